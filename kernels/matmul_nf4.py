"""y = x W^T for a few rows of x, straight from NF4 codes: chat decoding.

    y[m, o] = sum_i x[m, i] * quant_map[code[o, i]] * absmax[(o * in + i) // 64]        absmax: see `dequant_nf4.py`

A few rows of x go to `gemv_nf4.py` where that takes them. The kernel for one row here is for every other case: older cards,
fp32, rows that are not whole blocks, any address. Levels are looked up by a gather in shared memory, a block's absmax is decoded
once and multiplies its sum, and weights that see the same input (q, k, v) are one launch. There are more programs than
multiprocessors without splitting a sum, so the order of a sum is fixed. More rows, up to MAX_ROWS, decode a tile of W once
and multiply it on the tensor cores, as in `matmul_grouped.py`.

Rows start at a block's start when 64 divides in_features; otherwise each byte looks up its own block, which is slower.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels import gemv_nf4
from kernels.dequant_nf4 import block_scales, operands
from kernels.gemv import MOST_WEIGHTS, choose
from kernels.matmul_grouped import MAX_ROWS, split, tensor_cores

GEMV_BYTES = (1024, 512)  # of a row of W that a program reads at a time: 8 or 4 a thread
DOT_ROWS, DOT_BYTES = 64, 64  # a tile of W: 64 rows x 128 columns, 16 KB at 16 bit
BLOCK_BYTES = 32  # codes of one block of 64


@triton.jit
def _level(levels, code, ROWS: tl.constexpr, BYTES: tl.constexpr):
    """levels[code], code: int32 [ROWS, BYTES]."""
    return tl.reshape(tl.gather(levels, tl.reshape(code, (ROWS * BYTES,)), 0), (ROWS, BYTES))


@triton.jit
def _nibbles(codes_ptr, row, rows, first, row_bytes, ALIGNED: tl.constexpr, ROWS: tl.constexpr, BYTES: tl.constexpr):
    """High and low codes of bytes [first, first + BYTES) of rows `row` (int64 [ROWS]): int32 [ROWS, BYTES] each, 0 outside.

    Read as words where rows allow it: shifting a byte out of a word takes half the instructions of widening it.
    """
    if ALIGNED:
        word = first // 4 + tl.arange(0, BYTES // 4)
        inside = (row < rows)[:, None] & (word * 4 < row_bytes)[None, :]
        words = tl.load(codes_ptr + (row * (row_bytes // 4))[:, None] + word[None, :], mask=inside, other=0)
        even, odd = tl.join((words >> 4) & 15, (words >> 20) & 15), tl.join((words >> 12) & 15, (words >> 28) & 15)
        high = tl.reshape(tl.join(even, odd), (ROWS, BYTES))
        even, odd = tl.join(words & 15, (words >> 16) & 15), tl.join((words >> 8) & 15, (words >> 24) & 15)
        return high, tl.reshape(tl.join(even, odd), (ROWS, BYTES))
    else:
        byte = first + tl.arange(0, BYTES)
        inside = (row < rows)[:, None] & (byte < row_bytes)[None, :]
        codes = tl.load(codes_ptr + (row * row_bytes)[:, None] + byte[None, :], mask=inside, other=0).to(tl.int32)
        return codes >> 4, codes & 15


@triton.jit
def _gemv_kernel(
    x_ptr, y_ptr, x_stride, y_stride, row_bytes, rows0, rows1, rows2,
    codes0_ptr, absmax0_ptr, nested0_ptr, nested_map0_ptr, offset0_ptr, map0_ptr,
    codes1_ptr, absmax1_ptr, nested1_ptr, nested_map1_ptr, offset1_ptr, map1_ptr,
    codes2_ptr, absmax2_ptr, nested2_ptr, nested_map2_ptr, offset2_ptr, map2_ptr,
    COUNT: tl.constexpr, DOUBLE: tl.constexpr, ALIGNED: tl.constexpr, ROWS: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    program, which = tl.program_id(0), 0
    if COUNT > 1:  # which of the stacked weights this program works on
        second = tl.cdiv(rows0, ROWS)
        third = second + tl.cdiv(rows1, ROWS)
        which = (program >= second).to(tl.int32) + (program >= third).to(tl.int32)
        program -= choose(which, 0, second, third, COUNT)
        y_ptr += choose(which, 0, rows0, rows0 + rows1, COUNT)
    rows, codes_ptr = choose(which, rows0, rows1, rows2, COUNT), choose(which, codes0_ptr, codes1_ptr, codes2_ptr, COUNT)
    absmax_ptr, nested_ptr = choose(which, absmax0_ptr, absmax1_ptr, absmax2_ptr, COUNT), choose(which, nested0_ptr, nested1_ptr, nested2_ptr, COUNT)
    nested_map_ptr = choose(which, nested_map0_ptr, nested_map1_ptr, nested_map2_ptr, COUNT)
    offset_ptr, map_ptr = choose(which, offset0_ptr, offset1_ptr, offset2_ptr, COUNT), choose(which, map0_ptr, map1_ptr, map2_ptr, COUNT)
    x_ptr += tl.program_id(1).to(tl.int64) * x_stride
    y_ptr += tl.program_id(1).to(tl.int64) * y_stride
    row = program.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    levels = tl.load(map_ptr + tl.arange(0, 16))
    acc = tl.zeros((ROWS, BYTES // 32), dtype=tl.float32)
    for first in range(0, row_bytes, BYTES):
        byte = first + tl.arange(0, BYTES)
        high, low = _nibbles(codes_ptr, row, rows, first, row_bytes, ALIGNED, ROWS, BYTES)
        col = first * 2 + tl.arange(0, BYTES * 2)
        x = tl.load(x_ptr + col, mask=col < row_bytes * 2, other=0.0).to(tl.float32)
        x_high, x_low = tl.split(tl.reshape(x, (BYTES, 2)))
        product = _level(levels, high, ROWS, BYTES) * x_high[None, :] + _level(levels, low, ROWS, BYTES) * x_low[None, :]
        if ALIGNED:
            block = first // 32 + tl.arange(0, BYTES // 32)
            number, whole = (row * (row_bytes // 32))[:, None] + block[None, :], (row < rows)[:, None] & (block * 32 < row_bytes)[None, :]
            scale = block_scales(absmax_ptr, nested_ptr, nested_map_ptr, offset_ptr, number, whole, DOUBLE)
            acc += tl.sum(tl.reshape(product, (ROWS, BYTES // 32, 32)), 2) * scale
        else:
            number, inside = ((row * row_bytes)[:, None] + byte[None, :]) // 32, (row < rows)[:, None] & (byte < row_bytes)[None, :]
            scale = block_scales(absmax_ptr, nested_ptr, nested_map_ptr, offset_ptr, number, inside, DOUBLE)
            acc += tl.sum(tl.reshape(product * scale, (ROWS, BYTES // 32, 32)), 2)
    y = tl.sum(acc, 1)
    tl.store(y_ptr + row, y.to(y_ptr.dtype.element_ty), mask=row < rows)


@triton.jit
def _dot_kernel(
    x_ptr, codes_ptr, absmax_ptr, nested_ptr, nested_map_ptr, offset_ptr, map_ptr, part_ptr, x_rows, rows, row_bytes,
    bytes_per_part, DOUBLE: tl.constexpr, ALIGNED: tl.constexpr, X_ROWS: tl.constexpr, ROWS: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    part = tl.program_id(1)
    m = tl.arange(0, X_ROWS)
    levels = tl.load(map_ptr + tl.arange(0, 16))
    acc = tl.zeros((ROWS, X_ROWS), dtype=tl.float32)
    for first in range(part * bytes_per_part, tl.minimum((part + 1) * bytes_per_part, row_bytes), BYTES):
        byte = first + tl.arange(0, BYTES)
        high, low = _nibbles(codes_ptr, row, rows, first, row_bytes, ALIGNED, ROWS, BYTES)
        if ALIGNED:
            block = first // 32 + tl.arange(0, BYTES // 32)
            number, whole = (row * (row_bytes // 32))[:, None] + block[None, :], (row < rows)[:, None] & (block * 32 < row_bytes)[None, :]
            scale = block_scales(absmax_ptr, nested_ptr, nested_map_ptr, offset_ptr, number, whole, DOUBLE)
            scale = tl.reshape(tl.broadcast_to(scale[:, :, None], (ROWS, BYTES // 32, 32)), (ROWS, BYTES))
        else:
            number, inside = ((row * row_bytes)[:, None] + byte[None, :]) // 32, (row < rows)[:, None] & (byte < row_bytes)[None, :]
            scale = block_scales(absmax_ptr, nested_ptr, nested_map_ptr, offset_ptr, number, inside, DOUBLE)
        high, low = _level(levels, high, ROWS, BYTES) * scale, _level(levels, low, ROWS, BYTES) * scale
        w = tl.interleave(high, low).to(x_ptr.dtype.element_ty)  # [ROWS, 2 BYTES]
        col = first * 2 + tl.arange(0, BYTES * 2)
        mask = (col < row_bytes * 2)[:, None] & (m < x_rows)[None, :]
        x = tl.load(x_ptr + m.to(tl.int64)[None, :] * (row_bytes * 2) + col[:, None], mask=mask, other=0.0)  # [2 BYTES, X_ROWS]
        acc = tl.dot(w, x, acc, input_precision="ieee")
    out = (part.to(tl.int64) * x_rows + m[None, :]) * rows + row[:, None]
    tl.store(part_ptr + out, acc, mask=(row < rows)[:, None] & (m < x_rows)[None, :])


def matmul(x: torch.Tensor, packed: dict[str, torch.Tensor], out_features: int) -> torch.Tensor:
    """x: [M, in], fp16, bf16 or fp32, contiguous, M <= MAX_ROWS, in even. Returns y [M, out] in x's dtype, summed in fp32."""
    if x.shape[0] == 1 or not tensor_cores(x.device):
        return matmul_stacked(x, [packed], [out_features])
    _check(x, [packed], [out_features])
    if gemv_nf4.takes(x, [packed]):
        return gemv_nf4.multiply(x, [packed], [out_features])
    x_rows, row_bytes = x.shape[0], x.shape[1] // 2
    aligned = _aligned([packed], row_bytes)
    programs = triton.cdiv(out_features, DOT_ROWS)
    parts, bytes_per_part = split(programs, row_bytes, DOT_BYTES, x.device)
    partial = torch.empty(parts, x_rows, out_features, dtype=torch.float32, device=x.device)
    _dot_kernel[(programs, parts)](
        x, *_pointers(packed, aligned), partial, x_rows, out_features, row_bytes, bytes_per_part,
        DOUBLE="nested_absmax" in packed, ALIGNED=aligned,
        X_ROWS=max(16, triton.next_power_of_2(x_rows)), ROWS=DOT_ROWS, BYTES=DOT_BYTES, num_warps=4, num_stages=2,
    )  # fmt: skip
    return partial.sum(0).to(x.dtype)


def matmul_stacked(x: torch.Tensor, packed: list[dict[str, torch.Tensor]], out_features: list[int]) -> torch.Tensor:
    """x [W1; W2; ..]^T for up to MOST_WEIGHTS weights in one launch, meant for a few rows of x. Otherwise as `matmul`."""
    _check(x, packed, out_features)
    if not 1 <= len(packed) <= MOST_WEIGHTS or len({"nested_absmax" in p for p in packed}) != 1:
        raise ValueError(f"one launch takes 1 to {MOST_WEIGHTS} weights, all with double quantization or all without; got {len(packed)}.")
    if gemv_nf4.takes(x, packed):
        return gemv_nf4.multiply(x, packed, out_features)
    y = x.new_empty(x.shape[0], sum(out_features))
    row_bytes = x.shape[1] // 2
    aligned, tile = _aligned(packed, row_bytes), gemv_rows(y.shape[1])
    unused = MOST_WEIGHTS - len(packed)
    weights = [p for weight in [*packed, *[packed[0]] * unused] for p in _pointers(weight, aligned)]
    grid = (sum(triton.cdiv(rows, tile) for rows in out_features), x.shape[0])
    _gemv_kernel[grid](
        x, y, x.stride(0), y.stride(0), row_bytes, *out_features, *[0] * unused, *weights,
        COUNT=len(packed), DOUBLE="nested_absmax" in packed[0], ALIGNED=aligned,
        ROWS=tile, BYTES=gemv_bytes(row_bytes), num_warps=4,
    )  # fmt: skip
    return y


def gemv_rows(rows: int) -> int:
    """Rows of W a program, so that there are always more programs than a large card holds at a time."""
    return 4 if rows >= 2048 else 2 if rows >= 1024 else 1


def gemv_bytes(row_bytes: int) -> int:
    """The widest step that wastes no more of its last round than the narrowest does, within an eighth of a row."""
    least = -(-row_bytes // GEMV_BYTES[-1]) * GEMV_BYTES[-1]
    return next(step for step in GEMV_BYTES if -(-row_bytes // step) * step <= least + row_bytes // 8)


def _aligned(packed: list[dict[str, torch.Tensor]], row_bytes: int) -> bool:
    """Whether every row begins with a block of its own, and can be read in words."""
    return row_bytes % BLOCK_BYTES == 0 and all(p["weight"].storage_offset() % 4 == 0 for p in packed)


def _pointers(packed: dict[str, torch.Tensor], aligned: bool) -> tuple[torch.Tensor, ...]:
    codes, *rest = operands(packed)
    return codes.view(torch.int32) if aligned else codes, *rest


def _check(x: torch.Tensor, packed: list[dict[str, torch.Tensor]], out_features: list[int]) -> None:
    if not x.is_contiguous() or not 1 <= x.shape[0] <= MAX_ROWS or x.shape[1] % 2:
        raise ValueError(
            f"the fused product takes 1 to {MAX_ROWS} contiguous rows of even length; x is {list(x.shape)}, strides {x.stride()}."
        )
    for weight, rows in zip(packed, out_features, strict=True):
        if weight["weight"].numel() * 2 != rows * x.shape[1]:
            raise ValueError(f"{weight['weight'].numel() * 2} codes are not a weight of {rows}x{x.shape[1]}.")
