"""LLM.int8 rows to 16 or 32 bit on the card.

    out[r, i] = q[o, i] * SCB[o] / 127        o = row_start + r

The division is the correctly rounded one: the product with 1/127 differs in the last bit of fp32 for some codes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

ROWS, COLS = 4, 1024  # of a program: 4,096 values


@triton.jit
def _dequantize_kernel(q_ptr, scb_ptr, out_ptr, row_start, rows, cols, ROWS: tl.constexpr, COLS: tl.constexpr):
    local = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)
    inside = (local < rows)[:, None] & (col < cols)[None, :]
    q = tl.load(q_ptr + (row_start + local)[:, None] * cols + col[None, :], mask=inside, other=0).to(tl.float32)
    scb = tl.load(scb_ptr + row_start + local, mask=local < rows, other=0.0)
    w = tl.div_rn(q * scb[:, None], 127.0)
    tl.store(out_ptr + local[:, None] * cols + col[None, :], w.to(out_ptr.dtype.element_ty), mask=inside)


def dequantize(qweight: torch.Tensor, scb: torch.Tensor, out: torch.Tensor, row_start: int = 0) -> torch.Tensor:
    """out[r, :] = W[row_start + r, :]. qweight: int8 [out, in]; scb: fp32 [out]; out: [rows, in], contiguous. Returns out."""
    rows, cols = out.shape
    if qweight.dtype != torch.int8 or qweight.shape[1] != cols or len(scb) != len(qweight):
        raise ValueError(f"int8 weight {qweight.dtype} {list(qweight.shape)} with {len(scb)} scales cannot fill {list(out.shape)}.")
    if not (out.is_contiguous() and qweight.is_contiguous()) or row_start < 0 or row_start + rows > len(qweight):
        raise ValueError(f"rows {row_start} to {row_start + rows} of {len(qweight)} cannot be written with strides {out.stride()}.")
    grid = (triton.cdiv(rows, ROWS), triton.cdiv(cols, COLS))
    _dequantize_kernel[grid](qweight, scb, out, row_start, rows, cols, ROWS=ROWS, COLS=COLS, num_warps=4)
    return out
