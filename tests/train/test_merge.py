"""The adapter merged into the weights while they are dequantized: the same loss and gradients as beside them."""

import pytest
import torch

from lowvram_tuner.train import fused_layer
from lowvram_tuner.train.step import FusedStep
from tests.engine_cases import batch_of, flat, make_case, make_plan, model_values, reference, relative

PLAN = {"scratch_bytes": 2 * 192 * 64 * 4}  # gate and up fit in one piece


@pytest.fixture
def merges(monkeypatch):
    """Counts the weights that were dequantized merged, from the first token on."""
    monkeypatch.setattr(fused_layer, "MERGE_ROWS", 1)
    from lowvram_tuner.quant.nf4 import NF4

    original, count = NF4.dequantize_merged, []
    monkeypatch.setattr(NF4, "dequantize_merged", lambda self, *args: (count.append(args[1].shape), original(self, *args))[1])
    return count


@pytest.mark.parametrize("targets", [None, ("q_proj", "v_proj", "up_proj")], ids=["all linears", "some linears"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_merged_equals_autograd(family, targets, merges):
    options = {} if targets is None else {"target_modules": targets}
    loaded, adapter = make_case(model_values(family, intermediate_size=192, head_dim=32), 4, make_plan(**PLAN), **options)
    data = flat()
    loss, wanted = reference(adapter, data)
    step = FusedStep(loaded, adapter, make_plan(**PLAN))
    adapter.gradients.zero_()
    assert float(step.accumulate(batch_of(data), torch.tensor(1.0))) == pytest.approx(loss, rel=1e-6)
    assert relative(adapter.gradients, wanted) < 3e-6
    passes = 3 * 3  # layers x (forward, again, backward)
    assert len(merges) == passes * len(targets or range(7)) - (0 if targets else 3)  # the last product is not computed again


def test_kept_weights_are_merged_once(merges):
    """Of three layers, two keep their weights from forward to backward."""
    plan = make_plan(keep_all=3, keep_weights=2, **PLAN)
    loaded, adapter = make_case(model_values("llama", intermediate_size=192, head_dim=32), 4, plan)
    data = flat()
    loss, wanted = reference(adapter, data)
    adapter.gradients.zero_()
    total = FusedStep(loaded, adapter, plan).accumulate(batch_of(data), torch.tensor(1.0))
    assert float(total) == pytest.approx(loss, rel=1e-6) and relative(adapter.gradients, wanted) < 3e-6
    assert len(merges) == 7 * (3 + 1)


def test_what_cannot_be_merged_is_added_beside(merges):
    """160 columns are no whole number of blocks of 64: down's adapter stays beside its weight, the others are merged."""
    loaded, adapter = make_case(model_values("llama"), 4)
    data = flat()
    loss, wanted = reference(adapter, data)
    adapter.gradients.zero_()
    total = FusedStep(loaded, adapter, make_plan()).accumulate(batch_of(data), torch.tensor(1.0))
    assert float(total) == pytest.approx(loss, rel=1e-6) and relative(adapter.gradients, wanted) < 3e-6
    assert (64, 160) not in merges and (160, 64) in merges


def test_few_tokens_are_not_worth_it():
    loaded, adapter = make_case(model_values("llama", intermediate_size=192), 4, make_plan(**PLAN))
    layer = FusedStep(loaded, adapter, make_plan(**PLAN)).layers[0]
    assert not layer.qkv._merges(torch.zeros(fused_layer.MERGE_ROWS - 1, 64))
    assert layer.qkv._merges(torch.zeros(fused_layer.MERGE_ROWS, 64))
