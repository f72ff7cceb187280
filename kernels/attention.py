"""Causal attention over several sequences laid end to end (block-diagonal), forward and backward, from PyTorch's own kernels.

    o = softmax(scale q k^T + causal, block-diagonal mask) v

Flash attention from compute capability 8.0, the memory-efficient kernel before it, one sequence after the other on the CPU. Where
all sequences are of one length, cuDNN's on the cards whose tensor cores flash attention 2 does not know, as PyTorch itself
chooses: backward takes half the time there. The operators are called directly so that output and log-sum-exp can be kept while q, k
and v are recomputed.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch

aten = torch.ops.aten


@dataclass
class Saved:
    """What backward needs besides q, k, v: output [T, heads, d], log-sum-exp fp32, the kernel's random state, and whether it was
    cuDNN's."""

    out: torch.Tensor
    lse: torch.Tensor
    rng: tuple[torch.Tensor, ...]
    cudnn: bool = False


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor, max_len: int, scale: float, even: bool = False
) -> Saved:
    """q: [T, heads, d], k and v: [T, kv_heads, d], last dimension contiguous; cu_seqlens: int32 [n + 1] on q's device.

    On the CPU `cu_seqlens` is read; on a card its values stay there and `max_len` bounds them. even: T is whole sequences of
    `max_len`.
    """
    if not q.is_cuda:
        return _cpu_forward(q, k, v, cu_seqlens, scale)
    if even and max_len > 1 and _prefers_cudnn(q):
        out, lse, _, _, _, _, *rng = aten._scaled_dot_product_cudnn_attention(
            *(_rows(t, max_len) for t in (q, k, v)), None, True, 0.0, True, False, scale=scale
        )
        return Saved(_flat(out), lse, tuple(rng[:2]), cudnn=True)
    if _has_flash(q):
        out, lse, rng, unused, _ = aten._flash_attention_forward(
            q, k, v, cu_seqlens, cu_seqlens, max_len, max_len, 0.0, True, False, scale=scale
        )
        return Saved(out, lse, (rng, unused))
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    out, lse, seed, offset, _, _ = aten._efficient_attention_forward(
        q[None], k[None], v[None], None, cu_seqlens, cu_seqlens, max_len, max_len, 0.0, 1, True, scale=scale
    )
    return Saved(out[0], lse, (seed, offset))


def attention_backward(
    grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, saved: Saved, cu_seqlens: torch.Tensor, max_len: int, scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(gq [T, heads, d], gk, gv [T, kv_heads, d]) from grad [T, heads, d] contiguous."""
    if not q.is_cuda:
        return _cpu_backward(grad, q, k, v, saved, cu_seqlens, scale)
    if saved.cudnn:
        operands = (_rows(t, max_len) for t in (grad, q, k, v, saved.out))
        grads = aten._scaled_dot_product_cudnn_attention_backward(
            *operands, saved.lse, *saved.rng, None, None, None, max_len, max_len, 0.0, True, scale=scale
        )
        return tuple(_flat(g) for g in grads)
    if _has_flash(q):
        return aten._flash_attention_backward(
            grad, q, k, v, saved.out, saved.lse, cu_seqlens, cu_seqlens, max_len, max_len, 0.0, True, *saved.rng, scale=scale
        )
    groups = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(groups, 1) for t in (k, v))
    gq, gk, gv, _ = aten._efficient_attention_backward(
        grad[None], q[None], k[None], v[None], None, saved.out[None], cu_seqlens, cu_seqlens, max_len, max_len, saved.lse, 0.0,
        *saved.rng, 1, False, scale=scale,
    )  # fmt: skip
    gk, gv = (g[0].unflatten(1, (-1, groups)).sum(2) for g in (gk, gv))
    return gq[0], gk, gv


def _has_flash(q: torch.Tensor) -> bool:
    return torch.cuda.get_device_capability(q.device) >= (8, 0) and q.dtype in (torch.float16, torch.bfloat16)


def _prefers_cudnn(q: torch.Tensor) -> bool:
    known = torch.cuda.get_device_capability(q.device)[0] in (9, 10) and q.shape[2] <= 128 and q.shape[2] % 8 == 0
    return known and _has_flash(q) and torch.backends.cudnn.is_available()


def _rows(t: torch.Tensor, length: int) -> torch.Tensor:
    """[T, heads, d] as [rows, heads, length, d]."""
    return t.unflatten(0, (-1, length)).transpose(1, 2)


def _flat(t: torch.Tensor) -> torch.Tensor:
    return t.transpose(1, 2).flatten(0, 1)


def _sequences(cu_seqlens: torch.Tensor) -> list[tuple[int, int]]:
    edges = cu_seqlens.tolist()
    return [(a, b) for a, b in pairwise(edges) if b > a]


def _heads_first(t: torch.Tensor, heads: int) -> torch.Tensor:
    """[t, kv_heads, d] as [1, heads, t, d], key and value heads repeated."""
    return t.repeat_interleave(heads // t.shape[1], 1).transpose(0, 1)[None]


def _cpu_forward(q, k, v, cu_seqlens, scale) -> Saved:
    heads = q.shape[1]
    out, lse = torch.empty(q.shape, dtype=q.dtype), torch.empty(q.shape[0], heads)
    for a, b in _sequences(cu_seqlens):
        o, s = aten._scaled_dot_product_flash_attention_for_cpu(*(_heads_first(t[a:b], heads) for t in (q, k, v)), 0.0, True, scale=scale)
        out[a:b], lse[a:b] = o[0].transpose(0, 1), s[0].transpose(0, 1) if s.shape[1] == heads else s[0]
    return Saved(out, lse, ())


def _cpu_backward(grad, q, k, v, saved, cu_seqlens, scale):
    heads, groups = q.shape[1], q.shape[1] // k.shape[1]
    gq, gk, gv = (torch.empty(t.shape, dtype=q.dtype) for t in (q, k, v))
    for a, b in _sequences(cu_seqlens):
        ops = [_heads_first(t[a:b], heads) for t in (grad, q, k, v, saved.out)]
        lse = saved.lse[a:b].transpose(0, 1)[None].contiguous()
        g = aten._scaled_dot_product_flash_attention_for_cpu_backward(*(t.contiguous() for t in ops), lse, 0.0, True, scale=scale)
        gq[a:b] = g[0][0].transpose(0, 1)
        for target, part in ((gk, g[1]), (gv, g[2])):
            target[a:b] = part[0].transpose(0, 1).unflatten(1, (-1, groups)).sum(2)
    return gq, gk, gv
