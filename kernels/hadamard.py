"""Rotations by U_n = (H_K kron Sylvester_{n/K}) / sqrt(n), or its transpose, along the last dimension.

    rotate(x) = post * (U (pre * x)),   x: [M, n]

The Sylvester factor is `hadamard_kernel` on a card, two small products elsewhere; the dense factor H_K is one batched
product by the library. It holds +1 and -1 times a power of two, exact in every dtype.
"""

from __future__ import annotations

import functools
import math

import torch

from kernels.hadamard_matrices import hadamard_matrix, hadamard_order, sylvester_matrix

LARGEST = 8192  # columns of a Sylvester factor that one program holds, 82 KB of shared memory
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

    x: [M, n], fp16, bf16 or fp32. pre, post: fp32 [n]. out: [M, n], default a new tensor of x's dtype; it may be x. Rows of
    x and out are contiguous. Raises ValueError for an n without a known Hadamard matrix.
    """
    n = x.shape[1]
    if out is None:
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.is_cuda and split(n)[1] > 1 and multiplies(x.device):
        return rotate_with_kernel(x, transposed, pre, post, out, add)
    y = reference(x.float() if pre is None else x * pre, transposed)
    if post is not None:
        y *= post
    return out.add_(y) if add else out.copy_(y)


def rotate_with_kernel(x, transposed, pre, post, out, add):
    """`rotate` for n with a Sylvester factor of at least SMALLEST, on a card or interpreted."""
    from kernels.hadamard_kernel import rotate_segments

    dense, _ = split(x.shape[1])
    if dense == 1:
        return rotate_segments(x, pre, post, out, add)
    if pre is None:  # the factors commute: the one that scales goes where the scaling is
        return rotate_segments(_multiply_dense(x, dense, transposed), None, post, out, add)
    y = rotate_segments(x, pre, None, torch.empty(x.shape, dtype=x.dtype, device=x.device), False)
    if post is None and not add:
        return _multiply_dense(y, dense, transposed, out)
    y = _multiply_dense(y, dense, transposed)
    if post is not None:
        y *= post
    return out.add_(y) if add else out.copy_(y)


def reference(x: torch.Tensor, transposed: bool = False) -> torch.Tensor:
    """U_n x in plain torch, in x's dtype. x: [M, n], fp32 or fp64."""
    dense, m = split(x.shape[1])
    a, b = sides(m)
    y = x.reshape(-1, a, b) @ _sylvester_on(b, x.dtype, x.device)
    if a > 1:
        y = _sylvester_on(a, x.dtype, x.device) @ y
    if dense > 1:
        y = _dense_on(x.shape[1], transposed, x.dtype, x.device) @ y.view(-1, dense, m)
    return y.reshape(x.shape).mul_(remaining_scale(x.shape[1]))


def split(n: int) -> tuple[int, int]:
    """(D, m), n = D m: the size of the dense factor and of the Sylvester factor that a program holds."""
    dense = hadamard_order(n)
    while n // dense > LARGEST:
        dense *= 2
    return (n, 1) if n // dense < SMALLEST else (dense, n // dense)


@functools.lru_cache(maxsize=8)
def multiplies(device: torch.device) -> bool:
    """Whether the compiler uses the card's tensor cores; below compute capability 8 its tl.dot is scalar and spills."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0)


@functools.lru_cache(maxsize=64)
def dense_factor(n: int, transposed: bool = False) -> torch.Tensor:
    """H_K kron Sylvester_{D/K} times the power of two nearest below 1 / sqrt(D), fp32 [D, D], on the CPU."""
    dense = split(n)[0]
    h = hadamard_matrix(hadamard_order(n))
    h = torch.kron(h.t().contiguous() if transposed else h, sylvester_matrix(dense // h.shape[0]))
    return h * _dense_scale(dense)


def _dense_scale(dense: int) -> float:
    return 2.0 ** -math.ceil(math.log2(dense) / 2)


def remaining_scale(n: int) -> float:
    """What remains of 1 / sqrt(n) beside the dense factor's power of two."""
    return 1.0 / (math.sqrt(n) * _dense_scale(split(n)[0]))


def sides(m: int) -> tuple[int, int]:
    """(a, b), m = a b: one product for a small m, two of about equal sides for a large one."""
    if m <= ONE_PRODUCT:
        return 1, m
    b = 1 << math.ceil(math.log2(m) / 2)
    return m // b, b


@functools.lru_cache(maxsize=64)
def _sylvester_on(size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return sylvester_matrix(size).to(device, dtype)


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
    torch.bmm(h, x.unflatten(1, (dense, -1)), out=out.unflatten(1, (dense, -1)))
    return out
