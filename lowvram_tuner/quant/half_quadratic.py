"""The half-quadratic solver of HQQ, from its equations (https://mobiusml.github.io/hqq_blog/).

    argmin over z of  phi(W / s - (q - z)),   q = round(W / s + z),   phi = sum |.|^p with p < 1

With an auxiliary error E the problem splits into two that have closed forms, solved in turn while beta grows:

    E = argmin phi(E) + beta/2 ||E - (W / s - (q - z))||^2      (generalized soft thresholding)
    z = mean of  q - (W / s - E)  over the group

Errors are in steps of the scale, so that beta means the same whatever the size of the weights (in the paper's own units an
ordinary weight's errors all fall below the threshold). A group keeps the best zero it has seen, so that more iterations
never make it worse.
"""

from __future__ import annotations

import torch

NORM = 0.7
BETA = 10.0
GROWTH = 1.01
ITERATIONS = 20
CHUNK = 1 << 22  # values solved at a time: bounds the fp32 working memory


def solve(groups: torch.Tensor, bits: int, dtype: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """groups: fp32 [n, size], finite. Returns codes uint8 [n, size], scales and zeros [n] in `dtype`, W = scale (q - zero)."""
    codes = torch.empty(groups.shape, dtype=torch.uint8, device=groups.device)
    scales = torch.empty(len(groups), dtype=getattr(torch, dtype), device=groups.device)
    zeros = torch.empty_like(scales)
    step = max(1, CHUNK // groups.shape[1])
    for start in range(0, len(groups), step):
        part = slice(start, start + step)
        codes[part], scales[part], zeros[part] = _solve(groups[part], 2**bits - 1, scales.dtype)
    return codes, scales, zeros


def _solve(w: torch.Tensor, top: int, dtype: torch.dtype):
    low, high = w.amin(1, keepdim=True), w.amax(1, keepdim=True)
    # A group of equal values keeps them exactly at code 0 (scale 1, zero -value); tiny scales would be lost in 16 bits.
    scale = torch.where(high > low, (high - low) / top, 1.0).clamp_(min=2.0**-20).to(dtype).float()
    zero = -low / scale
    y = w / scale
    best_zero, best_error, beta = zero, torch.full_like(zero, torch.inf), BETA
    for _ in range(ITERATIONS):
        zero = zero.to(dtype).float()
        q = _codes(y, zero, top)
        error = y - q + zero
        size = error.abs()
        norm = size.pow(NORM).sum(1, keepdim=True)
        best_zero = torch.where(norm < best_error, zero, best_zero)
        best_error = torch.minimum(norm, best_error)
        kept = (size - size.pow(NORM - 1) / beta).clamp_(min=0).mul_(error.sign())
        zero = (q - y + kept).mean(1, keepdim=True)
        beta *= GROWTH
    return _codes(y, best_zero, top).to(torch.uint8), scale.squeeze(1).to(dtype), best_zero.squeeze(1).to(dtype)


def _codes(y: torch.Tensor, zero: torch.Tensor, top: int) -> torch.Tensor:
    return (y + zero).round_().clamp_(0, top)
