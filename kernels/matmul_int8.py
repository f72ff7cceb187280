"""y = x W^T for a few rows of x, straight from LLM.int8 rows: the 8-bit codes are multiplied, the row's scale applied last.

    y[m, o] = SCB[o] / 127 * sum_i x[m, i] * q[o, i]

Codes are exact in 16 bit, so the tensor cores multiply them unscaled. See `kernels/matmul_grouped.py` for the shape of it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.matmul_grouped import MAX_ROWS, split, tensor_cores

GEMV_COLS = 1024
DOT_ROWS, DOT_COLS = 64, 128


@triton.jit
def _gemv_kernel(x_ptr, q_ptr, scb_ptr, y_ptr, rows, cols, ROWS: tl.constexpr, COLS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    x_ptr += tl.program_id(1).to(tl.int64) * cols
    acc = tl.zeros((ROWS, COLS), dtype=tl.float32)
    for start in range(0, cols, COLS):
        col = start + tl.arange(0, COLS)
        inside = (row < rows)[:, None] & (col < cols)[None, :]
        q = tl.load(q_ptr + row[:, None] * cols + col[None, :], mask=inside, other=0).to(tl.float32)
        acc += q * tl.load(x_ptr + col, mask=col < cols, other=0.0).to(tl.float32)[None, :]
    scb = tl.load(scb_ptr + row, mask=row < rows, other=0.0)
    y = tl.sum(acc, 1) * scb / 127.0
    tl.store(y_ptr + tl.program_id(1).to(tl.int64) * rows + row, y.to(y_ptr.dtype.element_ty), mask=row < rows)


@triton.jit
def _dot_kernel(
    x_ptr, q_ptr, scb_ptr, part_ptr, x_rows, rows, cols, cols_per_part,
    X_ROWS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    part = tl.program_id(1)
    m = tl.arange(0, X_ROWS)
    acc = tl.zeros((ROWS, X_ROWS), dtype=tl.float32)
    for start in range(part * cols_per_part, tl.minimum((part + 1) * cols_per_part, cols), COLS):
        col = start + tl.arange(0, COLS)
        inside = (row < rows)[:, None] & (col < cols)[None, :]
        q = tl.load(q_ptr + row[:, None] * cols + col[None, :], mask=inside, other=0).to(x_ptr.dtype.element_ty)
        mask = (col < cols)[:, None] & (m < x_rows)[None, :]
        x = tl.load(x_ptr + m.to(tl.int64)[None, :] * cols + col[:, None], mask=mask, other=0.0)  # [COLS, X_ROWS]
        acc = tl.dot(q, x, acc, input_precision="ieee")
    scb = tl.load(scb_ptr + row, mask=row < rows, other=0.0)
    out = (part.to(tl.int64) * x_rows + m[None, :]) * rows + row[:, None]
    tl.store(part_ptr + out, acc * scb[:, None] / 127.0, mask=(row < rows)[:, None] & (m < x_rows)[None, :])


def matmul(x: torch.Tensor, qweight: torch.Tensor, scb: torch.Tensor) -> torch.Tensor:
    """x: [M, in], fp16, bf16 or fp32, contiguous, M <= MAX_ROWS; qweight: int8 [out, in]. Returns y [M, out] in x's dtype."""
    x_rows, cols = x.shape
    if not (x.is_contiguous() and qweight.is_contiguous()) or not 1 <= x_rows <= MAX_ROWS or qweight.shape[1] != cols:
        raise ValueError(
            f"the fused product takes 1 to {MAX_ROWS} contiguous rows of {qweight.shape[1]}; x is {list(x.shape)}, strides {x.stride()}."
        )
    rows = len(qweight)
    if x_rows == 1 or not tensor_cores(x.device):
        y = x.new_empty(x_rows, rows)
        tile = 4 if rows >= 8192 else 2 if rows >= 2048 else 1
        _gemv_kernel[(triton.cdiv(rows, tile), x_rows)](x, qweight, scb, y, rows, cols, ROWS=tile, COLS=GEMV_COLS, num_warps=4)
        return y
    parts, cols_per_part = split(triton.cdiv(rows, DOT_ROWS), cols, DOT_COLS, x.device)
    partial = torch.empty(parts, x_rows, rows, dtype=torch.float32, device=x.device)
    _dot_kernel[(triton.cdiv(rows, DOT_ROWS), parts)](
        x, qweight, scb, partial, x_rows, rows, cols, cols_per_part,
        X_ROWS=max(16, triton.next_power_of_2(x_rows)), ROWS=DOT_ROWS, COLS=DOT_COLS, num_warps=4, num_stages=3,
    )  # fmt: skip
    return partial.sum(0).to(x.dtype)
