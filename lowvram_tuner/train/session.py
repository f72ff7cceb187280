"""Everything a run needs in memory, built from a plan: model, adapter, optimizer, step.

A session can be taken down and built again under a leaner plan, with the training state carried over: that is what happens
when the card runs out of memory in spite of the plan.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lowvram_tuner.config import ConfigError, TrainConfig
from lowvram_tuner.hardware.card import process_bytes, read_card
from lowvram_tuner.hardware.ram import read_ram
from lowvram_tuner.lora.adapter import Adapter, attach, load_adapter, load_state
from lowvram_tuner.memory.allocator import cap_allocator
from lowvram_tuner.memory.calibrate import measure
from lowvram_tuner.memory.plan import GB, Budget, Plan, plan_run
from lowvram_tuner.memory.reading import plan_evaluation
from lowvram_tuner.models.hub import find_shape
from lowvram_tuner.models.kept import as_stored
from lowvram_tuner.models.load import Loaded, load_model, reading_plan, spec_for
from lowvram_tuner.models.precision import pick_device, pick_dtype
from lowvram_tuner.train.fused_layer import supports
from lowvram_tuner.train.graph import CapturedStep
from lowvram_tuner.train.hf_step import TransformersStep
from lowvram_tuner.train.optimizer import Optimizer
from lowvram_tuner.train.step import FusedStep

LEANER = 0.93  # a plan that ran out of memory is made again for this share of what it allocated


@dataclass
class Session:
    """A run's working parts."""

    config: TrainConfig
    plan: Plan
    device: torch.device
    loaded: Loaded
    adapter: Adapter
    optimizer: Optimizer
    step: CapturedStep | TransformersStep

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Adapter and optimizer as CPU tensors, and the optimizer's numbers."""
        tensors = {f"adapter.{k}": v for k, v in self.adapter.state().items()}
        tensors |= {k: v.detach().cpu().clone() for k, v in self.optimizer.tensors().items()}
        return tensors, self.optimizer.numbers()

    def restore(self, tensors: dict[str, torch.Tensor], numbers: dict[str, Any]) -> None:
        """The inverse of `state`."""
        load_state(self.adapter, {k.removeprefix("adapter."): v for k, v in tensors.items() if k.startswith("adapter.")})
        self.optimizer.restore(tensors, numbers)


def make_plan(config: TrainConfig, limit: int | None = None) -> Plan:
    """The plan for this machine as it is now, for `limit` bytes at most. ConfigError when nothing fits."""
    config = as_stored(config)
    device = pick_device()
    card = read_card() if device.type == "cuda" else None
    if card:
        measure(card, pick_dtype(device, config.precision))
        card = read_card()
        own = process_bytes(os.getpid())  # a plan counts all of this process, so what it holds already is free to it
        card = replace(card, free_bytes=card.free_bytes + own, used_bytes=card.used_bytes - own)
    budget = Budget.of(config, card, read_ram())
    if limit is not None:
        budget = replace(budget, limit_bytes=min(limit, budget.limit_bytes))
    plan = plan_run(config, find_shape(config.model), budget)
    if not plan.fits:
        offers = "; ".join(r.label for r in plan.remedies) or "choose a smaller model"
        need, have = plan.process_bytes / GB, budget.limit_bytes / GB
        raise ConfigError(f"this run needs {need:.1f} GB and may use {have:.1f} GB; what helps: {offers}.")
    return plan


def build(config: TrainConfig, plan: Plan, progress: Callable[[str, float, float], None] | None = None) -> Session:
    """Loads the model, attaches the adapter and prepares the step."""
    device = pick_device()
    dtype = pick_dtype(device, config.precision)
    cap_allocator(device, plan)
    loaded = load_model(config.model, spec_for(config), plan, device, dtype, progress)
    adapter = attach(loaded.model, config, device, dtype)
    optimizer = Optimizer(adapter, config, plan.optimizer_bits, plan.optimizer_on_host)
    if supports(loaded.model, config.max_seq_length) and config.lora_dropout == 0:
        tokens = config.micro_batch_size * config.max_seq_length
        step: Any = CapturedStep(FusedStep(loaded, adapter, plan, tokens), device)
    else:
        step = TransformersStep(loaded, adapter)
    return Session(config, plan, device, loaded, adapter, optimizer, step)


def build_to_fit(config: TrainConfig, progress: Callable[[str, float, float], None] | None = None) -> Session:
    """Plans and builds; where the card is out of memory already while loading, again with less."""
    return _build_within(config, None, progress)


def rebuild(
    session: Session, configs: Iterable[TrainConfig], limit: int, progress: Callable[[str, float, float], None] | None = None
) -> Session:
    """The same training state under a plan for at most `limit` bytes, for the first of `configs` that has one.

    The configs say the same training in ever smaller passes. `session` is taken down first, so that both never exist
    together. Raises ConfigError when none of them fits.
    """
    tensors, numbers = session.state()
    session.loaded = session.adapter = session.optimizer = session.step = None
    refused: ConfigError | None = None
    for config in configs:
        try:
            again = _build_within(config, limit, progress)
        except ConfigError as error:
            refused = error
        else:
            again.restore(tensors, numbers)
            return again
    raise refused


def less(plan: Plan) -> int:
    """The bytes to plan for after `plan` ran out of memory: less of everything but CUDA's own share."""
    context = plan.components["context"]
    return context + int((min(plan.process_bytes, plan.budget.limit_bytes) - context) * LEANER)


def _build_within(config: TrainConfig, limit: int | None, progress: Any) -> Session:
    while True:
        free_memory()
        plan = make_plan(config, limit)
        try:
            return build(config, plan, progress)
        except torch.OutOfMemoryError:
            limit = less(plan)  # what was loaded is held by the traceback, and free only after this block


def open_for_reading(config: TrainConfig, adapter: Path | None) -> tuple[FusedStep | TransformersStep, torch.device]:
    """A step that only evaluates: the model of a config, with a saved adapter when one is given."""
    device = pick_device()
    plan = reading_plan(config, device, plan_evaluation)
    cap_allocator(device, plan)
    loaded = load_model(config.model, spec_for(config), plan, device, pick_dtype(device, config.precision))
    attached = load_adapter(loaded.model, adapter) if adapter else None
    if supports(loaded.model, config.max_seq_length):
        return FusedStep(loaded, attached, plan, config.max_seq_length), device
    return TransformersStep(loaded, attached), device


def memory_now(device: torch.device, context: int) -> tuple[int, int]:
    """(now, peak) bytes of this process: on the card with CUDA's own share `context`, else in RAM."""
    if device.type != "cuda":
        import psutil

        now = psutil.Process().memory_info().rss
        return now, now
    now = process_bytes(os.getpid()) or torch.cuda.memory_reserved(device) + context
    return now, max(now, torch.cuda.max_memory_reserved(device) + context)


def free_memory() -> None:
    """Gives back what nobody holds any more, cuBLAS's workspaces too."""
    gc.collect()
    if torch.cuda.is_available():
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()
