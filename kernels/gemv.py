"""What the products of a few rows of x share (`gemv_nf4`, `gemv_even`): where they run, how warps share a weight, their PTX.

A weight's codes should come as fast as a card can read them, which leaves a few instructions to each. So both kernels turn codes
into registers of a tensor core's operand themselves. Triton has no word for that, nor for the layout of an operand, hence the
few lines of PTX; one element is one thread. A warp takes 16 rows of W at a time, of which a lane holds two, lane // 4 and that
+ 8; the sum is over columns, whose order is free: a lane takes neighbouring columns of its rows, and x is read to match.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import lru_cache

import torch
import triton
import triton.language as tl

log = logging.getLogger(__name__)
_right: dict[tuple[torch.device, str], bool] = {}  # where which kernel was tried

MOST_WEIGHTS = 3  # in one launch
MOST_ROWS = 8  # of x
TILE = 16  # rows of W of one product on the tensor cores
WARPS = 8  # of a program
RESIDENT = 2  # programs on a multiprocessor at a time
REGISTERS = 65536 // (RESIDENT * WARPS * 32)  # a thread's then


@lru_cache(maxsize=8)
def capable(device: torch.device) -> bool:
    """Whether these kernels run on `device`. Triton's interpreter does not know PTX."""
    return device.type == "cuda" and not triton.knobs.runtime.interpret and torch.cuda.get_device_capability(device) >= (8, 0)


@lru_cache(maxsize=8)
def processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def trusted(device: torch.device, kernel: str, tried: Callable[[torch.device], bool]) -> bool:
    """Whether a kernel's results came out right here, tried once: PTX by hand meets more cards and drivers than anybody can test on.

    Not while a graph is captured, which cannot wait for a result; a pass is run before it is captured.
    """
    if (device, kernel) not in _right and not torch.cuda.is_current_stream_capturing():
        _right[device, kernel] = tried(device)
        if not _right[device, kernel]:
            log.warning("the fast kernel (%s) is wrong on this card (%s); the slower one is used.", kernel, device)
    return _right.get((device, kernel), False)


def shares(rows: list[int], steps: int, device: torch.device) -> tuple[int, int, int]:
    """(parts, rounds, programs) for stacked weights of so many rows, whose columns are `steps` of a warp.

    parts: warps that share the columns of 16 rows, as few as fill the card, since their sums have to meet. rounds: tiles that a
    program takes in turn.
    """
    parts, resident = 1, processors(device) * RESIDENT
    while parts < WARPS and sum(rows) // TILE * parts < 0.8 * resident * WARPS and parts < steps:
        parts *= 2
    tiles = [triton.cdiv(n, TILE * (WARPS // parts)) for n in rows]
    rounds = triton.cdiv(sum(tiles), resident)
    return parts, rounds, sum(triton.cdiv(n, rounds) for n in tiles)


@triton.jit
def choose(which, first, second, third, COUNT: tl.constexpr):
    """One of the COUNT stacked weights' operands."""
    if COUNT > 2:
        second = tl.where(which == 1, second, third)
    return first if COUNT == 1 else tl.where(which == 0, first, second)


@triton.jit
def weight_of(program, rounds, rows0, rows1, rows2, ROWS: tl.constexpr, COUNT: tl.constexpr):
    """Which of COUNT stacked weights a program works on, its number there, how many work on it, and the rows of y above its.
    A weight's programs take its tiles of ROWS in turn, `rounds` each, the last ones fewer."""
    which, above, programs = 0, 0, tl.cdiv(tl.cdiv(rows0, ROWS), rounds)
    if COUNT > 1:
        programs1, programs2 = tl.cdiv(tl.cdiv(rows1, ROWS), rounds), tl.cdiv(tl.cdiv(rows2, ROWS), rounds)
        which = (program >= programs).to(tl.int32) + (program >= programs + programs1).to(tl.int32)
        program -= choose(which, 0, programs, programs + programs1, COUNT)
        above = choose(which, 0, rows0, rows0 + rows1, COUNT)
        programs = choose(which, programs, programs1, programs2, COUNT)
    return which, program, programs, above


def _lines(*lines: str) -> tl.constexpr:
    return tl.constexpr("\n".join(lines))


LOAD_BYTE = _lines("{ .reg .pred p; setp.ne.s32 p, $2, 0; mov.b32 $0, 0;", "@p ld.global.u8 $0, [$1]; }")
LOAD_HALF = _lines("{ .reg .pred p; setp.ne.s32 p, $2, 0; mov.b32 $0, 0;", "@p ld.global.u16 $0, [$1]; }")
LOAD_FLOAT = tl.constexpr("ld.global.f32 $0, [$1];")
TAKE_FROM = tl.constexpr("shfl.sync.idx.b32 $0, $1, $2, 0x1f, 0xffffffff;")


def load_x_lines(words: int, always: bool = False) -> tl.constexpr:
    """2 `words` values of x from $words on; unless `always`, zeros where the operand after it is 0."""
    loads = [f"ld.global.nc.v4.b32 {{${i}, ${i + 1}, ${i + 2}, ${i + 3}}}, [${words} + {4 * i}];" for i in range(0, words, 4)]
    if always:
        return _lines(*loads)
    zeros = (f"mov.b32 ${i}, 0;" for i in range(words))
    return _lines(f"{{ .reg .pred p; setp.ne.s32 p, ${words + 1}, 0;", *zeros, *(f"@p {load}" for load in loads), "}")


LOAD_X = load_x_lines(8)
EIGHT_WORDS, OUT_EIGHT = tl.constexpr((tl.int32,) * 8), tl.constexpr("=r," * 8 + "l,r")


def _meet_lines(parts: int) -> tl.constexpr:
    """The sums $1 and $2 of a warp's first and last 8 rows, in its lanes 0, 4, 8, .., added to those of the `parts` warps that
    share its rows. $0: of thread i ($3), that of row i of the program; later threads get any value."""
    return _lines(
        f".shared .align 128 .f32 gemv_sums[{32 * WARPS}];",
        "{ .reg .b32 a, b; .reg .pred p; .reg .f32 v, sum; mov.u32 b, gemv_sums; and.b32 a, $3, 3; setp.eq.u32 p, a, 0;",
        "shr.u32 a, $3, 5; shl.b32 a, a, 6; and.b32 $0, $3, 28; add.u32 a, a, $0; add.u32 a, a, b;",
        "@p st.shared.f32 [a], $1; @p st.shared.f32 [a + 32], $2; bar.sync 0;",
        f"shr.u32 a, $3, 4; and.b32 a, a, {WARPS // parts - 1}; mad.lo.u32 b, a, {64 * parts}, b;",
        "and.b32 a, $3, 15; mad.lo.u32 a, a, 4, b; ld.shared.f32 sum, [a];",
        *(f"ld.shared.f32 v, [a + {64 * i}]; add.f32 sum, sum, v;" for i in range(1, parts)),
        "bar.sync 0; mov.b32 $0, sum; }",
    )


MEET_1, MEET_2, MEET_4, MEET_8 = (_meet_lines(parts) for parts in (1, 2, 4, 8))


@triton.jit
def _load_byte(ptr, index, valid):
    """A byte, widened. `tl.load` would change the layout to a coalesced one and back, through shared memory."""
    return tl.inline_asm_elementwise(LOAD_BYTE, "=r,l,r", [ptr.to(tl.int64) + index, valid.to(tl.int32)], tl.int32, False, 1)


@triton.jit
def _load_half(ptr, index, valid):
    """A value of 16 bits, its bits widened, as `_load_byte`."""
    return tl.inline_asm_elementwise(LOAD_HALF, "=r,l,r", [ptr.to(tl.int64) + index * 2, valid.to(tl.int32)], tl.int32, False, 1)


@triton.jit
def _load_float(ptr, index):
    """An fp32, in the layout of `index`, as `_load_byte`."""
    return tl.inline_asm_elementwise(LOAD_FLOAT, "=f,l", [ptr.to(tl.int64) + index.to(tl.int64) * 4], tl.float32, False, 1)


@triton.jit
def _take_from(value, lane):
    """The value that another lane of the warp has."""
    return tl.inline_asm_elementwise(TAKE_FROM, "=f,f,r", [value, lane], tl.float32, False, 1)


@triton.jit
def _load_x(x_ptr, index, valid):
    """x[index] to x[index + 15], two a word, as the tensor cores take them; zeros where not `valid`."""
    return tl.inline_asm_elementwise(LOAD_X, OUT_EIGHT, [x_ptr.to(tl.int64) + index * 2, valid.to(tl.int32)], EIGHT_WORDS, False, 1)


@triton.jit
def _meet(first, second, thread, PARTS: tl.constexpr):
    """The sums of 16 rows of each tile, by the warps that share its columns: of thread i that of row i of the program."""
    arguments = [first, second, thread]
    if PARTS == 1:
        bits = tl.inline_asm_elementwise(MEET_1, "=&r,f,f,r", arguments, tl.int32, False, 1)
    elif PARTS == 2:
        bits = tl.inline_asm_elementwise(MEET_2, "=&r,f,f,r", arguments, tl.int32, False, 1)
    elif PARTS == 4:
        bits = tl.inline_asm_elementwise(MEET_4, "=&r,f,f,r", arguments, tl.int32, False, 1)
    else:
        bits = tl.inline_asm_elementwise(MEET_8, "=&r,f,f,r", arguments, tl.int32, False, 1)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _store_few(y_ptr, y_stride, x_rows, sum00, sum01, sum10, sum11, first, rows, TILES: tl.constexpr, PARTS: tl.constexpr):
    """y of TILES times 16 rows of W from `first` on, of `rows`, for some rows of x: the sums in the tensor cores' layout, of a
    lane's first and second row of W by its two columns, added over the PARTS warps that share them."""
    sums = tl.join(tl.join(sum00, sum10), tl.join(sum01, sum11))
    y = tl.sum(tl.reshape(sums, (TILES, PARTS, 32, 4)), 1)  # [tile, lane, half and column]
    lanes, which = tl.arange(0, 32)[None, :, None], tl.arange(0, 4)[None, None, :]
    row = first + tl.arange(0, TILES)[:, None, None] * 16 + lanes // 4 + which // 2 * 8
    of_x = lanes % 4 * 2 + which % 2
    tl.store(y_ptr + of_x * y_stride + row, y.to(y_ptr.dtype.element_ty), mask=(of_x < x_rows) & (row < rows))
