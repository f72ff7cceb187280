"""The frozen layer, whatever its quantizer: every gradient against dense fp32, one unpacked weight at a time, new formats."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lowvram_tuner.quant import registry
from lowvram_tuner.quant.linear import QuantLinear, quant_linear
from lowvram_tuner.quant.registry import quant_format, register, resolve
from lowvram_tuner.quant.spec import QuantError, QuantFormat, Scratch, TensorSpec
from tests.engine_cases import Allocations

IN, OUT, R = 128, 96, 4


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def layer(bits=4, method="auto", bias=True, scratch=1 << 20, out=OUT, inside=IN):
    fmt = quant_format(resolve(bits, method))
    if method == "none" or bits == 16:
        fmt.dtype = "float32"
    made = QuantLinear(inside, out, fmt, randn(out, seed=9) if bias else None)
    made.bind(fmt.quantize(randn(out, inside) * 0.1), Scratch(scratch, "cpu"))
    return made


def relative(got, want):
    return float((got - want).norm() / want.norm())


@pytest.mark.parametrize("dropout", [False, True], ids=["same input", "dropped input"])
@pytest.mark.parametrize("scratch", [1 << 20, 64 * IN * 4], ids=["one tile", "two tiles"])
@pytest.mark.parametrize("bits", [4, 8, 16])
def test_output_and_every_gradient_equal_the_dense_oracle(bits, scratch, dropout):
    base = layer(bits, scratch=scratch)
    w = base.dense().double()
    leaves = {
        "x": randn(2, 5, IN), "a": randn(R, IN, seed=1) * 0.1, "b": randn(OUT, R, seed=2) * 0.1,
    } | ({"x_lora": randn(2, 5, IN, seed=3)} if dropout else {})  # fmt: skip
    ours = {k: v.clone().requires_grad_() for k, v in leaves.items()}
    want = {k: v.double().requires_grad_() for k, v in leaves.items()}
    gy = randn(2, 5, OUT, seed=4)
    y = quant_linear(ours["x"], base, ours["a"], ours["b"], 0.5, ours.get("x_lora"))
    oracle = want["x"] @ w.t() + base.bias.double() + 0.5 * (want.get("x_lora", want["x"]) @ want["a"].t()) @ want["b"].t()
    y.backward(gy)
    oracle.backward(gy.double())
    assert y.shape == (2, 5, OUT) and relative(y.double(), oracle) < 2e-6
    for name in leaves:
        assert relative(ours[name].grad.double(), want[name].grad) < 2e-6, name
    assert base.bias.grad is None  # frozen


def test_without_an_adapter_only_x_gets_a_gradient():
    base = layer(4, bias=False)
    x = randn(3, IN).requires_grad_()
    y = base(x)
    assert relative(y, x @ base.dense().t()) < 2e-6
    y.sum().backward()
    assert relative(x.grad, base.dense().sum(0).expand(3, IN)) < 2e-6
    assert not list(base.parameters()) and not base.state_dict()  # packed bytes belong to the slab


def test_gradients_that_nobody_needs_are_not_computed():
    class Counting(type(layer(4).format)):
        calls = 0

        def grad_input(self, *args):
            Counting.calls += 1
            return super().grad_input(*args)

    base = layer(4)
    base.format.__class__ = Counting
    a, b = randn(R, IN).requires_grad_(), randn(OUT, R)
    quant_linear(randn(3, IN), base, a, b).sum().backward()
    assert a.grad is not None and b.grad is None and Counting.calls == 0


def test_one_unpacked_weight_at_a_time():
    """A stack's forward and backward unpack into the one shared scratch: no operator returns another weight-sized tensor."""

    class Toy(QuantFormat):
        def layout(self, out_features, in_features):
            return {"codes": TensorSpec((out_features, in_features), "int8")}

        def quantize(self, weight):
            return {"codes": (weight * 64).round().to(torch.int8)}

        def dequantize(self, packed, out, row_start=0):
            written.append(out.data_ptr())
            out.copy_(packed["codes"][row_start : row_start + out.shape[0]])
            return out.mul_(1 / 64)

    written: list[int] = []
    size, scratch = 256, Scratch(256 * 256 * 4, "cpu")
    fmt = Toy(resolve(4))
    stack = [QuantLinear(size, size, fmt) for _ in range(6)]
    for n, linear in enumerate(stack):
        linear.bind(fmt.quantize(randn(size, size, seed=n) * 0.1), scratch)
    x = randn(2, size).requires_grad_()
    with Allocations(size * size * 4, {scratch.buffer.data_ptr()}) as seen:
        y = x
        for linear in stack:
            y = torch.tanh(linear(y))
        y.sum().backward()
    assert len(written) == 12 and set(written) == {scratch.buffer.data_ptr()}
    assert seen.large == 0
    with Allocations(size * size * 4) as seen:  # the counter does see a weight-sized tensor
        stack[0].dense()
    assert seen.large > 0


# a quantizer from outside


class Ternary(QuantFormat):
    """Each row is -1, 0 or 1 times its mean magnitude: all that a new format has to say."""

    def layout(self, out_features, in_features):
        return {"signs": TensorSpec((out_features, in_features), "int8"), "scale": TensorSpec((out_features,), "float32")}

    def quantize(self, weight):
        scale = weight.float().abs().mean(1)
        return {"signs": (weight / scale[:, None]).round().clamp(-1, 1).to(torch.int8), "scale": scale}

    def dequantize(self, packed, out, row_start=0):
        rows = slice(row_start, row_start + out.shape[0])
        return out.copy_(packed["signs"][rows]).mul_(packed["scale"][rows, None].to(out.dtype))


@pytest.fixture
def ternary(monkeypatch):
    for name in ("_FORMATS", "_BITS", "_AUTO"):
        monkeypatch.setattr(registry, name, dict(getattr(registry, name)))
    register("ternary", Ternary, (3,))


def test_what_is_only_read_is_not_offered():
    """QuIP# at 3 bits comes in checkpoints of others."""
    assert registry.methods(3) == ["gptq", "hqq"] and resolve(3, "quip").method == "quip"
    with pytest.raises(QuantError, match=r"for 3 bits use gptq or hqq\.$"):
        resolve(3, "nf4")


def test_a_format_registered_from_outside_trains_a_model(ternary):
    from lowvram_tuner.config import TrainConfig
    from lowvram_tuner.lora.adapter import attach
    from lowvram_tuner.models.load import random_model
    from lowvram_tuner.train.optimizer import Optimizer
    from lowvram_tuner.train.step import FusedStep
    from tests.engine_cases import batch_of, flat, make_plan, model_values, reference, relative

    assert "ternary" in registry.methods(3)
    plan, device = make_plan(), torch.device("cpu")
    loaded = random_model(model_values("llama"), resolve(3, "ternary"), plan, device, torch.float32)
    adapter = attach(loaded.model, TrainConfig(lora_r=4), device, torch.float32)
    step, data, optimizer = FusedStep(loaded, adapter, plan), flat(), Optimizer(adapter, TrainConfig())
    batch, losses = batch_of(data), []
    for _ in range(40):
        losses.append(float(step.accumulate(batch, torch.tensor(1 / batch.counted))))
        optimizer.step(2e-2)
    assert losses[-1] < 0.94 * losses[0], losses  # the frozen head, whose logits are small, allows about 0.8
    step.accumulate(batch, torch.tensor(1.0))
    ours = adapter.gradients.clone()
    assert relative(ours, reference(adapter, data)[1]) < 5e-6


def test_unknown_formats_are_refused_in_a_sentence(ternary):
    with pytest.raises(QuantError, match=r"bits=5.*use 2, 3, 4, 8, 16 bits\."):
        resolve(5)
    with pytest.raises(QuantError, match=r"bits=4 with method 'ternary'.*nf4"):
        resolve(4, "ternary")
    with pytest.raises(QuantError, match="'nonsense' is unknown"):
        quant_format(registry.QuantSpec("nonsense", 4))
    with pytest.raises(QuantError, match="odd number of values"):
        quant_format(resolve(4)).layout(3, 33)


@pytest.mark.parametrize("bits, method", [(4, "nf4"), (8, "int8"), (4, "hqq"), (3, "hqq"), (4, "gptq"), (16, "none")])
def test_layout_is_what_quantizing_makes(bits, method):
    """The estimator counts the layout's bytes without torch; they must be the real ones."""
    fmt = quant_format(resolve(bits, method, group_size=64))
    if method == "none":
        fmt.dtype = "float32"
    packed, layout = fmt.quantize(randn(OUT, IN)), fmt.layout(OUT, IN)
    assert {k: (tuple(v.shape), str(v.dtype)) for k, v in packed.items()} == {
        k: (v.shape, f"torch.{v.dtype}") for k, v in layout.items()
    }
    assert sum(v.numel() * v.itemsize for v in packed.values()) == fmt.nbytes(OUT, IN)


def test_scratch_tiles():
    scratch = Scratch(300 * 64 * 4, "cpu")
    assert scratch.tiles(300, 64, torch.float32) == [(0, 300)]
    assert scratch.tiles(700, 64, torch.float32, 64) == [(0, 256), (256, 512), (512, 700)]
    assert scratch.tile(10, 64, torch.float32).data_ptr() == scratch.buffer.data_ptr()
    with pytest.raises(QuantError, match="cannot hold 64 rows"):
        scratch.tiles(700, 1024, torch.float32, 64)


def test_repr_names_the_format():
    assert "nf4 4-bit" in repr(nn.Sequential(layer(4)))


@pytest.mark.parametrize("bits, method", [(4, "nf4"), (8, "int8"), (4, "hqq"), (4, "gptq"), (16, "none")])
def test_a_weight_is_packed_into_tensors_that_are_there(bits, method, monkeypatch):
    from kernels import reference_nf4
    from lowvram_tuner.quant import int8

    monkeypatch.setattr(reference_nf4, "CHUNK", 1024)
    monkeypatch.setattr(int8, "PIECE", 1000)
    fmt = quant_format(resolve(bits, method, group_size=32))
    if method == "none":
        fmt.dtype = "float32"
    weight = torch.randn(44, 96, generator=torch.Generator().manual_seed(0))
    room = {name: torch.zeros(t.shape, dtype=getattr(torch, t.dtype)) for name, t in fmt.layout(44, 96).items()}
    fmt.quantize_into(weight, room)
    assert all(torch.equal(room[name], tensor.view(room[name].shape)) for name, tensor in fmt.quantize(weight).items())
