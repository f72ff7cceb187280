"""The adapter's optimizer: AdamW over the flat buffer, clipping and loss scaling without a host synchronization."""

from __future__ import annotations

import math

import torch

from kernels.adamw import adamw, compress, expand, make_state
from lowvram_tuner.config import TrainConfig
from lowvram_tuner.lora.adapter import Adapter


class Optimizer:
    """Steps the adapter. For fp16 it keeps a dynamic loss scale: doubled after 1000 good steps, halved after a bad one."""

    def __init__(self, adapter: Adapter, config: TrainConfig, bits: int = 32, on_host: bool = False) -> None:
        self.adapter, self.config = adapter, config
        self.state = make_state(adapter.parameters, bits, pinned=on_host and adapter.parameters.is_cuda)
        self.steps, self.good_steps = 0, 0
        self.loss_scale = 2.0**14 if adapter.parameters.dtype == torch.float16 else 1.0

    def step(self, learning_rate: float) -> torch.Tensor:
        """Clips, updates, and clears the gradients. Returns the gradient's norm before clipping (device scalar)."""
        gradients = self.adapter.gradients
        norm = torch.linalg.vector_norm(gradients, dtype=torch.float32) / self.loss_scale
        limit = self.config.max_grad_norm
        factor = torch.ones_like(norm) if limit == 0 else torch.clamp(limit / (norm + 1e-6), max=1.0)
        factor = torch.where(torch.isfinite(norm), factor / self.loss_scale, torch.inf)
        self.steps += 1
        adamw(
            self.adapter.parameters, gradients, self.state, factor, learning_rate, self.steps, decay=self.config.weight_decay
        )  # fmt: skip
        gradients.zero_()
        if self.adapter.parameters.dtype == torch.float16:
            self._rescale(bool(torch.isfinite(norm)))
        return norm

    def _rescale(self, good: bool) -> None:
        if not good:
            self.loss_scale, self.good_steps, self.steps = max(self.loss_scale / 2, 1.0), 0, self.steps - 1
            return
        self.good_steps += 1
        if self.good_steps == 1000:
            self.loss_scale, self.good_steps = self.loss_scale * 2, 0

    def tensors(self) -> dict[str, torch.Tensor]:
        """The state as tensors, for a checkpoint."""
        return {f"optimizer.{k}": v for k, v in self.state.items()}

    def numbers(self) -> dict[str, float]:
        """The rest of the state."""
        return {"steps": self.steps, "good_steps": self.good_steps, "loss_scale": self.loss_scale}

    def restore(self, tensors: dict[str, torch.Tensor], numbers: dict[str, float]) -> None:
        """The inverse of `tensors` and `numbers`; moments kept at other bits are expanded or rounded."""
        saved = {k.removeprefix("optimizer."): v for k, v in tensors.items() if k.startswith("optimizer.")}
        for name, tensor in _as_bits(saved, "m_scale" in self.state).items():
            self.state[name].copy_(tensor)
        self.steps, self.good_steps = int(numbers["steps"]), int(numbers["good_steps"])
        self.loss_scale = float(numbers["loss_scale"])


def learning_rate(config: TrainConfig, step: int, total: int) -> float:
    """Linear warm-up over `warmup_steps`, then a cosine to a tenth of the peak at the last step. `step` counts from 0."""
    warmup = min(config.warmup_steps, total)
    if step < warmup:
        return config.learning_rate * (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, total - warmup)
    return config.learning_rate * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))


def _as_bits(saved: dict[str, torch.Tensor], eight: bool) -> dict[str, torch.Tensor]:
    """Saved moments at the width this run uses, so that a re-planned run can resume."""
    if eight == ("m_scale" in saved):
        return saved
    rest = {k: v for k, v in saved.items() if k in ("low", "master")}
    if not eight:
        m, v = expand(saved)
        return rest | {"m": m, "v": v}
    n = saved["m"].numel()
    target = {"m": torch.zeros(n, dtype=torch.int8), "v": torch.zeros(n, dtype=torch.uint8)}
    target |= {k: torch.zeros(-(-n // 256)) for k in ("m_scale", "v_scale")}
    compress(target, saved["m"], saved["v"])
    return rest | target
