"""OPTQ, the rounding of GPTQ (https://arxiv.org/abs/2210.17323), with scales searched for the error that it leaves.

    minimize tr((W - Q) H (W - Q).T) over Q on the grid        H = mean of x x.T over calibration inputs

Columns are rounded one after the other, those with the largest H[i, i] first; the error of each is pushed into the columns
not yet rounded, through the Cholesky factor U of the inverse Hessian, U.T U = (H + damping)^-1:

    e_i = (w_i - q_i) / U[i, i],    W[:, i:] -= e_i U[i, i:]

The objective then equals sum e_i^2: a column's squared error, at the moment it is rounded, times 1 / U[i, i]^2. A group's
scale and zero are searched for exactly that, first on W, then on the columns as they were when the first pass rounded them.
Groups stay in column order (no g_idx) unless desc_act asks for groups in the order of rounding. Last, codes are revisited:
each is set to the best one given all others (coordinate descent), a few times over.

Measured on linears of a 135M model in groups of 64, the error left: with scales searched for the plain squared error 1; for
1 / U[i, i]^2 0.96 (4 bits) to 0.86 (2 bits); searched a second time 0.95 to 0.83; codes revisited four times 0.90 to 0.79.
"""

from __future__ import annotations

import logging
import sys
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from lowvram_tuner.quant.spec import QuantError

if TYPE_CHECKING:
    from collections.abc import Callable

    from lowvram_tuner.quant.spec import QuantSpec

log = logging.getLogger(__name__)

BLOCK = 128  # columns rounded before their errors reach the rest
DAMPING = 0.01  # of H's mean diagonal
PASSES = 2
REVISITS = 4
SHRINKS = torch.linspace(1.0, 0.3, 60).tolist()  # a scale is tried at these shares of the group's range
SMALLEST = 2.0**-20  # a scale below it would lose its digits in fp16
SEARCH_CHUNK = 1 << 24  # values searched at a time

Codes = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def nearest(weight: torch.Tensor, spec: QuantSpec, size: int) -> Codes:
    """Round to nearest without data. weight: fp32 [out, in], finite.

    Returns (codes uint8 [out, in], scales fp32 [out, groups], zeros fp32 [out, groups], g_idx [in]).
    """
    g_idx = torch.arange(weight.shape[1], device=weight.device) // size
    scales, zeros = search(weight, torch.ones_like(weight[0]), spec, size)
    codes = _codes(weight, scales[:, g_idx], zeros[:, g_idx], spec.bits)
    return codes.to(torch.uint8), scales, zeros, g_idx


def solve(weight: torch.Tensor, hessian: torch.Tensor, spec: QuantSpec, size: int) -> Codes:
    """Rounds by OPTQ. weight: fp32 [out, in], finite; hessian: fp32 [in, in]. Returns as `nearest` does.

    Raises QuantError when H holds inf or nan, or H + damping is not positive definite.
    """
    order, upper, diagonal = _factor(hessian)
    back = torch.argsort(order)
    dead = hessian.diagonal() == 0
    w = weight.masked_fill(dead, 0.0) if dead.any() else weight  # a column whose input is always zero may be anything
    importance = 1 / upper.diagonal().square()
    if spec.desc_act:  # groups of columns that are rounded together: the whole problem in permuted columns
        grouped, importance_of, g_idx = w[:, order], importance, (torch.arange(len(order), device=w.device) // size)[back]
    else:
        grouped, importance_of, g_idx = w, importance[back], torch.arange(len(order), device=w.device) // size
    for _ in range(PASSES):
        scales, zeros = search(grouped, importance_of, spec, size)
        codes = seen = grouped = None  # of the pass before
        codes, seen = _round(w, order, upper, scales, zeros, g_idx, spec.bits)
        grouped = seen if spec.desc_act else seen[:, back]
    del upper, seen, grouped
    codes = _revisit(w, _with_diagonal(hessian.clone(), diagonal), codes[:, back], scales, zeros, g_idx, spec.bits)
    return codes.to(torch.uint8), scales, zeros, g_idx


def search(weight: torch.Tensor, importance: torch.Tensor, spec: QuantSpec, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and zeros [out, groups] with the least sum over a group's columns of importance * (w - q)^2.

    weight: fp32 [out, in]; importance: fp32 [in]. Scales are fp16 values (or of spec.scale_dtype), in fp32.
    """
    rows = max(1, SEARCH_CHUNK // weight.shape[1])
    weights = _grouped(importance.unsqueeze(0), size)
    found = [_search(_grouped(part, size), weights, spec) for part in weight.split(rows)]
    return torch.cat([s for s, _ in found]), torch.cat([z for _, z in found])


def _search(groups: torch.Tensor, weights: torch.Tensor, spec: QuantSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """groups: [rows, groups, size]; weights: [1, groups, size]."""
    top = 2**spec.bits - 1
    low, high = groups.amin(-1).clamp_(max=0), groups.amax(-1).clamp_(min=0)
    if spec.sym:
        high = torch.maximum(high, -low)
        low = -high
    best = None
    for shrink in SHRINKS:
        scale = _storable((high - low) * (shrink / top), spec)
        for zero in _zeros(low, high, shrink, scale, spec.sym, top):
            q = _codes(groups, scale.unsqueeze(-1), zero.unsqueeze(-1), spec.bits)
            error = q.sub_(zero.unsqueeze(-1)).mul_(scale.unsqueeze(-1)).sub_(groups).square_().mul_(weights).sum(-1)
            if best is None:
                best = error, scale, zero
            else:
                better = error < best[0]
                best = tuple(torch.where(better, new, old) for new, old in zip((error, scale, zero), best))
    return best[1], best[2]


def _zeros(low, high, shrink: float, scale, sym: bool, top: int) -> list[torch.Tensor]:
    """The zero points worth trying: 0 of the range kept at its share, and the range's middle put at the codes' middle."""
    if sym:
        return [torch.full_like(scale, (top + 1) // 2)]
    middle = top / 2 - (low + high) / (2 * scale)
    tried = (torch.round(-low * shrink / scale), torch.floor(middle), torch.ceil(middle))
    return [zero.clamp_(0, top) for zero in tried]


def _storable(scale: torch.Tensor, spec: QuantSpec) -> torch.Tensor:
    """The scale as it is stored, in fp32; 1 for a group of zeros."""
    scale = torch.where(scale == 0, 1.0, scale).clamp_(min=SMALLEST)
    stored = scale.to(getattr(torch, spec.scale_dtype)).float()
    if not stored.isfinite().all():
        raise QuantError(f"a weight needs the scale {float(scale.max()):.3g}, which {spec.scale_dtype} cannot hold; use bits=16.")
    return stored


def _factor(hessian: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(order of rounding [in], U in that order [in, in], the damped diagonal of H [in]).

    Of matrices as large as H, which a 7B's down has at 0.5 GB, no more are alive than have to be.
    """
    if not hessian.isfinite().all():
        raise QuantError("the calibration inputs hold inf or nan; use other calibration text or a wider precision.")
    diagonal = hessian.diagonal()
    diagonal = torch.where(diagonal == 0, 1.0, diagonal) + DAMPING * diagonal.mean()  # 0: a column without input
    order = torch.argsort(diagonal, descending=True)
    upper, failed = torch.linalg.cholesky_ex(_with_diagonal(hessian[order[:, None], order], diagonal[order]))
    if not int(failed):
        upper = torch.cholesky_inverse(upper)
        upper, failed = torch.linalg.cholesky_ex(upper, upper=True)
    if int(failed) or not upper.diagonal().isfinite().all():
        raise QuantError("the Hessian of the calibration inputs is not positive definite; it needs more damping.")
    return order, upper, diagonal


def _with_diagonal(h: torch.Tensor, diagonal: torch.Tensor) -> torch.Tensor:
    """H, whose diagonal is replaced."""
    h.diagonal().copy_(diagonal)
    return h


def _round(
    w: torch.Tensor, order: torch.Tensor, upper: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, g_idx: torch.Tensor, bits: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """One pass over the columns of w [out, in] in their order. Returns (codes, columns as they were rounded), in that order."""
    left, s, z = w.t()[order], scales.t()[g_idx[order]], zeros.t()[g_idx[order]]  # [in, out]: a column is contiguous
    codes, seen = torch.empty_like(left), torch.empty_like(left)
    round_columns, _ = _column_loops(w.device)
    for start in range(0, len(left), BLOCK):
        stop = min(start + BLOCK, len(left))
        part = slice(start, stop)
        codes[part], seen[part], errors = round_columns(left[part], s[part], z[part], upper[part, part], bits)
        left[stop:].addmm_(upper[part, stop:].t(), errors, alpha=-1)
    return codes.t(), seen.t()


def _revisit(
    w: torch.Tensor, h: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, g_idx: torch.Tensor, bits: int
) -> torch.Tensor:
    """Coordinate descent on tr(D H D.T), D = W - Q. Returns the codes [out, in].

    With all other columns fixed the best value of column i is w_i - (d_i - (D H)_i / H[i, i]).
    """
    w, q, s, z = w.t().contiguous(), codes.t().contiguous(), scales.t()[g_idx], zeros.t()[g_idx]  # [in, out]
    d = w - (q - z) * s
    _, revisit_columns = _column_loops(w.device)
    for _ in range(REVISITS):
        slope = h @ d
        for start in range(0, len(w), BLOCK):
            stop = min(start + BLOCK, len(w))
            part = slice(start, stop)
            before = d[part].clone()
            revisit_columns(w[part], s[part], z[part], h[part, part], slope[part], q[part], d[part], bits)
            slope[stop:].addmm_(h[stop:, part], d[part] - before)
    return q.t()


def _column_loops(device: torch.device) -> tuple[Callable, Callable]:
    """The loops over a block's columns: one launch each on a card that does them right, else the functions below."""
    if device.type != "cuda" or not _right_on(device):
        return round_columns, revisit_columns
    from kernels import optq_block

    return optq_block.round_columns, optq_block.revisit_columns


@lru_cache(maxsize=8)
def _right_on(device: torch.device) -> bool:
    """Whether the launches find the codes of the loops on this card, tried once on a small block."""
    from kernels import optq_block

    generator = torch.Generator().manual_seed(0)
    w, x = torch.randn(24, 8, generator=generator), torch.randn(96, 24, generator=generator)
    scale, zero, h = torch.full_like(w, 0.3), torch.full_like(w, 8.0), x.t() @ x / len(x) + torch.eye(24)
    upper = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    found = []
    for module, where in ((sys.modules[__name__], "cpu"), (optq_block, device)):
        a, b, c, factor, hessian = (t.to(where) for t in (w, scale, zero, upper, h))
        codes = module.round_columns(a, b, c, factor, 4)[0]
        d = a - (codes - c) * b
        module.revisit_columns(a, b, c, hessian, hessian @ d, codes, d, 4)
        found.append(codes.cpu())
    right = float((found[0] != found[1]).float().mean()) <= 0.02  # the border of two codes
    if not right:
        log.warning("the fast rounding of columns is wrong on this card (%s); the slower one is used.", device)
    return right


def round_columns(left: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, upper: torch.Tensor, bits: int) -> tuple[torch.Tensor, ...]:
    """As `kernels.optq_block.round_columns`."""
    left, codes, seen, errors = left.clone(), torch.empty_like(left), torch.empty_like(left), torch.empty_like(left)
    for i in range(len(left)):
        seen[i] = left[i]
        codes[i] = _codes(left[i], scale[i], zero[i], bits)
        errors[i] = (left[i] - (codes[i] - zero[i]) * scale[i]) / upper[i, i]
        left[i + 1 :].addr_(upper[i, i + 1 :], errors[i], alpha=-1)
    return codes, seen, errors


def revisit_columns(
    w: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, h: torch.Tensor, slope: torch.Tensor, codes: torch.Tensor, d: torch.Tensor, bits: int
) -> None:
    """As `kernels.optq_block.revisit_columns`."""
    slope = slope.clone()
    for i in range(len(w)):
        codes[i] = _codes(w[i] - d[i] + slope[i] / h[i, i], scale[i], zero[i], bits)
        moved = w[i] - (codes[i] - zero[i]) * scale[i] - d[i]
        d[i] += moved
        slope.addr_(h[i], moved)


def _codes(w: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, bits: int) -> torch.Tensor:
    return (w / scale).add_(zero).round_().clamp_(0, 2**bits - 1)


def _grouped(w: torch.Tensor, size: int) -> torch.Tensor:
    """[rows, in] as [rows, groups, size]; a last part of a group is filled with zeros, which cost no error."""
    return F.pad(w, (0, -w.shape[1] % size)).unflatten(1, (-1, size))
