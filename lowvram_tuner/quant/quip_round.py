"""How QuIP# rounds a weight (https://arxiv.org/abs/2402.04396): rotate, round eight columns at a time with feedback, refit.

    minimize tr((W - Q) H (W - Q).T)          H = mean of x x.T over calibration inputs

1. Random signs and Hadamard rotations make W and H incoherent: Wr = U_out^T diag(s_v) W diag(s_u) U_in, and H likewise.
2. LDLQ: with Hr = L D L^T, L unit block-lower-triangular in blocks of 8, columns are rounded from the last block to the
   first, each after adding the error of the later ones: Q_k = nearest(W_k + sum_{j > k} (W_j - Q_j) L_jk).
3. SV and SU become real numbers: given the codes, the best row scales and then the best column scales are least squares
   in the unrotated space. That lowers the error by 1 to 4 % (measured on SmolLM2-135M) and costs nothing at run time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from kernels.hadamard import rotate
from kernels.nearest_e8p import nearest, points
from lowvram_tuner.quant.spec import QuantError

if TYPE_CHECKING:
    from collections.abc import Callable

BLOCK = 8
BUFFER = 128  # columns whose errors are fed back together
SPREAD = 1.03  # root mean square of what the codebook is given
DAMPING = (0.01, 0.03, 0.1, 0.3, 1.0)  # of the mean diagonal of H, in turn until it can be factorized
RIDGE = 1e-3  # pull of the column scales towards what they were
CHUNK_BYTES = 1 << 28  # of rows rounded at a time: they do not depend on each other
SEED = 0


def solve(weight: torch.Tensor, hessian: torch.Tensor | None, residual_scale: float | None) -> dict[str, torch.Tensor]:
    """The packed tensors of `quip.Quip`. weight: [out, in]; hessian: [in, in] or None for plain rounding.

    residual_scale: None for 2 bits, else that of the second layer. Raises QuantError for values that are not finite.
    """
    weight = weight.detach().float()
    signs_u, signs_v = _signs(weight.shape[1], weight.device, SEED), _signs(weight.shape[0], weight.device, SEED + 1)
    turned = rotate((rotate(weight, True, pre=signs_u)).t().contiguous(), True, pre=signs_v).t().contiguous()
    scale = turned.square().mean().sqrt() / SPREAD
    if not torch.isfinite(scale):
        raise QuantError(f"a weight of {'x'.join(map(str, weight.shape))} holds inf or nan; it cannot be quantized.")
    scale = torch.where(scale > 0, scale, 1.0)
    lower = None if hessian is None else feedback(hessian, signs_u)
    codes, residual = _round_rows(turned / scale, lower, residual_scale)
    del turned, lower
    packed = {"codes": codes} if residual is None else {"codes": codes, "residual": residual}
    return packed | _refit(weight, hessian, packed, scale * signs_u, signs_v, residual_scale)


def feedback(hessian: torch.Tensor, signs: torch.Tensor) -> torch.Tensor:
    """L of the rotated Hessian's block factorization, fp32 [in, in]: unit blocks of 8 on the diagonal, zero above.

    Raises QuantError when H is not finite or cannot be factorized with the strongest damping.
    """
    turned = rotate(rotate(hessian.float(), True, pre=signs).t().contiguous(), True, pre=signs)
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
    for start in range(0, lower.shape[0], BLOCK):
        block = slice(start, start + BLOCK)
        lower[start:, block] = torch.linalg.solve_triangular(lower[block, block], lower[start:, block], upper=False, left=False)
    return lower


def _round_rows(
    values: torch.Tensor, lower: torch.Tensor | None, residual_scale: float | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Codes, and those of the second layer, int16 [out, in/8], of the rotated and scaled weight."""
    rounded = _rounder(residual_scale)
    step = max(BLOCK, CHUNK_BYTES // (8 * values.shape[1]))
    parts = [_round_chunk(values[start : start + step], lower, rounded) for start in range(0, values.shape[0], step)]
    codes = torch.cat([codes for codes, _ in parts])
    return codes, None if residual_scale is None else torch.cat([residual for _, residual in parts])


def _round_chunk(values: torch.Tensor, lower: torch.Tensor | None, rounded: Callable) -> tuple[torch.Tensor, torch.Tensor]:
    rows, columns = values.shape
    if lower is None:
        codes, residual, _ = rounded(values.reshape(-1, BLOCK))
        return codes.view(rows, -1), residual.view(rows, -1)
    codes = torch.empty(rows, columns // BLOCK, dtype=torch.int16, device=values.device)
    residual = torch.empty_like(codes)
    error = torch.empty_like(values)
    for last in range(columns, 0, -BUFFER):
        first = max(0, last - BUFFER)
        target = values[:, first:last] + error[:, last:] @ lower[last:, first:last]
        for start in range(last - BLOCK, first - 1, -BLOCK):
            stop = start + BLOCK
            x = target[:, start - first : stop - first] + error[:, stop:last] @ lower[stop:last, start:stop]
            column = start // BLOCK
            codes[:, column], residual[:, column], point = rounded(x)
            error[:, start:stop] = values[:, start:stop] - point
    return codes, residual


def _rounder(residual_scale: float | None) -> Callable:
    """x [n, 8] -> (codes, codes of the second layer, the values they stand for)."""

    def rounded(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        codes = nearest(x)
        point = points(codes)
        if residual_scale is None:
            return codes, codes, point
        residual = nearest((x - point) * residual_scale)
        return codes, residual, point + points(residual) / residual_scale

    return rounded


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
