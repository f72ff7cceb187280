"""Kernels over HQQ's groups: fractional zeros, groups that run on into the next row, groups down the rows."""

import os

import pytest
import torch

from kernels import reference_grouped
from kernels.reference_grouped import FLAT, MODULO, ROW
from tests.kernels.grouped_cases import make
from tests.kernels.test_gptq import check_dequantize, check_matmul

pytest.importorskip("triton")

interpreted = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="the kernels are compiled here")
CASES = [(ROW, 6, 64, 32), (FLAT, 6, 64, 128), (FLAT, 6, 36, 24), (FLAT, 4, 48, 96), (MODULO, 6, 40, 3), (MODULO, 8, 100, 4)]
BITS = (2, 3, 4, 8)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_reference_equals_the_definition(bits, case):
    mode, rows, cols, size = case
    made = make(bits, rows, cols, mode, size, "float")
    out = torch.full((rows - 1, cols), torch.nan)
    assert torch.equal(reference_grouped.dequantize(*made.operands, out, 1), made.weight[1:])


@interpreted
@pytest.mark.parametrize("bits", (3, 4))
@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernels_interpreted(bits, case):
    mode, rows, cols, size = case
    made = make(bits, rows, cols, mode, size, "float")
    check_dequantize(made, torch.float32)
    check_matmul(made, 1, torch.float32)
    check_matmul(made, 5, torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernels_on_a_card(bits, case):
    mode, rows, cols, size = case
    made = make(bits, rows, cols, mode, size, "float", device="cuda")
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        check_dequantize(made, dtype)
    for m in (1, 5, 32):
        check_matmul(made, m, torch.bfloat16)
