"""Few rows times an E8P weight, decoded in registers: y = x @ Wq.T for chat, where the weight's bytes are the cost.

    Wq[n, 8 g + i] = codebook[codes[n, g]][i] (+ codebook'[residual[n, g]][i] / residual_scale)

One row of x goes to `gemv_even.py` where that takes it. Elsewhere a code's weights are 0.5 (16 + nibble_i) + base, so the kernel
multiplies the cheap 16 + nibble_i and adds base times the sum of the eight inputs once per code. More rows: tiles are decoded
as tl.dot wants them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels import gemv_even
from kernels.dequant_e8p import check, e8p_words, grids, point_values, residual_kind, sixteen_plus_nibble
from kernels.hadamard import multiplies

LARGEST = 32  # rows of x


def matmul(
    x: torch.Tensor, codes: torch.Tensor, residual: torch.Tensor | None = None, residual_scale: float = 1.0
) -> torch.Tensor:
    """x @ Wq.T in x's dtype, summed in fp32. x: [M, 8 groups], M <= 32, contiguous; codes, residual: as for `dequantize`."""
    check(codes, residual)
    rows, groups = codes.shape
    if x.shape[0] > LARGEST or x.shape[1] != 8 * groups or not x.is_contiguous():
        raise ValueError(f"x must be contiguous [1..{LARGEST}, {8 * groups}]; got {tuple(x.shape)}, strides {x.stride()}.")
    if gemv_even.takes_e8p(x, codes, residual):
        return gemv_even.multiply_e8p(x, codes, residual, residual_scale)
    out = torch.empty(x.shape[0], rows, dtype=x.dtype, device=x.device)
    weight = (codes, codes if residual is None else residual, *grids(codes.device))
    sizes, kind = (rows, groups, codes.stride(0), 1.0 / residual_scale), residual_kind(residual)
    if x.shape[0] == 1 or not multiplies(x.device):
        tile = {"ROWS": 8 if kind == 0 else 4, "GROUPS": 128}
        for line, result in zip(x, out):
            _vector_kernel[(triton.cdiv(rows, tile["ROWS"]),)](line, *weight, result, *sizes, KIND=kind, **tile, num_warps=4)
    else:
        tile = {"ROWS": 16, "GROUPS": 16, "BATCH": 16 if x.shape[0] <= 16 else 32}
        _matrix_kernel[(triton.cdiv(rows, tile["ROWS"]),)](x, *weight, out, *sizes, x.shape[0], KIND=kind, **tile, num_warps=2)
    return out


@triton.jit
def _vector_kernel(
    x_ptr, codes_ptr, residual_ptr, grid_ptr, residual_grid_ptr, out_ptr,
    rows, groups, codes_stride, residual_factor,
    KIND: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    position = tl.arange(0, 8)[None, None, :]
    source = row.to(tl.int64)[:, None] * codes_stride
    scaled = tl.zeros((ROWS, GROUPS, 8), tl.float32)  # sums of (16 + nibble) x
    based = tl.zeros((ROWS, GROUPS), tl.float32)  # sums of 2 base x
    finer = tl.zeros((ROWS, GROUPS, 8), tl.float32)  # the same of the second layer
    finer_based = tl.zeros((ROWS, GROUPS), tl.float32)
    for start in range(0, groups, GROUPS):
        group = start + tl.arange(0, GROUPS)[None, :]
        inside = (row[:, None] < rows) & (group < groups)
        x = tl.load(x_ptr + group[:, :, None] * 8 + position, mask=(group < groups)[:, :, None], other=0.0).to(tl.float32)
        total = tl.sum(x, 2)  # [1, GROUPS]
        word, odd = e8p_words(tl.load(codes_ptr + source + group, mask=inside, other=0).to(tl.int32), grid_ptr)
        scaled += sixteen_plus_nibble(word[:, :, None], position) * x
        based += (-23.5 - odd.to(tl.float32)) * total
        if KIND == 1:
            word, odd = e8p_words(tl.load(residual_ptr + source + group, mask=inside, other=0).to(tl.int32), grid_ptr)
            finer += sixteen_plus_nibble(word[:, :, None], position) * x
            finer_based += (-23.5 - odd.to(tl.float32)) * total
        if KIND == 2:
            code = tl.load(residual_ptr + source + group, mask=inside, other=0).to(tl.int32)
            finer += sixteen_plus_nibble(tl.load(residual_grid_ptr + code)[:, :, None], position) * x
            finer_based += -24.0 * total
    y = tl.sum(tl.sum(scaled, 2) + based, 1)
    if KIND > 0:
        y += tl.sum(tl.sum(finer, 2) + finer_based, 1) * residual_factor
    tl.store(out_ptr + row, (0.5 * y).to(out_ptr.dtype.element_ty), mask=row < rows)


@triton.jit
def _matrix_kernel(
    x_ptr, codes_ptr, residual_ptr, grid_ptr, residual_grid_ptr, out_ptr,
    rows, groups, codes_stride, residual_factor, batch,
    KIND: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr, BATCH: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    line = tl.arange(0, BATCH)
    position = tl.arange(0, 8)[None, None, :]
    source = row.to(tl.int64)[:, None] * codes_stride
    y = tl.zeros((BATCH, ROWS), tl.float32)
    for start in range(0, groups, GROUPS):
        group = start + tl.arange(0, GROUPS)[None, :]
        inside = (row[:, None] < rows) & (group < groups)
        code = tl.load(codes_ptr + source + group, mask=inside, other=0).to(tl.int32)[:, :, None]
        residual = code
        if KIND > 0:
            residual = tl.load(residual_ptr + source + group, mask=inside, other=0).to(tl.int32)[:, :, None]
        w = point_values(code, residual, grid_ptr, residual_grid_ptr, residual_factor, position, KIND)
        w = tl.reshape(w.to(DTYPE), (ROWS, GROUPS * 8))
        column = start * 8 + tl.arange(0, GROUPS * 8)[None, :]
        x = tl.load(
            x_ptr + line[:, None] * (groups * 8) + column, mask=(line[:, None] < batch) & (column < groups * 8), other=0.0
        )
        y = tl.dot(x, tl.trans(w), y, input_precision="ieee")
    inside = (line[:, None] < batch) & (row[None, :] < rows)
    tl.store(out_ptr + line[:, None] * rows + row[None, :], y.to(DTYPE), mask=inside)
