"""Attention of new tokens over a static cache of keys and values.

    o = softmax(scale q k^T over positions 0 .. p) v          for a query at position p

The cache of a layer is [capacity, 2, kv_heads, d]: a token's key and value are neighbours, so that both are written at once.
One new token is bound by reading the cache, so its positions are split over programs (flash decoding), each with its own
softmax; a second kernel weighs their results. How many positions count is read on the card: a captured step can be replayed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

MOST_PARTS = 64
LEAST_PART = 64  # positions


@triton.jit
def _part_kernel(
    q_ptr, cache_ptr, position_ptr, part_ptr, lse_ptr, kv_heads, size, scale,
    GROUP: tl.constexpr, QUERIES: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    kv, part, parts = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    length = tl.load(position_ptr).to(tl.int32) + 1
    query, d = tl.arange(0, QUERIES), tl.arange(0, WIDTH)
    head = kv * GROUP + query
    own = (query < GROUP)[:, None] & (d < D)[None, :]
    q = tl.load(q_ptr + head[:, None] * D + d[None, :], mask=own, other=0.0)  # [QUERIES, WIDTH]
    keys = cache_ptr + kv * D
    most = tl.full((QUERIES,), float("-inf"), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    out = tl.zeros((QUERIES, WIDTH), tl.float32)
    for start in range(part * size, tl.minimum((part + 1) * size, length), BLOCK):
        position = start + tl.arange(0, BLOCK)
        inside = (position < length)[:, None] & (d < D)[None, :]
        token = position.to(tl.int64)[:, None] * (2 * kv_heads * D) + d[None, :]
        k = tl.load(keys + token, mask=inside, other=0.0)  # [BLOCK, WIDTH]
        v = tl.load(keys + kv_heads * D + token, mask=inside, other=0.0)
        score = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        score = tl.where((position < length)[None, :], score, float("-inf"))
        higher = tl.maximum(most, tl.max(score, 1))
        weight = tl.exp(score - higher[:, None])
        fade = tl.exp(most - higher)
        total = total * fade + tl.sum(weight, 1)
        out = tl.dot(weight.to(v.dtype), v, out * fade[:, None], input_precision="ieee")
        most = higher
    some = tl.where(total > 0, total, 1.0)
    place = head * parts + part
    tl.store(lse_ptr + place, most + tl.log(some), mask=query < GROUP)
    tl.store(part_ptr + place[:, None] * D + d[None, :], out / some[:, None], mask=own)


@triton.jit
def _combine_kernel(part_ptr, lse_ptr, out_ptr, parts, D: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr):
    head = tl.program_id(0)
    part, d = tl.arange(0, PARTS), tl.arange(0, WIDTH)
    lse = tl.load(lse_ptr + head * parts + part, mask=part < parts, other=float("-inf"))
    weight = tl.exp(lse - tl.max(lse, 0))
    inside = (part < parts)[:, None] & (d < D)[None, :]
    values = tl.load(part_ptr + (head * parts + part)[:, None] * D + d[None, :], mask=inside, other=0.0)
    out = tl.sum(values * weight[:, None], 0) / tl.sum(weight, 0)
    tl.store(out_ptr + head * D + d, out.to(out_ptr.dtype.element_ty), mask=d < D)


def attend_one(q: torch.Tensor, cache: torch.Tensor, position: torch.Tensor, scale: float) -> torch.Tensor:
    """o [1, heads * d] of one token. q: [1, heads, d] contiguous; cache: [capacity, 2, kv_heads, d] contiguous, which holds the
    token's own key and value already; position: int64 [1], the token's, on q's device."""
    (_, heads, d), (capacity, _, kv_heads, _) = q.shape, cache.shape
    if not (q.is_contiguous() and cache.is_contiguous()) or q.shape[0] != 1 or heads % kv_heads or cache.shape[3] != d:
        raise ValueError(f"q {list(q.shape)} and cache {list(cache.shape)} must be contiguous [1, heads, d] and [capacity, 2, kv, d].")
    parts = min(MOST_PARTS, -(-capacity // LEAST_PART))
    size = -(-capacity // parts // LEAST_PART) * LEAST_PART
    parts, width = -(-capacity // size), max(16, triton.next_power_of_2(d))
    partial = torch.empty(heads, parts, d, dtype=torch.float32, device=q.device)
    lse = torch.empty(heads, parts, dtype=torch.float32, device=q.device)
    out = torch.empty(1, heads * d, dtype=q.dtype, device=q.device)
    group = heads // kv_heads
    _part_kernel[(kv_heads, parts)](
        q, cache, position, partial, lse, kv_heads, size, scale, GROUP=group, QUERIES=max(16, triton.next_power_of_2(group)),
        D=d, WIDTH=width, BLOCK=64 if width <= 128 else 32, num_warps=4, num_stages=2,
    )  # fmt: skip
    _combine_kernel[(heads,)](partial, lse, out, parts, D=d, WIDTH=width, PARTS=triton.next_power_of_2(parts), num_warps=4)
    return out


def attend(q: torch.Tensor, cache: torch.Tensor, start: int, scale: float) -> torch.Tensor:
    """o [T, heads * d] of tokens at positions start .. start + T - 1, by PyTorch's own operators.

    q: [T, heads, d]; cache: [capacity, 2, kv_heads, d], which holds the tokens' own keys and values already. The heads that
    share keys are laid end to end as queries, so keys and values are read in place and never repeated.
    """
    (tokens, heads, d), kv_heads = q.shape, cache.shape[2]
    group, length = heads // kv_heads, start + tokens
    k, v = (t.transpose(0, 1) for t in cache[:length].unbind(1))  # [kv_heads, length, d]
    queries = q.unflatten(1, (kv_heads, group)).permute(1, 2, 0, 3).reshape(kv_heads, group * tokens, d)
    if tokens == 1:  # on a CPU PyTorch's attention takes 6 ms here, these three operators 0.1
        out = ((queries * scale) @ k.transpose(1, 2)).softmax(-1) @ v
    else:
        mask = torch.ones(tokens, length, dtype=torch.bool, device=q.device).tril_(start).repeat(group, 1)
        out = torch.nn.functional.scaled_dot_product_attention(queries[None], k[None], v[None], attn_mask=mask, scale=scale)
    return out.view(kv_heads, group, tokens, d).permute(2, 0, 1, 3).reshape(tokens, heads * d)
