"""What one micro-batch costs: memory, time, kernels. The measurement behind the README's tables and `bench`.

`random_weights` gives the model its real shape and layout with random contents, so that a 65B can be measured without one.
"""

from __future__ import annotations

import gc
import statistics
import time
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from lowvram_tuner.config import TrainConfig
from lowvram_tuner.hardware.card import read_card
from lowvram_tuner.lora.adapter import attach
from lowvram_tuner.memory.plan import GB, Plan
from lowvram_tuner.models.load import Loaded, config_values, load_model, random_model, spec_for
from lowvram_tuner.models.precision import pick_device, pick_dtype
from lowvram_tuner.train import profile
from lowvram_tuner.train.fused_layer import supports
from lowvram_tuner.train.graph import CapturedStep
from lowvram_tuner.train.hf_step import TransformersStep
from lowvram_tuner.train.optimizer import Optimizer
from lowvram_tuner.train.session import cap_allocator, make_plan, memory_now
from lowvram_tuner.train.step import FusedStep, to_batch

WARM_UP = 3  # the first pass runs eagerly, the second is captured


def bench(
    config: TrainConfig, steps: int = 10, random_weights: bool = False, captured: bool = True, profiled: bool = True
) -> dict[str, Any]:
    """Trains `steps` micro-batches of random tokens at full length, every position a target; where several go through a layer
    together, as many times so many, and each counts its share. Returns `bench`'s JSON keys.

    process_gb: what the driver counts for the card since the start; context_gb: its share beyond the allocator's, CUDA's own.
    Without a card all memory is the process's, in RAM. Without `profiled` the keys about kernels are zero, which saves seconds.
    """
    device = pick_device()
    used_before = _used_bytes(device) if device.type == "cuda" else 0
    plan = make_plan(replace(config, packing=False))  # every row is one example
    cap_allocator(device, plan)
    started = time.perf_counter()
    loaded = _load(config, plan, device, random_weights)
    _synchronize(device)
    load_s, load_peak = time.perf_counter() - started, _peak(device)
    adapter = attach(loaded.model, config, device, loaded.dtype)
    optimizer = Optimizer(adapter, config, plan.optimizer_bits, plan.optimizer_on_host)
    tokens = config.micro_batch_size * config.max_seq_length
    if supports(loaded.model, config.max_seq_length):
        step = CapturedStep(FusedStep(loaded, adapter, plan, tokens), device)
        step.enabled = step.enabled and captured
    else:
        step = TransformersStep(loaded, adapter)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    times, losses, process = [], [], 0
    vocabulary = min(loaded.model.config.vocab_size, 30000)
    for index in range(steps + WARM_UP):
        batches = [_random_batch(config, vocabulary, index * plan.together + i, device) for i in range(plan.together)]
        _synchronize(device)
        begin = time.perf_counter()
        loss = step.accumulate(batches, optimizer.loss_scale / (tokens * plan.together))
        optimizer.step(config.learning_rate)
        _synchronize(device)
        times.append((time.perf_counter() - begin) / plan.together)
        losses.append(float(loss) / sum(b.labels.ge(0).sum().item() for b in batches))
        process = max(process, _used_bytes(device) - used_before)
    step_s = statistics.median(times[WARM_UP:])
    measured = profiled and device.type == "cuda"
    recorded = profile.record(lambda: (step.accumulate(batches, 1.0 / tokens), optimizer.step(0.0))) if measured else []
    kernels = profile.summary(recorded, step_s * plan.together * 1e3)
    peak = _peak(device)
    reserved = torch.cuda.max_memory_reserved(device) if device.type == "cuda" else peak
    return {
        "peak_allocated_gb": peak / GB,
        "peak_reserved_gb": reserved / GB,
        "process_gb": process / GB,
        "context_gb": (process - reserved) / GB,
        "predicted_peak_gb": plan.peak_bytes / GB,
        "predicted_process_gb": plan.process_bytes / GB,
        "step_ms": step_s * 1e3,
        "tokens_per_s": tokens / step_s,
        "gpu_ms": kernels["gpu_ms"],
        "gpu_busy_share": kernels["busy_share"],
        "kernels": kernels["kernels"],
        "load_s": load_s,
        "load_peak_gb": load_peak / GB,
        "loss_first": losses[0],
        "loss_last": losses[-1],
        "captured": bool(getattr(step, "graphs", None)),
        "capture_failed": getattr(step, "failed", ""),
        "profile": kernels,
        "plan": plan.to_dict() | {"components": plan.components, "fits": plan.fits, "step_s": plan.step_s},
    }


def _load(config: TrainConfig, plan: Plan, device: torch.device, random_weights: bool) -> Loaded:
    spec, dtype = spec_for(config), pick_dtype(device, config.precision)
    if random_weights:
        return random_model(config_values(config), spec, plan, device, dtype)
    return load_model(config.model, spec, plan, device, dtype)


def _random_batch(config: TrainConfig, vocabulary: int, index: int, device: torch.device):
    """A full micro-batch: every row one example of the whole length."""
    rows, length = config.micro_batch_size, config.max_seq_length
    ids = np.random.default_rng(index).integers(5, vocabulary, rows * length)
    labels = np.where(np.arange(rows * length) % length == length - 1, -100, np.roll(ids, -1))
    flat = SimpleNamespace(
        input_ids=ids, labels=labels, position_ids=np.tile(np.arange(length), rows),
        cu_seqlens=np.arange(0, rows * length + 1, length, dtype=np.int32),
        tokens=rows * length,
    )  # fmt: skip
    return to_batch(flat, device, length)


def _peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _used_bytes(device)


def _used_bytes(device: torch.device) -> int:
    """Of the card, by every program; without one this process's RAM."""
    if device.type != "cuda":
        return memory_now(device, 0)[0]
    card = read_card()
    return card.used_bytes if card else 0


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
