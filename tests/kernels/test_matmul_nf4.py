"""The product straight from NF4 codes against the fp32 oracle: blocks that cross rows, stacked weights, every number of rows."""

from __future__ import annotations

import os

import pytest
import torch

from kernels import reference_nf4

pytest.importorskip("triton")
from kernels import matmul_nf4
from lowvram_tuner.quant.registry import quant_format
from lowvram_tuner.quant.spec import QuantSpec

interpreted = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="the kernels are compiled here")
RAGGED = [(5, 64), (66, 128), (13, 130), (3, 2), (9, 1100)]  # in: whole blocks, and blocks that cross rows
REAL = [(4096, 4096), (1024, 4096), (4096, 14336), (14336, 4096), (11008, 4096), (896, 4864), (128, 896)]
LIMITS = {torch.float16: 5e-4, torch.bfloat16: 4e-3}


def limit(dtype, cols):
    """The relative RMS error of rounding y, doubled; in fp32 that of summing `cols` products one after the other, about sqrt(cols) 2^-25."""
    return LIMITS.get(dtype) or max(1e-6, cols**0.5 * 2**-25)


def check_error(y, x, w):
    """y's RMS error against fp64 is at most twice what rounding W and y to the dtype costs, or y alone, where that is more."""
    oracle = x.double() @ w.double().t()
    rounded = (x.double() @ w.to(x.dtype).double().t()).to(x.dtype)
    assert y.dtype == x.dtype and y.shape == oracle.shape
    assert (y - oracle).norm() <= max(2 * (rounded - oracle).norm(), limit(x.dtype, x.shape[1]) * oracle.norm())


def packed_weight(rows, cols, device="cpu", double=True, seed=0):
    """A weight of every code, whose blocks differ much in size, and its exact fp32 values."""
    generator = torch.Generator().manual_seed(rows + seed)
    w = torch.randn(rows, cols, generator=generator) * torch.logspace(-2, 1, rows)[:, None]
    packed = reference_nf4.quantize(w, double)
    exact = reference_nf4.dequantize(packed, torch.empty(rows, cols))
    return {k: v.to(device) for k, v in packed.items()}, exact.to(device)


def inputs(m, cols, dtype, device="cpu"):
    return torch.randn(m, cols, generator=torch.Generator().manual_seed(m)).to(device, dtype)


def check(rows, cols, device, dtypes, counts=(1, 3, 17)):
    for double in (True, False):
        packed, w = packed_weight(rows, cols, device, double)
        for dtype in dtypes:
            for m in counts:
                x = inputs(m, cols, dtype, device)
                y = matmul_nf4.matmul(x, packed, rows)
                check_error(y, x, w)
                assert torch.equal(y, matmul_nf4.matmul(x, packed, rows)), "a sum's order changed"


def check_stacked(sizes, cols, device, dtype, double=True, m=1):
    parts = [packed_weight(rows, cols, device, double, seed=i) for i, rows in enumerate(sizes)]
    x = inputs(m, cols, dtype, device)
    y = matmul_nf4.matmul_stacked(x, [packed for packed, _ in parts], list(sizes))
    check_error(y, x, torch.cat([w for _, w in parts]))
    one_by_one = torch.cat([matmul_nf4.matmul(x, packed, rows) for (packed, _), rows in zip(parts, sizes)], 1)
    torch.testing.assert_close(y, one_by_one, rtol=2e-3, atol=1e-3 * float(y.abs().max()))


@pytest.fixture(params=[1, 4], ids=["a row a program", "4 rows a program"])
def tile(request, monkeypatch):
    monkeypatch.setattr(matmul_nf4, "gemv_rows", lambda rows: request.param)


@interpreted
@pytest.mark.parametrize("shape", RAGGED, ids=str)
def test_interpreted(shape, tile):
    check(*shape, "cpu", (torch.float32, torch.float16))


@interpreted
@pytest.mark.parametrize("shape", [(192, 576), (16, 4096)], ids=str)
def test_real_widths_interpreted(shape, monkeypatch):
    monkeypatch.setattr(matmul_nf4, "gemv_rows", lambda rows: 4)
    check(*shape, "cpu", (torch.float16,), (1,))


@interpreted
@pytest.mark.parametrize("sizes", [(7,), (6, 3), (13, 5, 5)], ids=str)
def test_stacked_weights_are_one_product_interpreted(sizes, tile):
    check_stacked(sizes, 128, "cpu", torch.float16)
    check_stacked(sizes[:2], 100, "cpu", torch.float32)


@interpreted
def test_inputs_that_are_not_on_a_word_interpreted():
    packed, w = packed_weight(9, 64)
    x = torch.randn(65).half()[1:].view(1, 64)
    assert x.storage_offset() == 1
    oracle = x.double() @ w.double().t()
    assert (matmul_nf4.matmul(x, packed, 9) - oracle).norm() <= LIMITS[torch.float16] * oracle.norm()


@interpreted
def test_codes_that_are_not_on_a_word_interpreted():
    packed, w = packed_weight(9, 64)
    packed["weight"] = torch.cat([torch.zeros(1, dtype=torch.uint8), packed["weight"]])[1:]
    for m in (1, 2):
        x = inputs(m, 64, torch.float32)
        assert (matmul_nf4.matmul(x, packed, 9) - x @ w.t()).norm() <= 1e-6 * (x @ w.t()).norm()


@interpreted
def test_pairs_of_bf16_are_taken_apart_exactly():
    """bf16 arithmetic is wrong in the interpreter, but here each value is only widened: y's own rounding remains."""
    packed, w = packed_weight(40, 128)
    x = inputs(1, 128, torch.bfloat16)
    oracle = x.double() @ w.double().t()
    assert (matmul_nf4.matmul(x, packed, 40) - oracle).norm() <= 2 * LIMITS[torch.bfloat16] * oracle.norm()


def test_the_format_multiplies_an_odd_width_all_the_same():
    packed, w = packed_weight(4, 33)
    x = torch.randn(2, 33)
    torch.testing.assert_close(quant_format(QuantSpec()).matmul(x, packed, 4), x @ w.t(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("row_bytes, step", [(2048, 1024), (7168, 1024), (5504, 1024), (288, 512), (1792, 1024), (2560, 512)])
def test_steps_fit_a_row(row_bytes, step):
    assert matmul_nf4.gemv_bytes(row_bytes) == step


def test_the_launcher_checks_what_it_is_given():
    packed, _ = packed_weight(5, 64)
    with pytest.raises(ValueError, match=r"1 to 32 contiguous rows of even length; x is \[33, 64\]"):
        matmul_nf4.matmul(torch.empty(33, 64), packed, 5)
    with pytest.raises(ValueError, match=r"320 codes are not a weight of 5x66"):
        matmul_nf4.matmul(torch.empty(1, 66), packed, 5)
    single, _ = packed_weight(5, 64, double=False)
    with pytest.raises(ValueError, match=r"all with double quantization or all without"):
        matmul_nf4.matmul_stacked(torch.empty(1, 64), [packed, single], [5, 5])


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [*RAGGED, *REAL], ids=str)
def test_on_a_card(shape):
    check(*shape, "cuda", (torch.float32, torch.float16, torch.bfloat16), (1, 2, 16, 32))


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", [(33, 5, 5), (4096, 1024, 1024), (14336, 14336)], ids=str)
def test_stacked_on_a_card(sizes):
    for dtype in (torch.float16, torch.bfloat16):
        check_stacked(sizes, 4096, "cuda", dtype)
