"""HQQ's format and solver: either axis, any grouping, a smaller lp error than min-max rounding."""

import pytest
import torch

from lowvram_tuner.quant import half_quadratic
from lowvram_tuner.quant.hqq import HQQ
from lowvram_tuner.quant.spec import QuantError, QuantSpec, Scratch

BITS = (2, 3, 4, 8)


def spec(bits=4, group_size=32, axis=1):
    return QuantSpec(method="hqq", bits=bits, group_size=group_size, axis=axis)


def weight(rows=48, cols=96):
    """Mostly small values and a few outliers: what the lp norm is for."""
    g = torch.Generator().manual_seed(0)
    return torch.randn(rows, cols, generator=g).mul_(0.02) + (torch.rand(rows, cols, generator=g) < 0.01) * 0.3


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group", [(32, 1), (128, 1), (-1, 1), (32, 0), (-1, 0), (24, 0)], ids=str)
def test_layout_is_kept_and_values_follow_the_definition(bits, group):
    w, fmt = weight(), HQQ(spec(bits, *group))
    packed = fmt.quantize(w)
    assert {k: (tuple(t.shape), str(t.dtype)[6:]) for k, t in packed.items()} == {
        k: (t.shape, t.dtype) for k, t in fmt.layout(48, 96).items()
    }
    assert sum(t.nbytes for t in packed.values()) == fmt.nbytes(48, 96)
    size = {(-1, 1): 96, (-1, 0): 48}.get(group, group[0])
    shape, column = ((-1, size), (-1, 1)) if group[1] == 1 else ((size, -1), (1, -1))
    values = fmt.dequantize(packed, torch.empty(48, 96))
    scale, zero = packed["scales"].float().view(column), packed["qzeros"].float().view(column)
    codes = torch.round(values.reshape(shape) / scale + zero)
    assert codes.min() >= 0 and codes.max() <= 2**bits - 1
    assert torch.equal(((codes - zero) * scale).reshape(48, 96), values)


@pytest.mark.parametrize("bits", BITS[:3])
def test_the_solver_lowers_the_lp_error_of_every_group_or_keeps_it(bits, monkeypatch):
    def error():
        packed = HQQ(spec(bits)).quantize(weight())
        values = HQQ(spec(bits)).dequantize(packed, torch.empty(48, 96))
        return (values - weight()).abs().pow(half_quadratic.NORM).view(-1, 32).sum(1)

    solved = error()
    monkeypatch.setattr(half_quadratic, "ITERATIONS", 1)  # the min-max zero
    plain = error()
    assert (solved <= plain * 1.001).all()
    assert solved.sum() < 0.97 * plain.sum()


def test_chunks_do_not_change_the_result(monkeypatch):
    whole = HQQ(spec(3)).quantize(weight())
    monkeypatch.setattr(half_quadratic, "CHUNK", 700)
    for name, tensor in HQQ(spec(3)).quantize(weight()).items():
        assert torch.equal(tensor, whole[name])


def test_equal_values_are_kept_exactly():
    w = torch.full((32, 32), 0.25)
    assert torch.equal(HQQ(spec()).dequantize(HQQ(spec()).quantize(w), torch.empty_like(w)), w)


def test_products_match_the_oracle():
    for group in ((32, 1), (128, 1), (24, 0)):
        fmt = HQQ(spec(3, *group))
        packed = fmt.quantize(weight())
        w = fmt.dequantize(packed, torch.empty(48, 96)).double()
        x, gy, scratch = torch.randn(7, 96), torch.randn(7, 48), Scratch(10 * 96 * 4, "cpu")
        y = fmt.forward(x, packed, scratch, torch.full((7, 48), torch.nan))
        gx = fmt.grad_input(gy, packed, scratch, torch.ones(7, 96))
        torch.testing.assert_close(y.double(), x.double() @ w.t(), rtol=0, atol=2e-6)
        torch.testing.assert_close(gx.double(), 1 + gy.double() @ w, rtol=0, atol=2e-6)


def test_a_group_that_does_not_divide_the_weight_is_refused():
    with pytest.raises(QuantError, match="group_size=64 does not divide 5x10 values"):
        HQQ(spec(4, 64)).layout(5, 10)
