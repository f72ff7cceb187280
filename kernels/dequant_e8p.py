"""E8P codes to 16 or 32 bit on the card: any tile of rows and columns of the codebook matrix.

    out[r, 8 g + i] = codebook[codes[r, g]][i] + codebook'[residual[r, g]][i] / residual_scale

Codes and codebooks: `kernels/e8p.py`. A word of the grid holds 2 v + 8 of all eight weights of a code in nibbles, and that
is odd, so changing a weight's sign, 16 - n, is an exclusive or with 14: one for all eight. A nibble becomes a float by
setting it into the mantissa of 16.0. Memory-bound: reads 2 bits a weight and writes 16.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.e8p import abs_grid, residual_grid

NO_RESIDUAL, E8P_RESIDUAL, E8_RESIDUAL = 0, 1, 2
_ROWS, _GROUPS = 4, 128  # codes of a program: 1 KB read, 8 KB written at 16 bit

_on_device: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = {}


def grids(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """`abs_grid` and `residual_grid` on a device, copied there once."""
    if device not in _on_device:
        _on_device[device] = abs_grid().to(device), residual_grid().to(device)
    return _on_device[device]


def residual_kind(residual: torch.Tensor | None) -> int:
    """Which second layer a weight has, by the dtype of its codes."""
    if residual is None:
        return NO_RESIDUAL
    return E8P_RESIDUAL if residual.dtype == torch.int16 else E8_RESIDUAL


@triton.jit
def e8p_words(code, grid_ptr):
    """(nibbles 2 v + 8 of the eight signed weights, 1 where they are shifted by -1/4 instead of +1/4). code: int32."""
    signs = (code >> 8) & 255
    odd = signs ^ (signs >> 4)
    odd = (0x6996 >> (odd & 15)) & 1
    signs = signs ^ odd
    signs = (signs | (signs << 12)) & 0x000F000F  # bit i goes to bit 4 i
    signs = (signs | (signs << 6)) & 0x03030303
    signs = (signs | (signs << 3)) & 0x11111111
    return tl.load(grid_ptr + (code & 255)) ^ (signs * 14), odd


@triton.jit
def sixteen_plus_nibble(word, position):
    """16.0 + nibble `position` of each word, in fp32."""
    return ((((word >> (4 * position)) & 15) << 19) | 0x41800000).to(tl.float32, bitcast=True)


@triton.jit
def point_values(code, residual, grid_ptr, residual_grid_ptr, residual_factor, position, KIND: tl.constexpr):
    """fp32 weights [R, G, 8] of codes [R, G, 1]; position: [1, 1, 8]."""
    word, odd = e8p_words(code, grid_ptr)
    base = -11.75 - 0.5 * odd.to(tl.float32)
    values = sixteen_plus_nibble(word, position) * 0.5 + base
    if KIND == 1:
        word, odd = e8p_words(residual, grid_ptr)
        base = -11.75 - 0.5 * odd.to(tl.float32)
        values += (sixteen_plus_nibble(word, position) * 0.5 + base) * residual_factor
    if KIND == 2:
        word = tl.load(residual_grid_ptr + residual)
        values += (sixteen_plus_nibble(word, position) * 0.5 - 12.0) * residual_factor
    return values


@triton.jit
def _dequantize_kernel(
    codes_ptr, residual_ptr, grid_ptr, residual_grid_ptr, out_ptr,
    rows, groups, codes_stride, out_stride, residual_factor,
    KIND: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    group = (tl.program_id(1) * GROUPS + tl.arange(0, GROUPS))[None, :]
    inside = (row < rows) & (group < groups)
    source = row.to(tl.int64) * codes_stride + group
    code = tl.load(codes_ptr + source, mask=inside, other=0).to(tl.int32)[:, :, None]
    residual = code
    if KIND > 0:
        residual = tl.load(residual_ptr + source, mask=inside, other=0).to(tl.int32)[:, :, None]
    position = tl.arange(0, 8)[None, None, :]
    values = point_values(code, residual, grid_ptr, residual_grid_ptr, residual_factor, position, KIND)
    target = (row.to(tl.int64) * out_stride + group * 8)[:, :, None] + position
    tl.store(out_ptr + target, values.to(out_ptr.dtype.element_ty), mask=inside[:, :, None])


def dequantize(
    codes: torch.Tensor, out: torch.Tensor, residual: torch.Tensor | None = None, residual_scale: float = 1.0
) -> torch.Tensor:
    """The tile whose codes are given, in out's dtype. Returns out.

    codes: int16 [rows, groups]; residual: int16 (E8P) or uint8 (E8), same shape and strides; out: [rows, 8 groups], fp16,
    bf16 or fp32. All may be views of larger tensors whose columns are contiguous.
    """
    check(codes, residual)
    rows, groups = codes.shape
    if out.shape != (rows, 8 * groups) or out.stride(1) != 1 or out.device != codes.device:
        raise ValueError(f"out must be [{rows}, {8 * groups}] with contiguous columns beside the codes; got {tuple(out.shape)}.")
    kind = residual_kind(residual)
    grid = (triton.cdiv(rows, _ROWS), triton.cdiv(groups, _GROUPS))
    _dequantize_kernel[grid](
        codes, codes if residual is None else residual, *grids(codes.device), out,
        rows, groups, codes.stride(0), out.stride(0), 1.0 / residual_scale,
        KIND=kind, ROWS=_ROWS, GROUPS=_GROUPS, num_warps=4,
    )  # fmt: skip
    return out


def check(codes: torch.Tensor, residual: torch.Tensor | None) -> None:
    """Raises ValueError when the kernels cannot read these codes."""
    if codes.dtype != torch.int16 or codes.stride(1) != 1:
        raise ValueError(f"E8P codes are int16 with contiguous rows; got {codes.dtype}, strides {codes.stride()}.")
    if residual is not None and (
        residual.dtype not in (torch.int16, torch.uint8) or residual.shape != codes.shape or residual.stride() != codes.stride()
    ):
        raise ValueError(f"residual codes are int16 or uint8 laid out like the codes; got {residual.dtype}, {tuple(residual.shape)}.")
