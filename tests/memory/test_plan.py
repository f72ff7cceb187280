"""The planner: more memory never makes a run slower, speed is given up in order, and what does not fit gets a way out.

Behaviour only; `tests/memory/test_slabs.py` and `tests/quant/test_linear.py` compare the formulas with real tensors.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowvram_tuner.config import TrainConfig
from lowvram_tuner.memory.budget import Rates
from lowvram_tuner.memory.cost import Choice, Cost, Layers
from lowvram_tuner.memory.estimate import Work
from lowvram_tuner.memory.plan import COMPONENT_LABELS, GB, Budget, plan_run
from lowvram_tuner.models.catalogue import catalogue, shape_of
from lowvram_tuner.quant.registry import resolve

CASES = [("meta-llama/Llama-3.1-8B-Instruct", 4), ("Qwen/Qwen3-14B", 4), ("Qwen/Qwen2.5-0.5B-Instruct", 16)]


def budget(gb: float, kind: str = "vram") -> Budget:
    return Budget(int(gb * GB), 0, int(gb * GB), kind)


def plan_of(model: str, gb: float, kind: str = "vram", **options):
    config = TrainConfig(model=model, **options)
    return plan_run(config, shape_of(model), budget(gb, kind))


@pytest.mark.parametrize("model, bits", CASES)
def test_more_memory_gives_up_no_more(model, bits):
    plans = [plan_of(model, gb, bits=bits) for gb in (x / 4 for x in range(2, 120, 2))]
    fitting = [p.fits for p in plans]
    assert fitting == sorted(fitting) and not fitting[0] and fitting[-1]
    fitted = [p for p in plans if p.fits]
    for less, more in itertools.pairwise(fitted):
        assert more.head_bits >= less.head_bits and more.streamed <= less.streamed, (less.to_dict(), more.to_dict())


@settings(max_examples=150, deadline=None)
@given(
    model=st.sampled_from(("meta-llama/Llama-3.1-8B-Instruct", "Qwen/Qwen3-14B", "Qwen/Qwen2.5-1.5B-Instruct", "meta-llama/Llama-2-70b-chat-hf")),
    bits=st.sampled_from((4, 8, 16)), batch=st.sampled_from((1, 4, 16)), length=st.sampled_from((128, 512, 2048)),
    share=st.floats(0, 1), more=st.floats(0, 0.2), kind=st.sampled_from(("vram", "vram", "ram")), rates=st.sampled_from((Rates(), Rates(640e12, 2.5e12, 50e9), Rates(20e12, 250e9, 1e9))),
)  # fmt: skip
def test_more_memory_never_makes_a_step_slower(model, bits, batch, length, share, more, kind, rates):
    """`share` of the way from the least memory that fits to all that can be used, and a little more."""
    config = TrainConfig(model=model, bits=bits, micro_batch_size=batch, max_seq_length=length)
    shape = shape_of(model)
    least = plan_run(config, shape, budget(0, kind), rates).process_bytes
    most = plan_run(config, shape, budget(5000, kind), rates).process_bytes
    less, limit = (int(least + x * (most - least)) for x in (share, share + more))
    slower, faster = (plan_run(config, shape, Budget(n, 0, n, kind), rates) for n in (less, limit))
    assert slower.fits and faster.fits
    assert faster.step_s <= slower.step_s, (slower.to_dict(), faster.to_dict())


@settings(max_examples=100, deadline=None)
@given(
    streamed=st.sampled_from((0, 4, 9)), spare=st.integers(0, 9 * GB), host=st.booleans(), chunk=st.sampled_from((1 << 30, 2048)),
    batch=st.sampled_from((1, 8)),
)  # fmt: skip
def test_as_many_activations_are_kept_as_fit(streamed, spare, host, chunk, batch):
    shape = shape_of("meta-llama/Llama-3.1-8B-Instruct")
    work = Work(shape, resolve(4), batch * 512, 16, TrainConfig().target_modules)
    cost = Cost(work, Choice(inputs_on_host=host, mlp_chunk=chunk), Budget(0, 0, 0, "vram"), Rates(), 1)
    assert cost.least(streamed) == cost.total(Layers(streamed))
    limit = cost.total(Layers(streamed)) + spare
    kept = cost.kept_within(limit, streamed)
    assert cost.total(kept) <= limit and sum(cost.components(kept).values()) == cost.total(kept)
    if kept.keep_all < 32:
        assert cost.total(replace(kept, keep_all=kept.keep_all + 1, keep_attention=0)) > limit
        assert kept.keep_all + kept.keep_attention == 32 or cost.total(replace(kept, keep_attention=kept.keep_attention + 1)) > limit
    assert cost.kept_within(cost.total(Layers(streamed)) - 1, streamed) is None


@pytest.mark.parametrize("model, bits", CASES)
def test_a_plan_that_fits_is_inside_its_budget(model, bits):
    for gb in (2.0, 4.3, 4.95, 6.0, 8.9, 24.0):
        plan = plan_of(model, gb, bits=bits)
        assert plan.fits == (plan.process_bytes <= plan.budget.limit_bytes)
        assert plan.process_bytes == sum(plan.components.values()) == plan.allocated_bytes + plan.components["context"]
        assert plan.peak_bytes == plan.allocated_bytes
        assert set(plan.components) <= set(COMPONENT_LABELS) and all(v >= 0 for v in plan.components.values())


def test_what_is_given_up_comes_in_order():
    """Each sacrifice is made only where the ones before it were; layers are streamed last of all."""
    seen = set()
    for model, bits in CASES:
        tied = shape_of(model).tie_word_embeddings
        for step in range(60):
            plan = plan_of(model, 1.0 + step / 4, bits=bits, micro_batch_size=4)
            if not plan.fits:
                continue
            kept = plan.keep_all + plan.keep_attention
            order = [plan.optimizer_bits == 8]
            order += [plan.inputs_on_host] if kept < shape_of(model).num_hidden_layers else []  # else none is there to put away
            order += [] if tied else [plan.embeddings_on_host, plan.head_bits < 16, plan.head_bits < 8]
            order += [plan.optimizer_on_host, plan.streamed > 0]
            assert order == sorted(order, reverse=True), plan.to_dict()
            seen.add(sum(order) if not tied else -1)
    assert {0, 7} <= seen and len(seen) >= 5  # from nothing given up to everything


def test_the_issues_card_holds_the_issues_models():
    assert plan_of("meta-llama/Llama-3.1-8B-Instruct", 5.2).fits
    assert plan_of("Qwen/Qwen3-8B", 5.2).fits
    assert plan_of("Qwen/Qwen3-14B", 7.2).fits


def test_kept_layers_and_streamed_layers_are_layers():
    for gb in (4, 5, 6, 8, 12, 16, 24):
        plan = plan_of("meta-llama/Llama-3.1-8B-Instruct", gb)
        assert plan.keep_all >= 0 and plan.keep_attention >= 0 and plan.keep_all + plan.keep_attention <= 32
        assert 0 <= plan.streamed <= 32 and plan.streamed != 1  # a single slot would wait for itself
    assert plan_of("meta-llama/Llama-3.1-8B-Instruct", 24).keep_all == 32


def test_weights_stay_unpacked_where_there_is_room_and_nothing_is_given_up():
    counts = {gb: plan_of("meta-llama/Llama-3.1-8B-Instruct", gb) for gb in (10, 12, 16, 24)}
    assert [p.keep_weights for p in counts.values()] == sorted(p.keep_weights for p in counts.values())
    assert counts[10].keep_weights < 4 < counts[16].keep_weights < counts[24].keep_weights == 32
    assert "weights unpacked once a pass" in counts[24].words
    assert counts[24].step_s < counts[16].step_s < counts[10].step_s
    for model, bits in CASES:
        for plan in (plan_of(model, 1.0 + step / 2, bits=bits) for step in range(60)):
            if plan.keep_weights:
                assert plan.keep_all == shape_of(model).num_hidden_layers and plan.optimizer_bits == 32 and bits != 16
                assert not (plan.streamed or plan.embeddings_on_host or plan.head_bits < 16)
    assert plan_of("meta-llama/Llama-3.1-8B-Instruct", 60, bits=16).keep_weights == 0
    assert plan_of("meta-llama/Llama-3.1-8B-Instruct", 60, bits=2).keep_weights == 0  # quip never unpacks a whole weight for a product
    assert plan_of("Qwen/Qwen2.5-1.5B-Instruct", 60, kind="ram").keep_weights == 0


def test_in_ram_the_peak_is_that_of_the_process():
    plan = plan_run(TrainConfig(), shape_of("demo"), Budget(9 * 10**9, 0, 9 * 10**9, "ram", context_bytes=6 * 10**8))
    assert plan.peak_bytes == plan.process_bytes == plan.allocated_bytes + 6 * 10**8


def test_what_moves_to_the_host_is_counted_there():
    rich, poor = plan_of("meta-llama/Llama-3.1-8B-Instruct", 24), plan_of("meta-llama/Llama-3.1-8B-Instruct", 4)
    assert rich.host_bytes == 0 and poor.streamed > 0
    assert poor.components["embeddings"] == 0
    slab = (rich.components["weights"] - poor.components["weights"]) / (poor.streamed - 2)
    assert poor.host_bytes > poor.streamed * slab * 0.999 + rich.components["embeddings"]


@pytest.mark.parametrize(
    "model, gb, options",
    [
        ("meta-llama/Llama-3.1-8B-Instruct", 4.0, {"micro_batch_size": 64}),
        ("Qwen/Qwen3-14B", 4.5, {"max_seq_length": 32768}),
        ("Qwen/Qwen2.5-7B-Instruct", 2.5, {"bits": 16, "micro_batch_size": 16, "max_seq_length": 2048}),
    ],
)
def test_what_does_not_fit_gets_remedies_that_work(model, gb, options):
    config = TrainConfig(model=model, **options)
    plan = plan_run(config, shape_of(model), budget(gb))
    assert not plan.fits and plan.remedies
    assert any("too big" in w.lower() for w in plan.words)
    for remedy in plan.remedies:
        changed = TrainConfig.from_dict({**config.to_dict(), **remedy.changes})
        assert changed != config and remedy.label
        assert plan_run(changed, shape_of(model), budget(gb)).fits, remedy


def test_a_hopeless_budget_says_by_how_much():
    plan = plan_of("meta-llama/Llama-2-70b-chat-hf", 1.0)
    assert not plan.fits and not plan.remedies
    missing = (plan.process_bytes - plan.budget.limit_bytes) / GB
    assert f"{missing:.1f} GB" in " ".join(plan.words)


def test_without_a_card_everything_is_in_ram():
    plan = plan_of("demo", 8, "ram", micro_batch_size=8, max_seq_length=128)
    assert plan.fits and plan.item == 4 and plan.unpacked
    assert plan.streamed == 0 and not plan.embeddings_on_host and not plan.inputs_on_host and not plan.optimizer_on_host


def test_every_known_model_can_be_planned_at_every_bit_width():
    for name, shape in catalogue().items():
        for bits in (4, 8, 16):
            plan = plan_run(TrainConfig(model=name, bits=bits), shape, budget(200))
            assert plan.fits and plan.step_s > 0 and plan.words, name


def test_fewer_bits_take_less():
    sizes = [plan_of("meta-llama/Llama-3.1-8B-Instruct", 100, bits=b).components["weights"] for b in (2, 3, 4, 8, 16)]
    assert sizes == sorted(sizes) and len(set(sizes)) == 5
    shape = shape_of("meta-llama/Llama-3.1-8B-Instruct")
    in_linears = 32 * sum(o * i for o, i in shape.linears().values())
    for bits, size in zip((2, 3, 4, 8, 16), sizes):
        assert bits <= 8 * size / in_linears < bits + 0.6


def test_what_a_format_allocates_beside_its_result_is_counted():
    """quip turns its activations: two copies of the wider side, here the MLP's inner one."""
    shape, targets = shape_of("meta-llama/Llama-2-7b-chat-hf"), TrainConfig().target_modules
    quip, hqq = (Work(shape, resolve(2, method, group_size=128), 2048, 8, targets) for method in ("quip", "hqq"))
    turned = 2 * shape.intermediate_size * 2
    assert quip.recompute_work_bytes(1024) - hqq.recompute_work_bytes(1024) <= 1024 * turned
    assert quip.recompute_work_bytes(1 << 30) - hqq.recompute_work_bytes(1 << 30) == 2048 * turned
    assert quip.kept_work_bytes() - hqq.kept_work_bytes() == 2048 * turned


def test_longer_examples_take_more():
    plans = [plan_of("Qwen/Qwen3-8B", 200, max_seq_length=n) for n in (256, 512, 1024, 2048)]
    for short, long in itertools.pairwise(plans):
        assert short.components["activations"] < long.components["activations"] and short.step_s < long.step_s
        assert short.components["weights"] == long.components["weights"]
    tight = [plan_of("Qwen/Qwen3-8B", 6, max_seq_length=n).step_s for n in (256, 512, 1024, 2048)]
    assert tight == sorted(tight)


def test_the_budget_of_a_card_and_of_a_machine_without_one():
    card = SimpleNamespace(total_bytes=6 * GB, free_bytes=5 * GB, used_bytes=GB, uuid="GPU-none-of-this-name")
    asked = Budget.of(TrainConfig(vram_gb=4.5), card)
    assert (asked.limit_bytes, asked.others_bytes, asked.total_bytes, asked.kind) == (int(4.5 * GB), GB, 6 * GB, "vram")
    assert not asked.note
    free = Budget.of(TrainConfig(), card)
    assert 4 * GB < free.limit_bytes < 5 * GB  # a reserve is left for the desktop
    ram = SimpleNamespace(total_bytes=16 * GB, available_bytes=9 * GB)
    without = Budget.of(TrainConfig(vram_gb=4.5), None, ram)  # a run without a card uses RAM, whatever VRAM a preset names
    assert without.kind == "ram" and 8 * GB < without.limit_bytes < 9 * GB
    assert Budget.of(TrainConfig(), None, None).limit_bytes == 0


def test_a_budget_larger_than_the_card_is_what_is_free_and_says_so():
    card = SimpleNamespace(total_bytes=6 * GB, free_bytes=5 * GB, used_bytes=GB, uuid="GPU-none-of-this-name")
    clamped = Budget.of(TrainConfig(vram_gb=24), card)
    assert clamped.limit_bytes == 5 * GB and "24 GB were asked for" in clamped.note and "6.0 GB" in clamped.note
    plan = plan_run(TrainConfig(), shape_of("demo"), clamped)
    assert plan.fits and plan.words[-1] == clamped.note


def test_a_card_to_come_is_planned_for_as_a_card():
    absent = Budget.of_absent_card(5.2)
    assert (absent.kind, absent.limit_bytes, absent.others_bytes) == ("vram", int(5.2 * GB), 0) and absent.rates == Rates()
    plan = plan_run(TrainConfig(model="Qwen/Qwen3-8B"), shape_of("Qwen/Qwen3-8B"), absent)
    assert plan.fits and plan.item == 2 and "not in this machine" in plan.words[-1]


@pytest.mark.parametrize(
    "model, gb, length",
    [
        ("meta-llama/Llama-3.1-8B-Instruct", 8, 512),
        ("meta-llama/Llama-3.1-8B-Instruct", 4, 512),
        ("Qwen/Qwen3-14B", 5.2, 512),
        ("Qwen/Qwen3-14B", 6, 2048),
        ("Qwen/Qwen3-32B", 5.2, 512),
        ("meta-llama/Llama-2-70b-chat-hf", 22, 2048),
        ("meta-llama/Llama-2-70b-chat-hf", 2, 2048),  # does not fit: remedies are tried
    ],
)
def test_planning_takes_milliseconds(model, gb, length):
    """The gauge asks at every keystroke. The best of several, so that a busy machine does not fail it."""
    config, shape = TrainConfig(model=model, max_seq_length=length), shape_of(model)
    times = []
    for _ in range(15):
        start = time.process_time()
        plan_run(config, shape, budget(gb))
        times.append(time.process_time() - start)
    assert min(times) < 0.010, min(times)


def test_planning_imports_no_torch(root):
    code = (
        "import json, sys; from lowvram_tuner.config import TrainConfig; from lowvram_tuner.models.catalogue import shape_of;"
        "from lowvram_tuner.memory.plan import Budget, plan_run;"
        "p = plan_run(TrainConfig(model='Qwen/Qwen3-8B'), shape_of('Qwen/Qwen3-8B'), Budget(6*10**9, 0, 5*10**9, 'vram'));"
        "heavy = [m for m in ('torch', 'transformers', 'numpy', 'gradio', 'triton') if m in sys.modules];"
        "print(json.dumps([p.fits, heavy]))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=120, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [True, []]


def test_the_estimated_parts_are_the_engines(root):
    """Weights, norms, adapter, optimizer and tables of a loaded tiny model, byte for byte."""
    torch = pytest.importorskip("torch")
    from kernels.adamw import make_state
    from lowvram_tuner.memory.slabs import slab_bytes
    from lowvram_tuner.models.catalogue import shape_from_values
    from tests.engine_cases import make_case, make_plan, model_values

    values = model_values("llama", False, num_hidden_layers=2)
    shape = shape_from_values(values, "tiny")
    config = TrainConfig(bits=4, lora_r=4, max_seq_length=64)
    plan = plan_run(config, shape, budget(24))
    loaded, adapter = make_case(values, 4, make_plan(head_bits=16), dtype=torch.bfloat16)
    slabs = sum(s.buffer.numel() for s in loaded.slabs)
    layer = {n: m.format.layout(m.out_features, m.in_features) for n, m in loaded.layers[0].named_modules() if hasattr(m, "packed")}
    assert slabs == 2 * slab_bytes(layer)
    norms = sum(p.numel() * 2 for n, p in loaded.model.named_parameters() if "norm" in n)
    assert slabs + norms <= plan.components["weights"] <= slabs + norms + 2 * 4 * shape.head_dim
    assert plan.components["adapter"] == adapter.parameters.nbytes and plan.components["gradients"] == adapter.gradients.nbytes
    assert plan.components["embeddings"] == loaded.model.model.embed_tokens.weight.nbytes
    head = loaded.head.packed["weight"].nbytes
    assert head <= plan.components["head"] < head + 4096
    state = make_state(adapter.parameters, plan.optimizer_bits)
    assert plan.components["optimizer"] == pytest.approx(sum(t.nbytes for t in state.values()), abs=4096)


def test_inputs_wait_in_ram_only_where_a_layer_keeps_nothing_else():
    """The page says what waits; and a stream that carries nothing must not be waited for while a step is captured."""
    seen = set()
    for step in range(200):
        plan = plan_of("meta-llama/Llama-2-7b-chat-hf", 4 + step / 20, micro_batch_size=4)
        kept = plan.keep_all + plan.keep_attention
        assert not (plan.inputs_on_host and kept == 32), plan.to_dict()
        assert ("some activations wait in RAM" in plan.words) == (plan.inputs_on_host or plan.gate_up_on_host > 0)
        seen.add((plan.inputs_on_host, kept == 32, plan.embeddings_on_host))
    assert (False, True, True) in seen  # later sacrifices are made, and nothing is left to put away
