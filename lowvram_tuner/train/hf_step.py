"""One micro-batch through any decoder that transformers builds: the path for families `fused_layer.py` does not know.

transformers' own forward runs under its gradient checkpointing; the loss is still taken tile by tile over the trained
positions only (`loss.py`), so that no logits exist. Slower than the fused path, and the same results.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lowvram_tuner.lora.adapter import Adapter
from lowvram_tuner.models.load import Loaded
from lowvram_tuner.train.loss import Head, head_loss, head_losses
from lowvram_tuner.train.step import Batch


class TransformersStep:
    """`FusedStep`'s interface over a transformers model with an adapter."""

    def __init__(self, loaded: Loaded, adapter: Adapter | None) -> None:
        self.loaded, self.inner, self.ring = loaded, loaded.model.model, loaded.ring
        cap = getattr(loaded.config, "final_logit_softcapping", None) or 0.0
        self.logit_scale = _logit_scale(loaded.config)
        self.head = Head(loaded.head, self.inner.embed_tokens.weight, loaded.scratch, cap)
        loaded.model.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": True})

    def accumulate(self, batches: Batch | Sequence[Batch], scale: torch.Tensor) -> torch.Tensor:
        """Adds scale x the gradient of the summed loss to the adapter's gradients. Returns the sum of losses."""
        return sum(self._pass(batch, scale) for batch in ([batches] if isinstance(batches, Batch) else batches))

    def release(self) -> bool:
        """`CapturedStep.release`: nothing is held between passes."""
        return False

    def _pass(self, batch: Batch, scale: torch.Tensor) -> torch.Tensor:
        self.loaded.model.train()
        with torch.enable_grad():
            rows = self._rows(batch, requires_grad=True)
        total, gradient = head_loss(rows.detach() * self.logit_scale, batch.labels, self.head)
        rows.backward(gradient * (scale * self.logit_scale))
        return total

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> torch.Tensor:
        """The loss of each of the batch's `targets`, fp32 [M], zero where one only fills up."""
        self.loaded.model.eval()
        return head_losses(self._rows(batch, False) * self.logit_scale, batch.labels, self.head)

    def _rows(self, batch: Batch, requires_grad: bool) -> torch.Tensor:
        """Final hidden states [M, H] of the trained positions. Restarting positions tell transformers where examples end."""
        x = self.inner.embed_tokens(batch.input_ids[None]).requires_grad_(requires_grad)
        out = self.inner(inputs_embeds=x, position_ids=batch.position_ids[None], use_cache=False).last_hidden_state[0]
        return torch.index_select(out, 0, batch.targets)


def _logit_scale(config: object) -> float:
    """What some families multiply their logits by (Cohere) or divide them by (Granite)."""
    return (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
