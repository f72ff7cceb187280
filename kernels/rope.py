"""Rotary position embedding of q and k inside the fused [q | k | v] rows, with Qwen3's per-head RMSNorm where a model has it.

    y[i] = x[i] cos[i] - x[i + d/2] sin[i],   y[i + d/2] = x[i + d/2] cos[i] + x[i] sin[i],   i < d/2

(https://arxiv.org/abs/2104.09864 in the half-split form of Llama.) The gradient is the rotation by the negative angle.
Backward gathers attention's separate gradients of q, k and v into one [T, Q + 2 KV] matrix on the way.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

HEADS = 8  # a program: with one, moving 256 bytes, the card is busy starting programs


@triton.jit
def _forward_kernel(
    x_ptr, y_ptr, cos_ptr, sin_ptr, qw_ptr, kw_ptr, x_stride, y_stride, cos_stride, q_heads, heads, eps,
    D: tl.constexpr, HALF: tl.constexpr, NORM: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    i = tl.arange(0, HALF)[None, :]
    mask = (i < D // 2) & (head < heads)
    place = row * x_stride + head * D + i
    a = tl.load(x_ptr + place, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(x_ptr + place + D // 2, mask=mask, other=0.0).to(tl.float32)
    if NORM:
        w_ptr = tl.where(head < q_heads, qw_ptr, kw_ptr)
        rstd = 1.0 / tl.sqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / D + eps)[:, None]
        a *= rstd * tl.load(w_ptr + i, mask=mask, other=0.0).to(tl.float32)
        b *= rstd * tl.load(w_ptr + i + D // 2, mask=mask, other=0.0).to(tl.float32)
    cos = tl.load(cos_ptr + row * cos_stride + i, mask=i < D // 2, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + row * cos_stride + i, mask=i < D // 2, other=0.0).to(tl.float32)
    target = row * y_stride + head * D + i
    tl.store(y_ptr + target, (a * cos - b * sin).to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(y_ptr + target + D // 2, (b * cos + a * sin).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _backward_kernel(
    gq_ptr, gk_ptr, gv_ptr, x_ptr, g_ptr, cos_ptr, sin_ptr, qw_ptr, kw_ptr, x_stride, cos_stride, q_heads, kv_heads, eps,
    D: tl.constexpr, HALF: tl.constexpr, NORM: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    i = tl.arange(0, HALF)[None, :]
    turned = head < q_heads + kv_heads  # q and k; v is only moved
    mask = (i < D // 2) & (head < q_heads + 2 * kv_heads)
    source = tl.where(turned, gk_ptr + (row * kv_heads + head - q_heads) * D, gv_ptr + (row * kv_heads + head - q_heads - kv_heads) * D)
    source = tl.where(head < q_heads, gq_ptr + (row * q_heads + head) * D, source)
    a = tl.load(source + i, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(source + i + D // 2, mask=mask, other=0.0).to(tl.float32)
    cos = tl.load(cos_ptr + row * cos_stride + i, mask=i < D // 2, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + row * cos_stride + i, mask=i < D // 2, other=0.0).to(tl.float32)
    ga = a * cos + b * sin
    gb = b * cos - a * sin
    if NORM:
        place, here = row * x_stride + head * D + i, mask & turned
        xa = tl.load(x_ptr + place, mask=here, other=0.0).to(tl.float32)
        xb = tl.load(x_ptr + place + D // 2, mask=here, other=0.0).to(tl.float32)
        w_ptr = tl.where(head < q_heads, qw_ptr, kw_ptr)
        ga *= tl.load(w_ptr + i, mask=here, other=0.0).to(tl.float32)
        gb *= tl.load(w_ptr + i + D // 2, mask=here, other=0.0).to(tl.float32)
        rstd = 1.0 / tl.sqrt((tl.sum(xa * xa, 1) + tl.sum(xb * xb, 1)) / D + eps)[:, None]
        dot = (tl.sum(ga * xa, 1) + tl.sum(gb * xb, 1))[:, None] * rstd * rstd / D
        ga = rstd * (ga - xa * dot)
        gb = rstd * (gb - xb * dot)
    target = (row * (q_heads + 2 * kv_heads) + head) * D + i
    tl.store(g_ptr + target, tl.where(turned, ga, a).to(g_ptr.dtype.element_ty), mask=mask)
    tl.store(g_ptr + target + D // 2, tl.where(turned, gb, b).to(g_ptr.dtype.element_ty), mask=mask)


class HeadNorm:
    """Qwen3's RMSNorm of each head of q and k: weights [head_dim] and eps."""

    def __init__(self, q_weight: torch.Tensor, k_weight: torch.Tensor, eps: float) -> None:
        self.q_weight, self.k_weight, self.eps = q_weight, k_weight, eps


def rope(qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, heads: int, kv_heads: int, norm: HeadNorm | None = None) -> torch.Tensor:
    """Rotated q and k as [T, (heads + kv_heads) d]: in place (a view of qkv) without `norm`, a new tensor with it.

    qkv: [T, (heads + 2 kv_heads) d] contiguous; cos, sin: [T, d] (only the first half of the columns is read).
    """
    t, d = qkv.shape[0], qkv.shape[1] // (heads + 2 * kv_heads)
    rotated = qkv[:, : (heads + kv_heads) * d]
    out = rotated if norm is None else torch.empty(rotated.shape, dtype=qkv.dtype, device=qkv.device)
    if not qkv.is_cuda:
        x = rotated.view(t, heads + kv_heads, d).float()
        if norm is not None:
            x = x * _rstd(x, norm) * _head_weights(norm, heads, kv_heads)
        out.view(t, heads + kv_heads, d).copy_(_rotate(x, cos, sin, 1.0))
        return out
    half = triton.next_power_of_2(d // 2)
    weights = (norm.q_weight, norm.k_weight, norm.eps) if norm else (qkv, qkv, 0.0)
    _forward_kernel[(t, triton.cdiv(heads + kv_heads, HEADS))](
        qkv, out, cos, sin, weights[0], weights[1], qkv.stride(0), out.stride(0), cos.stride(0), heads, heads + kv_heads, weights[2],
        D=d, HALF=half, NORM=norm is not None, HEADS=HEADS, num_warps=2,
    )  # fmt: skip
    return out


def rope_backward(
    gq: torch.Tensor, gk: torch.Tensor, gv: torch.Tensor, qkv: torch.Tensor | None, cos: torch.Tensor, sin: torch.Tensor,
    norm: HeadNorm | None = None,
) -> torch.Tensor:  # fmt: skip
    """The gradient of the fused rows [T, (heads + 2 kv_heads) d] from gq [T, heads, d], gk and gv [T, kv_heads, d].

    `qkv`: the rows before norm and rotation, needed only with `norm`.
    """
    (t, heads, d), kv_heads = gq.shape, gk.shape[1]
    out = torch.empty(t, (heads + 2 * kv_heads) * d, dtype=gq.dtype, device=gq.device)
    if not gq.is_cuda:
        g = _rotate(torch.cat([gq, gk], 1).float(), cos, sin, -1.0)
        if norm is not None:
            x = qkv[:, : (heads + kv_heads) * d].view(t, heads + kv_heads, d).float()
            rstd, g = _rstd(x, norm), g * _head_weights(norm, heads, kv_heads)
            g = rstd * (g - x * (g * x).mean(-1, keepdim=True) * rstd.square())
        out.view(t, -1, d).copy_(torch.cat([g.to(gv.dtype), gv], 1))
        return out
    half = triton.next_power_of_2(d // 2)
    source = qkv if norm else gq
    weights = (norm.q_weight, norm.k_weight, norm.eps) if norm else (gq, gq, 0.0)
    _backward_kernel[(t, triton.cdiv(heads + 2 * kv_heads, HEADS))](
        gq.contiguous(), gk.contiguous(), gv.contiguous(), source, out, cos, sin, weights[0], weights[1], source.stride(0),
        cos.stride(0), heads, kv_heads, weights[2], D=d, HALF=half, NORM=norm is not None, HEADS=HEADS, num_warps=2,
    )  # fmt: skip
    return out


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, sign: float) -> torch.Tensor:
    half = x.shape[-1] // 2
    c, s = cos[:, None, :half].float(), sign * sin[:, None, :half].float()
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * c - b * s, b * c + a * s], -1)


def _rstd(x: torch.Tensor, norm: HeadNorm) -> torch.Tensor:
    return torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.eps)


def _head_weights(norm: HeadNorm, heads: int, kv_heads: int) -> torch.Tensor:
    q, k = norm.q_weight.float(), norm.k_weight.float()
    return torch.cat([q.expand(heads, -1), k.expand(kv_heads, -1)])
