"""GPTQ's format and its rounding: sizes as promised, products as the oracle's, errors that calibration really lowers."""

import pytest
import torch

from lowvram_tuner.quant import calibrate, optq
from lowvram_tuner.quant.gptq import GPTQ
from lowvram_tuner.quant.registry import quant_format
from lowvram_tuner.quant.spec import QuantError, QuantSpec, Scratch
from tests.engine_cases import Allocations

BITS = (2, 3, 4, 8)


def spec(bits=4, group_size=32, **options):
    return QuantSpec(method="gptq", bits=bits, group_size=group_size, **options)


def weight(rows=48, cols=96, seed=0):
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed)).mul_(0.05)


def hessian(cols=96, seed=1):
    """Inputs that are correlated and of very different size, as a model's are."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(cols, cols, generator=g) * torch.logspace(0, -1.5, cols)
    x = torch.randn(4 * cols, cols, generator=g) @ mix
    return x.t() @ x / len(x)


def loss(w, q, h):
    return float((((w - q) @ h) * (w - q)).sum())


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("options", [{}, {"sym": False}, {"desc_act": True}, {"sym": False, "desc_act": True}], ids=str)
@pytest.mark.parametrize("shape", [(48, 96, 32), (7, 100, 64), (5, 40, -1)], ids=str)
def test_packed_tensors_are_what_the_layout_says(bits, options, shape):
    fmt = GPTQ(spec(bits, shape[2], **options))
    layout = fmt.layout(*shape[:2])
    for packed in (fmt.quantize(weight(*shape[:2])), fmt.round(weight(*shape[:2]), hessian(shape[1]))[0]):
        assert {k: (tuple(t.shape), str(t.dtype)) for k, t in packed.items()} == {
            k: (t.shape, f"torch.{t.dtype}") for k, t in layout.items()
        }
        assert sum(t.nbytes for t in packed.values()) == fmt.nbytes(*shape[:2])


def test_four_bits_in_groups_of_128_take_four_and_an_eighth():
    assert GPTQ(spec(4, 128)).nbytes(4096, 14336) * 8 / (4096 * 14336) == 4 + 16 / 128


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("options", [{}, {"sym": False, "desc_act": True}], ids=str)
@pytest.mark.parametrize("scratch_rows", [1, 13, 48])
def test_products_match_the_oracle(bits, options, scratch_rows):
    """fp32, whatever the size of the scratch: only the order of sums differs from the fp64 oracle (2e-7 measured)."""
    fmt = GPTQ(spec(bits, **options))
    packed, q = fmt.round(weight(), hessian())
    assert torch.equal(fmt.dequantize(packed, torch.empty(48, 96)), q)
    scratch = Scratch(scratch_rows * 96 * 4, "cpu")
    x, gy = torch.randn(11, 96), torch.randn(11, 48)
    y = fmt.forward(x, packed, scratch, torch.full((11, 48), torch.nan))
    gx = fmt.grad_input(gy, packed, scratch, torch.ones(11, 96))
    torch.testing.assert_close(y.double(), x.double() @ q.double().t(), rtol=0, atol=2e-6)
    torch.testing.assert_close(gx.double(), 1 + gy.double() @ q.double(), rtol=0, atol=2e-6)


@pytest.mark.parametrize("bits", BITS)
def test_every_value_is_within_half_a_step(bits):
    w = weight()
    fmt = GPTQ(spec(bits, sym=False))
    packed = fmt.quantize(w)
    step = packed["scales"].float().repeat_interleave(32, 1)
    error = (fmt.dequantize(packed, torch.empty_like(w)) - w).abs()
    zero, top = packed["qzeros"].float().repeat_interleave(32, 1), 2**bits - 1
    reachable = (w >= -zero * step) & (w <= (top - zero) * step)
    assert reachable.float().mean() > 0.8
    assert (error[reachable] <= step[reachable] * 0.5001).all()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("options", [{}, {"sym": False}, {"desc_act": True}], ids=str)
def test_calibrated_rounding_beats_the_nearest(bits, options):
    w, h = weight(), hessian()
    fmt = GPTQ(spec(bits, **options))
    nearest = fmt.dequantize(fmt.quantize(w), torch.empty_like(w))
    _, rounded = fmt.round(w, h)
    assert loss(w, rounded, h) < 0.6 * loss(w, nearest, h)


def test_each_part_of_the_solver_helps(monkeypatch):
    w, h = weight(), hessian()
    fmt = GPTQ(spec(3))
    full = loss(w, fmt.round(w, h)[1], h)
    monkeypatch.setattr(optq, "REVISITS", 0)
    without_revisits = loss(w, fmt.round(w, h)[1], h)
    monkeypatch.setattr(optq, "PASSES", 1)
    one_pass = loss(w, fmt.round(w, h)[1], h)
    assert full < without_revisits < one_pass


def test_uncorrelated_equal_inputs_leave_nothing_to_gain():
    """With H = 1 the columns do not influence each other: every value goes to its nearest code."""
    w = weight()
    packed, rounded = GPTQ(spec(4)).round(w, torch.eye(96))
    scales = packed["scales"].float().repeat_interleave(32, 1)
    nearest = (torch.round(w / scales) + 8).clamp(0, 15).sub(8).mul(scales)
    assert torch.equal(rounded, nearest)


def test_a_revisit_never_raises_the_error():
    w, h = weight(), hessian()
    order, upper, diagonal = optq._factor(h)
    damped = optq._with_diagonal(h.clone(), diagonal)
    scales, zeros = optq.search(w, torch.ones(96), spec(2), 96)
    codes = torch.randint(0, 4, w.shape).float()
    s, z = scales.expand_as(w), zeros.expand_as(w)
    revisited = optq._revisit(w, damped, codes, scales, zeros, torch.zeros(96, dtype=torch.int64), 2)
    assert loss(w, (revisited - z) * s, damped) < 0.5 * loss(w, (codes - z) * s, damped)
    assert torch.equal(order.sort().values, torch.arange(96)) and (upper.tril(-1) == 0).all()


@pytest.mark.parametrize("method, most", [("gptq", 3), ("quip", 5)])
def test_few_matrices_of_the_hessians_size_are_alive(method, most):
    """Besides the Hessian itself: a 7B's down, where each takes 0.5 GB, is so rounded in 3 GB. quip's rotations take two without a card."""
    fmt, h = quant_format(QuantSpec(method, 2)), hessian(512)
    with Allocations(h.nbytes) as seen:
        calibrate._round(fmt, weight(64, 512), h, "down")
    assert seen.most <= most


def test_columns_without_input_do_no_harm():
    w, h = weight(), hessian()
    h[:, 5] = h[5] = 0
    w[:, 5] = 0.0
    _, without = GPTQ(spec(4)).round(w, h)
    w[:, 5] = 100.0
    assert torch.equal(GPTQ(spec(4)).round(w, h)[1], without)
    assert loss(w, without, h) < 0.01 * loss(w, torch.zeros_like(w), h)


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_inputs_that_are_not_finite_are_named(value):
    h = hessian()
    h[3, 3] = value
    with pytest.raises(QuantError, match="calibration inputs hold inf or nan"):
        GPTQ(spec()).round(weight(), h)
    w = weight()
    w[2, 2] = value
    with pytest.raises(QuantError, match=r"a weight of 48x96 holds 1 values that are inf or nan"):
        GPTQ(spec()).quantize(w)


def test_a_hessian_that_is_not_positive_definite_is_refused():
    with pytest.raises(QuantError, match="not positive definite"):
        GPTQ(spec()).round(weight(), hessian() - 0.5 * torch.eye(96) * hessian().diagonal().mean())


def test_scales_that_fp16_cannot_hold_are_refused():
    with pytest.raises(QuantError, match="float16 cannot hold"):
        GPTQ(spec(2)).quantize(weight() * 1e8)


@pytest.mark.parametrize(("options", "message"), [({"bits": 5}, "bits=5 is not possible with gptq"), ({"group_size": 0}, "group_size=0")])
def test_impossible_specs_are_refused(options, message):
    with pytest.raises(QuantError, match=message):
        GPTQ(spec(**options))
