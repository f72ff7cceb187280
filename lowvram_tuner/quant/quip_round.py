"""How QuIP# rounds a weight (https://arxiv.org/abs/2402.04396): rotate, round eight columns at a time with feedback, refit.

    minimize tr((W - Q) H (W - Q).T)          H = mean of x x.T over calibration inputs

1. Random signs and Hadamard rotations make W and H incoherent: Wr = U_out^T diag(s_v) W diag(s_u) U_in, and H likewise.
2. LDLQ: with Hr = L D L^T, L unit block-lower-triangular in blocks of 8, columns are rounded from the last block to the
   first, each after adding the error of the later ones: Q_k near W_k + sum_{j > k} (W_j - Q_j) L_jk.
   The loss is the sum of |.|^2_{D_k} over the blocks, so a beam search does better than taking the nearest point each
   time: of every row the BEAMS best beginnings are kept. (SmolLM2-135M: 4 % less loss with 4, 6 % with 8, at twice the time.)
3. SV and SU become real numbers: given the codes, the best row scales and then the best column scales are least squares
   in the unrotated space. That lowers the loss by 1 to 4 % (SmolLM2-135M) and costs nothing at run time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from kernels.hadamard import rotate
from kernels.nearest_e8p import nearest, nearest_of_each_shift, points
from lowvram_tuner.quant.spec import QuantError

if TYPE_CHECKING:
    from collections.abc import Callable

BLOCK = 8
BUFFER = 128  # columns whose errors are fed back together
BEAMS = 8  # beginnings of a row that are followed
SPREAD = {False: 1.0, True: 0.93}  # root mean square of what the codebook is given, without and with a second layer
DAMPING = (0.01, 0.03, 0.1, 0.3, 1.0)  # of the mean diagonal of H, in turn until it can be factorized
RIDGE = 1e-3  # pull of the column scales towards what they were
CHUNK_BYTES = 1 << 28  # of errors of rows rounded at a time: rows do not depend on each other
SEED = 0


def solve(weight: torch.Tensor, hessian: torch.Tensor | None, residual_scale: float | None) -> dict[str, torch.Tensor]:
    """The packed tensors of `quip.Quip`. weight: [out, in]; hessian: [in, in] or None for plain rounding.

    residual_scale: None for 2 bits, else that of the second layer. Raises QuantError for values that are not finite.
    """
    weight = weight.detach().float()
    signs_u, signs_v = _signs(weight.shape[1], weight.device, SEED), _signs(weight.shape[0], weight.device, SEED + 1)
    turned = rotate((rotate(weight, True, pre=signs_u)).t().contiguous(), True, pre=signs_v).t().contiguous()
    scale = turned.square().mean().sqrt() / SPREAD[residual_scale is not None]
    if not torch.isfinite(scale):
        raise QuantError(f"a weight of {'x'.join(map(str, weight.shape))} holds inf or nan; it cannot be quantized.")
    scale = torch.where(scale > 0, scale, 1.0)
    factors = None if hessian is None else factorized(hessian, signs_u)
    codes, residual = _round_rows(turned / scale, factors, residual_scale)
    del turned, factors
    packed = {"codes": codes} if residual is None else {"codes": codes, "residual": residual}
    return packed | _refit(weight, hessian, packed, scale * signs_u, signs_v, residual_scale)


def factorized(hessian: torch.Tensor, signs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(L, C) of the rotated Hessian L D L^T, where D_k = C_k C_k^T. L: fp32 [in, in], C: [in/8, 8, 8].

    Raises QuantError when H is not finite or cannot be factorized with the strongest damping.
    """
    turned = rotate(hessian.float(), True, pre=signs).t().contiguous()
    turned = rotate(turned, True, pre=signs, out=turned)
    mean = turned.diagonal().mean()
    if not torch.isfinite(mean):
        raise QuantError(f"the calibration Hessian of {hessian.shape[0]} inputs is not finite; check the weights and the text.")
    lower, before = None, 0.0
    for damping in DAMPING:
        turned.diagonal().add_((damping - before) * mean.clamp(min=1e-30))
        before = damping
        lower, failed = torch.linalg.cholesky_ex(turned)
        if not failed and bool(torch.isfinite(lower).all()):
            break
    else:
        raise QuantError(f"the calibration Hessian of {hessian.shape[0]} inputs cannot be factorized even with damping {damping}.")
    blocks = []
    for start in range(0, lower.shape[0], BLOCK):
        block = slice(start, start + BLOCK)
        blocks.append(lower[block, block].clone())
        lower[start:, block] = torch.linalg.solve_triangular(blocks[-1], lower[start:, block], upper=False, left=False)
    return lower, torch.stack(blocks)


def _round_rows(
    values: torch.Tensor, factors: tuple[torch.Tensor, torch.Tensor] | None, residual_scale: float | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Codes, and those of the second layer, int16 [out, in/8], of the rotated and scaled weight."""
    rows, columns = values.shape
    if factors is None:
        found = _with_residual(values.reshape(-1, BLOCK), nearest, residual_scale)[0].view(rows, -1, 2)
    else:
        step = max(BLOCK, CHUNK_BYTES // (4 * BEAMS * columns))
        found = torch.cat([_search(values[start : start + step], *factors, residual_scale) for start in range(0, rows, step)])
    codes = found[..., 0].contiguous()
    return codes, None if residual_scale is None else found[..., 1].contiguous()


def _search(values: torch.Tensor, lower: torch.Tensor, blocks: torch.Tensor, residual_scale: float | None) -> torch.Tensor:
    """The codes of both layers, int16 [rows, groups, 2], that a beam search from the last block to the first finds.

    `error` and `codes` hold each beam's columns so far. Within a buffer of columns only the beams' own parts are reordered;
    `origin` says which beam at the buffer's start each comes from.
    """
    rows, columns = values.shape
    error = values.new_empty(rows, 1, 0)
    codes = torch.empty(rows, 1, 0, 2, dtype=torch.int16, device=values.device)
    cost = values.new_zeros(rows, 1)
    for last in range(columns, 0, -BUFFER):
        first = max(0, last - BUFFER)
        target = values[:, None, first:last] + error @ lower[last:, first:last]  # [rows, beams, buffer]
        near, near_codes = error[..., :0], codes[:, :, :0]
        origin = torch.arange(error.shape[1], device=values.device).expand(rows, -1)
        for start in range(last - BLOCK, first - 1, -BLOCK):
            stop = start + BLOCK
            x = _take(target[..., start - first : stop - first], origin) + near @ lower[stop:last, start:stop]
            options, points_ = _with_residual(x.reshape(-1, BLOCK), nearest_of_each_shift, residual_scale)
            options, points_ = options.view(rows, -1, 2), points_.view(rows, -1, BLOCK)  # [rows, 2 beams, .]
            away = x.repeat_interleave(2, 1) - points_
            costs = cost.repeat_interleave(2, 1) + (away @ blocks[start // BLOCK]).square().sum(2)
            cost, chosen = costs.topk(min(BEAMS, costs.shape[1]), 1, largest=False)
            parent = chosen // 2
            origin = origin.gather(1, parent)
            near = torch.cat([values[:, None, start:stop] - _take(points_, chosen), _take(near, parent)], 2)
            near_codes = torch.cat([_take(options, chosen).unsqueeze(2), _take(near_codes, parent)], 2)
        error = torch.cat([near, _take(error, origin)], 2)
        codes = torch.cat([near_codes, _take(codes, origin)], 2)
    return codes[torch.arange(rows, device=values.device), cost.argmin(1)]


def _take(values: torch.Tensor, beams: torch.Tensor) -> torch.Tensor:
    """values[r, beams[r, b], ...] for [rows, beams, ...]."""
    return values[torch.arange(values.shape[0], device=values.device)[:, None], beams]


def _with_residual(x: torch.Tensor, nearest_codes: Callable, residual_scale: float | None) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes of both layers [n, ..., 2], the values they stand for [n, ..., 8]) near x [n, 8], for each code found."""
    codes = nearest_codes(x)
    point = points(codes)
    if residual_scale is None:
        return torch.stack([codes, codes], -1), point
    rest = (x.view(-1, *[1] * (codes.dim() - 1), BLOCK) - point) * residual_scale
    residual = nearest(rest.view(-1, BLOCK)).view(codes.shape)
    return torch.stack([codes, residual], -1), point + points(residual) / residual_scale


def _refit(
    weight: torch.Tensor, hessian: torch.Tensor | None, packed: dict[str, torch.Tensor],
    su: torch.Tensor, sv: torch.Tensor, residual_scale: float | None,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """SU [in] and SV [out], fp32, from their first guesses. Both are fp16 numbers times a power of two, to be stored so."""
    from kernels.e8p import dequantize

    dense = dequantize(packed["codes"], torch.empty_like(weight), packed.get("residual"), residual_scale or 1.0)
    dense = rotate(rotate(dense.t().contiguous()).t().contiguous())
    dense *= su
    dense *= sv[:, None]
    moment = weight if hessian is None else weight @ hessian.float()
    rows = _row_scales(dense, moment, hessian)
    dense *= rows[:, None]
    columns = _column_scales(dense, moment, hessian)
    stored = in_half(su * columns)
    dense *= stored / su
    rows = rows * _row_scales(dense, moment, hessian)
    return {"SU": stored, "SV": (sv * rows).half().float()}


def _row_scales(dense: torch.Tensor, moment: torch.Tensor, hessian: torch.Tensor | None) -> torch.Tensor:
    """The factor of each row of `dense` that brings it nearest to W; moment = W H."""
    image = dense if hessian is None else dense @ hessian.float()
    size = (image * dense).sum(1)
    return torch.where(size > 0, (moment * dense).sum(1) / size, 1.0).clamp(0.0, 4.0)


def _column_scales(dense: torch.Tensor, moment: torch.Tensor, hessian: torch.Tensor | None) -> torch.Tensor:
    """The same for columns, which H couples: (dense^T dense * H) d = diag(dense^T W H)."""
    want = (moment * dense).sum(0)
    if hessian is None:
        size = dense.square().sum(0)
        return torch.where(size > 0, want / size, 1.0).clamp(0.0, 4.0)
    system = (dense.t() @ dense).mul_(hessian)
    ridge = RIDGE * system.diagonal().mean().clamp(min=1e-30)
    system.diagonal().add_(ridge)
    factor, failed = torch.linalg.cholesky_ex(system)
    if failed:
        return torch.ones_like(want)
    return torch.cholesky_solve((want + ridge)[:, None], factor)[:, 0].clamp(0.0, 4.0)


def in_half(values: torch.Tensor) -> torch.Tensor:
    """`values` rounded to fp16 numbers times the power of two nearest to their typical size, so that nothing underflows."""
    scale = half_scale(values)
    return (values / scale).half().float() * scale


def half_scale(values: torch.Tensor) -> torch.Tensor:
    """That power of two, a 0-d tensor; 1 where all values are 0."""
    typical = values.abs().median()
    return torch.where(typical > 0, torch.exp2(torch.round(torch.log2(typical))), 1.0)


def _signs(n: int, device: torch.device, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randint(0, 2, (n,), generator=generator) * 2 - 1).float().to(device)
