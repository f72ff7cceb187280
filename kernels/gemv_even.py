"""y = x W^T for a few rows of x, straight from codes of evenly spaced levels, on cards from compute capability 8.0 on: chat decoding.

    W[o, i] = scale[o, g] * (code[o, i] - zero[o, g])           GPTQ and HQQ at 2, 3, 4 and 8 bits, g = i // group size
    W[o, i] = 1/2 * (code[o, i] - 7.5)                          E8P (`e8p.py`), of the rotated weight

Or-ed into the last bits of a power of two, a code is already a 16-bit value: base + code. So two codes become a register of a
tensor core's operand by a shift and one logical operation, and neither scale nor zero is met before the sum:

    sum of w x = scale * (sum of (base + code) x - (base + zero) * sum of x)

where the sum of x is another product, with x on the left and ones on the right: half the products of ones on the left. The two
codes lie 16 bits apart, which is no neighbour: x's pairs are made to match. A mantissa of bf16 has room for 7 bits. So three codes
of 2 bits are taken from one shifted word, where they stand, each place with sums of its own that count 1, 1/4 and 1/16; and the
halves of an 8-bit code are taken one after the other.

A code of E8P is eight weights: 2 v + 8 of a vector |v| by its lower byte, changed by its signs and its shift, the upper byte. 2 v
is odd, so its last bit says nothing, and can say whether the code's shift is up or down instead; a change of sign is an
exclusive or, and what several do is the exclusive or of what each does. So tables of 256, 16 and 16 words in shared memory give
eight nibbles of evenly spaced levels. They are there once for each lane, 36 KB.

A lane takes 16 bytes of codes of a row at a time (12 at 3 bits), neighbouring lanes the next ones: UNIT columns each. Groups
smaller than the columns of four lanes are told apart by the columns of x: x's one row is held as up to four columns, one a
group, with zeros where a lane has another group's codes. Several rows of x, up to 8, need the columns for themselves; then such a
step is multiplied once for each group. What a step needs is asked for two steps before. As many programs as the registers hold
stay on a multiprocessor and walk over the tiles. The order of a sum is fixed.

As one graph, bf16, 4096 x 14336, on an H100: gptq at 4 bits 15.6 us, which is 65 % of what a copy moves (with scalar products it
took 32), 8 bits 26.4 (75 %), 3 bits 16.7 (46 %), 2 bits 13.7 (38 %; 12.9 on another H100), E8P 19.7 (25 %); 8 rows of x take 17.7,
26.4, 20.4, 36 and 36 us, rotations included, where `matmul_grouped` and `matmul_e8p` took 74, 118, 113, 67 and 115. y's error is
1.7e-3. Of these about 5 us are a launch, the first load and the sums' meeting. What bounds 3 bits
and less is not memory but issue: 2 to 3 instructions a weight, half of them the decoding; unrolling by two helps where the
registers allow it (2 bits and E8P: slower). Tried in vain: addresses carried along instead of computed (2 % fewer instructions),
and launches that overlap (programmatic dependent launch), by which a chain of products alone takes 1.3 to 2 us less each, but a
token of the 8B model as long as before (347 and 352 tokens/s), since between two products there are a norm, attention or SwiGLU.
"""

from __future__ import annotations

from functools import lru_cache, partial

import torch
import triton
import triton.language as tl

from kernels import e8p, reference_grouped
from kernels.gemv import (
    MOST_ROWS,
    MOST_WEIGHTS,
    REGISTERS,
    WARPS,
    _load_byte,
    _load_half,
    _meet,
    _store_few,
    _take_from,
    capable,
    choose,
    shares,
    trusted,
    weight_of,
)
from kernels.gemv_even_ptx import E8P, UNIT, _load_codes, _load_x, _multiply, _store_tables

NO_ZEROS, BYTES, HALVES = range(3)  # how a weight's zeros are stored
_NO_ZEROS, _BYTES = tl.constexpr(NO_ZEROS), tl.constexpr(BYTES)
_E8P = tl.constexpr(E8P)
HALF_TYPES = (torch.float16, torch.bfloat16)
COLUMNS_TRIED = 4160


@triton.jit
def _value(ptr, index, valid):
    """A 16-bit float, in fp32."""
    return _load_half(ptr, index, valid).to(tl.int16).to(ptr.dtype.element_ty, bitcast=True).to(tl.float32)


@triton.jit
def _load_group(scales_ptr, zeros_ptr, index, valid, ZEROS: tl.constexpr, KIND: tl.constexpr):
    """A group's scale and zero; 0 and any zero where not `valid`."""
    scale = _value(scales_ptr, index, valid)
    if ZEROS == _NO_ZEROS:
        return scale, tl.full(scale.shape, 1 << (KIND - 1), tl.float32)
    elif ZEROS == _BYTES:
        return scale, _load_byte(zeros_ptr, index, valid).to(tl.float32)
    else:
        return scale, _value(zeros_ptr, index, valid)


@triton.jit
def _next(tile, turn, by, TURNS: tl.constexpr):
    """The turn after one, which may be the first one of a program's next tile."""
    return tl.where(turn == TURNS - 1, tile + by, tile), tl.where(turn == TURNS - 1, 0, turn + 1)


@triton.jit
def _load_step(
    codes_ptr, finer_ptr, scales_ptr, zeros_ptr, tile, turn, rows, thread,
    KIND: tl.constexpr, UNITS: tl.constexpr, SPLIT: tl.constexpr, SIZE: tl.constexpr, GROUPS: tl.constexpr, ZEROS: tl.constexpr, ONE: tl.constexpr,
    LAYERS: tl.constexpr, PARTS: tl.constexpr, ROW_BYTES: tl.constexpr, UNIT_BYTES: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """What a program reads in a turn of a tile: codes of both rows of every lane, then (scale, zero) of one row and the other by
    group: the groups of the lane's two columns where x has ONE row, else all of the step's."""
    lane, warp = thread % 32, thread // 32
    step = turn // LAYERS * PARTS + warp % PARTS
    unit = step * 4 + lane % 4
    inside = (tile < rows) & (unit < UNITS)
    row = tile + warp // PARTS * 16 + lane // 4
    row0, row1 = tl.minimum(row, rows - 1), tl.minimum(row + 8, rows - 1)
    if LAYERS == 2:
        codes_ptr = tl.where(turn % 2 == 0, codes_ptr, finer_ptr)
    codes0 = _load_codes(codes_ptr, row0.to(tl.int64) * ROW_BYTES + unit * UNIT_BYTES, inside, KIND)
    codes1 = _load_codes(codes_ptr, row1.to(tl.int64) * ROW_BYTES + unit * UNIT_BYTES, inside, KIND)
    read = (codes0, codes1)
    if KIND != _E8P:
        mine = lane % 4 * 2 if SPLIT > 1 and ONE else 0
        group = step * STEP // SIZE if SPLIT == 1 else step * SPLIT + mine
        for i in tl.static_range(2 if SPLIT > 2 and ONE else SPLIT):
            there = (tile < rows) & (group + i < GROUPS) & (mine < SPLIT)
            index0, index1 = row0.to(tl.int64) * GROUPS + group + i, row1.to(tl.int64) * GROUPS + group + i
            read += (_load_group(scales_ptr, zeros_ptr, index0, there, ZEROS, KIND), _load_group(scales_ptr, zeros_ptr, index1, there, ZEROS, KIND))
    return read


@triton.jit
def _x_of(x, nothing_ptr, unit, mine, KIND: tl.constexpr, UNIT: tl.constexpr, UNITS: tl.constexpr):
    """The values of a unit of a row of x, which is at the address `x`; zeros where it is not `mine` or there is none."""
    return _load_x(tl.where(mine & (unit < UNITS), x + unit * (UNIT * 2), nothing_ptr.to(tl.int64)), KIND)


@triton.jit
def _only(x, where, WORDS: tl.constexpr):
    """x where `where`, else zeros."""
    kept = ()
    for i in tl.static_range(WORDS):
        kept += (tl.where(where, x[i], 0),)
    return kept


@triton.jit(do_not_specialize=["x_rows", "rounds"])
def _gemv_kernel(
    x_ptr, y_ptr, x_rows, y_stride, nothing_ptr, tables_ptr, finer_ptr, finer_factor, rounds, rows0, rows1, rows2,
    codes0_ptr, scales0_ptr, zeros0_ptr, codes1_ptr, scales1_ptr, zeros1_ptr, codes2_ptr, scales2_ptr, zeros2_ptr,
    COUNT: tl.constexpr, KIND: tl.constexpr, UNIT: tl.constexpr, UNITS: tl.constexpr, SPLIT: tl.constexpr, SIZE: tl.constexpr,
    GROUPS: tl.constexpr, ZEROS: tl.constexpr, ONE: tl.constexpr, LAYERS: tl.constexpr, WARPS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """UNITS: of UNIT columns, in a row. SPLIT: groups in the columns of four lanes; 1 where SIZE is a multiple of these. ONE: x has
    one row. LAYERS: 2 where E8P has a second one. PARTS: warps that share the columns of 16 rows."""
    TURNS: tl.constexpr = (UNITS + 4 * PARTS - 1) // (4 * PARTS) * LAYERS  # steps of a warp for a tile
    ROWS: tl.constexpr = 16 * (WARPS // PARTS)  # of a tile
    BF16: tl.constexpr = x_ptr.dtype.element_ty == tl.bfloat16
    UNIT_BYTES: tl.constexpr = 12 if KIND == 3 else 16
    ROW_BYTES: tl.constexpr = (UNITS * UNIT + 31) // 32 * KIND * 4 if KIND < 16 else UNITS * UNIT_BYTES
    which, program, programs, above = weight_of(tl.program_id(0), rounds, rows0, rows1, rows2, ROWS, COUNT)
    y_ptr += above
    rows, codes_ptr = choose(which, rows0, rows1, rows2, COUNT), choose(which, codes0_ptr, codes1_ptr, codes2_ptr, COUNT)
    scales_ptr, zeros_ptr = choose(which, scales0_ptr, scales1_ptr, scales2_ptr, COUNT), choose(which, zeros0_ptr, zeros1_ptr, zeros2_ptr, COUNT)

    thread = tl.arange(0, WARPS * 32)
    lane, part = thread % 32, thread // 32 % PARTS
    if ONE:  # a lane's column of x is that of the group of its codes; of one group, all columns are alike
        mine = (lane // 4 == lane % 4 * SPLIT // 4) | (SPLIT == 1)
        x_row = x_ptr.to(tl.int64)
    else:  # it is a row of x
        mine = lane // 4 < x_rows
        x_row = x_ptr.to(tl.int64) + lane // 4 * (UNITS * UNIT * 2)
    # Two steps are asked for ahead, of the tile that they belong to (its first row), which may be the next one.
    tile, turn = program * ROWS, 0
    soon = _load_step(
        codes_ptr, finer_ptr, scales_ptr, zeros_ptr, tile, turn, rows, thread,
        KIND, UNITS, SPLIT, SIZE, GROUPS, ZEROS, ONE, LAYERS, PARTS, ROW_BYTES, UNIT_BYTES, 4 * UNIT,
    )  # fmt: skip
    tile, turn = _next(tile, turn, programs * ROWS, TURNS)
    later = _load_step(
        codes_ptr, finer_ptr, scales_ptr, zeros_ptr, tile, turn, rows, thread,
        KIND, UNITS, SPLIT, SIZE, GROUPS, ZEROS, ONE, LAYERS, PARTS, ROW_BYTES, UNIT_BYTES, 4 * UNIT,
    )  # fmt: skip
    if KIND == _E8P:
        _store_tables(tables_ptr, thread)
    x = _x_of(x_row, nothing_ptr, part * 4 + lane % 4, mine, KIND, UNIT, UNITS)
    # What a code is or-ed into; of 8 bits, the halves' together.
    BASE: tl.constexpr = (2176.0 if KIND == 8 else 128.0) if BF16 else (2048.0 if KIND == 8 else 1024.0)
    for first in range(program * ROWS, rows, programs * ROWS):
        sum00 = tl.zeros((WARPS * 32,), dtype=tl.float32)
        sum01, sum10, sum11 = sum00, sum00, sum00  # of the lane's first row and its second column, ..
        for this in tl.range(TURNS, loop_unroll_factor=2 if UNIT < 64 else 1):
            now = soon
            soon = later
            tile, turn = _next(tile, turn, programs * ROWS, TURNS)
            later = _load_step(
                codes_ptr, finer_ptr, scales_ptr, zeros_ptr, tile, turn, rows, thread,
                KIND, UNITS, SPLIT, SIZE, GROUPS, ZEROS, ONE, LAYERS, PARTS, ROW_BYTES, UNIT_BYTES, 4 * UNIT,
            )  # fmt: skip
            if KIND == _E8P:
                factor = 0.5 if LAYERS == 1 else tl.where(this % 2 == 0, 0.5, 0.5 * finer_factor)
                now += ((factor, 7.5), (factor, 7.5))
            for i in tl.static_range(1 if ONE else SPLIT):
                one_group = x if ONE or SPLIT == 1 else _only(x, lane % 4 * SPLIT // 4 == i, UNIT // 2)
                c = _multiply(now[0], now[1], one_group, lane, KIND, BF16)
                scale0, zero0 = now[2 + 2 * i]
                scale1, zero1 = now[3 + 2 * i]
                if ONE and SPLIT == 1:
                    sum00 += (c[0] - BASE * c[4] - zero0 * c[5]) * scale0
                    sum10 += (c[2] - BASE * c[4] - zero1 * c[5]) * scale1
                else:  # the sums of the lane's two columns of x, from lanes that hold these
                    of_x0, of_x1 = _take_from(c[5], lane % 4 * 8), _take_from(c[5], lane % 4 * 8 + 4)
                    base0, base1 = BASE * of_x0, BASE * of_x1
                    if KIND == 2:
                        base0, base1 = BASE * _take_from(c[4], lane % 4 * 8), BASE * _take_from(c[4], lane % 4 * 8 + 4)
                    sum00 += (c[0] - base0 - zero0 * of_x0) * scale0
                    sum10 += (c[2] - base0 - zero1 * of_x0) * scale1
                    if ONE:
                        scale0, zero0 = now[4]
                        scale1, zero1 = now[5]
                    sum01 += (c[1] - base1 - zero0 * of_x1) * scale0
                    sum11 += (c[3] - base1 - zero1 * of_x1) * scale1
            ahead = tl.where(this == TURNS - 1, 0, this + 1) // LAYERS
            x = _x_of(x_row, nothing_ptr, (ahead * PARTS + part) * 4 + lane % 4, mine, KIND, UNIT, UNITS)
        if ONE:
            if SPLIT > 1:
                sum00, sum10 = sum00 + sum01, sum10 + sum11
            if SPLIT == 4:
                sum00, sum10 = sum00 + _take_from(sum00, lane ^ 1), sum10 + _take_from(sum10, lane ^ 1)
            y = _meet(sum00, sum10, thread, PARTS)
            row = first + thread
            tl.store(y_ptr + row, y.to(y_ptr.dtype.element_ty), mask=(thread < ROWS) & (row < rows))
        else:
            _store_few(y_ptr, y_stride, x_rows, sum00, sum01, sum10, sum11, first, rows, WARPS // PARTS, PARTS)


def takes_grouped(x: torch.Tensor, weights: list[tuple], size: int, bits: int) -> bool:
    """Whether `multiply_grouped` does: a few rows of 16 bits on a card it is made for, groups that lanes do not share."""
    if x.shape[0] > MOST_ROWS or x.dtype not in HALF_TYPES or not capable(x.device):
        return False
    unit, cols = UNIT[bits], x.shape[1]
    whole = size >= cols or size % (4 * unit) == 0 or (4 * unit % size == 0 and size % unit == 0)
    if x.shape[0] > 1 and bits == 2 and size == unit < cols:
        return False  # more than the registers hold: 107 us on an H100, where `matmul_grouped` takes 92
    stored = all(s.dtype in HALF_TYPES and (z is None or z.dtype in (*HALF_TYPES, torch.uint8)) for _, s, z in weights)
    aligned = x.is_contiguous() and all(t.data_ptr() % 16 == 0 for t in (x, *(codes for codes, _, _ in weights)))
    return cols % unit == 0 and whole and stored and aligned and trusted(x.device, f"{bits} bits", partial(_grouped_tried, bits=bits))


def multiply_grouped(x: torch.Tensor, weights: list[tuple], size: int, bits: int) -> torch.Tensor:
    """x: [M, in], as `takes_grouped` says. weights: 1 to MOST_WEIGHTS (codes int32 [out, words], scales [out, groups], zeros like
    them or None), alike but for their rows; groups of `size` columns. Returns y [M, sum of out]."""
    cols, scales = x.shape[1], weights[0][1]
    groups = -(-cols // size)
    zeros = [NO_ZEROS if z is None else BYTES if z.dtype == torch.uint8 else HALVES for _, _, z in weights]
    split = max(1, 4 * UNIT[bits] // size) if groups > 1 else 1
    layout = {"SPLIT": split, "SIZE": 1 << 30 if groups == 1 else size, "GROUPS": groups, "ZEROS": zeros[0]}
    return _launch(x, [(codes, s, scales if z is None else z) for codes, s, z in weights], bits, layout)


def takes_e8p(x: torch.Tensor, codes: torch.Tensor, residual: torch.Tensor | None) -> bool:
    """Whether `multiply_e8p` does: a few rows of 16 bits on a card it is made for, and no second layer but E8P."""
    if x.shape[0] > MOST_ROWS or x.dtype not in HALF_TYPES or not capable(x.device) or x.shape[1] % UNIT[E8P] or not x.is_contiguous():
        return False
    read = [codes] if residual is None else [codes, residual]
    if not all(t.dtype == torch.int16 and t.is_contiguous() and t.data_ptr() % 16 == 0 for t in read) or x.data_ptr() % 16:
        return False
    return trusted(x.device, "E8P", _e8p_tried)


def multiply_e8p(x: torch.Tensor, codes: torch.Tensor, residual: torch.Tensor | None = None, residual_scale: float = 1.0) -> torch.Tensor:
    """x: [M, in], as `takes_e8p` says; codes, residual: int16 [out, in / 8]. Returns y [M, out]."""
    layout = {"SPLIT": 1, "SIZE": 1 << 30, "GROUPS": 1, "ZEROS": NO_ZEROS}
    return _launch(x, [(codes, x, x)], E8P, layout, residual, 1.0 / residual_scale)


def _launch(x: torch.Tensor, weights: list[tuple], kind: int, layout: dict[str, int], finer: torch.Tensor | None = None, factor: float = 1.0) -> torch.Tensor:
    """finer: the codes of a second layer, times `factor`."""
    rows = [len(codes) for codes, _, _ in weights]
    y = x.new_empty(x.shape[0], sum(rows))
    units, unused = x.shape[1] // UNIT[kind], MOST_WEIGHTS - len(weights)
    parts, rounds, programs = shares(rows, triton.cdiv(units, 4), x.device)
    operands = [t for weight in [*weights, *[weights[0]] * unused] for t in weight]
    _gemv_kernel[(programs,)](
        x, y, x.shape[0], y.shape[1], nothing(x.device), tables(x.device) if kind == E8P else x, weights[0][0] if finer is None else finer, factor, rounds,
        *rows, *[0] * unused, *operands, COUNT=len(weights), KIND=kind, UNIT=UNIT[kind], UNITS=units,
        ONE=x.shape[0] == 1, LAYERS=1 if finer is None else 2, WARPS=WARPS, PARTS=parts, **layout,
        num_warps=WARPS, maxnreg=REGISTERS,
    )  # fmt: skip
    return y


def _grouped_tried(device: torch.device, bits: int) -> bool:
    """Two stacked weights in groups of 64, several turns, the last one partly used; one row of x and more."""
    generator = torch.Generator().manual_seed(0)
    x, grouping = torch.randn(3, COLUMNS_TRIED, generator=generator).half(), reference_grouped.Grouping(reference_grouped.ROW, 64, COLUMNS_TRIED // 64)
    weights, exact = [], []
    for rows in (33, 5):
        codes = torch.randint(-(1 << 31), 1 << 31, (rows, COLUMNS_TRIED // 32 * bits), generator=generator).to(torch.int32)
        scales, zeros = ((torch.rand(rows, COLUMNS_TRIED // 64, generator=generator) + 0.5).half() for _ in range(2))
        weights.append((codes, scales, zeros))
        exact.append(reference_grouped.dequantize(*weights[-1], None, grouping, bits, torch.empty(rows, COLUMNS_TRIED)))
    moved = [tuple(t.to(device) for t in weight) for weight in weights]
    return all(_close(multiply_grouped(x[:rows].to(device), moved, 64, bits), x[:rows], torch.cat(exact)) for rows in (1, 3))


def _e8p_tried(device: torch.device) -> bool:
    """With a second layer; one row of x and more."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, COLUMNS_TRIED, generator=generator).half()
    codes, finer = (torch.randint(-(1 << 15), 1 << 15, (33, COLUMNS_TRIED // 8), generator=generator).to(torch.int16) for _ in range(2))
    exact, moved = e8p.dequantize(codes, torch.empty(33, COLUMNS_TRIED), finer, 3.45), (codes.to(device), finer.to(device), 3.45)
    return all(_close(multiply_e8p(x[:rows].to(device), *moved), x[:rows], exact) for rows in (1, 3))


def _close(y: torch.Tensor, x: torch.Tensor, w: torch.Tensor) -> bool:
    wanted = x.double() @ w.double().t()
    return bool((y.cpu().double() - wanted).norm() <= 1e-3 * wanted.norm())


@lru_cache(maxsize=8)
def nothing(device: torch.device) -> torch.Tensor:
    """x of lanes that have none: zeros, as many as a unit's."""
    return torch.zeros(max(UNIT.values()), dtype=torch.int16, device=device)


@lru_cache(maxsize=8)
def tables(device: torch.device) -> torch.Tensor:
    """E8P's words by lower byte, then what the upper byte's lower and upper half change in them: int32 [256 + 16 + 16].

    Changes of several bits are the exclusive or of theirs: a bit's sign, and what an odd number of them does.
    """
    bits = (torch.arange(16)[:, None] >> torch.arange(4)) & 1
    odd = (bits.sum(1) & 1) * 0x1111111F  # the shift in every nibble, the sign of the first one
    signs = [(bits * 14 << 4 * torch.arange(first, first + 4)).sum(1) ^ odd for first in (0, 4)]
    return torch.cat([e8p.abs_grid(), *(s.to(torch.int32) for s in signs)]).to(device)
