"""Rounding: the nearest code exactly, LDLQ against plain rounding, scales, and weights that break lesser code."""

from __future__ import annotations

import pytest
import torch

from kernels import e8p
from kernels.nearest_e8p import nearest, nearest_of_each_shift, points
from lowvram_tuner.quant import quip_round
from lowvram_tuner.quant.registry import quant_format
from lowvram_tuner.quant.spec import QuantError, QuantSpec


def weight_and_hessian(rows: int, columns: int, seed: int = 0):
    """Inputs of a few strong directions and outlier columns, as real layers have."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(2048, 24, generator=g) @ torch.randn(24, columns, generator=g) + torch.randn(2048, columns, generator=g)
    x[:, ::37] *= 8
    return torch.randn(rows, columns, generator=g) * 0.05, x.t() @ x / len(x)


def loss(weight, dense, hessian) -> float:
    difference = weight - dense
    return float(((difference @ hessian) * difference).sum() / ((weight @ hessian) * weight).sum())


@pytest.mark.parametrize("spread", [0.2, 0.7, 1.03, 1.6, 4.0])
def test_nearest_is_nearest_among_all_codes(spread):
    x = torch.randn(400, 8, generator=torch.Generator().manual_seed(0)) * spread
    codes = nearest(x)
    best = torch.cdist(x.double(), e8p.codebook().double()).min(1).values
    assert codes.dtype == torch.int16
    assert torch.allclose((x - points(codes)).double().norm(dim=1), best, atol=1e-6, rtol=0)


def test_nearest_finds_every_point_of_the_codebook():
    codes = torch.arange(1 << 16).to(torch.int16)
    assert torch.equal(nearest(points(codes)), codes)


def test_nearest_of_each_shift():
    x = torch.randn(300, 8, generator=torch.Generator().manual_seed(1)) * 1.1
    codes, book = nearest_of_each_shift(x), e8p.codebook().double()
    odd = ((torch.arange(1 << 16)[:, None] >> 8 + torch.arange(8)) & 1).sum(1) % 2 == 1
    for column, half in ((0, ~odd), (1, odd)):
        best = torch.cdist(x.double(), book[half]).min(1).values
        assert bool(half[codes[:, column].int() & 0xFFFF].all())
        assert torch.allclose((x - points(codes[:, column])).double().norm(dim=1), best, atol=1e-6, rtol=0)


def test_more_beams_find_better_codes(monkeypatch):
    weight, hessian = weight_and_hessian(64, 256)
    fmt, losses = quant_format(QuantSpec("quip", 2)), []
    for beams in (1, 4, 16):
        monkeypatch.setattr(quip_round, "BEAMS", beams)
        losses.append(loss(weight, fmt.round(weight, hessian)[1], hessian))
    assert losses[1] < 0.97 * losses[0]
    assert losses[2] < 0.99 * losses[1]


@pytest.mark.parametrize(("bits", "ratio"), [(2, 0.5), (4, 0.5)])
def test_feedback_beats_plain_rounding(bits, ratio):
    weight, hessian = weight_and_hessian(96, 256)
    fmt = quant_format(QuantSpec("quip", bits))
    packed, dense = fmt.round(weight, hessian)
    plain = fmt.dequantize(fmt.quantize(weight), torch.empty_like(weight))
    assert loss(weight, dense, hessian) < ratio * loss(weight, plain, hessian)
    assert torch.equal(dense, fmt.dequantize(packed, torch.empty_like(weight)))


@pytest.mark.parametrize(("bits", "most"), [(2, 0.095), (4, 0.0105)])
def test_plain_rounding_of_a_gaussian_weight(bits, most):
    """E8P's mean squared error on a Gaussian is 0.0915 of the variance (2 bits; 0.0098 with the second layer)."""
    weight = torch.randn(256, 512, generator=torch.Generator().manual_seed(0))
    fmt = quant_format(QuantSpec("quip", bits))
    dense = fmt.dequantize(fmt.quantize(weight), torch.empty_like(weight))
    assert 0.8 * most < float((weight - dense).square().sum() / weight.square().sum()) < most


def test_an_outlier_does_not_spoil_the_rest():
    weight = torch.randn(128, 256, generator=torch.Generator().manual_seed(0))
    weight[7, 9] = 60.0
    fmt = quant_format(QuantSpec("quip", 2))
    dense = fmt.dequantize(fmt.quantize(weight), torch.empty_like(weight))
    rest = torch.ones_like(weight, dtype=torch.bool)
    rest[7, 9] = False
    assert float((weight - dense)[rest].square().mean()) < 0.16


def test_refitted_scales_lower_the_loss(monkeypatch):
    weight, hessian = weight_and_hessian(96, 256)
    fmt = quant_format(QuantSpec("quip", 2))
    fitted = loss(weight, fmt.round(weight, hessian)[1], hessian)
    monkeypatch.setattr(quip_round, "_row_scales", lambda dense, *_: torch.ones(dense.shape[0]))
    monkeypatch.setattr(quip_round, "_column_scales", lambda dense, *_: torch.ones(dense.shape[1]))
    assert fitted < 0.99 * loss(weight, fmt.round(weight, hessian)[1], hessian)


def test_chunks_of_rows_change_nothing(monkeypatch):
    weight, hessian = weight_and_hessian(96, 128)
    whole = quip_round.solve(weight, hessian, 3.45)
    monkeypatch.setattr(quip_round, "CHUNK_BYTES", 8 * 128 * 17)
    parts = quip_round.solve(weight, hessian, 3.45)
    for name, tensor in whole.items():
        assert torch.equal(tensor, parts[name]), name


def test_scales_are_fp16_numbers_times_a_power_of_two():
    weight, hessian = weight_and_hessian(64, 128)
    packed = quip_round.solve(weight * 1e-3, hessian, None)
    scaled = packed["SU"] / quip_round.half_scale(packed["SU"])
    assert torch.equal(scaled, scaled.half().float())
    assert torch.equal(packed["SV"], packed["SV"].half().float())


def test_singular_hessian_and_dead_inputs():
    weight, hessian = weight_and_hessian(32, 128)
    one = torch.outer(hessian[0], hessian[0])
    one[:, 5] = one[5] = 0
    dense = quant_format(QuantSpec("quip", 2)).round(weight, one)[1]
    assert bool(dense.isfinite().all())
    assert loss(weight, dense, one) < 1e-3  # one direction is fitted almost exactly


def test_zero_weight_and_zero_hessian_stay_finite():
    fmt = quant_format(QuantSpec("quip", 2))
    weight, hessian = weight_and_hessian(32, 64)
    assert not fmt.round(torch.zeros(32, 64), hessian)[1].any()
    assert bool(fmt.round(weight, torch.zeros(64, 64))[1].isfinite().all())


def test_values_that_are_not_finite_are_refused():
    fmt = quant_format(QuantSpec("quip", 2))
    weight, hessian = weight_and_hessian(32, 64)
    broken = weight.clone()
    broken[3, 3] = float("nan")
    with pytest.raises(QuantError, match="32x64 holds inf or nan"):
        fmt.round(broken, hessian)
    hessian[0, 0] = float("inf")
    with pytest.raises(QuantError, match="not finite"):
        fmt.round(weight, hessian)
