"""LLM.int8's format: sizes, and products against the oracle."""

import pytest
import torch

from lowvram_tuner.quant.int8 import Int8
from lowvram_tuner.quant.spec import QuantError, QuantSpec, Scratch

FORMAT = Int8(QuantSpec(method="int8", bits=8))


def test_layout_and_size():
    packed = FORMAT.quantize(torch.randn(40, 72))
    assert {k: (tuple(t.shape), str(t.dtype)[6:]) for k, t in packed.items()} == {
        k: (t.shape, t.dtype) for k, t in FORMAT.layout(40, 72).items()
    }
    assert sum(t.nbytes for t in packed.values()) == FORMAT.nbytes(40, 72) == 40 * 72 + 160


def test_error_is_at_most_half_a_step_of_the_row():
    w = torch.randn(40, 72)
    packed = FORMAT.quantize(w)
    error = (FORMAT.dequantize(packed, torch.empty_like(w)) - w).abs()
    assert (error <= packed["SCB"].unsqueeze(1) / 254 * 1.0001).all()


def test_products_match_the_oracle():
    packed = FORMAT.quantize(torch.randn(40, 72))
    w = FORMAT.dequantize(packed, torch.empty(40, 72)).double()
    x, gy, scratch = torch.randn(7, 72), torch.randn(7, 40), Scratch(9 * 72 * 4, "cpu")
    y = FORMAT.forward(x, packed, scratch, torch.full((7, 40), torch.nan))
    gx = FORMAT.grad_input(gy, packed, scratch, torch.ones(7, 72))
    torch.testing.assert_close(y.double(), x.double() @ w.t(), rtol=0, atol=2e-5)
    torch.testing.assert_close(gx.double(), 1 + gy.double() @ w, rtol=0, atol=2e-5)


def test_weights_that_are_not_finite_are_refused():
    with pytest.raises(QuantError, match=r"a weight of 2x3 holds 6 values that are inf or nan"):
        FORMAT.quantize(torch.full((2, 3), torch.inf))
