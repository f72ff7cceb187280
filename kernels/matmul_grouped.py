"""y = x W^T for a few rows of x, straight from grouped codes (GPTQ, HQQ): chat decoding.

Up to 8 rows of x go to `gemv_even.py` where that takes them. Else (older cards, `g_idx`, groups of odd sizes, fp32), of one row, a
program takes a few rows of W and walks along them, every thread with its own part of the sum, one reduction at the end. More
rows, up to MAX_ROWS, decode a tile of W once and multiply it on the tensor cores; W's columns are split over programs until the
card is full, the partial sums added in a fixed order, so that a result does not change from call to call.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl

from kernels import gemv_even
from kernels.dequant_grouped import decode_runs, operands
from kernels.gemv import MOST_WEIGHTS, processors
from kernels.reference_grouped import ROW, Grouping

MAX_ROWS = 32
GEMV_RUNS = 128  # columns / 8 that a program reads at a time
DOT_ROWS, DOT_RUNS = 64, 16  # a tile of W: 64 rows x 128 columns, 16 KB at 16 bit


@triton.jit
def _gemv_kernel(
    x_ptr, codes_ptr, scales_ptr, zeros_ptr, g_idx_ptr, y_ptr, rows, cols, units, count,
    BITS: tl.constexpr, MODE: tl.constexpr, SIZE: tl.constexpr, PER_RUN: tl.constexpr, HAS_ZEROS: tl.constexpr,
    ROWS: tl.constexpr, RUNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    x_ptr += tl.program_id(1).to(tl.int64) * cols
    acc = tl.zeros((ROWS, RUNS), dtype=tl.float32)
    for start in range(0, tl.cdiv(cols, 8), RUNS):
        run = start + tl.arange(0, RUNS)
        inside = (row < rows)[:, None] & (run * 8 < cols)[None, :]
        w = decode_runs(
            codes_ptr, scales_ptr, zeros_ptr, g_idx_ptr, row, run, inside, cols, units, count,
            BITS, MODE, SIZE, PER_RUN, HAS_ZEROS,
        )  # fmt: skip
        col = run[:, None] * 8 + tl.arange(0, 8)[None, :]
        x = tl.load(x_ptr + col, mask=col < cols, other=0.0).to(tl.float32)
        acc += tl.sum(w * x[None, :, :], 2)
    y = tl.sum(acc, 1)
    tl.store(y_ptr + tl.program_id(1).to(tl.int64) * rows + row, y.to(y_ptr.dtype.element_ty), mask=row < rows)


@triton.jit
def _dot_kernel(
    x_ptr, codes_ptr, scales_ptr, zeros_ptr, g_idx_ptr, part_ptr, x_rows, rows, cols, units, count, runs_per_part,
    BITS: tl.constexpr, MODE: tl.constexpr, SIZE: tl.constexpr, PER_RUN: tl.constexpr, HAS_ZEROS: tl.constexpr,
    X_ROWS: tl.constexpr, ROWS: tl.constexpr, RUNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    part = tl.program_id(1)
    m = tl.arange(0, X_ROWS)
    acc = tl.zeros((ROWS, X_ROWS), dtype=tl.float32)
    for start in range(part * runs_per_part, tl.minimum((part + 1) * runs_per_part, tl.cdiv(cols, 8)), RUNS):
        run = start + tl.arange(0, RUNS)
        inside = (row < rows)[:, None] & (run * 8 < cols)[None, :]
        w = decode_runs(
            codes_ptr, scales_ptr, zeros_ptr, g_idx_ptr, row, run, inside, cols, units, count,
            BITS, MODE, SIZE, PER_RUN, HAS_ZEROS,
        )  # fmt: skip
        w = tl.reshape(w.to(x_ptr.dtype.element_ty), (ROWS, RUNS * 8))
        col = start * 8 + tl.arange(0, RUNS * 8)
        mask = (col < cols)[:, None] & (m < x_rows)[None, :]
        x = tl.load(x_ptr + m.to(tl.int64)[None, :] * cols + col[:, None], mask=mask, other=0.0)  # [RUNS * 8, X_ROWS]
        acc = tl.dot(w, x, acc, input_precision="ieee")
    out = (part.to(tl.int64) * x_rows + m[None, :]) * rows + row[:, None]
    tl.store(part_ptr + out, acc, mask=(row < rows)[:, None] & (m < x_rows)[None, :])


def matmul(
    x: torch.Tensor, qweight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, g_idx: torch.Tensor | None,
    grouping: Grouping, bits: int,
) -> torch.Tensor:  # fmt: skip
    """x: [M, in], fp16, bf16 or fp32, contiguous, M <= MAX_ROWS. Returns y [M, out] in x's dtype, summed in fp32."""
    x_rows, cols = x.shape
    if not x.is_contiguous() or not 1 <= x_rows <= MAX_ROWS:
        raise ValueError(f"the fused product takes 1 to {MAX_ROWS} contiguous rows; x is {list(x.shape)}, strides {x.stride()}.")
    rows = len(qweight)
    pointers, layout = operands(qweight, scales, zeros, g_idx, grouping, bits, cols)
    if grouping.mode == ROW and gemv_even.takes_grouped(x, [(qweight, scales, zeros)], grouping.size, bits):
        return gemv_even.multiply_grouped(x, [(qweight, scales, zeros)], grouping.size, bits)
    if x_rows == 1 or not tensor_cores(x.device):
        y = x.new_empty(x_rows, rows)
        tile = 4 if rows >= 8192 else 2 if rows >= 2048 else 1
        _gemv_kernel[(triton.cdiv(rows, tile), x_rows)](
            x, *pointers, y, rows, **layout, ROWS=tile, RUNS=GEMV_RUNS, num_warps=4
        )
        return y
    parts, runs_per_part = split(triton.cdiv(rows, DOT_ROWS), triton.cdiv(cols, 8), DOT_RUNS, x.device)
    partial = torch.empty(parts, x_rows, rows, dtype=torch.float32, device=x.device)
    _dot_kernel[(triton.cdiv(rows, DOT_ROWS), parts)](
        x, *pointers, partial, x_rows, rows, runs_per_part=runs_per_part, **layout,
        X_ROWS=max(16, triton.next_power_of_2(x_rows)), ROWS=DOT_ROWS, RUNS=DOT_RUNS, num_warps=4, num_stages=2,
    )  # fmt: skip
    return partial.sum(0).to(x.dtype)


def matmul_stacked(x: torch.Tensor, weights: list[tuple]) -> torch.Tensor:
    """x [W1; W2; ..]^T of weights, each the rest of `matmul`'s arguments, that differ in their rows alone; in one launch where
    that can be. Otherwise as `matmul`."""
    grouping, bits = weights[0][4:]
    read = [weight[:3] for weight in weights]
    if len(weights) <= MOST_WEIGHTS and grouping.mode == ROW and gemv_even.takes_grouped(x, read, grouping.size, bits):
        return gemv_even.multiply_grouped(x, read, grouping.size, bits)
    return torch.cat([matmul(x, *weight) for weight in weights], 1)


@lru_cache(maxsize=8)
def tensor_cores(device: torch.device) -> bool:
    """Whether `tl.dot` uses tensor cores: on Turing and older, Triton falls back to scalar arithmetic."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device)[0] >= 8


def split(programs: int, runs: int, step: int, device: torch.device) -> tuple[int, int]:
    """(parts, runs per part): cuts the sum so that about two programs per multiprocessor run, each of whole steps."""
    steps = -(-runs // step)
    parts = max(1, min(2 * processors(device) // programs, steps // 4))
    per_part = -(-steps // parts) * step
    return -(-runs // per_part), per_part
