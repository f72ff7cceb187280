"""Activations on the host change where a value waits, not its value: loss and gradient are bit for bit those of recomputing."""

import pytest
import torch

from lowvram_tuner.memory.offload import GateUpAway, HostStore
from lowvram_tuner.train import fused_layer
from lowvram_tuner.train.step import FusedStep
from tests.engine_cases import batch_of, flat, make_case, make_plan, model_values

CPU = torch.device("cpu")
ONE = torch.tensor(1.0)
TOKENS = 40  # of engine_cases.flat


def one_pass(loaded, adapter, batch, **decisions):
    device = adapter.parameters.device
    step = FusedStep(loaded, adapter, make_plan(**decisions), TOKENS)
    adapter.gradients.zero_()
    total = step.accumulate(batch, ONE.to(device))
    return float(total), adapter.gradients.clone(), step


CASES = {
    "inputs": {"inputs_on_host": True},
    "gate and up of every layer": {"gate_up_on_host": 3},
    "of one layer": {"gate_up_on_host": 1},
    "more than there is": {"gate_up_on_host": 99},
    "in chunks": {"gate_up_on_host": 4, "mlp_chunk": 16},
    "beside kept layers": {"gate_up_on_host": 2, "keep_all": 1, "keep_attention": 1, "mlp_chunk": 16},
    "everything at once": {"gate_up_on_host": 5, "inputs_on_host": True, "mlp_chunk": 16, "keep_attention": 1},
}


@pytest.mark.parametrize("bits", [16, 4])
@pytest.mark.parametrize("decisions", CASES.values(), ids=CASES)
def test_the_same_loss_and_gradient_bit_for_bit(decisions, bits):
    loaded, adapter = make_case(model_values("qwen3"), bits)
    batch = batch_of(flat())
    here = {k: v for k, v in decisions.items() if "host" not in k}
    loss, gradient, _ = one_pass(loaded, adapter, batch, **here)
    ours, g, step = one_pass(loaded, adapter, batch, **decisions)
    assert gradient.norm() > 0.1 and ours == loss and torch.equal(g, gradient)
    shorter = batch_of(flat((0, 9, 20)))  # the same step meets a pass with fewer chunks
    want = one_pass(loaded, adapter, shorter, **here)[:2]
    adapter.gradients.zero_()
    assert float(step.accumulate(shorter, ONE)) == want[0] and torch.equal(adapter.gradients, want[1])


def test_what_came_back_is_not_computed_again(monkeypatch):
    loaded, adapter = make_case(model_values("llama"))
    calls = []
    original = fused_layer.LinearGroup.forward
    monkeypatch.setattr(fused_layer.LinearGroup, "forward", lambda self, *given, **more: (calls.append(self.out_features), original(self, *given, **more))[1])
    batch, gate_up = batch_of(flat()), 2 * 160

    def products(**decisions):
        calls.clear()
        one_pass(loaded, adapter, batch, **decisions)
        return calls.count(gate_up)

    assert products() == 6 and products(gate_up_on_host=1) == 5 and products(gate_up_on_host=3) == 3
    assert products(mlp_chunk=16) == 18 and products(mlp_chunk=16, gate_up_on_host=7) == 11


def test_units_are_spread_and_come_back_in_the_order_of_backward():
    away = GateUpAway([0, 1, 2, 3], tokens=40, rows=16, away=6, columns=8, dtype=torch.float32, device=CPU)
    assert sorted(away.slot) == [(0, 0), (0, 2), (1, 1), (2, 0), (2, 2), (3, 1)]  # every second of twelve
    away.begin(40)
    order, unit = [], away.first
    while unit is not None:
        order.append(unit)
        unit = away.next.get(unit)
    assert order == [(3, 1), (2, 0), (2, 2), (1, 1), (0, 0), (0, 2)]
    away.begin(20)  # the third chunk of 16 does not exist in a pass over 20
    assert away.first == (3, 1) and away.next == {(3, 1): (2, 0), (2, 0): (1, 1), (1, 1): (0, 0)}


def test_a_store_gives_back_what_it_took():
    store = HostStore(2, (4, 3), torch.float32, CPU)
    a, b = torch.randn(4, 3), torch.randn(2, 3)
    store.put(0, a)
    store.put(1, b)
    want = a.clone()
    a.zero_()  # the caller may reuse its memory
    store.prefetch(1, 2)
    assert torch.equal(store.get(0, 4), want) and torch.equal(store.get(1, 2), b)


def test_memory_that_cannot_be_pinned_is_done_without(monkeypatch):
    original, calls = torch.empty, []

    def scarce(*size, **options):
        calls.append(size)
        if options.get("pin_memory") is not None and len(calls) > 2:
            raise RuntimeError("CUDA error: out of memory\nmore")
        return original(*size, **options)

    monkeypatch.setattr(torch, "empty", scarce)
    with pytest.warns(UserWarning, match=r"2 of 5 parts can be pinned \(CUDA error: out of memory\)"):
        away = GateUpAway(list(range(10)), tokens=8, rows=8, away=5, columns=4, dtype=torch.float32, device=CPU)
    assert sorted(away.slot) == [(0, 0), (5, 0)] and len(away.store.host) == 2


@pytest.mark.gpu
@pytest.mark.parametrize("decisions", CASES.values(), ids=CASES)
def test_on_the_card_eager_and_captured(decisions):
    from lowvram_tuner.train.graph import CapturedStep

    card = torch.device("cuda")
    loaded, adapter = make_case(model_values("qwen3"), 4, device="cuda", dtype=torch.bfloat16)
    batch = batch_of(flat(), "cuda")
    here = {k: v for k, v in decisions.items() if "host" not in k}
    loss, gradient, _ = one_pass(loaded, adapter, batch, **here)
    captured = CapturedStep(FusedStep(loaded, adapter, make_plan("vram", **decisions), TOKENS), card)
    for _ in range(4):  # eager, captured, replayed twice
        adapter.gradients.zero_()
        assert float(captured.accumulate(batch, 1.0)) == loss
        assert torch.equal(adapter.gradients, gradient)
    assert captured.graphs
