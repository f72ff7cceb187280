"""What is added to a frozen product of one token: its adapter, its bias and the residual, in two small kernels.

    down[r] = s[r] sum_i a[r, i] x[i]                 y[o] += bias[o] + residual[o] + sum_r b[o, r] down[first[o] + r]

Linears that share their input are stacked: a holds the A of all of them, a row o of b belongs to one of them, and first[o]
says where its ranks begin. A token's products are too small to fill a card, so what counts is the number of launches.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

COLUMNS, ROWS = 1024, 64  # read at a time by a program of `_down_kernel`; rows of y per program of `_finish_kernel`


@dataclass
class Thin:
    """Stacked adapters. a: [R, in]; scaling: fp32 [R]; b: [out, r], r the largest rank; first: int32 [out]."""

    a: torch.Tensor
    scaling: torch.Tensor
    b: torch.Tensor
    first: torch.Tensor


@triton.jit
def _down_kernel(x_ptr, a_ptr, scaling_ptr, down_ptr, cols, BLOCK: tl.constexpr):
    rank = tl.program_id(0).to(tl.int64)
    acc = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, cols, BLOCK):
        col = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + col, mask=col < cols, other=0.0).to(tl.float32)
        acc += x * tl.load(a_ptr + rank * cols + col, mask=col < cols, other=0.0).to(tl.float32)
    tl.store(down_ptr + rank, tl.sum(acc, 0) * tl.load(scaling_ptr + rank))


@triton.jit
def _finish_kernel(
    y_ptr, bias_ptr, residual_ptr, down_ptr, b_ptr, first_ptr, rows, ranks, width,
    BIAS: tl.constexpr, RESIDUAL: tl.constexpr, ADAPTER: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    y = tl.load(y_ptr + row, mask=inside, other=0.0).to(tl.float32)
    if BIAS:
        y += tl.load(bias_ptr + row, mask=inside, other=0.0).to(tl.float32)
    if ADAPTER:
        r = tl.arange(0, WIDTH)
        rank = tl.load(first_ptr + row, mask=inside, other=0)[:, None] + r[None, :]
        own = inside[:, None] & (r < width)[None, :]
        b = tl.load(b_ptr + row.to(tl.int64)[:, None] * width + r[None, :], mask=own, other=0.0).to(tl.float32)
        y += tl.sum(b * tl.load(down_ptr + rank, mask=own & (rank < ranks), other=0.0), 1)
    if RESIDUAL:
        y += tl.load(residual_ptr + row, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + row, y.to(y_ptr.dtype.element_ty), mask=inside)


def finish(
    y: torch.Tensor, x: torch.Tensor, thin: Thin | None = None, bias: torch.Tensor | None = None, residual: torch.Tensor | None = None
) -> torch.Tensor:
    """Adds adapter, bias and residual to y [1, out] in place and returns it. x: [1, in]; bias: [out]; residual: [1, out]."""
    if thin is None and bias is None and residual is None:
        return y
    if y.shape[0] != 1 or not all(t.is_contiguous() for t in (y, x, bias, residual) if t is not None):
        raise ValueError(f"one contiguous row is finished at a time; y is {list(y.shape)}, strides {y.stride()}.")
    down, ranks, width, b, first = y, 0, 1, y, y
    if thin is not None:
        ranks, width, b, first = thin.a.shape[0], thin.b.shape[1], thin.b, thin.first
        down = torch.empty(ranks, dtype=torch.float32, device=x.device)
        _down_kernel[(ranks,)](x, thin.a, thin.scaling, down, x.shape[1], BLOCK=COLUMNS, num_warps=4)
    _finish_kernel[(triton.cdiv(y.shape[1], ROWS),)](
        y, y if bias is None else bias, y if residual is None else residual, down, b, first, y.shape[1], ranks, width,
        BIAS=bias is not None, RESIDUAL=residual is not None, ADAPTER=thin is not None,
        WIDTH=triton.next_power_of_2(width), BLOCK=ROWS, num_warps=2,
    )  # fmt: skip
    return y
