"""y = x W^T for one row of x, straight from NF4 codes, on cards from compute capability 8.0 on: chat decoding.

    y[o] = sum_i x[i] * quant_map[code[o, i]] * absmax[(o * in + i) // 64]        absmax: see `dequant_nf4.py`

The codes should come as fast as the card can read them, which leaves few instructions to a weight. A thread takes a group at a
time, half a block: one load of 16 bytes, one absmax for the sum of its products, and 32 of x, which stay in registers where
a row is one round. The 16 levels lie in shared memory at an address that ends in a zero byte, so that a code times 4 put in
that byte is its level's address: 1.5 integer instructions a weight, and 16 words never meet in a bank. From the loads to
the sum everything has one layout, [ROWS, GROUPS], so nothing waits but that sum, and the next codes are asked for before it.
As many programs as the registers hold stay on a multiprocessor and walk over the tiles. The order of a sum is fixed.

Triton has no word for such a table, and would give each load a layout of its own: hence the few lines of PTX.

On an H100, bf16, double quantization, 8 layers of Llama 8B (900 MB) as one graph took 543 us, 1659 GB/s, where the kernel of
`matmul_nf4.py` took 920 us, 978 GB/s. That was with the fastest of many tilings for each product: 23.0 us for 4096 x 14336,
36.2 for (14336, 14336) x 4096, 10.7 for 4096 x 4096 and 12.6 for (4096, 1024, 1024) x 4096. The one tiling kept for them all,
4 x 128 groups, took 23.4 and 10.7 for the first and third as launched here; 37.1 (twice the programs) and 13.6 (the next
codes asked for before the present ones' work) for the others. y's error is 1.7e-3, where rounding y costs 2.4e-3.
"""

from __future__ import annotations

import logging
from functools import lru_cache

import torch
import triton
import triton.language as tl

from kernels import reference_nf4
from kernels.matmul_grouped import processors

log = logging.getLogger(__name__)
_right: dict[torch.device, bool] = {}  # where the kernel was tried

MOST_WEIGHTS = 3  # in one launch
THREADS = 128
EACH = (4, 2, 1)  # groups a thread has of a tile
TILES = 512  # at least, where that can be: some for each multiprocessor of a large card
GROUPS = (128, 64, 32)  # groups of a row that a program reads at a time; a group is 16 bytes, 32 weights
REGISTERS = 1 << 16  # of a multiprocessor


def _lines(*lines: str) -> tl.constexpr:
    return tl.constexpr("\n".join(lines))


def _eight(line: str) -> str:
    """`line` for each of 8 codes; {k} is the number, {x} the operand that holds x, {half} and {byte} where the code is."""
    return "\n".join(line.format(k=k, x=f"${k + 2}", half=["high", "low"][k % 2], byte=k // 2) for k in range(8))


# Loads that are passed by where `valid` is 0. L1 is left to x: codes are read once. Not .nc, which ptxas moves over barriers.
LOAD_CODES = _lines("{ .reg .pred p; setp.ne.s32 p, $5, 0;", "@p ld.global.L1::no_allocate.v4.b32 {$0, $1, $2, $3}, [$4]; }")
LOAD_BYTE = _lines("{ .reg .pred p; setp.ne.s32 p, $2, 0;", "@p ld.global.u8 $0, [$1]; }")
LOAD_FLOAT = tl.constexpr("ld.global.nc.f32 $0, [$1];")

# 8 values of 16 bits in one load, widened: a bf16 is the upper half of an fp32.
LOAD_BF16 = _lines(
    "{ .reg .b32 a, b, c, d; ld.global.nc.v4.b32 {a, b, c, d}, [$8];",
    *(f"shl.b32 ${2 * i}, {w}, 16; and.b32 ${2 * i + 1}, {w}, 0xffff0000;" for i, w in enumerate("abcd")),
    "}",
)
LOAD_FP16 = _lines(
    "{ .reg .b32 a, b, c, d; .reg .b16 l, h; ld.global.nc.v4.b32 {a, b, c, d}, [$8];",
    *(f"mov.b32 {{l, h}}, {w}; cvt.f32.f16 ${2 * i}, l; cvt.f32.f16 ${2 * i + 1}, h;" for i, w in enumerate("abcd")),
    "}",
)

# Thread $1 stores level $2, the first 16 of them. 256-byte aligned, so that the address ends in a zero byte.
STORE_LEVELS = _lines(
    ".shared .align 256 .b32 nf4_levels[64];",
    "{ .reg .b32 a; .reg .pred p; mov.u32 a, nf4_levels; setp.lt.u32 p, $1, 16; mad.lo.u32 a, $1, 4, a;",
    "@p st.shared.b32 [a], $2; bar.sync 0; mov.u32 $0, 0; }",
)
# The sum of the 8 levels of word $1 times $2..$9 and $10. Byte j of the word: x[2j] has the high nibble, x[2j + 1] the low one.
DOT_EIGHT = _lines(
    "{ .reg .b32 high, low, table, a; .reg .f32 sum, level<8>; mov.u32 table, nf4_levels;",
    "shr.u32 high, $1, 2; and.b32 high, high, 0x3c3c3c3c; shl.b32 low, $1, 2; and.b32 low, low, 0x3c3c3c3c;",
    _eight("prmt.b32 a, {half}, table, 0x765{byte}; ld.shared.f32 level{k}, [a];"),
    "mov.f32 sum, $10;",
    _eight("fma.rn.f32 sum, level{k}, {x}, sum;"),
    "mov.f32 $0, sum; }",
)
OUT_EIGHT, IN_EIGHT = tl.constexpr("=f," * 8 + "l"), tl.constexpr("=f,r" + ",f" * 9)
FOUR_WORDS, EIGHT_FLOATS = tl.constexpr((tl.int32,) * 4), tl.constexpr((tl.float32,) * 8)



@triton.jit
def choose(which, first, second, third, COUNT: tl.constexpr):
    """One of the COUNT stacked weights' operands."""
    if COUNT > 2:
        second = tl.where(which == 1, second, third)
    return first if COUNT == 1 else tl.where(which == 0, first, second)


@triton.jit
def _store_levels(map_ptr, THREADS: tl.constexpr):
    """The levels to shared memory. One element a thread, so that the table is declared once."""
    thread = tl.arange(0, THREADS)
    tl.inline_asm_elementwise(STORE_LEVELS, "=r,r,f", [thread, tl.load(map_ptr + thread % 16)], tl.int32, False, 1)


@triton.jit
def _load_codes(codes_ptr, group, valid):
    """A group's 4 words. Impure, like `_load_byte`: a pure load sinks to its use, behind the wait for the sum."""
    return tl.inline_asm_elementwise(LOAD_CODES, "=r,=r,=r,=r,l,r", [codes_ptr.to(tl.int64) + group * 16, valid], FOUR_WORDS, False, 1)


@triton.jit
def _load_byte(ptr, index, valid):
    """A byte, widened. `tl.load` would change the layout to a coalesced one and back, through shared memory."""
    return tl.inline_asm_elementwise(LOAD_BYTE, "=r,l,r", [ptr.to(tl.int64) + index, valid], tl.int32, False, 1)


@triton.jit
def _load_float(ptr, index):
    """An fp32, in the layout of `index`, as `_load_byte`."""
    return tl.inline_asm_elementwise(LOAD_FLOAT, "=f,l", [ptr.to(tl.int64) + index.to(tl.int64) * 4], tl.float32, True, 1)


@triton.jit
def _load_eight(x_ptr, index, BF16: tl.constexpr):
    """x[index] to x[index + 7], widened, as one load each thread."""
    address = x_ptr.to(tl.int64) + index.to(tl.int64) * 2
    if BF16:
        return tl.inline_asm_elementwise(LOAD_BF16, OUT_EIGHT, [address], EIGHT_FLOATS, True, 1)
    else:
        return tl.inline_asm_elementwise(LOAD_FP16, OUT_EIGHT, [address], EIGHT_FLOATS, True, 1)


@triton.jit
def _load_group(x_ptr, group, BF16: tl.constexpr):
    """The 32 values of x that meet a group, in fours of eight."""
    first = group * 32
    return (
        _load_eight(x_ptr, first, BF16), _load_eight(x_ptr, first + 8, BF16),
        _load_eight(x_ptr, first + 16, BF16), _load_eight(x_ptr, first + 24, BF16),
    )  # fmt: skip


@triton.jit
def _dot_eight(word, x, acc):
    """acc + levels of a word's 8 codes times x. Impure, so that it stays behind `_store_levels`."""
    operands = [word, x[0], x[1], x[2], x[3], x[4], x[5], x[6], x[7], acc]
    return tl.inline_asm_elementwise(DOT_EIGHT, IN_EIGHT, operands, tl.float32, False, 1)


@triton.jit
def _load_weights(codes_ptr, absmax_ptr, row, group, per_row, valid, DOUBLE: tl.constexpr):
    """Codes, stored absmax and number in the weight of the groups `group` of rows `row`."""
    number = row.to(tl.int64) * per_row + group
    absmax = _load_byte(absmax_ptr, number >> 1, valid) if DOUBLE else _load_float(absmax_ptr, number >> 1)
    return _load_codes(codes_ptr, number, valid), absmax, number


@triton.jit(do_not_specialize=["rounds"])
def _gemv_kernel(
    x_ptr, y_ptr, rounds, rows0, rows1, rows2,
    codes0_ptr, absmax0_ptr, nested0_ptr, nested_map0_ptr, offset0_ptr, map0_ptr,
    codes1_ptr, absmax1_ptr, nested1_ptr, nested_map1_ptr, offset1_ptr, map1_ptr,
    codes2_ptr, absmax2_ptr, nested2_ptr, nested_map2_ptr, offset2_ptr, map2_ptr,
    COUNT: tl.constexpr, DOUBLE: tl.constexpr, PER_ROW: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr, THREADS: tl.constexpr,
):  # fmt: skip
    """PER_ROW: groups of a row. A weight's programs take its tiles in turn, `rounds` each, the last ones fewer."""
    STEPS: tl.constexpr = (PER_ROW + GROUPS - 1) // GROUPS
    BF16: tl.constexpr = x_ptr.dtype.element_ty == tl.bfloat16
    program, which = tl.program_id(0), 0
    programs = tl.cdiv(tl.cdiv(rows0, ROWS), rounds)
    if COUNT > 1:  # which of the stacked weights this program works on
        programs1, programs2 = tl.cdiv(tl.cdiv(rows1, ROWS), rounds), tl.cdiv(tl.cdiv(rows2, ROWS), rounds)
        which = (program >= programs).to(tl.int32) + (program >= programs + programs1).to(tl.int32)
        program -= choose(which, 0, programs, programs + programs1, COUNT)
        y_ptr += choose(which, 0, rows0, rows0 + rows1, COUNT)
        programs = choose(which, programs, programs1, programs2, COUNT)
    rows, codes_ptr = choose(which, rows0, rows1, rows2, COUNT), choose(which, codes0_ptr, codes1_ptr, codes2_ptr, COUNT)
    absmax_ptr, nested_ptr = choose(which, absmax0_ptr, absmax1_ptr, absmax2_ptr, COUNT), choose(which, nested0_ptr, nested1_ptr, nested2_ptr, COUNT)
    nested_map_ptr = choose(which, nested_map0_ptr, nested_map1_ptr, nested_map2_ptr, COUNT)
    offset_ptr, map_ptr = choose(which, offset0_ptr, offset1_ptr, offset2_ptr, COUNT), choose(which, map0_ptr, map1_ptr, map2_ptr, COUNT)

    local, group = tl.arange(0, ROWS)[:, None], tl.arange(0, GROUPS)[None, :]
    row, here = tl.minimum(program * ROWS + local, rows - 1), tl.minimum(group, PER_ROW - 1)
    codes, absmax, number = _load_weights(codes_ptr, absmax_ptr, row, here, PER_ROW, 1, DOUBLE)
    _store_levels(map_ptr, THREADS)
    offset = tl.load(offset_ptr) if DOUBLE else 0.0
    x = _load_group(x_ptr, here, BF16)
    for tile in range(program, tl.cdiv(rows, ROWS), programs):
        acc = tl.zeros((ROWS, GROUPS), dtype=tl.float32)
        for step in range(STEPS):
            if STEPS > 1:
                x = _load_group(x_ptr, tl.minimum(step * GROUPS + group, PER_ROW - 1), BF16)
            scale = absmax
            if DOUBLE:
                scale = _load_float(nested_map_ptr, absmax) * _load_float(nested_ptr, number >> 9) + offset
            part = tl.zeros((ROWS, GROUPS), dtype=tl.float32)
            for i in tl.static_range(4):
                part = _dot_eight(codes[i], x[i], part)
            acc += tl.where(step * GROUPS + group < PER_ROW, part * scale, 0.0)

            last = step == STEPS - 1  # then the next codes are the next tile's, if there is one
            next_tile, next_step = tl.where(last, tile + programs, tile), tl.where(last, 0, step + 1)
            row = tl.minimum(next_tile * ROWS + local, rows - 1)
            here = tl.minimum(next_step * GROUPS + group, PER_ROW - 1)
            valid = (next_tile * ROWS < rows).to(tl.int32)
            codes, absmax, number = _load_weights(codes_ptr, absmax_ptr, row, here, PER_ROW, valid, DOUBLE)
        out = tile * ROWS + tl.arange(0, ROWS)
        tl.store(y_ptr + out, tl.sum(acc, 1).to(y_ptr.dtype.element_ty), mask=out < rows)


def takes(x: torch.Tensor, packed: list[dict[str, torch.Tensor]]) -> bool:
    """Whether `multiply` does: one row of 16 bits on a card it is made for, whole blocks, all at addresses of 16-byte loads."""
    if x.shape[0] != 1 or x.shape[1] % 64 or x.dtype not in (torch.float16, torch.bfloat16) or not capable(x.device):
        return False
    return all(tensor.data_ptr() % 16 == 0 for tensor in (x, *(p["weight"] for p in packed))) and trusted(x.device)


@lru_cache(maxsize=8)
def capable(device: torch.device) -> bool:
    """Whether the kernel runs on `device`. Triton's interpreter does not know PTX."""
    return device.type == "cuda" and not triton.knobs.runtime.interpret and torch.cuda.get_device_capability(device) >= (8, 0)


def trusted(device: torch.device) -> bool:
    """Whether a product came out right here, tried once: PTX by hand meets more cards and drivers than anybody can test on.

    Not while a graph is captured, which cannot wait for a result; a pass is run before it is captured.
    """
    if device not in _right and not torch.cuda.is_current_stream_capturing():
        _right[device] = _tried(device)
        if not _right[device]:
            log.warning("the fast product of one row is wrong on this card (%s); the slower one is used.", device)
    return _right.get(device, False)


def _tried(device: torch.device) -> bool:
    """Two stacked weights, several steps of a row, the last one partly used."""
    generator = torch.Generator().manual_seed(0)
    weights = [reference_nf4.quantize(torch.randn(rows, 4160, generator=generator)) for rows in (33, 5)]
    x = torch.randn(1, 4160, generator=generator).half()
    exact = torch.cat([reference_nf4.dequantize(w, torch.empty(rows, 4160)) for w, rows in zip(weights, (33, 5))])
    wanted = x.double() @ exact.double().t()
    moved = [{name: tensor.to(device) for name, tensor in w.items()} for w in weights]
    got = multiply(x.to(device), moved, [33, 5]).cpu().double()
    return bool((got - wanted).norm() <= 1e-3 * wanted.norm())


def multiply(x: torch.Tensor, packed: list[dict[str, torch.Tensor]], out_features: list[int]) -> torch.Tensor:
    """x: [1, in], as `takes` says. 1 to MOST_WEIGHTS weights, all with double quantization or none. Returns y [1, sum of out]."""
    y = x.new_empty(1, sum(out_features))
    per_row, unused = x.shape[1] // 32, MOST_WEIGHTS - len(packed)
    rows, groups, registers = tiling(y.shape[1], per_row)
    tiles = [triton.cdiv(n, rows) for n in out_features]
    rounds = triton.cdiv(sum(tiles), processors(x.device) * (REGISTERS // (registers * THREADS)))
    weights = [p for weight in [*packed, *[packed[0]] * unused] for p in operands(weight)]
    _gemv_kernel[(sum(triton.cdiv(n, rounds) for n in tiles),)](
        x, y, rounds, *out_features, *[0] * unused, *weights,
        COUNT=len(packed), DOUBLE="nested_absmax" in packed[0], PER_ROW=per_row, ROWS=rows, GROUPS=groups, THREADS=THREADS,
        num_warps=THREADS // 32, maxnreg=registers,
    )  # fmt: skip
    return y


def tiling(rows: int, per_row: int) -> tuple[int, int, int]:
    """Rows and groups of a tile, and the registers of a thread, for `rows` rows of `per_row` groups.

    The widest step that wastes no more of its last round than the narrowest does, within a quarter of a row, and 4 rows a
    thread, or fewer for more tiles. Registers without spills; unasked, triton 3.6 takes up to 254 and few programs fit.
    """
    least = -(-per_row // GROUPS[-1]) * GROUPS[-1]
    groups = next(step for step in GROUPS if -(-per_row // step) * step <= least + per_row // 4)
    each = next((n for n in EACH if rows * groups >= TILES * n * THREADS), EACH[-1])
    return each * THREADS // groups, groups, 128 if each == 4 and per_row <= groups else 96


def operands(packed: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """A weight's tensors in the order of the kernels' arguments."""
    absmax = packed["absmax"]
    nested = (packed["nested_absmax"], packed["nested_quant_map"], packed["nested_offset"]) if "nested_absmax" in packed else (absmax,) * 3
    return packed["weight"], absmax, *nested, packed["quant_map"]
