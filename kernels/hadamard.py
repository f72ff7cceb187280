"""Rotations by U_n = (H_K kron Sylvester_{n/K}) / sqrt(n), or its transpose, along the last dimension.

    rotate(x) = post * (U (pre * x)),   x: [M, n]

A Sylvester matrix of size m = a b is Sylvester_a kron Sylvester_b, so a row of m values seen as [a, b] is rotated by two
small products, S_a X S_b, which tensor cores do while the row is read and written once. The signs of S are popcounts of
i & j, made in registers. The dense factor H_K is one batched product by the library.

Rounding: the kernel multiplies 16-bit values split into a high and a low part, so both products are exact to about 2^-17
of a value; H_K holds +1 and -1 times a power of two, exact in every dtype.
"""

from __future__ import annotations

import functools
import math

import torch
import triton
import triton.language as tl

from kernels.hadamard_matrices import hadamard_matrix, hadamard_order, sylvester_matrix

LARGEST = 16384  # columns of a Sylvester factor that one program holds
SMALLEST = 16  # the least that tl.dot multiplies
ONE_PRODUCT = 128  # up to this size one product S_m is used


def rotate(
    x: torch.Tensor,
    transposed: bool = False,
    pre: torch.Tensor | None = None,
    post: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    add: bool = False,
) -> torch.Tensor:
    """out = post * (U_n (pre * x)), or U_n.T with `transposed`; added to `out` when `add`.

    x: [M, n], fp16, bf16 or fp32, rows contiguous. pre, post: fp32 [n]. out: [M, n], contiguous, default a new tensor of
    x's dtype; out may be x. Raises ValueError for an n without a known Hadamard matrix.
    """
    n = x.shape[1]
    if out is None:
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.is_cuda and split(n)[1] > 1:
        return rotate_with_kernel(x, transposed, pre, post, out, add)
    y = reference(x.float() if pre is None else x * pre, transposed)
    if post is not None:
        y *= post
    return out.add_(y) if add else out.copy_(y)


def rotate_with_kernel(x, transposed, pre, post, out, add):
    """`rotate` for n with a Sylvester factor of at least SMALLEST, on the card or interpreted."""
    dense, _ = split(x.shape[1])
    if dense == 1:
        return _sylvester(x, pre, post, out, add)
    if pre is None:  # the factors commute: the one that scales goes where the scaling is
        return _sylvester(_multiply_dense(x, dense, transposed), None, post, out, add)
    y = _sylvester(x, pre, None, torch.empty(x.shape, dtype=x.dtype, device=x.device), False)
    if post is None and not add:
        return _multiply_dense(y, dense, transposed, out)
    y = _multiply_dense(y, dense, transposed)
    if post is not None:
        y *= post
    return out.add_(y) if add else out.copy_(y)


def reference(x: torch.Tensor, transposed: bool = False) -> torch.Tensor:
    """U_n x in plain torch, in x's dtype. x: [M, n], fp32 or fp64."""
    dense, m = split(x.shape[1])
    a, b = _sides(m)
    s_a, s_b = (sylvester_matrix(size).to(x) for size in (a, b))
    y = x.reshape(-1, a, b) @ s_b
    if a > 1:
        y = s_a @ y
    if dense > 1:
        y = dense_factor(x.shape[1], transposed).to(x) @ y.view(-1, dense, m)
    return y.reshape(x.shape).mul_(_scale(x.shape[1]))


def split(n: int) -> tuple[int, int]:
    """(D, m), n = D m: the size of the dense factor and of the Sylvester factor that a program holds."""
    dense = hadamard_order(n)
    while n // dense > LARGEST:
        dense *= 2
    return (n, 1) if n // dense < SMALLEST else (dense, n // dense)


@functools.lru_cache(maxsize=64)
def dense_factor(n: int, transposed: bool = False) -> torch.Tensor:
    """H_K kron Sylvester_{D/K} times the power of two nearest below 1 / sqrt(D), fp32 [D, D], on the CPU."""
    dense = split(n)[0]
    h = hadamard_matrix(hadamard_order(n))
    h = torch.kron(h.t().contiguous() if transposed else h, sylvester_matrix(dense // h.shape[0]))
    return h * _dense_scale(dense)


def _dense_scale(dense: int) -> float:
    return 2.0 ** -math.ceil(math.log2(dense) / 2)


def _scale(n: int) -> float:
    """What remains of 1 / sqrt(n) beside the dense factor's power of two."""
    return 1.0 / (math.sqrt(n) * _dense_scale(split(n)[0]))


def _sides(m: int) -> tuple[int, int]:
    """(a, b), m = a b: one product for a small m, two of about equal sides for a large one."""
    if m <= ONE_PRODUCT:
        return 1, m
    b = 1 << math.ceil(math.log2(m) / 2)
    return m // b, b


@functools.lru_cache(maxsize=64)
def _dense_on(n: int, transposed: bool, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """`dense_factor` on a device, with rows padded to 16 bytes for the library's fast kernels."""
    h = dense_factor(n, transposed)
    padded = torch.zeros(h.shape[0], -(-h.shape[0] // 8) * 8, dtype=dtype, device=device)
    padded[:, : h.shape[0]] = h
    return padded[:, : h.shape[0]]


def _multiply_dense(x: torch.Tensor, dense: int, transposed: bool, out: torch.Tensor | None = None) -> torch.Tensor:
    """(H kron I) x for each row. x: [M, n], rows contiguous. Returns out, [M, n], by default new."""
    rows, n = x.shape
    if out is None:
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    h = _dense_on(n, transposed, x.dtype, x.device).expand(rows, dense, dense)
    torch.bmm(h, x.unflatten(1, (dense, -1)), out=out.view(rows, dense, -1))
    return out


def _sylvester(
    x: torch.Tensor, pre: torch.Tensor | None, post: torch.Tensor | None, out: torch.Tensor, add: bool
) -> torch.Tensor:
    """out (+)= post * (I kron Sylvester_m) (pre * x) * scale, for n = D m columns. out may be x."""
    n = x.shape[1]
    dense, m = split(n)
    if x.stride(1) != 1 or not out.is_contiguous() or out.shape != x.shape:
        raise ValueError(f"rotations need contiguous rows and an out of x's shape; got strides {x.stride()}, out {tuple(out.shape)}.")
    a, b = _sides(m)
    segments = x.shape[0] * dense
    # One product: a tile of 4096 values. Two: whole segments, several per program once they would fill the card anyway.
    rows = max(SMALLEST, 4096 // m) if a == 1 else (4 if segments >= 2048 else 1)
    warps = min(8, max(1, max(rows, a) * b // 1024)) if a == 1 else min(8, max(1, m // 1024))
    _sylvester_kernel[(triton.cdiv(segments, rows),)](
        x, out, x if pre is None else pre, x if post is None else post, segments, dense, x.stride(0), _scale(n),
        A=a, B=b, ROWS=rows, PRE=pre is not None, POST=post is not None, ADD=add, num_warps=warps,
    )  # fmt: skip
    return out


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
def _right(v, s):
    """v @ s in fp32. v: [R, B] fp32, split into two parts of s's dtype."""
    if s.dtype == tl.float32:
        return tl.dot(v, s, input_precision="ieee")
    high = v.to(s.dtype)
    low = (v - high.to(tl.float32)).to(s.dtype)
    return tl.dot(low, s, tl.dot(high, s))


@triton.jit
def _left(s, v):
    """s @ v in fp32. v: [A, C] fp32."""
    if s.dtype == tl.float32:
        return tl.dot(s, v, input_precision="ieee")
    high = v.to(s.dtype)
    low = (v - high.to(tl.float32)).to(s.dtype)
    return tl.dot(s, low, tl.dot(s, high))


@triton.jit
def _rotated(
    x_ptr, out_ptr, pre_ptr, post_ptr, source, target, vector, inside, scale, s_a, s_b,
    PRE: tl.constexpr, POST: tl.constexpr, ADD: tl.constexpr, BOTH: tl.constexpr,
):  # fmt: skip
    """One tile [R, B]: load at `source`, scale, rotate, store at `target`; `vector` indexes pre and post."""
    v = tl.load(x_ptr + source, mask=inside, other=0.0).to(tl.float32)
    if PRE:
        v *= tl.load(pre_ptr + vector)
    v = _right(v * scale, s_b)
    if BOTH:
        v = _left(s_a, v)
    if POST:
        v *= tl.load(post_ptr + vector)
    if ADD:
        v += tl.load(out_ptr + target, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + target, v.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _sylvester_kernel(
    x_ptr, out_ptr, pre_ptr, post_ptr, segments, dense, x_stride, scale,
    A: tl.constexpr, B: tl.constexpr, ROWS: tl.constexpr,
    PRE: tl.constexpr, POST: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """Segment g is columns (g % dense) * A * B.. of row g // dense. x: [rows, dense * A * B]."""
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    s_b = _signs(B, DTYPE)
    column = tl.arange(0, B)[None, :]
    first = tl.program_id(0) * ROWS
    if A == 1:
        segment = (first + tl.arange(0, ROWS))[:, None]  # tile [ROWS, B]
        vector = segment % dense * B + column
        source = (segment // dense).to(tl.int64) * x_stride + vector
        target = segment.to(tl.int64) * B + column
        inside = segment + column * 0 < segments
        _rotated(x_ptr, out_ptr, pre_ptr, post_ptr, source, target, vector, inside, scale, s_b, s_b, PRE, POST, ADD, False)
    else:
        s_a = _signs(A, DTYPE)
        inner = tl.arange(0, A)[:, None] * B + column  # tile [A, B]
        for i in range(ROWS):
            segment = first + i
            vector = segment % dense * (A * B) + inner
            source = (segment // dense).to(tl.int64) * x_stride + vector
            target = segment.to(tl.int64) * (A * B) + inner
            inside = segment + inner * 0 < segments
            _rotated(x_ptr, out_ptr, pre_ptr, post_ptr, source, target, vector, inside, scale, s_a, s_b, PRE, POST, ADD, True)
