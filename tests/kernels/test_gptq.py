"""Kernels over GPTQ's groups: dequantize is exact, the fused product is within fp32's own error of the oracle.

On the CPU the Triton kernels run in the interpreter (fp16 and fp32 only: its bf16 arithmetic is wrong), on a card for real.
"""

import os

import pytest
import torch

from kernels import reference_grouped
from kernels.reference_grouped import INDEX, ROW
from tests.kernels.grouped_cases import make

pytest.importorskip("triton")
from kernels import dequant_grouped, matmul_grouped

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="the kernels are compiled here")
BITS = (2, 3, 4, 8)
RAGGED = [(5, 100, 32), (37, 264, 128), (3, 576, 64), (9, 40, 40), (6, 72, 20)]
REAL = [(576, 1536), (1536, 576), (4096, 4096), (5120, 13824), (14336, 4096), (4096, 11008)]
GROUPS = [(ROW, "none"), (ROW, "int"), (INDEX, "int")]


def name(groups):
    return f"{('ordered', 'desc_act')[groups[0]]}-{groups[1]}"


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("groups", GROUPS, ids=name)
@pytest.mark.parametrize("shape", RAGGED, ids=str)
def test_reference_equals_the_definition(bits, groups, shape):
    rows, cols, size = shape
    case = make(bits, rows, cols, groups[0], size, groups[1])
    for start in (0, rows // 2):
        out = torch.full((rows - start, cols), torch.nan)
        assert torch.equal(reference_grouped.dequantize(*case.operands, out, start), case.weight[start:])


def check_dequantize(case, dtype):
    rows, cols = case.weight.shape
    for start, stop in ((0, rows), (rows // 3, rows - rows // 4)):
        guard = torch.full((stop - start + 1, cols), torch.nan, dtype=dtype, device=case.weight.device)
        out = dequant_grouped.dequantize(*case.operands, guard[:-1], start)
        assert torch.equal(out, case.weight[start:stop].to(dtype))
        assert guard[-1].isnan().all()  # nothing is written past the last row


@interpreted
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("groups", GROUPS, ids=name)
@pytest.mark.parametrize("shape", RAGGED[:3], ids=str)
def test_dequantize_interpreted(bits, groups, shape):
    case = make(bits, *shape[:2], groups[0], shape[2], groups[1])
    for dtype in (torch.float32, torch.float16):
        check_dequantize(case, dtype)


@interpreted
@pytest.mark.parametrize("shape", RAGGED[3:], ids=str)
def test_groups_that_end_inside_a_run(shape):
    check_dequantize(make(3, *shape[:2], ROW, shape[2], "int"), torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("groups", GROUPS, ids=name)
@pytest.mark.parametrize("shape", RAGGED, ids=str)
def test_dequantize_on_a_card(bits, groups, shape):
    case = make(bits, *shape[:2], groups[0], shape[2], groups[1], device="cuda")
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        check_dequantize(case, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", REAL, ids=str)
def test_real_shapes_on_a_card(bits, shape):
    case = make(bits, *shape, ROW, 64, "int", device="cuda")
    check_dequantize(case, torch.bfloat16)
    for m in (1, 2, 16, 32):
        check_matmul(case, m, torch.bfloat16)


def check_matmul(case, m, dtype):
    """RMS error against fp64 within twice what rounding W and y to `dtype` costs, and 1e-6 for the sums in fp32."""
    cols = case.weight.shape[1]
    x = torch.randn(m, cols, generator=torch.Generator().manual_seed(m)).to(device=case.weight.device, dtype=dtype)
    y = matmul_grouped.matmul(x, *case.operands)
    oracle = x.double() @ case.weight.double().t()
    assert y.dtype == dtype and y.shape == oracle.shape
    rounded = (x.double() @ case.weight.to(dtype).double().t()).to(dtype)
    assert (y - oracle).norm() <= 2 * (rounded - oracle).norm() + 1e-6 * oracle.norm()


@interpreted
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("groups", GROUPS, ids=name)
@pytest.mark.parametrize("m", [1, 17])
def test_matmul_interpreted(bits, groups, m):
    case = make(bits, 11, 136, groups[0], 32, groups[1])
    check_matmul(case, m, torch.float16 if bits == 4 else torch.float32)


@interpreted
def test_split_sum_is_the_whole_sum():
    case = make(4, 9, 4096, ROW, 128, "int")
    assert matmul_grouped.split(1, 512, matmul_grouped.DOT_RUNS, torch.device("cpu")) == (8, 64)
    check_matmul(case, 2, torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("groups", GROUPS, ids=name)
@pytest.mark.parametrize("m", [1, 2, 17, 32])
def test_matmul_on_a_card(bits, groups, m):
    case = make(bits, 37, 264, groups[0], 32, groups[1], device="cuda")
    for dtype in (torch.float16, torch.bfloat16):
        check_matmul(case, m, dtype)


def test_launchers_check_what_they_are_given():
    case = make(4, 5, 100, ROW, 32, "int")
    with pytest.raises(ValueError, match=r"rows 3 to 8 of 5"):
        dequant_grouped.dequantize(*case.operands, torch.empty(5, 100), 3)
    with pytest.raises(ValueError, match=r"not 4-bit codes of 200 columns"):
        dequant_grouped.dequantize(*case.operands, torch.empty(5, 200))
    with pytest.raises(ValueError, match=r"1 to 32 contiguous rows; x is \[33, 100\]"):
        matmul_grouped.matmul(torch.empty(33, 100), *case.operands)
    unsorted = make(4, 5, 100, INDEX, 32, "int").operands
    with pytest.raises(ValueError, match=r"g_idx must be int32 \[100\]"):
        dequant_grouped.dequantize(*unsorted[:3], unsorted[3].long(), *unsorted[4:], torch.empty(5, 100))
