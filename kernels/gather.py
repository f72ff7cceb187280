"""Rows of the embedding table, which may lie in pinned host memory: the card reads just the rows it needs over PCIe.

    out[i, :] = table[ids[i], :]
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _gather_kernel(ids_ptr, table_ptr, out_ptr, cols, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    source = tl.load(ids_ptr + row).to(tl.int64) * cols
    for begin in range(0, cols, BLOCK):
        col = begin + tl.arange(0, BLOCK)
        mask = col < cols
        tl.store(out_ptr + row * cols + col, tl.load(table_ptr + source + col, mask=mask), mask=mask)


def gather_rows(ids: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """ids: int64 [T]; table: [V, H] contiguous, on ids' device or in pinned host memory. Returns [T, H] on ids' device."""
    if table.device == ids.device:
        return torch.index_select(table, 0, ids)
    if not table.is_pinned():
        return torch.index_select(table, 0, ids.cpu()).to(ids.device)
    out = torch.empty(ids.numel(), table.shape[1], dtype=table.dtype, device=ids.device)
    _gather_kernel[(ids.numel(),)](ids, table, out, table.shape[1], BLOCK=2048, num_warps=4)
    return out
