"""NF4 to 16 or 32 bit with a LoRA adapter added on the way: out = W + s B A, rounded once.

A pass over many tokens T would otherwise add s (x A^T) B^T to y [T, out], which reads and writes all of y, and again for the
gradient of x. Here the adapter costs no memory traffic but A and B themselves: the tile of W is in registers anyway, and
B A is a product of inner size r on the tensor cores. The sum is rounded as W alone would have been.

`merge_nf4_tiles.py` does the same for 16 bits and the usual ranks on the cards it is made for; the kernel here for everything else.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels import merge_nf4_tiles
from kernels.dequant_nf4 import block_scales, operands

ROWS = 64  # of W a program; its columns are one block of 64


@triton.jit
def _merge_kernel(
    codes_ptr, absmax_ptr, nested_absmax_ptr, nested_map_ptr, offset_ptr, map_ptr, a_ptr, b_ptr, out_ptr,
    first_row, rows, cols, rank, scaling, DOUBLE: tl.constexpr, RANK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0)
    inside = row < rows
    block = (first_row + row).to(tl.int64) * (cols // 64) + column
    scale = block_scales(absmax_ptr, nested_absmax_ptr, nested_map_ptr, offset_ptr, block, inside, DOUBLE)

    byte = tl.arange(0, 32)
    codes = tl.load(codes_ptr + block[:, None] * 32 + byte[None, :], mask=inside[:, None], other=0).to(tl.int32)  # [ROWS, 32]
    high = tl.load(map_ptr + (codes >> 4)) * scale[:, None]
    low = tl.load(map_ptr + (codes & 15)) * scale[:, None]

    r, here = tl.arange(0, RANK), column * 64 + tl.arange(0, 64)
    b = tl.load(b_ptr + row[:, None] * rank + r[None, :], mask=inside[:, None] & (r[None, :] < rank), other=0.0)  # [ROWS, RANK]
    a = tl.load(a_ptr + r[:, None] * cols + here[None, :], mask=r[:, None] < rank, other=0.0)  # [RANK, 64]
    merged = tl.interleave(high, low) + scaling * tl.dot(b, a, input_precision="ieee")

    index = row.to(tl.int64)[:, None] * cols + here[None, :]
    tl.store(out_ptr + index, merged.to(out_ptr.dtype.element_ty), mask=inside[:, None])


def merge(
    packed: dict[str, torch.Tensor], out: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float, row_start: int = 0
) -> torch.Tensor:
    """out[i] = W[row_start + i] + scaling * b[i] @ a. out: [rows, in], contiguous, in a multiple of 64; a: [r, in], b: [rows, r],
    contiguous, of one dtype. Returns out."""
    rows, cols = out.shape
    if cols % 64 or not (out.is_contiguous() and a.is_contiguous() and b.is_contiguous()):
        raise ValueError(f"nf4 merges into contiguous rows of a multiple of 64 values; in={cols}, strides={out.stride()}.")
    if merge_nf4_tiles.takes(packed, out, a, b):
        return merge_nf4_tiles.merge(packed, out, a, b, scaling, row_start)
    rank = a.shape[0]
    _merge_kernel[(cols // 64, triton.cdiv(rows, ROWS))](
        *operands(packed), a, b, out, row_start, rows, cols, rank, scaling,
        DOUBLE="nested_absmax" in packed, RANK=max(16, triton.next_power_of_2(rank)), ROWS=ROWS, num_warps=4,
    )  # fmt: skip
    return out
