"""One tile of the vocabulary in a running softmax: what turns the head's loss into an attention over its rows.

For each row, with logits l of the tile and the running maximum m and sum s:

    m' = max(m, max l),   l := exp(l - m'),   s' = s exp(m - m') + sum l,   rescale = exp(m - m')

After the last tile the loss is m + log s - l[label]. The tile's exponentials are the weights with which the head's rows are
summed for the gradient (`train/loss.py`). Logits are overwritten; statistics are fp32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _tile_kernel(
    l_ptr, labels_ptr, m_ptr, s_ptr, picked_ptr, rescale_ptr, slope_ptr, l_stride, start, cols, cap,
    CAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    base = l_ptr + row * l_stride
    top = tl.load(m_ptr + row)
    old = top
    for begin in range(0, cols, BLOCK):
        col = begin + tl.arange(0, BLOCK)
        x = tl.load(base + col, mask=col < cols, other=float("-inf")).to(tl.float32)
        if CAP:
            x = tl.where(col < cols, cap * (2 * tl.sigmoid(2 * x / cap) - 1), float("-inf"))
        top = tl.maximum(top, tl.max(x, 0))
    label = tl.load(labels_ptr + row) - start
    if (label >= 0) & (label < cols):
        y = tl.load(base + label).to(tl.float32)
        if CAP:
            t = 2 * tl.sigmoid(2 * y / cap) - 1
            tl.store(slope_ptr + row, 1 - t * t)
            y = cap * t
        tl.store(picked_ptr + row, y)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for begin in range(0, cols, BLOCK):
        col = begin + tl.arange(0, BLOCK)
        x = tl.load(base + col, mask=col < cols, other=float("-inf")).to(tl.float32)
        slope = 1.0
        if CAP:
            t = 2 * tl.sigmoid(2 * x / cap) - 1
            slope = 1 - t * t
            x = tl.where(col < cols, cap * t, float("-inf"))
        p = tl.exp(x - top)
        total += p
        tl.store(base + col, (p * slope).to(l_ptr.dtype.element_ty), mask=col < cols)
    rescale = tl.exp(old - top)
    tl.store(m_ptr + row, top)
    tl.store(rescale_ptr + row, rescale)
    tl.store(s_ptr + row, tl.load(s_ptr + row) * rescale + tl.sum(total, 0))


class RunningSoftmax:
    """State of M rows, all fp32 [M]: maximum, sum, the label's logit, the last rescaling, the label's soft-cap slope."""

    def __init__(self, labels: torch.Tensor, cap: float = 0.0) -> None:
        rows, device = labels.numel(), labels.device
        self.labels, self.cap = labels, cap
        self.maximum = torch.full((rows,), float("-inf"), device=device)
        self.total, self.picked, self.rescale = (torch.zeros(rows, device=device) for _ in range(3))
        self.slope = torch.ones(rows, device=device)

    def add(self, logits: torch.Tensor, start: int, rows: slice) -> torch.Tensor:
        """Adds the logits [m, v] of vocabulary [start, start + v) for a range of rows; they become exp(l - maximum) in place.

        Returns rescale [m, 1], by which what was summed for these rows so far must be multiplied.
        """
        if not logits.is_cuda:
            return self._add_on_cpu(logits, start, rows)
        stats = [t[rows] for t in (self.labels, self.maximum, self.total, self.picked, self.rescale, self.slope)]
        _tile_kernel[(logits.shape[0],)](
            logits, *stats, logits.stride(0), start, logits.shape[1], self.cap, CAP=self.cap > 0, BLOCK=2048, num_warps=8
        )
        return stats[4][:, None]

    def losses(self) -> torch.Tensor:
        """fp32 [M]: minus the log-probability of each label; 0 where the label is negative."""
        return torch.where(self.labels >= 0, self.maximum + self.total.log() - self.picked, 0.0)

    def _add_on_cpu(self, logits: torch.Tensor, start: int, rows: slice) -> torch.Tensor:
        x, labels = logits.float(), self.labels[rows] - start
        slope = None
        if self.cap:
            t = torch.tanh(x / self.cap)
            x, slope = self.cap * t, 1 - t.square()
        old = self.maximum[rows].clone()
        top = torch.maximum(old, x.amax(1))
        here = ((labels >= 0) & (labels < x.shape[1])).nonzero()[:, 0]
        self.picked[rows][here] = x[here, labels[here]]
        if slope is not None:
            self.slope[rows][here] = slope[here, labels[here]]
        rescale = torch.exp(old - top)
        p = torch.exp(x - top[:, None])
        self.maximum[rows] = top
        self.total[rows] = self.total[rows] * rescale + p.sum(1)
        logits.copy_(p if slope is None else p * slope)
        return rescale[:, None]
