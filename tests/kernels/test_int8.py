"""LLM.int8 rows: the stored form is bitsandbytes' own, dequantize is exact, the fused product near the oracle."""

import os

import pytest
import torch

from kernels import reference_int8

pytest.importorskip("triton")
from kernels import dequant_int8, matmul_int8

interpreted = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="the kernels are compiled here")
SHAPES = [(5, 100), (70, 33)]


def weight(rows, cols):
    made = torch.randn(rows, cols, generator=torch.Generator().manual_seed(rows))
    made[1] = 0.0
    return made


def codes(rows, cols, device="cpu"):
    """Every code from -127 to 127, and rows of the largest."""
    q = torch.arange(rows * cols).remainder(255).sub(127).to(torch.int8).view(rows, cols)
    q[0] = 127
    return q.to(device), torch.rand(rows, generator=torch.Generator().manual_seed(1)).to(device)


def test_quantizing_equals_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes.functional")
    w = weight(48, 192).half()
    theirs, scb, _ = functional.int8_vectorwise_quant(w)
    ours = reference_int8.quantize(w.float())
    assert torch.equal(ours["qweight"], theirs) and torch.equal(ours["SCB"], scb)


def test_a_row_of_zeros_stays_zero():
    packed = reference_int8.quantize(weight(4, 8))
    assert not reference_int8.dequantize(packed["qweight"], packed["SCB"], torch.full((4, 8), torch.nan))[1].any()


def check(rows, cols, device, dtypes):
    q, scb = codes(rows, cols)
    w = (q.float() * scb.unsqueeze(1) / 127).to(device)  # on a card torch divides by a number with the product of its inverse
    q, scb = q.to(device), scb.to(device)
    for dtype in dtypes:
        for start in (0, rows // 2):
            guard = torch.full((rows - start + 1, cols), torch.nan, dtype=dtype, device=device)
            assert torch.equal(dequant_int8.dequantize(q, scb, guard[:-1], start), w[start:].to(dtype))
            assert guard[-1].isnan().all()
        for m in (1, 3, 17):
            x = torch.randn(m, cols, generator=torch.Generator().manual_seed(m)).to(device=device, dtype=dtype)
            oracle = x.double() @ w.double().t()
            # 16 bit: the rounding of y. fp32: that of a sum of `cols`, as a random walk.
            limit = {torch.float32: max(1e-6, 2**-24 * cols**0.5 / 3), torch.float16: 5e-4, torch.bfloat16: 4e-3}[dtype]
            assert (matmul_int8.matmul(x, q, scb) - oracle).norm() <= limit * oracle.norm()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_reference_equals_the_definition(shape):
    q, scb = codes(*shape)
    out = torch.full((shape[0] - 2, shape[1]), torch.nan)
    assert torch.equal(reference_int8.dequantize(q, scb, out, 2), (q.float() * scb.unsqueeze(1) / 127)[2:])


@interpreted
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernels_interpreted(shape):
    check(*shape, "cpu", (torch.float32, torch.float16))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [*SHAPES, (4096, 14336), (1536, 576)], ids=str)
def test_kernels_on_a_card(shape):
    check(*shape, "cuda", (torch.float32, torch.float16, torch.bfloat16))


def test_launchers_check_what_they_are_given():
    q, scb = codes(5, 100)
    with pytest.raises(ValueError, match=r"rows 3 to 8 of 5"):
        dequant_int8.dequantize(q, scb, torch.empty(5, 100), 3)
    with pytest.raises(ValueError, match=r"cannot fill \[5, 99\]"):
        dequant_int8.dequantize(q, scb, torch.empty(5, 99))
    with pytest.raises(ValueError, match=r"1 to 32 contiguous rows of 100; x is \[2, 101\]"):
        matmul_int8.matmul(torch.empty(2, 101), q, scb)
