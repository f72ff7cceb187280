"""The adapter's optimizer: torch's AdamW exactly, masters bit for bit, 8-bit moments on the same curve, bad steps skipped."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace

import pytest
import torch

from kernels import adamw
from lowvram_tuner.config import TrainConfig
from lowvram_tuner.train.optimizer import Optimizer, learning_rate


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + shape[0]))


def flat_adapter(values: torch.Tensor) -> SimpleNamespace:
    return SimpleNamespace(parameters=values.clone(), gradients=torch.zeros_like(values))


def config(**values) -> TrainConfig:
    return TrainConfig(**values)


@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_fp32_equals_torchs_adamw(clip):
    start = randn(700)
    ours, leaf = flat_adapter(start), torch.nn.Parameter(start.clone())
    optimizer = Optimizer(ours, config(weight_decay=0.1, max_grad_norm=clip))
    oracle = torch.optim.AdamW([leaf], lr=1e-2, weight_decay=0.1)
    for step in range(6):
        leaf.grad = randn(700, seed=step + 1) * 0.1 * (step + 1)
        ours.gradients.copy_(leaf.grad)
        norm = leaf.grad.norm()
        if clip:
            torch.nn.utils.clip_grad_norm_([leaf], clip)
        assert float(optimizer.step(1e-2)) == pytest.approx(float(norm), rel=1e-5)
        oracle.step()
        assert not ours.gradients.any()
    torch.testing.assert_close(ours.parameters, leaf.detach(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("scale, clipped", [(1e-3, False), (1e3, True)])
def test_clipping_shortens_only_long_gradients(scale, clipped):
    """After one step m = (1 - b1) g, so that the gradient the moments saw can be read off them."""
    ours = flat_adapter(torch.zeros(300))
    g = randn(300) * scale
    ours.gradients.copy_(g)
    optimizer = Optimizer(ours, config(max_grad_norm=1.0))
    optimizer.step(1e-3)
    seen = optimizer.state["m"] / 0.1
    torch.testing.assert_close(seen, g / g.norm() if clipped else g, rtol=2e-5, atol=0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_gradient_that_is_not_finite_is_skipped(dtype, bad):
    ours = flat_adapter(randn(300).to(dtype))
    optimizer = Optimizer(ours, config())
    before = ours.parameters.clone(), {k: v.clone() for k, v in optimizer.state.items()}, optimizer.loss_scale
    ours.gradients.fill_(0.1)[7] = bad
    assert not math.isfinite(float(optimizer.step(1e-2)))
    assert torch.equal(ours.parameters, before[0])
    assert all(torch.equal(optimizer.state[k], v) for k, v in before[1].items())
    assert not ours.gradients.any()  # the bad gradient does not linger
    if dtype == torch.float16:
        assert optimizer.loss_scale == before[2] / 2 and optimizer.steps == 0
    ours.gradients.fill_(0.1)
    optimizer.step(1e-2)
    assert torch.isfinite(ours.parameters).all() and not torch.equal(ours.parameters, before[0])


def test_split_and_join_are_exact():
    values = torch.cat([randn(4000) * torch.logspace(-30, 30, 4000), torch.tensor([0.0, -0.0, 1.0, 3.3895e38, 1.00390625])])
    high, low = adamw.split(values)
    assert high.dtype == torch.bfloat16 and low.dtype == torch.int16
    assert torch.equal(adamw.join(high, low).view(torch.int32), values.view(torch.int32))
    differs = high != values.to(torch.bfloat16)  # only where two bf16 are equally near
    assert differs.nonzero().flatten().tolist() == [len(values) - 1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_parameters_do_not_lose_small_steps(dtype):
    """1 + 1e-4 rounds to 1 in bf16: without an exact master nothing would ever move."""
    ours, exact = flat_adapter(torch.ones(300, dtype=dtype)), flat_adapter(torch.ones(300))
    one, two = (Optimizer(a, config(max_grad_norm=0.0)) for a in (ours, exact))
    for _ in range(100):
        ours.gradients.fill_(one.loss_scale * 0.25)
        exact.gradients.fill_(0.25)
        one.step(1e-4)
        two.step(1e-4)
    state = one.state
    master = adamw.join(ours.parameters, state["low"]) if "low" in state else state["master"]
    torch.testing.assert_close(master, exact.parameters, rtol=1e-6, atol=0)
    assert float(master[0]) == pytest.approx(0.99, abs=1e-4)
    assert torch.equal(ours.parameters, master.to(dtype))


def regression(bits: int, steps: int = 150) -> list[float]:
    """Losses of a least-squares problem whose columns differ in scale by a thousand."""
    x, truth = randn(64, 40) * torch.logspace(-2, 1, 40), randn(40, seed=3)
    y = x @ truth
    ours = flat_adapter(torch.zeros(40))
    optimizer, losses = Optimizer(ours, config(max_grad_norm=0.0), bits), []
    for _ in range(steps):
        error = x @ ours.parameters - y
        losses.append(float(error.square().mean()))
        ours.gradients.copy_(2 * x.t() @ error / len(y))
        optimizer.step(0.02)
    return losses


def test_8_bit_moments_follow_the_curve_of_32_bit_ones():
    exact, eight = regression(32), regression(8)
    assert exact[-1] < 0.05 * exact[0]
    gaps = [abs(a - b) / exact[0] for a, b in zip(exact, eight)]
    assert max(gaps) < 0.01, max(gaps)
    assert eight[-1] < 1.25 * exact[-1]


def test_8_bit_moments_neither_climb_nor_stand_still():
    """Noise of constant size: after hundreds of steps v must be its mean square, and fall again when the noise does."""
    n = 512
    w, size = torch.zeros(n), torch.logspace(-1.5, 0, 256).repeat(2)
    state = adamw.make_state(w, 8)
    for step in range(1, 401):
        g = randn(n, seed=step) * size * (1 if step <= 300 else 0.1)
        adamw.adamw(w, g, state, torch.tensor(1.0), 1e-3, step)
        if step == 300:
            steady = (adamw.expand(state)[1] / (1 - 0.999**step)).sqrt() / size
    assert float(steady.median()) == pytest.approx(1.0, abs=0.03)
    fallen = (adamw.expand(state)[1] / (1 - 0.999**400)).sqrt() / size
    wanted = ((1 - 0.999**300) * 0.999**100 / (1 - 0.999**400)) ** 0.5
    assert float(fallen.median()) == pytest.approx(wanted, abs=0.04)


def test_8_bit_moments_are_companded_within_their_spacing():
    n = 700
    state = adamw.make_state(torch.zeros(n), 8)
    m, v = randn(n) * torch.logspace(-2, 0, n), randn(n, seed=5).square() * torch.logspace(-4, 0, n)
    adamw.compress(state, m, v)
    back_m, back_v = adamw.expand(state)
    top = lambda t: torch.nn.functional.pad(t, (0, -n % 256)).view(-1, 256).abs().amax(1).repeat_interleave(256)[:n]  # noqa: E731
    large = m.abs() > 1e-2 * top(m)
    assert ((back_m - m).abs() / m.abs())[large].max() < 0.12
    assert (back_v[v > 0] > 0).all()  # a zero would turn its parameter's next step into a leap
    assert float(back_v.sum() / v.sum()) == pytest.approx(1, abs=5e-3) and float(back_m.abs().sum() / m.abs().sum()) == pytest.approx(1, abs=2e-2)
    assert (torch.sign(back_m)[large] == torch.sign(m)[large]).all()


def test_state_survives_a_checkpoint_exactly():
    def run(optimizer, ours, steps):
        for step in steps:
            ours.gradients.copy_(randn(300, seed=step))
            optimizer.step(1e-2)

    whole = flat_adapter(randn(300).to(torch.bfloat16))
    first = Optimizer(whole, config(), 8)
    run(first, whole, range(3))
    saved, numbers, parameters = {k: v.clone() for k, v in first.tensors().items()}, first.numbers(), whole.parameters.clone()
    run(first, whole, range(3, 6))
    resumed = flat_adapter(parameters)
    second = Optimizer(resumed, config(), 8)
    second.restore(saved, numbers)
    run(second, resumed, range(3, 6))
    assert torch.equal(resumed.parameters, whole.parameters) and second.numbers() == first.numbers()
    assert all(torch.equal(second.state[k], v) for k, v in first.state.items())


@pytest.mark.parametrize("saved_bits, bits", [(8, 32), (32, 8)])
def test_a_checkpoint_of_other_bits_is_taken_over(saved_bits, bits):
    ours = flat_adapter(randn(300).to(torch.bfloat16))
    first = Optimizer(ours, config(), saved_bits)
    for step in range(3):
        ours.gradients.copy_(randn(300, seed=step))
        first.step(1e-2)
    second = Optimizer(ours, config(), bits)
    second.restore(first.tensors(), first.numbers())
    moments = [adamw.expand(s) if "m_scale" in s else (s["m"], s["v"]) for s in (first.state, second.state)]
    for a, b in zip(*moments):
        assert float((a - b).norm() / a.norm()) < 0.05
    assert torch.equal(second.state["low"], first.state["low"]) and second.steps == 3


def test_learning_rate_schedule():
    c = config(learning_rate=1e-3, warmup_steps=5)
    rates = [learning_rate(c, step, 50) for step in range(50)]
    assert rates[:5] == pytest.approx([1e-3 * k / 6 for k in range(1, 6)])
    assert rates[5] == pytest.approx(1e-3)
    assert all(a > b for a, b in itertools.pairwise(rates[5:]))
    assert rates[-1] == pytest.approx(1e-4, rel=0.05) and rates[-1] >= 1e-4
    assert learning_rate(c, 50, 50) == pytest.approx(1e-4)
    assert all(0 < learning_rate(config(warmup_steps=500), s, 3) <= 2e-4 for s in range(3))  # a warm-up longer than the run
    assert learning_rate(config(warmup_steps=0), 0, 1) == pytest.approx(2e-4)
