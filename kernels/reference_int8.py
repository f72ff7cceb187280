"""LLM.int8 rows in plain torch: W[o, i] = q[o, i] * SCB[o] / 127."""

from __future__ import annotations

import torch

CHUNK = 1 << 18


def quantize(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """q = round(127 * W / SCB), SCB = max |W| of a row. weight: fp32 [out, in], finite. An all-zero row has SCB 0."""
    scb = weight.abs().amax(1)
    factor = torch.where(scb == 0, 0.0, 127.0 / scb)
    return {"qweight": (weight * factor.unsqueeze(1)).round_().to(torch.int8), "SCB": scb}


def dequantize(qweight: torch.Tensor, scb: torch.Tensor, out: torch.Tensor, row_start: int = 0) -> torch.Tensor:
    """out[r, :] = W[row_start + r, :] in fp32, rounded once to out's dtype. Returns out."""
    step = max(1, CHUNK // out.shape[1])
    for start in range(0, len(out), step):
        piece = out[start : start + step]
        rows = slice(row_start + start, row_start + start + len(piece))
        piece.copy_(qweight[rows].float().mul_(scb[rows].unsqueeze(1)).div_(127.0))
    return out
