"""The Sylvester factor of a rotation on the card: out (+)= post * (I kron Sylvester_m) (pre * x) * scale, row by row.

A Sylvester matrix of size m = a b is Sylvester_a kron Sylvester_b, so a row of m values seen as [a, b] is rotated by two
small products, S_a X S_b, which tensor cores do while the row is read and written once. The signs of S are parities of
i & j, made in registers. Values are multiplied as a high and a low 16-bit part: both products are exact to about 2^-17. Those of
fp32 are three bf16 parts, which lose nothing: a product of fp32 itself would unroll to 8 KB of stack a thread, for which CUDA
sets aside 2 GB on a card of 132 processors as long as the program runs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.hadamard import SMALLEST, remaining_scale, sides, split


def rotate_segments(
    x: torch.Tensor, pre: torch.Tensor | None, post: torch.Tensor | None, out: torch.Tensor, add: bool
) -> torch.Tensor:
    """For n = D m columns and m >= SMALLEST; pre and post are fp32 [n]. Returns out, [M, n], which may be x."""
    n = x.shape[1]
    dense, m = split(n)
    if x.stride(1) != 1 or out.stride(1) != 1 or out.shape != x.shape:
        raise ValueError(f"rotations need contiguous rows and an out of x's shape; got strides {x.stride()}, out {tuple(out.shape)}.")
    a, b = sides(m)
    segments = x.shape[0] * dense
    # One product: a tile of 4096 values. Two: whole segments, several per program once they would fill the card anyway.
    rows = max(SMALLEST, 4096 // m) if a == 1 else (4 if segments >= 2048 else 1)
    warps = min(8, max(1, max(rows, a) * b // 1024)) if a == 1 else min(8, max(1, m // 1024))
    _sylvester_kernel[(triton.cdiv(segments, rows),)](
        x, out, x if pre is None else pre, x if post is None else post, segments, dense, x.stride(0), out.stride(0), remaining_scale(n),
        A=a, B=b, ROWS=rows, **multiplied(x.dtype, x.is_cuda), PRE=pre is not None, POST=post is not None, ADD=add, num_warps=warps, num_stages=1,
    )  # fmt: skip
    return out


def multiplied(dtype: torch.dtype, on_card: bool) -> dict:
    """As which dtype, and in how many parts of it, values are multiplied. Triton's interpreter has no products of bf16."""
    if dtype == torch.float32:
        return {"SIGNS": tl.bfloat16, "PARTS": 3} if on_card else {"SIGNS": tl.float32, "PARTS": 1}
    return {"SIGNS": tl.float16 if dtype == torch.float16 else tl.bfloat16, "PARTS": 2}


@triton.jit
def _signs(SIZE: tl.constexpr, DTYPE: tl.constexpr):
    """Sylvester_SIZE: [SIZE, SIZE] of +1 and -1. SIZE <= 256."""
    i = tl.arange(0, SIZE)
    v = i[:, None] & i[None, :]
    v = v ^ (v >> 4)
    v = v ^ (v >> 2)
    v = v ^ (v >> 1)
    return (1 - 2 * (v & 1)).to(DTYPE)


@triton.jit
def _times(v, s, LEFT: tl.constexpr, PARTS: tl.constexpr):
    """v @ s, or s @ v if LEFT, in fp32. v: fp32 [R, B], split into parts of s's dtype."""
    out = tl.zeros_like(v)
    for _ in tl.static_range(PARTS):
        part = v.to(s.dtype)
        out = tl.dot(s, part, out) if LEFT else tl.dot(part, s, out)
        v -= part.to(tl.float32)
    return out


@triton.jit
def _rotated(
    x_ptr, out_ptr, pre_ptr, post_ptr, source, target, vector, inside, scale, s_a, s_b,
    PARTS: tl.constexpr, PRE: tl.constexpr, POST: tl.constexpr, ADD: tl.constexpr, BOTH: tl.constexpr,
):  # fmt: skip
    """One tile [R, B]: load at `source`, scale, rotate, store at `target`; `vector` indexes pre and post."""
    v = tl.load(x_ptr + source, mask=inside, other=0.0).to(tl.float32)
    if PRE:
        v *= tl.load(pre_ptr + vector)
    v = _times(v * scale, s_b, False, PARTS)
    if BOTH:
        v = _times(v, s_a, True, PARTS)
    if POST:
        v *= tl.load(post_ptr + vector)
    if ADD:
        v += tl.load(out_ptr + target, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + target, v.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _sylvester_kernel(
    x_ptr, out_ptr, pre_ptr, post_ptr, segments, dense, x_stride, out_stride, scale,
    A: tl.constexpr, B: tl.constexpr, ROWS: tl.constexpr, SIGNS: tl.constexpr, PARTS: tl.constexpr,
    PRE: tl.constexpr, POST: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """Segment g is columns (g % dense) * A * B.. of row g // dense. x: [rows, dense * A * B]."""
    s_b = _signs(B, SIGNS)
    column = tl.arange(0, B)[None, :]
    first = tl.program_id(0) * ROWS
    if A == 1:
        segment = (first + tl.arange(0, ROWS))[:, None]  # tile [ROWS, B]
        vector = segment % dense * B + column
        source = (segment // dense).to(tl.int64) * x_stride + vector
        target = (segment // dense).to(tl.int64) * out_stride + vector
        inside = segment + column * 0 < segments
        _rotated(x_ptr, out_ptr, pre_ptr, post_ptr, source, target, vector, inside, scale, s_b, s_b, PARTS, PRE, POST, ADD, False)
    else:
        s_a = _signs(A, SIGNS)
        inner = tl.arange(0, A)[:, None] * B + column  # tile [A, B]
        for i in range(ROWS):
            segment = first + i
            vector = segment % dense * (A * B) + inner
            source = (segment // dense).to(tl.int64) * x_stride + vector
            target = (segment // dense).to(tl.int64) * out_stride + vector
            inside = segment + inner * 0 < segments
            _rotated(x_ptr, out_ptr, pre_ptr, post_ptr, source, target, vector, inside, scale, s_a, s_b, PARTS, PRE, POST, ADD, True)
