"""Every speed-up at once keeps the loss curve: 100 steps of the demo on a card against transformers' own eager step in fp32.

What bf16 itself changes is measured beside it, by the same eager step in bf16: the fused, merged, offloaded and captured run
may differ from fp32 no more than that does.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lowvram_tuner.config import TrainConfig
from lowvram_tuner.data.packing import Batches, MicroBatch, collate
from lowvram_tuner.data.prepare import prepare
from lowvram_tuner.lora.adapter import attach
from lowvram_tuner.models.load import load_model
from lowvram_tuner.models.source import load_tokenizer
from lowvram_tuner.quant.registry import resolve
from lowvram_tuner.train.graph import CapturedStep
from lowvram_tuner.train.optimizer import Optimizer
from lowvram_tuner.train.step import FusedStep, to_batch
from tests.engine_cases import make_plan, reference

STEPS, LENGTH, RATE = 100, 128, 5e-4
PLAN = {"keep_all": 10, "keep_weights": 6, "keep_attention": 5, "inputs_on_host": True, "gate_up_on_host": 8, "scratch_bytes": 2 * 1536 * 576 * 4}
CARD = torch.device("cuda", 0)


def micro_batches(folder) -> list:
    """One example each: the plain step takes a tenth of a second for every example."""
    config = TrainConfig(model="demo", dataset="demo", max_seq_length=LENGTH, output_dir=str(folder))
    rows = prepare(config, load_tokenizer("demo")).train
    batches, flat, epoch = Batches(rows, 1, LENGTH, 0, packing=False), [], 0
    while len(flat) < STEPS:
        flat += [collate(rows, batch, LENGTH, LENGTH) for batch in batches.epoch(epoch)]
        epoch += 1
    return flat[:STEPS]


def even_micro_batches(folder) -> list:
    """Two rows of LENGTH tokens each, as long texts are cut: attention is another kernel there on some cards."""
    ids = np.concatenate([flat.input_ids[: flat.tokens] for flat in micro_batches(folder)])
    rows = ids[: len(ids) // (2 * LENGTH) * 2 * LENGTH].reshape(-1, 2 * LENGTH)
    edges, positions = np.array([0, LENGTH, 2 * LENGTH], np.int32), np.tile(np.arange(LENGTH), 2)
    labels = [np.where(positions == LENGTH - 1, -100, np.roll(row, -1)) for row in rows]
    return [
        MicroBatch(rows[i % len(rows)], labels[i % len(rows)], positions, edges, 2 * LENGTH - 2, LENGTH, 2 * LENGTH) for i in range(STEPS)
    ]


def session(dtype: torch.dtype):
    """The demo in nf4, its adapter (the same values in every dtype) and the fp32 optimizer over 16- or 32-bit parameters."""
    config, plan = TrainConfig(learning_rate=RATE), make_plan("vram", **PLAN)
    loaded = load_model("demo", resolve(4), plan, CARD, dtype)
    adapter = attach(loaded.model, config, CARD, dtype)
    generator = torch.Generator().manual_seed(0)
    for name, (offset, shape) in adapter.slices.items():
        values = torch.randn(shape, generator=generator) * 0.03 if "lora_A" in name else torch.zeros(shape)
        adapter.parameters[offset : offset + shape.numel()] = values.bfloat16().flatten().to(CARD, dtype)
    return loaded, adapter, Optimizer(adapter, config), plan


def eager(dtype: torch.dtype, data: list) -> np.ndarray:
    """Losses of transformers' forward, full logits and autograd, one example at a time."""
    _, adapter, optimizer, _ = session(dtype)
    losses = []
    for flat in data:
        total, _ = reference(adapter, flat)
        adapter.gradients.div_(flat.targets)
        optimizer.step(RATE)
        losses.append(total / flat.targets)
    return np.array(losses)


def ours(data: list) -> np.ndarray:
    loaded, adapter, optimizer, plan = session(torch.bfloat16)
    tokens = len(data[0].input_ids)
    step = CapturedStep(FusedStep(loaded, adapter, plan, tokens), CARD)
    losses = []
    for flat in data:
        batch = to_batch(flat, CARD, LENGTH, tokens, sequences=32)
        losses.append(float(step.accumulate(batch, 1 / flat.targets)) / flat.targets)
        optimizer.step(RATE)
    assert step.graphs, "the step was not captured"
    return np.array(losses)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [micro_batches, even_micro_batches], ids=["examples", "even rows"])
def test_the_curve_is_that_of_the_plain_step_in_fp32(rows, demo_gguf, tmp_path):
    data = rows(tmp_path)
    exact, rounded, fast = eager(torch.float32, data), eager(torch.bfloat16, data), ours(data)
    assert exact[-10:].mean() < 0.6 * exact[:10].mean(), "the reference learned nothing"
    noise, apart = (float(np.sqrt(np.mean((curve - exact) ** 2))) for curve in (rounded, fast))
    print(f"loss {exact[:10].mean():.3f} to {exact[-10:].mean():.3f}; from fp32 (RMS): eager bf16 {noise:.4f}, ours {apart:.4f}")
    assert apart <= 1.5 * noise
    assert abs(fast.mean() - exact.mean()) <= 1.5 * max(noise, abs(rounded.mean() - exact.mean()))
