"""Rotary position embedding of q and k inside the fused [q | k | v] rows, with Qwen3's per-head RMSNorm where a model has it.

    y[i] = x[i] cos[i] - x[i + d/2] sin[i],   y[i + d/2] = x[i + d/2] cos[i] + x[i] sin[i],   i < d/2

(https://arxiv.org/abs/2104.09864 in the half-split form of Llama.) The gradient is the rotation by the negative angle.
Backward gathers attention's separate gradients of q, k and v into one [T, Q + 2 KV] matrix on the way.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _forward_kernel(
    x_ptr, y_ptr, cos_ptr, sin_ptr, qw_ptr, kw_ptr, x_stride, y_stride, cos_stride, q_heads, eps,
    D: tl.constexpr, HALF: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i = tl.arange(0, HALF)
    mask = i < D // 2
    base = row * x_stride + head * D
    a = tl.load(x_ptr + base + i, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(x_ptr + base + D // 2 + i, mask=mask, other=0.0).to(tl.float32)
    if NORM:
        w_ptr = tl.where(head < q_heads, qw_ptr, kw_ptr)
        rstd = 1.0 / tl.sqrt((tl.sum(a * a, 0) + tl.sum(b * b, 0)) / D + eps)
        a *= rstd * tl.load(w_ptr + i, mask=mask, other=0.0).to(tl.float32)
        b *= rstd * tl.load(w_ptr + D // 2 + i, mask=mask, other=0.0).to(tl.float32)
    cos = tl.load(cos_ptr + row * cos_stride + i, mask=mask, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + row * cos_stride + i, mask=mask, other=0.0).to(tl.float32)
    out = row * y_stride + head * D
    tl.store(y_ptr + out + i, (a * cos - b * sin).to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(y_ptr + out + D // 2 + i, (b * cos + a * sin).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _backward_kernel(
    gq_ptr, gk_ptr, gv_ptr, x_ptr, g_ptr, cos_ptr, sin_ptr, qw_ptr, kw_ptr, x_stride, cos_stride, q_heads, kv_heads, eps,
    D: tl.constexpr, HALF: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i = tl.arange(0, HALF)
    mask = i < D // 2
    if head < q_heads:
        source = gq_ptr + row * q_heads * D + head * D
    elif head < q_heads + kv_heads:
        source = gk_ptr + row * kv_heads * D + (head - q_heads) * D
    else:
        source = gv_ptr + row * kv_heads * D + (head - q_heads - kv_heads) * D
    a = tl.load(source + i, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(source + D // 2 + i, mask=mask, other=0.0).to(tl.float32)
    if head < q_heads + kv_heads:
        cos = tl.load(cos_ptr + row * cos_stride + i, mask=mask, other=0.0).to(tl.float32)
        sin = tl.load(sin_ptr + row * cos_stride + i, mask=mask, other=0.0).to(tl.float32)
        rotated = a * cos + b * sin
        b = b * cos - a * sin
        a = rotated
        if NORM:
            base = row * x_stride + head * D
            xa = tl.load(x_ptr + base + i, mask=mask, other=0.0).to(tl.float32)
            xb = tl.load(x_ptr + base + D // 2 + i, mask=mask, other=0.0).to(tl.float32)
            w_ptr = tl.where(head < q_heads, qw_ptr, kw_ptr)
            a *= tl.load(w_ptr + i, mask=mask, other=0.0).to(tl.float32)
            b *= tl.load(w_ptr + D // 2 + i, mask=mask, other=0.0).to(tl.float32)
            rstd = 1.0 / tl.sqrt((tl.sum(xa * xa, 0) + tl.sum(xb * xb, 0)) / D + eps)
            dot = (tl.sum(a * xa, 0) + tl.sum(b * xb, 0)) * rstd * rstd / D
            a = rstd * (a - xa * dot)
            b = rstd * (b - xb * dot)
    out = (row * (q_heads + 2 * kv_heads) + head) * D
    tl.store(g_ptr + out + i, a.to(g_ptr.dtype.element_ty), mask=mask)
    tl.store(g_ptr + out + D // 2 + i, b.to(g_ptr.dtype.element_ty), mask=mask)


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
    _forward_kernel[(t, heads + kv_heads)](
        qkv, out, cos, sin, weights[0], weights[1], qkv.stride(0), out.stride(0), cos.stride(0), heads, weights[2],
        D=d, HALF=half, NORM=norm is not None, num_warps=1,
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
    _backward_kernel[(t, heads + 2 * kv_heads)](
        gq.contiguous(), gk.contiguous(), gv.contiguous(), source, out, cos, sin, weights[0], weights[1], source.stride(0),
        cos.stride(0), heads, kv_heads, weights[2], D=d, HALF=half, NORM=norm is not None, num_warps=1,
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
