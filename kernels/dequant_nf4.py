"""NF4 to 16 or 32 bit on the card, nested absmax decoded in the same kernel.

    out[i] = quant_map[code[i]] * (nested_quant_map[c[k]] * nested_absmax[k // 256] + offset),   k = i // 64

Layouts: `kernels/reference_nf4.py`. Memory-bound: a weight of n values reads 0.516 n bytes and writes 2 n.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCKS = 32  # blocks of 64 values per program: 1 KB read, 4 KB written at 16 bit


@triton.jit
def block_scales(absmax_ptr, nested_absmax_ptr, nested_map_ptr, offset_ptr, block, inside, DOUBLE: tl.constexpr):
    """fp32 absmax of `block` (a vector of block numbers)."""
    if DOUBLE:
        code = tl.load(absmax_ptr + block, mask=inside, other=0).to(tl.int32)
        scale = tl.load(nested_map_ptr + code) * tl.load(nested_absmax_ptr + block // 256, mask=inside, other=0.0)
        scale += tl.load(offset_ptr)
    else:
        scale = tl.load(absmax_ptr + block, mask=inside, other=0.0)
    return scale


@triton.jit
def _dequantize_kernel(
    codes_ptr, absmax_ptr, nested_absmax_ptr, nested_map_ptr, offset_ptr, map_ptr, out_ptr,
    first_block, values, DOUBLE: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    local = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    inside = local * 64 < values
    block = first_block + local
    scale = block_scales(absmax_ptr, nested_absmax_ptr, nested_map_ptr, offset_ptr, block, inside, DOUBLE)

    byte = tl.arange(0, 32)
    position = local[:, None] * 64 + byte[None, :] * 2  # of the high nibble, in out
    codes = tl.load(codes_ptr + block[:, None] * 32 + byte[None, :], mask=position < values, other=0).to(tl.int32)  # [BLOCKS, 32]
    high = tl.load(map_ptr + (codes >> 4)) * scale[:, None]
    low = tl.load(map_ptr + (codes & 15)) * scale[:, None]

    index = local[:, None] * 64 + tl.arange(0, 64)[None, :]
    tl.store(out_ptr + index, tl.interleave(high, low).to(out_ptr.dtype.element_ty), mask=index < values)  # [BLOCKS, 64]


def operands(packed: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """A weight's tensors in the order of the kernels' arguments."""
    absmax = packed["absmax"]
    nested = (packed["nested_absmax"], packed["nested_quant_map"], packed["nested_offset"]) if "nested_absmax" in packed else (absmax,) * 3
    return packed["weight"], absmax, *nested, packed["quant_map"]


def dequantize(packed: dict[str, torch.Tensor], out: torch.Tensor, start: int = 0) -> torch.Tensor:
    """out.flatten()[i] = w[start + i]. `start` is a multiple of 64; out: contiguous, fp16, bf16 or fp32. Returns out."""
    if start % 64 or not out.is_contiguous():
        raise ValueError(f"nf4 dequantizes from a multiple of 64 into contiguous memory; start={start}, strides={out.stride()}.")
    values = out.numel()
    grid = (triton.cdiv(values, BLOCKS * 64),)
    _dequantize_kernel[grid](
        *operands(packed), out, start // 64, values, DOUBLE="nested_absmax" in packed, BLOCKS=BLOCKS, num_warps=4,
        enable_fp_fusion=False,  # product and sum are rounded one after the other, as the format defines them
    )  # fmt: skip
    return out
