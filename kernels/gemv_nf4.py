"""y = x W^T for a few rows of x, straight from NF4 codes, on cards from compute capability 8.0 on: chat decoding.

    y[m, o] = sum_i x[m, i] * quant_map[code[o, i]] * absmax[(o * in + i) // 64]        absmax: see `dequant_nf4.py`

The codes should come as fast as the card can read them, which leaves few instructions to a weight: here 2. A byte holds two
codes, so a table of 256 pairs of levels in x's dtype turns it into one register of a tensor core's operand: shift, mask, load.
The table lies in shared memory once for each lane, 32 KB, so that 32 lookups never meet in a bank. The sum is over columns,
whose order is free: a lane's four registers are four neighbouring bytes of two rows, and x is read to match. A product has 16
rows of W and 8 of x; with one row of x seven eighths of it are idle, and it is still cheaper than 32 multiplications.

A warp takes 4 blocks of 64 at a time, of each of 16 rows the 128 bytes of one line of the cache; the warps of a program share
out the columns of its rows. All products of a block have one absmax, which multiplies their sum in fp32; a lane decodes those
of one block and hands them to its neighbours. One row of x is held as columns, one a block, with zeros where a lane has
another block's codes: sums of different blocks are then different columns of one product, and a lane loads 16 bytes of codes at
a time, half the lines that it takes to give all lanes the same block. Several rows of x need the columns, and get 8 bytes.
What a step needs is asked for two steps before, and the first of it before the tables, which then cost no waiting. As many
programs as the registers hold stay on a multiprocessor and walk over the tiles. The order of a sum is fixed.

The PTX that this takes is in `gemv_nf4_ptx.py` and `gemv.py`.

As one graph, bf16, double quantization, on an H100: 4096 x 14336 in 16.2 us, which is 62 % of what a copy moves, 4096 x 4096 in
7.7, (4096, 1024, 1024) x 4096 in 10.9, (14336, 14336) x 4096 in 28.8; 8 layers of Llama 8B (900 MB) in 508, 1773 GB/s, where
it was 573 with 8 bytes of codes a load, all asked for behind the tables. bitsandbytes takes 40 us for the first. y's error is
2.2e-3, where rounding W and y costs 2.4e-3.

Loading the same lines and nothing else takes 12.6 us; the absmax cost about 1, the products 1.9, a third of that the lookups. A lane
asks for half a line at a time, and all this was 0.3 us slower until L2 was told to fetch whole ones. Tried in vain: a fifth fewer
instructions, by unrolling and by absmax of four steps staged in shared memory (16.6 us), neighbouring steps for a warp as well
(16.6 to 16.8), lines prefetched into L2 four steps ahead (1 us more).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels import reference_nf4
from kernels.dequant_nf4 import operands
from kernels.gemv import (
    MOST_ROWS,
    MOST_WEIGHTS,
    REGISTERS,
    WARPS,
    _load_byte,
    _load_float,
    _load_x,
    _meet,
    _store_few,
    _take_from,
    capable,
    choose,
    shares,
    trusted,
    weight_of,
)
from kernels.gemv_nf4_ptx import STEP, _load_codes, _load_codes_wide, _multiply, _share, _store_tables


@triton.jit
def _load_row(codes_ptr, absmax_ptr, nested_ptr, row, step, left, lane, BLOCKS: tl.constexpr, DOUBLE: tl.constexpr, ONE: tl.constexpr):
    """Of a row: the lane's codes of 4 blocks, and of one of these the stored absmax and what it is a share of."""
    number, block = row.to(tl.int64) * BLOCKS + step * 4, lane % 4
    mine = tl.where(block < left, number + block, 0)
    absmax = _load_byte(absmax_ptr, mine, block < left) if DOUBLE else _load_float(absmax_ptr, mine)
    nested = _load_float(nested_ptr, mine >> 8) if DOUBLE else absmax
    if ONE:
        return _load_codes_wide(codes_ptr, number * 32 + block * 16, left - block // 2), absmax, nested
    else:
        return _load_codes(codes_ptr, number * 32 + block * 8, left), absmax, nested


@triton.jit
def _load_step(
    codes_ptr, absmax_ptr, nested_ptr, position, program, programs, rows, thread,
    BLOCKS: tl.constexpr, DOUBLE: tl.constexpr, ONE: tl.constexpr, WARPS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """What a program reads at a position: both rows of every lane. Positions are the turns of its tiles, one after the other."""
    TURNS: tl.constexpr = (BLOCKS + 4 * PARTS - 1) // (4 * PARTS)
    TILE: tl.constexpr = 16 * (WARPS // PARTS)
    lane, warp = thread % 32, thread // 32
    tile, step = program + position // TURNS * programs, position % TURNS * PARTS + warp % PARTS
    left = tl.where(tile * TILE < rows, BLOCKS - step * 4, 0)
    row = tile * TILE + warp // PARTS * 16 + lane // 4
    row0, row1 = tl.minimum(row, rows - 1), tl.minimum(row + 8, rows - 1)
    codes0, absmax0, nested0 = _load_row(codes_ptr, absmax_ptr, nested_ptr, row0, step, left, lane, BLOCKS, DOUBLE, ONE)
    codes1, absmax1, nested1 = _load_row(codes_ptr, absmax_ptr, nested_ptr, row1, step, left, lane, BLOCKS, DOUBLE, ONE)
    return codes0, absmax0, nested0, codes1, absmax1, nested1


@triton.jit(do_not_specialize=["x_rows", "rounds"])
def _gemv_kernel(
    x_ptr, y_ptr, x_rows, y_stride, rounds, rows0, rows1, rows2,
    codes0_ptr, absmax0_ptr, nested0_ptr, nested_map0_ptr, offset0_ptr, map0_ptr,
    codes1_ptr, absmax1_ptr, nested1_ptr, nested_map1_ptr, offset1_ptr, map1_ptr,
    codes2_ptr, absmax2_ptr, nested2_ptr, nested_map2_ptr, offset2_ptr, map2_ptr,
    COUNT: tl.constexpr, DOUBLE: tl.constexpr, ONE: tl.constexpr, BLOCKS: tl.constexpr, WARPS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """BLOCKS: of a row. ONE: x has one row. PARTS: warps that share the columns of 16 rows."""
    TURNS: tl.constexpr = (BLOCKS + 4 * PARTS - 1) // (4 * PARTS)  # steps of a warp for a tile
    TILES: tl.constexpr = WARPS // PARTS  # of 16 rows
    BF16: tl.constexpr = x_ptr.dtype.element_ty == tl.bfloat16
    which, program, programs, above = weight_of(tl.program_id(0), rounds, rows0, rows1, rows2, 16 * TILES, COUNT)
    y_ptr += above
    rows, codes_ptr = choose(which, rows0, rows1, rows2, COUNT), choose(which, codes0_ptr, codes1_ptr, codes2_ptr, COUNT)
    absmax_ptr, nested_ptr = choose(which, absmax0_ptr, absmax1_ptr, absmax2_ptr, COUNT), choose(which, nested0_ptr, nested1_ptr, nested2_ptr, COUNT)
    nested_map_ptr = choose(which, nested_map0_ptr, nested_map1_ptr, nested_map2_ptr, COUNT)
    offset_ptr, map_ptr = choose(which, offset0_ptr, offset1_ptr, offset2_ptr, COUNT), choose(which, map0_ptr, map1_ptr, map2_ptr, COUNT)

    thread = tl.arange(0, WARPS * 32)
    lane, part = thread % 32, thread // 32 % PARTS
    column = lane // 4  # of x, that this lane holds
    if ONE:  # which is a block: the lane has the half of it that it has of the codes, in the first or the second load of these
        mine, place, source = (column < 4) & (column % 2 == lane % 4 // 2), lane % 2 * 32, (lane & 28) + lane % 2 * 2
        x0 = _load_x(x_ptr, (part * 4 + column) * 64 + place, mine & (part * 4 + column < BLOCKS))
        x1 = _load_x(x_ptr, (part * 4 + column) * 64 + place + 16, mine & (part * 4 + column < BLOCKS))
    soon = _load_step(codes_ptr, absmax_ptr, nested_ptr, 0, program, programs, rows, thread, BLOCKS, DOUBLE, ONE, WARPS, PARTS)
    later = _load_step(codes_ptr, absmax_ptr, nested_ptr, 1, program, programs, rows, thread, BLOCKS, DOUBLE, ONE, WARPS, PARTS)
    offset = _load_float(offset_ptr, thread * 0) if DOUBLE else 0.0
    _store_tables(map_ptr, nested_map_ptr, thread, BF16, DOUBLE)
    position = 0
    for tile in range(program, tl.cdiv(rows, 16 * TILES), programs):
        sum00 = tl.zeros((WARPS * 32,), dtype=tl.float32)
        sum01, sum10, sum11 = sum00, sum00, sum00
        for turn in range(TURNS):
            codes0, scale0, nested0, codes1, scale1, nested1 = soon
            soon = later
            later = _load_step(codes_ptr, absmax_ptr, nested_ptr, position + 2, program, programs, rows, thread, BLOCKS, DOUBLE, ONE, WARPS, PARTS)
            position += 1
            if DOUBLE:
                scale0 = _share(scale0) * nested0 + offset
                scale1 = _share(scale1) * nested1 + offset
            first = (turn * PARTS + part) * 4
            if ONE:  # a lane's two columns of the sums are blocks 0 and 1 of the first load, in the next lane 2 and 3 of the second
                now0, now1, ahead = x0, x1, tl.where(turn == TURNS - 1, part * 4, first + PARTS * 4) + column
                x0 = _load_x(x_ptr, ahead * 64 + place, mine & (ahead < BLOCKS))
                x1 = _load_x(x_ptr, ahead * 64 + place + 16, mine & (ahead < BLOCKS))
                a, b = codes0, codes1
                upper = _multiply(a[0], a[1], b[0], b[1], now0, lane, BF16), _multiply(a[2], a[3], b[2], b[3], now1, lane, BF16)
                lower = _multiply(a[4], a[5], b[4], b[5], now0, lane, BF16), _multiply(a[6], a[7], b[6], b[7], now1, lane, BF16)
                for i in tl.static_range(2):
                    sum00 += tl.where(lane % 2 == 0, upper[0][i] + upper[1][i], lower[0][i] + lower[1][i]) * _take_from(scale0, source + i)
                    sum10 += tl.where(lane % 2 == 0, upper[0][2 + i] + upper[1][2 + i], lower[0][2 + i] + lower[1][2 + i]) * _take_from(scale1, source + i)
            else:
                for b in tl.static_range(4):
                    valid = (column < x_rows) & (first + b < BLOCKS)
                    now = _load_x(x_ptr, column * (BLOCKS * 64) + (first + b) * 64 + lane % 4 * 16, valid)
                    share0, share1 = _take_from(scale0, (lane & 28) + b), _take_from(scale1, (lane & 28) + b)
                    product = _multiply(codes0[2 * b], codes0[2 * b + 1], codes1[2 * b], codes1[2 * b + 1], now, lane, BF16)
                    sum00 += product[0] * share0
                    sum01 += product[1] * share0
                    sum10 += product[2] * share1
                    sum11 += product[3] * share1
        if ONE:
            y = _meet(sum00 + _take_from(sum00, lane ^ 1), sum10 + _take_from(sum10, lane ^ 1), thread, PARTS)
            row = tile * (16 * TILES) + thread
            tl.store(y_ptr + row, y.to(y_ptr.dtype.element_ty), mask=(thread < 16 * TILES) & (row < rows))
        else:
            _store_few(y_ptr, y_stride, x_rows, sum00, sum01, sum10, sum11, tile * (16 * TILES), rows, TILES, PARTS)


def takes(x: torch.Tensor, packed: list[dict[str, torch.Tensor]]) -> bool:
    """Whether `multiply` does: a few rows of 16 bits on a card it is made for, whole blocks, all at addresses of 16-byte loads."""
    if x.shape[0] > MOST_ROWS or x.shape[1] % 64 or x.dtype not in (torch.float16, torch.bfloat16) or not capable(x.device):
        return False
    read = (t for p in packed for t in (p["weight"], p["quant_map"]))
    return all(tensor.data_ptr() % 16 == 0 for tensor in (x, *read)) and trusted(x.device, "nf4", _tried)


def _tried(device: torch.device) -> bool:
    """Two stacked weights, several turns, the last one partly used; one row of x and more."""
    generator = torch.Generator().manual_seed(0)
    weights = [reference_nf4.quantize(torch.randn(rows, 4160, generator=generator)) for rows in (33, 5)]
    x = torch.randn(3, 4160, generator=generator).half()
    exact = torch.cat([reference_nf4.dequantize(w, torch.empty(rows, 4160)) for w, rows in zip(weights, (33, 5))])
    wanted = x.double() @ exact.double().t()
    moved = [{name: tensor.to(device) for name, tensor in w.items()} for w in weights]
    got = [multiply(x[:rows].to(device), moved, [33, 5]).cpu().double() for rows in (1, 3)]
    return all(bool((y - wanted[: len(y)]).norm() <= 1e-3 * wanted[: len(y)].norm()) for y in got)


def multiply(x: torch.Tensor, packed: list[dict[str, torch.Tensor]], out_features: list[int]) -> torch.Tensor:
    """x: [M, in], as `takes` says. 1 to MOST_WEIGHTS weights, all with double quantization or none. Returns y [M, sum of out]."""
    y = x.new_empty(x.shape[0], sum(out_features))
    blocks, unused = x.shape[1] // 64, MOST_WEIGHTS - len(packed)
    parts, rounds, programs = shares(out_features, triton.cdiv(blocks, STEP), x.device)
    weights = [p for weight in [*packed, *[packed[0]] * unused] for p in operands(weight)]
    _gemv_kernel[(programs,)](
        x, y, x.shape[0], y.shape[1], rounds, *out_features, *[0] * unused, *weights,
        COUNT=len(packed), DOUBLE="nested_absmax" in packed[0], ONE=x.shape[0] == 1, BLOCKS=blocks, WARPS=WARPS, PARTS=parts,
        num_warps=WARPS, maxnreg=REGISTERS,
    )  # fmt: skip
    return y
