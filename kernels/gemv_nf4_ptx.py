"""The words of PTX of `gemv_nf4`: tables of levels in shared memory, loads that keep their place, the tensor cores' product.

Each is a string and the function that puts it into a kernel. One element is one thread; `gemv_nf4` says who holds what.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.gemv import EIGHT_WORDS, OUT_EIGHT, WARPS, _lines

STEP = 4  # blocks that a warp reads at a time

# 4 x 8 bytes, 32 apart: a lane's share of 4 blocks of a row. Those from block $9 on are not there. Impure, as all loads of
# codes and absmax: a pure load sinks to its use, behind the wait for the sum. L1 is left to x: codes are read once. L2
# fetches whole lines, whose halves are asked for apart.
LOAD_CODES = _lines(
    "{ .reg .pred p;",
    *(f"mov.b32 ${2 * b}, 0; mov.b32 ${2 * b + 1}, 0; setp.gt.s32 p, $9, {b};"
      f"@p ld.global.L1::no_allocate.L2::128B.v2.b32 {{${2 * b}, ${2 * b + 1}}}, [$8 + {32 * b}];" for b in range(STEP)),
    "}",
)  # fmt: skip
# For one row of x: 32 bytes as 2 x 16, 64 apart, block 0 or 1 and then 2 or 3.
LOAD_CODES_WIDE = _lines(
    "{ .reg .pred p;",
    *(f"mov.b32 ${4 * b}, 0; mov.b32 ${4 * b + 1}, 0; mov.b32 ${4 * b + 2}, 0; mov.b32 ${4 * b + 3}, 0; setp.gt.s32 p, $9, {2 * b};"
      f"@p ld.global.L1::no_allocate.L2::128B.v4.b32 {{${4 * b}, ${4 * b + 1}, ${4 * b + 2}, ${4 * b + 3}}}, [$8 + {64 * b}];" for b in range(STEP // 2)),
    "}",
)  # fmt: skip


def _store_tables_lines(half: str, double: bool) -> tl.constexpr:
    """Thread $3 stores its share of the pairs of levels of map $1, where entry b has level b >> 4 in the lower half and b & 15
    above, and value $3 of the map $2 of stored absmax. The first barrier keeps the loads of codes before it: the compiler would
    have them wait for the maps."""
    each = 16 // WARPS
    shares = ["ld.global.nc.f32 level0, [h];", "mov.u32 v, nf4_shares; mad.lo.u32 v, $3, 4, v; st.shared.f32 [v], level0;"] if double else []
    return _lines(
        ".shared .align 128 .b32 nf4_pairs[8192];", f".shared .align 128 .f32 nf4_shares[{32 * WARPS}];",
        f"{{ .reg .b32 a, v; .reg .b64 h; .reg .f32 low<16>, high<{each}>, level0; bar.sync 0; shr.u32 a, $3, 5;",
        "mul.wide.u32 h, $3, 4; add.u64 h, h, $2;", *shares[:1],
        *(f"ld.global.nc.v4.f32 {{low{k}, low{k + 1}, low{k + 2}, low{k + 3}}}, [$1 + {4 * k}];" for k in range(0, 16, 4)),
        f"mul.wide.u32 h, a, {4 * each}; add.u64 h, h, $1;",
        *(f"ld.global.nc.f32 high{i}, [h + {4 * i}];" for i in range(each)), *shares[1:],
        f"and.b32 v, $3, 31; shl.b32 v, v, 2; mad.lo.u32 a, a, {each * 16 * 128}, v; mov.u32 v, nf4_pairs; add.u32 a, a, v;",
        *(f"cvt.rn.{half}x2.f32 v, low{k}, high{i}; st.shared.b32 [a + {(16 * i + k) * 128}], v;" for i in range(each) for k in range(16)),
        "bar.sync 0; mov.u32 $0, 0; }",
    )  # fmt: skip


STORE_F16, STORE_F16_DOUBLE = (_store_tables_lines("f16", double) for double in (False, True))
STORE_BF16, STORE_BF16_DOUBLE = (_store_tables_lines("bf16", double) for double in (False, True))
SHARE = tl.constexpr("{ .reg .b32 a; mov.u32 a, nf4_shares; mad.lo.u32 a, $1, 4, a; ld.shared.f32 $0, [a]; }")


def _multiply_lines(half: str) -> tl.constexpr:
    """$0..$3: the sums of a block, rows of W ($4, $5: a lane's codes of its first row, $6, $7: of its second) times columns of x
    ($8..$15). $16: four times the lane. Byte 2i of a row is its operand 0 of product i, byte 2i + 1 its operand 2."""
    names = [f"a{part}{byte}" for part in range(2) for byte in range(8)]
    shifts = ["shl.b32 s, {w}, 7;", "shr.u32 s, {w}, 1;", "shr.u32 s, {w}, 9;", "shr.u32 s, {w}, 17;"]
    look = (
        f"{shifts[byte % 4].format(w=f'${4 + 2 * part + byte // 4}')} lop3.b32 s, s, 0x7f80, $16, 0xea; "
        f"add.u32 s, s, table; ld.shared.b32 a{part}{byte}, [s];"
        for part in range(2) for byte in range(8)
    )  # fmt: skip
    mma = f"mma.sync.aligned.m16n8k16.row.col.f32.{half}.{half}.f32 {{c0, c1, c2, c3}},"
    return _lines(
        f"{{ .reg .b32 s, table, {', '.join(names)}; .reg .f32 c<4>; mov.u32 table, nf4_pairs;",
        *(f"mov.f32 c{i}, 0f00000000;" for i in range(4)), *look,
        *(f"{mma} {{a0{2 * i}, a1{2 * i}, a0{2 * i + 1}, a1{2 * i + 1}}}, {{${8 + 2 * i}, ${9 + 2 * i}}}, {{c0, c1, c2, c3}};" for i in range(4)),
        *(f"mov.f32 ${i}, c{i};" for i in range(4)), "}",
    )  # fmt: skip


MULTIPLY_F16, MULTIPLY_BF16 = _multiply_lines("f16"), _multiply_lines("bf16")
FOUR_FLOATS, OUT_FOUR = tl.constexpr((tl.float32,) * 4), tl.constexpr("=f," * 4 + "r" + ",r" * 12)


@triton.jit
def _store_tables(map_ptr, nested_map_ptr, thread, BF16: tl.constexpr, DOUBLE: tl.constexpr):
    """The pairs of levels and the values of a stored absmax to shared memory."""
    arguments = [map_ptr.to(tl.int64) + thread * 0, nested_map_ptr.to(tl.int64) + thread * 0, thread]
    if BF16:
        tl.inline_asm_elementwise(STORE_BF16_DOUBLE if DOUBLE else STORE_BF16, "=r,l,l,r", arguments, tl.int32, False, 1)
    else:
        tl.inline_asm_elementwise(STORE_F16_DOUBLE if DOUBLE else STORE_F16, "=r,l,l,r", arguments, tl.int32, False, 1)


@triton.jit
def _share(absmax):
    """What a stored absmax stands for. Impure, so that it stays behind `_store_tables`."""
    return tl.inline_asm_elementwise(SHARE, "=f,r", [absmax], tl.float32, False, 1)


@triton.jit
def _load_codes(codes_ptr, index, left):
    """A lane's 8 words of 4 blocks of a row, two a block, `left` of which there are."""
    return tl.inline_asm_elementwise(LOAD_CODES, OUT_EIGHT, [codes_ptr.to(tl.int64) + index, left], EIGHT_WORDS, False, 1)


@triton.jit
def _load_codes_wide(codes_ptr, index, left):
    """A lane's 8 words of 4 blocks of a row: four of block lane % 4 // 2, if `left` > 0, and four of that + 2, if `left` > 2."""
    return tl.inline_asm_elementwise(LOAD_CODES_WIDE, OUT_EIGHT, [codes_ptr.to(tl.int64) + index, left], EIGHT_WORDS, False, 1)


@triton.jit
def _multiply(first0, first1, second0, second1, x, lane, BF16: tl.constexpr):
    """A block's sums in the layout of the tensor cores: (row lane // 4 | that + 8) x (columns lane % 4 * 2 and that + 1), where
    the column n of x is in the four lanes from 4 n on."""
    arguments = [first0, first1, second0, second1, x[0], x[1], x[2], x[3], x[4], x[5], x[6], x[7], lane * 4]
    if BF16:
        return tl.inline_asm_elementwise(MULTIPLY_BF16, OUT_FOUR, arguments, FOUR_FLOATS, False, 1)
    else:
        return tl.inline_asm_elementwise(MULTIPLY_F16, OUT_FOUR, arguments, FOUR_FLOATS, False, 1)
