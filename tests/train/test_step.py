"""A pass of ours against transformers' forward and autograd on the same weights, in fp32: same loss, same gradient.

The comparison runs each example alone, so that it also proves that packed examples do not see each other.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lowvram_tuner.train import step as step_module
from lowvram_tuner.train.graph import CapturedStep
from lowvram_tuner.train.hf_step import TransformersStep
from lowvram_tuner.train.session import free_memory
from lowvram_tuner.train.step import FusedStep
from tests.engine_cases import VOCABULARY, batch_of, flat, make_case, make_plan, model_values, reference, relative

LEVELS = {
    "inputs": {}, "attention kept": {"keep_attention": 3}, "everything kept": {"keep_all": 3},
    "weights kept": {"keep_all": 3, "keep_weights": 2}, "mixed": {"keep_all": 1, "keep_attention": 1}, "mlp in chunks": {"mlp_chunk": 16},
}  # fmt: skip
ONE = torch.tensor(1.0)


def one_pass(step, adapter, batch, scale=ONE):
    adapter.gradients.zero_()
    total = step.accumulate(batch, scale)
    return float(total), adapter.gradients.clone()


@pytest.mark.parametrize("bits, tied", [(16, True), (4, False)], ids=["16-bit tied", "nf4 with a 4-bit head"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_fused_equals_autograd(family, bits, tied):
    plan = make_plan(head_bits=16 if tied else 4)
    loaded, adapter = make_case(model_values(family, tied), bits, plan)
    data = flat()
    batch = batch_of(data)
    loss, gradient = reference(adapter, data)
    assert gradient.norm() > 0.1
    seen = []
    for name, decisions in LEVELS.items():
        step = FusedStep(loaded, adapter, make_plan(**decisions))
        ours, g = one_pass(step, adapter, batch)
        assert ours == pytest.approx(loss, rel=1e-6), name
        assert relative(g, gradient) < 3e-6, name
        assert float(step.evaluate(batch).sum()) == pytest.approx(loss, rel=1e-6), name
        seen.append(g)
    for g in seen[1 : 3 if tied else 4]:  # what is kept changes when a value is computed, not its value; nobody keeps 16-bit weights unpacked
        assert torch.equal(g, seen[0])


def test_every_parameter_gets_its_own_gradient():
    """A norm over all parameters could hide one small matrix."""
    loaded, adapter = make_case(model_values("llama"), 4)
    data = flat()
    _, wanted = reference(adapter, data)
    _, g = one_pass(FusedStep(loaded, adapter, make_plan()), adapter, batch_of(data))
    assert len(adapter.slices) == 3 * 7 * 2
    for name, (offset, shape) in adapter.slices.items():
        part = slice(offset, offset + shape.numel())
        assert wanted[part].norm() > 0 and relative(g[part], wanted[part]) < 1e-5, name


@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), ("k_proj", "up_proj", "down_proj")], ids=",".join)
def test_adapters_on_some_layers_only(targets):
    loaded, adapter = make_case(model_values("llama"), 16, target_modules=targets)
    data = flat()
    loss, wanted = reference(adapter, data)
    ours, g = one_pass(FusedStep(loaded, adapter, make_plan()), adapter, batch_of(data))
    assert len(adapter.slices) == 3 * len(targets) * 2
    assert ours == pytest.approx(loss, rel=1e-6) and relative(g, wanted) < 3e-6


def test_gradients_add_up_and_scale():
    loaded, adapter = make_case(model_values("llama"))
    step, batch = FusedStep(loaded, adapter, make_plan()), batch_of(flat())
    _, once = one_pass(step, adapter, batch)
    adapter.gradients.zero_()
    step.accumulate(batch, torch.tensor(0.25))
    step.accumulate(batch, torch.tensor(0.5))
    assert relative(adapter.gradients, once * 0.75) < 1e-6


@pytest.mark.parametrize("kind", ["fused", "transformers"])
def test_packed_examples_do_not_see_each_other(kind):
    values = model_values("llama" if kind == "fused" else "gemma2", **({} if kind == "fused" else GEMMA))
    loaded, adapter = make_case(values)
    step = FusedStep(loaded, adapter, make_plan()) if kind == "fused" else TransformersStep(loaded, adapter)
    first = flat((0, 17, 40))
    changed = flat((0, 17, 40), ids=np.concatenate([(first.input_ids[:17] + 7) % VOCABULARY, first.input_ids[17:]]))
    first.labels[:17] = changed.labels[:17] = -100  # only the second example counts
    loss, g = one_pass(step, adapter, batch_of(first))
    other_loss, other = one_pass(step, adapter, batch_of(changed))
    assert loss == pytest.approx(other_loss, rel=1e-6) and relative(other, g) < 2e-6
    alone = flat((0, 23), ids=first.input_ids[17:])
    alone.labels[:] = first.labels[17:]
    alone_loss, alone_g = one_pass(step, adapter, batch_of(alone))
    assert loss == pytest.approx(alone_loss, rel=1e-6) and relative(alone_g, g) < 2e-6


def test_padding_changes_nothing():
    """Padding stands at the end as a sequence of its own that no label counts in."""
    loaded, adapter = make_case(model_values("qwen2"), 4)
    step = FusedStep(loaded, adapter, make_plan())
    bare = flat((0, 17, 40))
    padded = flat((0, 17, 40, 48), ids=np.concatenate([bare.input_ids, np.zeros(8, np.int64)]))
    padded.labels[40:] = -100
    loss, g = one_pass(step, adapter, batch_of(bare))
    padded_loss, padded_g = one_pass(step, adapter, batch_of(padded))
    assert loss == pytest.approx(padded_loss, rel=1e-6) and relative(padded_g, g) < 2e-6


def test_captured_step_without_a_card_is_the_step():
    loaded, adapter = make_case(model_values("llama"))
    step, batch = FusedStep(loaded, adapter, make_plan()), batch_of(flat())
    _, eager = one_pass(step, adapter, batch)
    captured = CapturedStep(step, torch.device("cpu"))
    for _ in range(3):
        _, g = one_pass(captured, adapter, batch, 1.0)
        assert torch.equal(g, eager)
    assert not captured.graphs


class Recorded(CapturedStep):
    """A card's captured step without a card: what it does, in order. Batches of n tokens are told apart by n."""

    def __init__(self, limit: int, roomy: bool) -> None:
        super().__init__(self, torch.device("cpu"), limit)
        self.enabled, self.roomy, self.done, self.plan = True, roomy, [], None
        self.step = SimpleNamespace(accumulate=lambda batches, scale: self.done.append(f"eager {len(batches[0].input_ids)}"))

    def _room_for_another(self):
        return self.roomy

    def _new_pool(self):
        self.graphs.clear()
        self.done.append("released")

    def _capture(self, key, batches):
        self.graphs[key] = None
        self.done.append(f"captured {len(batches[0].input_ids)}")

    def _replay(self, key, batches):
        self.done.append(f"replayed {len(batches[0].input_ids)}")


@pytest.mark.parametrize("roomy", [True, False])
def test_graphs_make_room_for_a_shape_that_was_never_seen(monkeypatch, roomy):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    step = Recorded(limit=2, roomy=roomy)
    a, b, c = (batch_of(flat((0, n))) for n in (10, 20, 30))
    for batch in (a, a, a, b, a, b, a, b, c, a):
        step.accumulate(batch, 1.0)
    seen = ["eager 10", "captured 10", "replayed 10"]
    if roomy:
        seen += ["eager 20", "replayed 10", "captured 20", "replayed 10", "replayed 20", "eager 30", "replayed 10"]
    else:  # the graphs that were given back are captured again without an eager pass; with a shape too many none is
        seen += ["released", "eager 20", "captured 10", "captured 20", "replayed 10", "replayed 20", "released", "eager 30", "eager 10"]
    assert step.done == seen
    assert step.enabled == roomy and not Recorded(2, roomy).release()


def test_counts_of_a_batch():
    data = flat()
    batch = batch_of(data)
    assert batch.counted == int((data.labels >= 0).sum())
    assert batch.targets.shape == batch.labels.shape and int((batch.labels >= 0).sum()) == batch.counted
    assert torch.equal(torch.from_numpy(data.labels)[batch.targets[: batch.counted]], batch.labels[: batch.counted])


def test_the_micro_batches_of_a_pass_have_one_shape(monkeypatch):
    """On a card; a pass is as large as its fullest micro-batch, in halves of the tokens and powers of two of sequences."""
    flats = [counting(flat((0, 256)), targets, count) for targets, count in ((3, 1), (200, 9), (129, 17), (5, 2), (7, 3))]
    monkeypatch.setattr(step_module, "to_batch", lambda data, device, max_len, *shape: (data.targets, *shape))
    got = step_module.to_batches(flats, torch.device("cuda"), 256, together=2)
    assert got == [(3, 256, 16), (200, 256, 16), (129, 256, 32), (5, 256, 32), (7, 128, 8)]
    assert [b[1:] for b in step_module.to_batches(flats, torch.device("cpu"), 256, together=1)] == [(1, 0)] * 5


def counting(data, targets: int, sequences: int):
    data.targets, data.cu_seqlens = targets, np.arange(sequences + 1, dtype=np.int32)
    return data


# families that only transformers knows

GEMMA = {
    "head_dim": 16, "query_pre_attn_scalar": 16, "final_logit_softcapping": 3.0, "attn_logit_softcapping": None,
    "sliding_window": 4096, "hidden_activation": "gelu_pytorch_tanh",
}  # fmt: skip


@pytest.mark.parametrize("family, extra", [("gemma2", GEMMA), ("granite", {"logits_scaling": 4.0}), ("llama", {})])
@pytest.mark.parametrize("bits", [16, 4])
def test_any_family_equals_autograd(family, extra, bits):
    loaded, adapter = make_case(model_values(family, **extra), bits)
    data = flat()
    loss, wanted = reference(adapter, data)
    step = TransformersStep(loaded, adapter)
    ours, g = one_pass(step, adapter, batch_of(data))
    assert ours == pytest.approx(loss, rel=1e-6) and relative(g, wanted) < 3e-6
    assert float(step.evaluate(batch_of(data)).sum()) == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize("bits", [16, 4])
@pytest.mark.parametrize("decisions", [{}, {"inputs_on_host": True}, {"inputs_on_host": True, "keep_all": 1, "keep_attention": 1}, {"keep_all": 3}], ids=str)
def test_micro_batches_together_equal_one_after_another_bit_for_bit(decisions, bits):
    """Each layer adds the micro-batches' gradients in their order, whether it meets them in one turn or in several."""
    batches = [batch_of(flat()), batch_of(flat((0, 9, 20))), batch_of(flat((0, 31, 33)))]
    loaded, adapter = make_case(model_values("qwen3"), bits)
    step = FusedStep(loaded, adapter, make_plan(**decisions), 40)
    adapter.gradients.zero_()
    losses = [float(step.accumulate(batch, torch.tensor(0.5))) for batch in batches]
    wanted = adapter.gradients.clone()
    together = FusedStep(loaded, adapter, make_plan(together=4, **decisions), 40)
    captured = CapturedStep(together, torch.device("cpu"))
    adapter.gradients.zero_()
    assert float(captured.accumulate(batches, 0.5)) == pytest.approx(sum(losses), rel=1e-6) and torch.equal(adapter.gradients, wanted)
    adapter.gradients.zero_()
    together.accumulate(batches[:1], torch.tensor(0.5))
    together.accumulate(batches[1:], torch.tensor(0.5))
    assert wanted.norm() > 0.1 and torch.equal(adapter.gradients, wanted)


KEEPING = [{"keep_all": 4, "keep_weights": 4}, {"keep_all": 1, "keep_attention": 3}, {"keep_all": 1, "keep_attention": 2, "inputs_on_host": True, "gate_up_on_host": 2}]


@pytest.mark.parametrize("decisions", KEEPING, ids=str)
def test_a_pass_that_keeps_less_gives_the_same_bits(decisions):
    loaded, adapter = make_case(model_values("llama", num_hidden_layers=4), 4)
    step, batch = FusedStep(loaded, adapter, make_plan(**decisions), 40), batch_of(flat())
    wanted, counts = one_pass(step, adapter, batch), []
    while step.keep_less():
        loss, g = one_pass(step, adapter, batch)
        assert loss == wanted[0] and torch.equal(g, wanted[1])
        counts.append((step.plan.keep_weights, step.plan.keep_all, step.plan.keep_attention))
    assert counts == sorted(counts, reverse=True) and len(set(counts)) == len(counts) and counts[-1] == (0, 0, 0)


# on a card

BIG = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 6, "vocab_size": 3000}
CARD_PLANS = {
    "everything kept": {"keep_all": 6}, "attention kept": {"keep_attention": 6},
    "nothing left to put away": {"keep_all": 4, "keep_attention": 2, "inputs_on_host": True},
    "on the host": {"keep_all": 2, "keep_attention": 2, "inputs_on_host": True, "embeddings_on_host": True},
    "streamed": {"streamed": 4}, "all streamed": {"streamed": 6, "inputs_on_host": True, "optimizer_on_host": True},
}  # fmt: skip
QUANTIZED_PLANS = {"some weights kept": {"keep_all": 6, "keep_weights": 4}, "all weights kept": {"keep_all": 6, "keep_weights": 6}}


class Hungry:
    """A step whose capture runs out of memory until it was told twice to keep less, which it does `gives` times."""

    def __init__(self, gives: int) -> None:
        self.plan, self.gives, self.less = "as planned", gives, 0

    def accumulate(self, batch, scale):
        held = torch.ones(50 << 20, dtype=torch.uint8, device="cuda")
        if torch.cuda.is_current_stream_capturing() and self.less < 2:
            torch.empty(1 << 50, dtype=torch.uint8, device="cuda")
        return held[:9].float().sum()

    def forget(self):
        pass

    def keep_less(self):
        if self.less == self.gives:
            return False
        self.plan, self.less = "less", self.less + 1
        return True


@pytest.mark.gpu
@pytest.mark.parametrize("gives", [0, 1, 2])
def test_a_capture_that_runs_out_of_memory_keeps_none_of_it_and_tries_with_less(gives):
    captured, batch = CapturedStep(Hungry(gives), torch.device("cuda", 0)), batch_of(flat(), "cuda")
    first = captured.accumulate(batch, 1.0).clone()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    second = captured.accumulate(batch, 1.0)
    done = gives == 2
    assert captured.enabled == bool(captured.graphs) == done and captured.step.plan == ("less" if done else "as planned")
    assert torch.equal(first, second) and torch.equal(first, captured.accumulate(batch, 1.0))
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= before + (60 << 20 if done else 1 << 20)


@pytest.mark.gpu
def test_graphs_give_their_memory_back_and_are_captured_again():
    plan = make_plan("vram", scratch_bytes=2 * 704 * 256 * 2, keep_all=6)
    loaded, adapter = make_case(model_values("llama", False, **BIG), 4, plan, "cuda", torch.bfloat16, lora_r=16)
    captured = CapturedStep(FusedStep(loaded, adapter, plan, 8192), torch.device("cuda", 0))
    batch = batch_of(flat(tuple(range(0, 8193, 128)), vocabulary=3000), "cuda")
    first = one_pass(captured, adapter, batch, 1 / 200)
    free_memory()
    before = torch.cuda.memory_reserved()
    passes = [one_pass(captured, adapter, batch, 1 / 200) for _ in range(2)]
    pool = captured.held
    assert captured.graphs and pool > 200 << 20 and torch.cuda.memory_reserved() >= before + pool
    assert captured.release() and not captured.release()
    assert torch.cuda.memory_reserved() <= before + (4 << 20)
    for _ in range(3):
        passes.append(one_pass(captured, adapter, batch, 1 / 200))
        free_memory()  # of nothing that the graph works in
    assert len(captured.graphs) == 1 and captured.held <= pool
    assert all(loss == first[0] and torch.equal(g, first[1]) for loss, g in passes)


@pytest.mark.gpu
def test_a_capture_that_fails_with_copies_under_way_is_tried_again():
    plan = make_plan("vram", scratch_bytes=2 * 704 * 256 * 2, keep_all=1, keep_attention=3, inputs_on_host=True, gate_up_on_host=2)
    loaded, adapter = make_case(model_values("llama", False, **BIG), 4, plan, "cuda", torch.bfloat16, lora_r=16)
    step, batch = FusedStep(loaded, adapter, plan, 256), batch_of(flat((0, 100, 101, 200, 256), vocabulary=3000), "cuda")
    forward, short = step._forward, []

    def once_short_of_memory(index, *rest):
        if torch.cuda.is_current_stream_capturing() and index == 3 and not short:  # what layer 2 kept is on its way out
            short.append(index)
            torch.empty(1 << 50, dtype=torch.uint8, device="cuda")
        return forward(index, *rest)

    step._forward = once_short_of_memory
    captured = CapturedStep(step, torch.device("cuda", 0))
    passes = [one_pass(captured, adapter, batch, 1 / 200) for _ in range(3)]
    assert short and captured.graphs and captured.step.plan.keep_attention == 2
    assert all(loss == passes[0][0] and torch.equal(g, passes[0][1]) for loss, g in passes)


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [16, 4])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("edges", [(0, 100, 101, 200, 256), (0, 128, 256)], ids=["packed", "even"])
def test_on_a_card_every_plan_and_a_graph_give_the_same_bits(edges, family, bits):
    data = flat(edges, vocabulary=3000)
    base = None
    for name, decisions in {"inputs": {}, **CARD_PLANS, **(QUANTIZED_PLANS if bits == 4 else {})}.items():
        plan = make_plan("vram", scratch_bytes=2 * 704 * 256 * 2, head_bits=4 if bits == 4 else 16, **decisions)
        values = model_values(family, False, **BIG, **({"head_dim": 64} if family == "qwen3" else {}))
        loaded, adapter = make_case(values, bits, plan, "cuda", torch.bfloat16, lora_r=16)
        step, batch = FusedStep(loaded, adapter, plan, 256), batch_of(data, "cuda")
        captured = CapturedStep(step, torch.device("cuda", 0))
        passes = [one_pass(captured, adapter, batch, 1 / 200) for _ in range(4)]  # eager, captured, replayed twice
        assert captured.graphs, name
        for loss, g in passes[1:]:
            assert loss == passes[0][0] and torch.equal(g, passes[0][1]), name
        base = base or passes[0]
        assert passes[0][0] == base[0] and torch.equal(passes[0][1], base[1]), name
        assert float(step.evaluate(batch).sum()) == pytest.approx(base[0], rel=1e-6)
        both = CapturedStep(FusedStep(loaded, adapter, replace(plan, together=2), 256), torch.device("cuda", 0))
        for _ in range(3):
            loss, g = one_pass(both, adapter, [batch, batch], 1 / 200)
            assert loss == pytest.approx(2 * base[0], rel=1e-6) and relative(g, 2 * base[1]) < 1e-2, name
        assert both.graphs, name
    loss, wanted = reference(adapter, data)
    assert base[0] == pytest.approx(loss, rel=2e-3) and relative(base[1], wanted / 200) < 2e-2
