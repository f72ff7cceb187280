"""The column loops of OPTQ (`quant/optq.py`) over a block of columns, as one launch each.

A column waits for the one before it, but the rows of a weight never meet: a program holds OUTS rows of all the block's columns
in registers, takes one column after the other out of them, rounds it, and adds what that changes to the columns that follow.
Launched column by column the same takes some 80 kernels a column over all passes, and the card waits for nearly all of them.

Weights lie transposed, [in, out], so that a column is contiguous. fp32 throughout; a code is rounded half to even, as torch does.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

MOST_COLUMNS = 128
OUTS = 32
MAGIC = tl.constexpr(12582912.0)  # 1.5 * 2^23: an fp32 that far up has no digits behind the point


@triton.jit
def _block(ptr, column, out, columns, outs):
    """[COLUMNS, OUTS] of a block, 0 outside."""
    return tl.load(ptr + column[:, None] * outs + out[None, :], mask=(column < columns)[:, None] & (out < outs)[None, :], other=0.0)


@triton.jit
def _column(block, column, i):
    """Column i of a block held in registers."""
    return tl.sum(tl.where(column[:, None] == i, block, 0.0), 0)


@triton.jit
def _code(w, scale, zero, top):
    """The nearest code of w, within 0 .. top."""
    value = tl.minimum(tl.maximum(tl.div_rn(w, scale) + zero, 0.0), top)
    return (value + MAGIC) - MAGIC


@triton.jit(do_not_specialize=["columns", "top"])
def _round_kernel(
    left_ptr, scale_ptr, zero_ptr, upper_ptr, codes_ptr, seen_ptr, errors_ptr, columns, outs, top,
    COLUMNS: tl.constexpr, OUTS: tl.constexpr,
):  # fmt: skip
    out, column = tl.program_id(0) * OUTS + tl.arange(0, OUTS), tl.arange(0, COLUMNS)
    inside = out < outs
    left = _block(left_ptr, column, out, columns, outs)
    for i in range(columns):
        at = i * outs + out
        scale, zero = tl.load(scale_ptr + at, mask=inside, other=1.0), tl.load(zero_ptr + at, mask=inside, other=0.0)
        row = tl.load(upper_ptr + i * columns + column, mask=(column > i) & (column < columns), other=0.0)
        w = _column(left, column, i)
        code = _code(w, scale, zero, top)
        error = tl.div_rn(w - (code - zero) * scale, tl.load(upper_ptr + i * columns + i))
        tl.store(seen_ptr + at, w, mask=inside)
        tl.store(codes_ptr + at, code, mask=inside)
        tl.store(errors_ptr + at, error, mask=inside)
        left -= row[:, None] * error[None, :]


@triton.jit(do_not_specialize=["columns", "top"])
def _revisit_kernel(
    w_ptr, scale_ptr, zero_ptr, h_ptr, slope_ptr, codes_ptr, d_ptr, columns, outs, top,
    COLUMNS: tl.constexpr, OUTS: tl.constexpr,
):  # fmt: skip
    out, column = tl.program_id(0) * OUTS + tl.arange(0, OUTS), tl.arange(0, COLUMNS)
    inside = out < outs
    slope = _block(slope_ptr, column, out, columns, outs)
    for i in range(columns):
        at = i * outs + out
        scale, zero = tl.load(scale_ptr + at, mask=inside, other=1.0), tl.load(zero_ptr + at, mask=inside, other=0.0)
        w, d = tl.load(w_ptr + at, mask=inside, other=0.0), tl.load(d_ptr + at, mask=inside, other=0.0)
        row = tl.load(h_ptr + i * columns + column, mask=column < columns, other=0.0)  # H is symmetric
        own = _column(slope, column, i)
        code = _code(w - d + tl.div_rn(own, tl.load(h_ptr + i * columns + i)), scale, zero, top)
        left = w - (code - zero) * scale
        tl.store(codes_ptr + at, code, mask=inside)
        tl.store(d_ptr + at, left, mask=inside)
        slope += row[:, None] * (left - d)[None, :]


def round_columns(left: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, upper: torch.Tensor, bits: int) -> tuple[torch.Tensor, ...]:
    """Rounds a block's columns one after the other. left, scale, zero: fp32 [columns, out], contiguous; upper: the block's part of
    U, [columns, columns]. Returns (codes, columns as they were rounded, errors), each [columns, out] in fp32."""
    upper = upper.contiguous()  # a factorization's result may lie by columns
    _check(left, scale, zero, upper)
    codes, seen, errors = (torch.empty_like(left) for _ in range(3))
    columns, outs = left.shape
    _round_kernel[(triton.cdiv(outs, OUTS),)](
        left, scale, zero, upper, codes, seen, errors, columns, outs, float(2**bits - 1),
        COLUMNS=MOST_COLUMNS, OUTS=OUTS, num_warps=4,
    )  # fmt: skip
    return codes, seen, errors


def revisit_columns(
    w: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, h: torch.Tensor, slope: torch.Tensor, codes: torch.Tensor, d: torch.Tensor, bits: int
) -> None:
    """Sets each column's codes to the best ones given all others, one column after the other. All but h fp32 [columns, out],
    contiguous; h: the block's part of H, [columns, columns]; slope: (H D) of the block. Changes `codes` and `d`, which is W - Q."""
    h = h.contiguous()
    _check(w, scale, zero, h, slope, codes, d)
    columns, outs = w.shape
    _revisit_kernel[(triton.cdiv(outs, OUTS),)](
        w, scale, zero, h, slope, codes, d, columns, outs, float(2**bits - 1), COLUMNS=MOST_COLUMNS, OUTS=OUTS, num_warps=4
    )  # fmt: skip


def _check(first: torch.Tensor, *rest: torch.Tensor) -> None:
    columns = first.shape[0]
    for tensor in (first, *rest):
        fits = tensor.shape in (first.shape, (columns, columns)) and tensor.is_contiguous()
        if tensor.dtype != torch.float32 or not fits or columns > MOST_COLUMNS:
            raise ValueError(
                f"a block is up to {MOST_COLUMNS} columns [columns, out] in fp32, contiguous, with [columns, columns] of a factor; "
                f"got {list(first.shape)} and {tensor.dtype} {list(tensor.shape)}, strides {tensor.stride()}."
            )
