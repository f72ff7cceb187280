"""Groups of codes (GPTQ, HQQ) to 16 or 32 bit on the card.

    out[r, i] = scales[g] * (q[o, i] - zeros[g])        o = row_start + r, g = the group of (o, i)

Layouts and groups: `kernels/reference_grouped.py`. Everything works on runs of 8 codes: a run is `bits` whole bytes at
every width, 3 bits included, and 8 values of 16 bit are one 16-byte store. Where groups hold whole runs, as in ordinary
checkpoints, a run reads its scale and zero once. Memory-bound: n values read n * bits / 8 bytes and write 2 n.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.reference_grouped import FLAT, INDEX, MODULO, ROW, Grouping

RUN = 8
RUNS_PER_PROGRAM = 512  # 4,096 values: 4 runs a thread
UNIT_DTYPE = {2: torch.int16, 3: torch.int32, 4: torch.int32, 8: torch.uint8}  # how the words are addressed

_ROW, _INDEX, _FLAT = tl.constexpr(ROW), tl.constexpr(INDEX), tl.constexpr(FLAT)
# 2**23 as fp32: or-ing a code into its low bits gives 2**23 + code, without an integer conversion.
_MAGIC, _MAGIC_VALUE = tl.constexpr(0x4B000000), tl.constexpr(8388608.0)


@triton.jit
def _run_codes(codes_ptr, first, run, inside, BITS: tl.constexpr):
    """The codes of `run` [RUNS] of rows that start at unit `first` [ROWS], fp32 2**23 + code [ROWS, RUNS, 8]."""
    lane = tl.arange(0, 8)[None, None, :]
    if BITS == 8:
        unit = first[:, None] + run[None, :] * 8
        codes = tl.load(codes_ptr + unit[:, :, None] + lane, mask=inside[:, :, None], other=0).to(tl.int32)
    elif BITS == 3:  # 24 bits from byte 3 * run on: one or two words
        byte = run * 3
        low = tl.load(codes_ptr + first[:, None] + (byte // 4)[None, :], mask=inside, other=0).to(tl.uint32, bitcast=True)
        high = tl.load(codes_ptr + first[:, None] + ((byte + 2) // 4)[None, :], mask=inside, other=0).to(tl.uint32, bitcast=True)
        shift = ((byte % 4) * 8)[None, :].to(tl.uint32)
        word = ((low >> shift) | ((high << 1) << (31 - shift))).to(tl.int32, bitcast=True)
        codes = (word[:, :, None] >> (lane * 3)) & 7
    else:  # one int16 (2 bits) or int32 (4 bits)
        word = tl.load(codes_ptr + first[:, None] + run[None, :], mask=inside, other=0).to(tl.int32)
        codes = (word[:, :, None] >> (lane * BITS)) & ((1 << BITS) - 1)
    return (codes | _MAGIC).to(tl.float32, bitcast=True)


@triton.jit
def decode_runs(
    codes_ptr, scales_ptr, zeros_ptr, g_idx_ptr, row, run, inside, cols, units, count,
    BITS: tl.constexpr, MODE: tl.constexpr, SIZE: tl.constexpr, PER_RUN: tl.constexpr, HAS_ZEROS: tl.constexpr,
):  # fmt: skip
    """W at rows `row` [ROWS] (int64) and columns 8 * run .. 8 * run + 7 [RUNS], fp32 [ROWS, RUNS, 8]; 0 where not `inside`."""
    codes = _run_codes(codes_ptr, row * units, run, inside, BITS)
    if PER_RUN:  # g: [ROWS, RUNS, 1]
        if MODE == _FLAT:
            g = (row[:, None] * cols + run[None, :] * 8) // SIZE
        else:
            g = row[:, None] * count + (run * 8 // SIZE)[None, :]
        g = g[:, :, None]
        valid = inside[:, :, None]
    else:  # g: [ROWS, RUNS, 8]
        col = run[:, None] * 8 + tl.arange(0, 8)[None, :]
        valid = inside[:, :, None] & (col < cols)[None, :, :]
        if MODE == _INDEX:
            g = row[:, None, None] * count + tl.load(g_idx_ptr + col, mask=col < cols, other=0)[None, :, :]
        elif MODE == _ROW:
            g = row[:, None, None] * count + (col // SIZE)[None, :, :]
        elif MODE == _FLAT:
            g = (row[:, None, None] * cols + col[None, :, :]) // SIZE
        else:
            g = (row[:, None, None] * cols + col[None, :, :]) % count
    scale = tl.load(scales_ptr + g, mask=valid, other=0.0).to(tl.float32)
    if HAS_ZEROS:
        zero = tl.load(zeros_ptr + g, mask=valid, other=0).to(tl.float32)
        return ((codes - _MAGIC_VALUE) - zero) * scale
    return (codes - (_MAGIC_VALUE + (1 << (BITS - 1)))) * scale


@triton.jit
def _dequantize_kernel(
    codes_ptr, scales_ptr, zeros_ptr, g_idx_ptr, out_ptr, row_start, rows, cols, units, count,
    BITS: tl.constexpr, MODE: tl.constexpr, SIZE: tl.constexpr, PER_RUN: tl.constexpr, HAS_ZEROS: tl.constexpr,
    ROWS: tl.constexpr, RUNS: tl.constexpr,
):  # fmt: skip
    local = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    run = tl.program_id(1) * RUNS + tl.arange(0, RUNS)
    inside = (local < rows)[:, None] & (run * 8 < cols)[None, :]
    w = decode_runs(
        codes_ptr, scales_ptr, zeros_ptr, g_idx_ptr, row_start + local, run, inside, cols, units, count,
        BITS, MODE, SIZE, PER_RUN, HAS_ZEROS,
    )  # fmt: skip
    col = run[:, None] * 8 + tl.arange(0, 8)[None, :]
    mask = (local < rows)[:, None, None] & (col < cols)[None, :, :]
    tl.store(out_ptr + local[:, None, None] * cols + col[None, :, :], w.to(out_ptr.dtype.element_ty), mask=mask)


def operands(
    qweight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, g_idx: torch.Tensor | None,
    grouping: Grouping, bits: int, cols: int,
) -> tuple[tuple, dict]:  # fmt: skip
    """What every kernel over grouped codes takes: pointers, and the keywords that describe the layout. Checks them."""
    if bits not in UNIT_DTYPE or qweight.dtype != torch.int32 or qweight.shape[1] != -(-cols // 32) * bits:
        raise ValueError(f"qweight {qweight.dtype} {list(qweight.shape)} is not {bits}-bit codes of {cols} columns.")
    if not all(t.is_contiguous() for t in (qweight, scales, zeros, g_idx) if t is not None):
        raise ValueError("grouped codes, scales, zeros and g_idx must be contiguous.")
    if grouping.mode == INDEX and (g_idx is None or g_idx.dtype != torch.int32 or len(g_idx) != cols):
        raise ValueError(f"g_idx must be int32 [{cols}].")
    units = qweight.view(UNIT_DTYPE[bits])
    whole = grouping.size % RUN == 0 and (grouping.mode == ROW or (grouping.mode == FLAT and cols % RUN == 0))
    layout = {
        "cols": cols, "units": units.shape[1], "count": grouping.count, "BITS": bits, "MODE": grouping.mode,
        "SIZE": 1 if grouping.mode in (INDEX, MODULO) else grouping.size, "PER_RUN": whole, "HAS_ZEROS": zeros is not None,
    }  # fmt: skip
    return (units, scales, scales if zeros is None else zeros, qweight if g_idx is None else g_idx), layout


def dequantize(
    qweight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, g_idx: torch.Tensor | None,
    grouping: Grouping, bits: int, out: torch.Tensor, row_start: int = 0,
) -> torch.Tensor:  # fmt: skip
    """out[r, :] = W[row_start + r, :]. out: [rows, in], fp16, bf16 or fp32, contiguous. Returns out."""
    rows, cols = out.shape
    if not out.is_contiguous() or row_start < 0 or row_start + rows > len(qweight):
        raise ValueError(f"rows {row_start} to {row_start + rows} of {len(qweight)} cannot be written with strides {out.stride()}.")
    pointers, layout = operands(qweight, scales, zeros, g_idx, grouping, bits, cols)
    runs = min(128, triton.next_power_of_2(triton.cdiv(cols, RUN)))
    tile = {"ROWS": RUNS_PER_PROGRAM // runs, "RUNS": runs}
    grid = (triton.cdiv(rows, tile["ROWS"]), triton.cdiv(cols, RUN * runs))
    _dequantize_kernel[grid](*pointers, out, row_start, rows, **layout, **tile, num_warps=4)
    return out
