"""NF4 to 16 bit with a LoRA adapter added on the way, on cards from compute capability 8.0 on: out = W + s B A, rounded once.

The kernel of `merge_nf4.py` does the same, and spends most of its time on bringing W and B A into one layout through shared
memory. Here W is decoded where the tensor cores leave B A, and nothing moves between threads. A product has 16 rows and 8
columns, of which lane 4 g + t holds columns 2 t and 2 t + 1 of rows g and g + 8. Which columns of out these are is free, as
long as A is read to match: column n of product j is column 32 (n % 2) + 8 (n // 2) + j of a block of 64, so that eight products
leave a lane with columns 8 t to 8 t + 7 and 32 more of two rows: two words of codes and two stores of 16 bytes for each, and four
lanes side by side fill whole sectors of memory. Likewise the order of the inner sum: a lane takes B's four neighbours from 4 t on.

A warp keeps a block of 64 columns, and A's share of it in registers, and goes down its rows 16 at a time; the warps of a program
are neighbouring blocks, and the programs beside it neighbouring rows. What a step reads is asked for two steps before. It takes
10 instructions to a value, of which one is the lookup of its level in shared memory: 16 levels lie in 16 banks and never meet.

4096 x 14336, rank 16, bf16, on an H100: 59 us, 83 % of what a copy moves, where the other kernel takes 73 and dequantizing alone
57; rank 32: 71 and 89. Of a step of Llama 8B on an H200 27 us a weight, where it was 42.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels import reference_nf4
from kernels.dequant_nf4 import operands
from kernels.gemv import _lines, _load_byte, _load_float, capable, processors, trusted

WARPS = 4  # of a program: 256 columns
RESIDENT = {1: 5, 2: 3}  # programs on a multiprocessor at a time, by the chunks of 16 of the rank: what the registers hold
MOST_RANK = 32  # at 64 a thread needs 193 registers: 95 to 108 us where the other kernel takes 92

# The 16 levels ($1) and the 256 values of a stored absmax ($2), by the threads ($3) of a program.
LEVELS = (
    ".shared .align 128 .f32 merge_levels[32];",
    "{ .reg .b32 a; .reg .b64 h; .reg .f32 v; .reg .pred p; setp.lt.u32 p, $3, 16; mul.wide.u32 h, $3, 4; add.u64 h, h, $1;",
    "mov.u32 a, merge_levels; mad.lo.u32 a, $3, 4, a; @p ld.global.nc.f32 v, [h]; @p st.shared.f32 [a], v;",
)
STORE_LEVELS = _lines(*LEVELS, "bar.sync 0; mov.u32 $0, 0; }")
STORE_TABLES = _lines(
    ".shared .align 128 .f32 merge_shares[256];", *LEVELS,
    "mul.wide.u32 h, $3, 4; add.u64 h, h, $2; mov.u32 a, merge_shares; mad.lo.u32 a, $3, 4, a;",
    *(f"ld.global.nc.f32 v, [h + {i * WARPS * 128}]; st.shared.f32 [a + {i * WARPS * 128}], v;" for i in range(8 // WARPS)),
    "bar.sync 0; mov.u32 $0, 0; }",
)  # fmt: skip
SHARE = tl.constexpr("{ .reg .b32 a; mov.u32 a, merge_shares; mad.lo.u32 a, $1, 4, a; ld.shared.f32 $0, [a]; }")
LOAD_CODES = tl.constexpr("ld.global.nc.b32 $0, [$2]; ld.global.nc.b32 $1, [$2 + 16];")
LOAD_B = _lines("{ .reg .pred p; setp.ne.s32 p, $3, 0; mov.b32 $0, 0; mov.b32 $1, 0; @p ld.global.nc.v2.b32 {$0, $1}, [$2]; }")
# Eight columns of four rows of A ($16, a row is $17 bytes) in pairs of rows, as the tensor cores take them: $2j, $2j + 1 of product j.
LOAD_A = _lines(
    f"{{ .reg .pred p; .reg .b64 h; .reg .b32 {', '.join(f'r{i}{w}' for i in range(4) for w in range(4))};",
    *(f"mov.b32 r{i}{w}, 0;" for i in range(4) for w in range(4)), "setp.ne.s32 p, $18, 0; mov.b64 h, $16;",
    *(line for i in range(4) for line in (f"@p ld.global.nc.v4.b32 {{r{i}0, r{i}1, r{i}2, r{i}3}}, [h];", "add.u64 h, h, $17;")),
    *(f"prmt.b32 ${2 * j + k}, r{2 * k}{j // 2}, r{2 * k + 1}{j // 2}, {'0x7632' if j % 2 else '0x5410'};" for j in range(8) for k in range(2)),
    "}",
)  # fmt: skip
TWO_WORDS, SIXTEEN_WORDS = tl.constexpr((tl.int32,) * 2), tl.constexpr((tl.int32,) * 16)
OUT_A = tl.constexpr("=&r," * 16 + "l,l,r")


def _merge_lines(half: str, chunks: int) -> tl.constexpr:
    """$1, $2: where a lane's values of its two rows go, if $3, $4 are not 0. $5, $6 and $7, $8: their codes. $9, $10: their absmax.
    $11: s. Then `chunks` times 4 words of B and, after all of these, 16 of A."""
    b, a = 12, 12 + 4 * chunks
    lines = ["{ .reg .pred p; .reg .b32 i, table; .reg .f32 v0, v1, c<8>; .reg .b32 " + ", ".join(f"o{q}{w}" for q in range(4) for w in range(4)) + ";"]
    lines.append("mov.u32 table, merge_levels;")
    for pair in range(4):  # products 2 pair and 2 pair + 1: neighbouring columns
        for j in range(2):
            c = ", ".join(f"c{4 * j + n}" for n in range(4))
            lines += [f"mov.f32 c{4 * j + n}, 0f00000000;" for n in range(4)]
            for k in range(chunks):
                of_a = a + 16 * k + 2 * (2 * pair + j)
                rows = f"${b + 4 * k}, ${b + 4 * k + 2}, ${b + 4 * k + 1}, ${b + 4 * k + 3}"
                lines.append(f"mma.sync.aligned.m16n8k16.row.col.f32.{half}.{half}.f32 {{{c}}}, {{{rows}}}, {{${of_a}, ${of_a + 1}}}, {{{c}}};")
        for quarter in range(4):  # row, then the first or second eight columns
            for j in range(2):
                place = 8 * pair + (0 if j else 4)  # of the code in its word: the first of two is the high one
                shift = f"shr.u32 i, ${5 + quarter}, {place - 2};" if place else f"shl.b32 i, ${5 + quarter}, 2;"
                lines.append(f"{shift} lop3.b32 i, i, 0x3c, table, 0xea; ld.shared.f32 v{j}, [i];")
                lines.append(f"mul.rn.f32 v{j}, v{j}, ${9 + quarter // 2}; fma.rn.f32 v{j}, $11, c{4 * j + quarter}, v{j};")
            lines.append(f"cvt.rn.{half}x2.f32 o{quarter}{pair}, v1, v0;")
    for quarter in range(4):
        words = ", ".join(f"o{quarter}{w}" for w in range(4))
        lines.append(f"setp.ne.s32 p, ${3 + quarter // 2}, 0; @p st.global.v4.b32 [${1 + quarter // 2} + {quarter % 2 * 64}], {{{words}}};")
    return _lines(*lines, "mov.u32 $0, 0; }")


MERGE_BF16_1, MERGE_BF16_2 = (_merge_lines("bf16", chunks) for chunks in RESIDENT)
MERGE_F16_1, MERGE_F16_2 = (_merge_lines("f16", chunks) for chunks in RESIDENT)
IN_1, IN_2 = (tl.constexpr("=r,l,l" + ",r" * 6 + ",f" * 3 + ",r" * (20 * chunks)) for chunks in RESIDENT)


@triton.jit
def _store_tables(map_ptr, nested_map_ptr, thread, DOUBLE: tl.constexpr):
    """The levels, and the values of a stored absmax, to shared memory."""
    arguments = [map_ptr.to(tl.int64) + thread * 0, nested_map_ptr.to(tl.int64) + thread * 0, thread]
    tl.inline_asm_elementwise(STORE_TABLES if DOUBLE else STORE_LEVELS, "=r,l,l,r", arguments, tl.int32, False, 1)


@triton.jit
def _share(absmax):
    """What a stored absmax stands for. Impure, so that it stays behind `_store_tables`."""
    return tl.inline_asm_elementwise(SHARE, "=f,r", [absmax], tl.float32, False, 1)


@triton.jit
def _load_codes(codes_ptr, index):
    """A lane's two words of a row's block, 16 bytes apart."""
    return tl.inline_asm_elementwise(LOAD_CODES, "=&r,=r,l", [codes_ptr.to(tl.int64) + index], TWO_WORDS, False, 1)


@triton.jit
def _load_b(b_ptr, index, valid):
    """b[index] to b[index + 3], two a word; zeros where not `valid`."""
    return tl.inline_asm_elementwise(LOAD_B, "=&r,=&r,l,r", [b_ptr.to(tl.int64) + index * 2, valid.to(tl.int32)], TWO_WORDS, False, 1)


@triton.jit
def _load_a(a_ptr, index, cols, valid):
    """Eight columns of four rows from a[index] on: of each column its first two rows in a word, then the other two."""
    arguments = [a_ptr.to(tl.int64) + index * 2, cols.to(tl.int64) * 2 + index * 0, valid.to(tl.int32)]
    return tl.inline_asm_elementwise(LOAD_A, OUT_A, arguments, SIXTEEN_WORDS, False, 1)


@triton.jit
def _merge(places, codes, scales, b, a, BF16: tl.constexpr, CHUNKS: tl.constexpr):
    """Decodes a lane's 32 values, adds their part of s B A, rounds and stores. places: of its two rows, and whether they are there."""
    arguments = places + codes + scales + b + a
    if CHUNKS == 1:
        tl.inline_asm_elementwise(MERGE_BF16_1 if BF16 else MERGE_F16_1, IN_1, arguments, tl.int32, False, 1)
    else:
        tl.inline_asm_elementwise(MERGE_BF16_2 if BF16 else MERGE_F16_2, IN_2, arguments, tl.int32, False, 1)


@triton.jit
def _load_row(codes_ptr, absmax_ptr, nested_ptr, b_ptr, row, first_row, blocks, rank, block, lane, DOUBLE: tl.constexpr, CHUNKS: tl.constexpr):
    """What a lane reads of a row: its codes, the stored absmax and what it is a share of, and words of B."""
    number = (first_row + row).to(tl.int64) * blocks + block
    codes = _load_codes(codes_ptr, number * 32 + lane % 4 * 4)
    absmax = _load_byte(absmax_ptr, number, lane >= 0) if DOUBLE else _load_float(absmax_ptr, number)
    nested = _load_float(nested_ptr, number >> 8) if DOUBLE else absmax
    b = ()
    for chunk in tl.static_range(CHUNKS):
        k = chunk * 16 + lane % 4 * 4
        b = b + _load_b(b_ptr, row.to(tl.int64) * rank + k, k < rank)
    return codes, absmax, nested, b


@triton.jit
def _load_tile(
    codes_ptr, absmax_ptr, nested_ptr, b_ptr, tile, first_row, rows, blocks, rank, block, lane, DOUBLE: tl.constexpr, CHUNKS: tl.constexpr
):  # fmt: skip
    """Both rows of a lane in a tile of 16; those beyond the last are read as the last."""
    row = tile * 16 + lane // 4
    row0, row1 = tl.minimum(row, rows - 1), tl.minimum(row + 8, rows - 1)
    first = _load_row(codes_ptr, absmax_ptr, nested_ptr, b_ptr, row0, first_row, blocks, rank, block, lane, DOUBLE, CHUNKS)
    second = _load_row(codes_ptr, absmax_ptr, nested_ptr, b_ptr, row1, first_row, blocks, rank, block, lane, DOUBLE, CHUNKS)
    return first, second


@triton.jit(do_not_specialize=["first_row", "rows", "blocks", "programs"])
def _merge_tiles_kernel(
    codes_ptr, absmax_ptr, nested_ptr, nested_map_ptr, offset_ptr, map_ptr, a_ptr, b_ptr, out_ptr,
    first_row, rows, blocks, rank, scaling, programs, DOUBLE: tl.constexpr, CHUNKS: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """blocks: of 64 columns. programs: that share the rows of a strip of columns. CHUNKS: of 16 of the rank."""
    BF16: tl.constexpr = out_ptr.dtype.element_ty == tl.bfloat16
    thread = tl.arange(0, WARPS * 32)
    lane, program = thread % 32, tl.program_id(0) % programs
    mine = tl.program_id(0) // programs * WARPS + thread // 32
    block = tl.minimum(mine, blocks - 1)
    soon = _load_tile(codes_ptr, absmax_ptr, nested_ptr, b_ptr, program, first_row, rows, blocks, rank, block, lane, DOUBLE, CHUNKS)
    later = _load_tile(codes_ptr, absmax_ptr, nested_ptr, b_ptr, program + programs, first_row, rows, blocks, rank, block, lane, DOUBLE, CHUNKS)
    offset = _load_float(offset_ptr, thread * 0) if DOUBLE else 0.0
    a, column = (), block * 64 + lane // 4 % 2 * 32 + lane // 8 * 8
    for chunk in tl.static_range(CHUNKS):
        k = chunk * 16 + lane % 4 * 4
        a = a + _load_a(a_ptr, k.to(tl.int64) * (blocks * 64) + column, blocks * 64, k < rank)
    _store_tables(map_ptr, nested_map_ptr, thread, DOUBLE)
    for tile in range(program, tl.cdiv(rows, 16), programs):
        first, second = soon
        soon = later
        later = _load_tile(codes_ptr, absmax_ptr, nested_ptr, b_ptr, tile + 2 * programs, first_row, rows, blocks, rank, block, lane, DOUBLE, CHUNKS)
        codes0, scale0, nested0, b0 = first
        codes1, scale1, nested1, b1 = second
        if DOUBLE:
            scale0 = _share(scale0) * nested0 + offset
            scale1 = _share(scale1) * nested1 + offset
        row = tile * 16 + lane // 4
        place = out_ptr.to(tl.int64) + (row.to(tl.int64) * blocks + block) * 128 + lane % 4 * 16
        there, there_too = ((mine < blocks) & (row < rows)).to(tl.int32), ((mine < blocks) & (row + 8 < rows)).to(tl.int32)
        places, scales, b = (place, place + blocks.to(tl.int64) * 1024, there, there_too), (scale0, scale1, scaling + thread * 0.0), ()
        for chunk in tl.static_range(CHUNKS):
            words = b0[2 * chunk], b0[2 * chunk + 1], b1[2 * chunk], b1[2 * chunk + 1]
            b = b + words
        _merge(places, codes0 + codes1, scales, b, a, BF16, CHUNKS)


def takes(packed: dict[str, torch.Tensor], out: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether `merge` does: 16 bits throughout, a rank of whole fours, all at addresses of its loads, a card it is made for."""
    if not (out.dtype == a.dtype == b.dtype and out.dtype in (torch.float16, torch.bfloat16)) or not capable(out.device):
        return False
    if a.shape[0] % 4 or a.shape[0] > MOST_RANK or any(t.data_ptr() % 16 for t in (packed["weight"], out, a, b)):
        return False
    return trusted(out.device, "nf4 with an adapter", _tried)


def _tried(device: torch.device) -> bool:
    """Rows and blocks that fill no whole tile and program, a rank that fills no whole product; and a later row as the first."""
    generator = torch.Generator().manual_seed(0)
    packed = reference_nf4.quantize(torch.randn(45, 576, generator=generator))
    a, b = torch.randn(20, 576, generator=generator).half(), torch.randn(40, 20, generator=generator).half()
    wanted = reference_nf4.dequantize(packed, torch.empty(45, 576))[5:].double() + 0.5 * (b.double() @ a.double())
    moved = {name: tensor.to(device) for name, tensor in packed.items()}
    got = merge(moved, torch.full((40, 576), torch.nan, dtype=torch.float16, device=device), a.to(device), b.to(device), 0.5, 5)
    return bool(((got.cpu().double() - wanted).abs() <= 2**-11 * wanted.abs() + 1e-5).all())


def merge(
    packed: dict[str, torch.Tensor], out: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float, row_start: int = 0
) -> torch.Tensor:
    """As `merge_nf4.merge`, of what `takes` takes."""
    rows, blocks, rank = out.shape[0], out.shape[1] // 64, a.shape[0]
    chunks = triton.cdiv(rank, 16)
    strips, tiles = triton.cdiv(blocks, WARPS), triton.cdiv(rows, 16)
    at_once = max(1, RESIDENT[chunks] * processors(out.device) // strips)  # of a strip, so that all programs run at once
    programs = triton.cdiv(tiles, triton.cdiv(tiles, at_once))
    _merge_tiles_kernel[(strips * programs,)](
        *operands(packed), a, b, out, row_start, rows, blocks, rank, scaling, programs,
        DOUBLE="nested_absmax" in packed, CHUNKS=chunks, WARPS=WARPS, num_warps=WARPS,
        enable_fp_fusion=False,  # product and sum of an absmax are rounded one after the other, as the format defines them
    )  # fmt: skip
    return out
