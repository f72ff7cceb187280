"""The cross-entropy of the trained positions without ever holding their logits.

The gradient of the loss by a hidden state is sum_v softmax(l)_v W_v - W_label: an attention over the rows of the head. So it
is computed like flash attention, tile of the vocabulary by tile, with a running softmax: each tile of the head is
dequantized once, multiplied twice, and forgotten. A 128k vocabulary costs one tile of logits instead of gigabytes.
"""

from __future__ import annotations

import torch

from kernels.loss import RunningSoftmax
from lowvram_tuner.memory.estimate import LOSS_ROWS, VOCABULARY_TILE
from lowvram_tuner.quant.linear import QuantLinear
from lowvram_tuner.quant.spec import Scratch


class Head:
    """The output matrix [V, H], packed or plain, in tiles of rows."""

    def __init__(self, packed: QuantLinear | None, table: torch.Tensor | None, scratch: Scratch, cap: float = 0.0) -> None:
        self.packed = packed if packed is not None and packed.format.spec.method != "none" else None
        self.table = table if packed is None or self.packed is not None else packed.packed["weight"]
        self.scratch, self.cap = scratch, cap

    def tiles(self, dtype: torch.dtype):
        """(first row, W rows [v, H]) over the vocabulary; each tile overwrites the one before when packed."""
        if self.packed is None:
            for start in range(0, self.table.shape[0], VOCABULARY_TILE):
                yield start, self.table[start : start + VOCABULARY_TILE]
            return
        base, cols = self.packed, self.packed.in_features
        for start, stop in self.scratch.tiles(base.out_features, cols, dtype, base.format.row_tile):
            yield start, base.format.dequantize(base.packed, self.scratch.tile(stop - start, cols, dtype), start)


def head_loss(hidden: torch.Tensor, labels: torch.Tensor, head: Head) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum of the losses (fp32 scalar) and its gradient by `hidden`.

    hidden: [M, H] after the final norm; labels: int64 [M], negative where a row only fills up. The gradient is [M, H] in
    hidden's dtype, zero in such rows.
    """
    state = RunningSoftmax(labels, head.cap)
    total = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
    picked = torch.zeros_like(hidden)
    for start, w in head.tiles(hidden.dtype):
        for rows in _row_tiles(hidden):
            weights = hidden[rows] @ w.t()  # [m, v] logits, then their exponentials
            rescale = state.add(weights, start, rows)
            total[rows].mul_(rescale).add_(weights @ w)
            del weights  # else two tiles are alive while the next one is computed
        _pick(picked, labels, w, start)
    counted = (labels >= 0)[:, None]
    gradient = total.div_(state.total[:, None]).sub_(picked.float() * state.slope[:, None]).mul_(counted)
    return state.losses().sum(), gradient.to(hidden.dtype)


def head_losses(hidden: torch.Tensor, labels: torch.Tensor, head: Head) -> torch.Tensor:
    """The loss of each row, fp32 [M], zero in rows that only fill up; arguments as for `head_loss`."""
    state = RunningSoftmax(labels, head.cap)
    for start, w in head.tiles(hidden.dtype):
        for rows in _row_tiles(hidden):
            state.add(hidden[rows] @ w.t(), start, rows)
    return state.losses()


def _row_tiles(hidden: torch.Tensor) -> list[slice]:
    return [slice(begin, begin + LOSS_ROWS) for begin in range(0, hidden.shape[0], LOSS_ROWS)]


def _pick(picked: torch.Tensor, labels: torch.Tensor, w: torch.Tensor, start: int) -> None:
    """picked[i] = W[label_i] for the rows whose label lies in this tile; no host synchronization."""
    index = labels - start
    inside = (index >= 0) & (index < w.shape[0])
    rows = torch.index_select(w, 0, index.clamp(0, w.shape[0] - 1))
    torch.where(inside[:, None], rows, picked, out=picked)
