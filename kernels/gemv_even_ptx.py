"""The words of PTX of `gemv_even`: a lane's loads, E8P's tables in shared memory, and the tensor cores' product by kind of code.

Each is a string and the function that puts it into a kernel. One element is one thread; `gemv_even` says who holds what.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.gemv import EIGHT_WORDS, WARPS, _lines, load_x_lines

E8P = 16  # the kind of codes whose 16 bits are eight weights; every other kind is its bits
UNIT = {2: 64, 3: 32, 4: 32, 8: 16, E8P: 64}  # columns that a lane takes at a time
ROOM = 7  # bits of a mantissa that codes of 2 bits are or-ed into: bf16's. Other codes are, one by one, into the last bits.
WORDS = {kind: 3 if kind == 3 else 4 for kind in UNIT}  # of codes, that hold them

# 12 or 16 bytes of codes; any where the lane has none: x is zero there, and every code makes a finite value. Impure, so that the
# load stays where it is asked for. L1 is left to what is read more than once; 12 bytes do not fill the sectors that they touch.
LOAD_FOUR = _lines("{ .reg .pred p; setp.ne.s32 p, $5, 0; @p ld.global.L1::no_allocate.L2::128B.v4.b32 {$0, $1, $2, $3}, [$4]; }")
LOAD_THREE = _lines(
    "{ .reg .pred p; setp.ne.s32 p, $4, 0;",
    "@p ld.global.b32 $0, [$3]; @p ld.global.b32 $1, [$3 + 4]; @p ld.global.b32 $2, [$3 + 8]; }",
)

LOAD_X_16, LOAD_X_32 = (load_x_lines(words, always=True) for words in (16, 32))
LOAD_X_8 = load_x_lines(8, always=True)

TABLES = 256 + 16 + 16  # words of E8P's
# Thread $2 copies some of the tables' words (at $1) to shared memory, an eighth of their 32 copies each: then 32 lanes that look
# up different words never meet in a bank.
STORE_TABLES = _lines(
    f".shared .align 128 .b32 e8p_tables[{TABLES * 32}];",
    f"{{ .reg .b32 a, b; .reg .b64 h; .reg .b32 v<{TABLES // (WARPS * 4)}>; bar.sync 0; shr.u32 a, $2, 3; mul.wide.u32 h, a, 4; add.u64 h, h, $1;",
    *(f"ld.global.nc.b32 v{i}, [h + {i * WARPS * 16}];" for i in range(TABLES // (WARPS * 4))),
    "shl.b32 a, a, 7; and.b32 b, $2, 7; mad.lo.u32 a, b, 16, a; mov.u32 b, e8p_tables; add.u32 a, a, b;",
    *(f"st.shared.v4.b32 [a + {i * WARPS * 512}], {{v{i}, v{i}, v{i}, v{i}}};" for i in range(TABLES // (WARPS * 4))),
    "bar.sync 0; mov.u32 $0, 0; }",
)


def _operands(kind: int, half: str, row: str, words: list[str]) -> tuple[list[str], list[int]]:
    """Lines that turn a lane's codes of a row into registers `row`0, `row`1, .. of two values base + 2^place code, and each one's place.

    base is a power of two whose last bit of mantissa is 1, so that a code is or-ed into it: 128 in bf16, 1024 in fp16.
    """
    low, lines, places = (0x43004300 if half == "bf16" else 0x64006400), [], []

    def take(word: str, mask: int, base: int = low, place: int = 0) -> None:
        lines.append(f"lop3.b32 {row}{len(places)}, {word}, {mask * 0x10001:#x}, {base:#x}, 0xea;")
        places.append(place)

    def take_all(word: str, bits: int) -> None:
        """The codes of both halves, those of 2 bits as many from one shifted word as the mantissa has room for."""
        shift = 0
        for bit in range(0, 12 if bits == 3 else 16, bits):
            if bit + bits - shift > (ROOM if bits == 2 else bits):
                shift = bit
                lines.append(f"shr.u32 s, {word}, {shift};")
            take("s" if shift else word, ((1 << bits) - 1) << (bit - shift), place=bit - shift)

    if kind in (2, 4):  # codes j and j + 8 of 16, j and j + 4 of eight
        for word in words:
            take_all(word, kind)
    if kind == 3:  # runs of eight codes, 24 bits; of these, the last four moved up by 4 bits: j and j + 4
        w = words
        for run in (f"mov.b32 r, {w[0]};", f"shf.r.wrap.b32 r, {w[0]}, {w[1]}, 24;", f"shf.r.wrap.b32 r, {w[1]}, {w[2]}, 16;", f"shr.u32 r, {w[2]}, 8;"):
            lines.append(f"{run} shl.b32 s, r, 4; prmt.b32 r, r, s, 0x7610;")
            take_all("r", 3)
    if kind == 8:  # the low and the high halves of codes 0 and 2 of four, then of 1 and 3: bf16 holds no more bits
        for word in words:
            for j in (0, 8):
                lines.append(f"shr.u32 s, {word}, {j};")
                take("s", 0x000F)
                if half == "bf16":
                    lines.append("shr.u32 s, s, 4;")
                    take("s", 0x000F, 0x45004500)  # 2048 + 16 code
                else:
                    take("s", 0x00F0)
    if kind == E8P:  # eight nibbles by the lower byte of a code, changed as the halves of the upper one say
        for word in words:
            for byte in (0, 2):
                lines.append(
                    f"prmt.b32 r, {word}, 0, {0x4440 + byte:#x}; prmt.b32 s, {word}, 0, {0x4441 + byte:#x}; mad.lo.u32 r, r, 128, table; "
                    "and.b32 t, s, 15; shr.u32 s, s, 4; mad.lo.u32 t, t, 128, table; mad.lo.u32 s, s, 128, table; "
                    "ld.shared.b32 r, [r]; ld.shared.b32 t, [t + 32768]; ld.shared.b32 s, [s + 34816]; lop3.b32 r, r, s, t, 0x96;"
                )
                take_all("r", 4)
    return lines, places


def _pairs(kind: int, x: list[str]) -> tuple[list[str], list[str]]:
    """Lines that bring x's values into the order of `_operands`, and the name of the pair that each of its registers meets."""
    step = {2: 8, 8: 2}.get(kind, 4)  # how far the two codes of a register lie apart
    lines, names = [], []
    for first in range(0, len(x), step):  # `step` words of x are `step` pairs
        for j in range(step):
            low, high = x[first + j // 2], x[first + j // 2 + step // 2]
            name = f"p{first + j}"
            lines.append(f"prmt.b32 {name}, {low}, {high}, {'0x7632' if j % 2 else '0x5410'};")
            names += [name, name] if kind == 8 else [name]
    return lines, names


def _together(places: dict, size: int) -> list[tuple[int, list]]:
    """`size` names each of one place, in the order in which they are complete."""
    waiting, complete = {place: [] for place in places.values()}, []
    for name, place in places.items():
        waiting[place].append(name)
        if len(waiting[place]) == size:
            complete.append((place, waiting[place]))
            waiting[place] = []
    assert not any(waiting.values())
    return complete


def _multiply_lines(kind: int, half: str) -> tl.constexpr:
    """$0..$3: sums of rows of W times columns of x; $4, $5: of the column of x that the lane holds, the sum of each value by
    2^-place, and of each value. Then the codes of a lane's two rows, its x, and four times the lane."""
    words = WORDS[kind]
    first, second = ([f"${6 + words * i + k}" for k in range(words)] for i in range(2))
    x = [f"${6 + 2 * words + k}" for k in range(UNIT[kind] // 2)]
    lane = f"${6 + 2 * words + len(x)}"
    upper, places = _operands(kind, half, "a", first)
    lower, _ = _operands(kind, half, "b", second)
    order, pairs = _pairs(kind, x)
    used = sorted(set(places))
    mma = f"mma.sync.aligned.m16n8k16.row.col.f32.{half}.{half}.f32"
    # Values by 2^-place are the product's odd columns, values as they are the even ones: x is the left operand here.
    one, mantissa = (0x3F80, 7) if half == "bf16" else (0x3C00, 10)
    weights = [f"selp.b32 w{p}, {(one - (p << mantissa)) * 0x10001:#x}, {one * 0x10001:#x}, odd;" for p in used]
    sums = [
        f"{mma} {{d0, d1, d2, d3}}, {{{', '.join(names)}}}, {{w{place}, w{place}}}, {{d0, d1, d2, d3}};"
        for place, names in _together(dict(zip(pairs, places)), 4)
    ]
    products = []
    for place, (i, j) in _together(dict(enumerate(places)), 2):
        c = ", ".join(f"c{place}_{n}" for n in range(4))
        products.append(f"{mma} {{{c}}}, {{a{i}, b{i}, a{j}, b{j}}}, {{{pairs[i]}, {pairs[j]}}}, {{{c}}};")
    count, add = len(places), [f"fma.rn.f32 ${n}, c{p}_{n}, 0f{127 - p << 23:08X}, ${n};" for p in used[1:] for n in range(4)]  # by 2^-p
    return _lines(
        f"{{ .reg .b32 r, s, t, table, a<{count}>, b<{count}>, p<{len(x)}>{''.join(f', w{p}' for p in used)}; .reg .pred odd;",
        f".reg .f32 d<4>{''.join(f', c{p}_<4>' for p in used)}; and.b32 t, {lane}, 16; setp.ne.u32 odd, t, 0;", *weights,
        f"mov.u32 table, e8p_tables; add.u32 table, table, {lane};" if kind == E8P else "",
        *(f"mov.f32 {name}{i}, 0f00000000;" for name in ("d", *(f"c{p}_" for p in used)) for i in range(4)), *order, *upper, *lower, *products, *sums,
        *(f"mov.f32 ${i}, c0_{i};" for i in range(4)), *add, "add.f32 $4, d1, d3; add.f32 $5, d0, d2; }",
    )  # fmt: skip


MULTIPLY = {(kind, half): _multiply_lines(kind, half) for kind in UNIT for half in ("f16", "bf16")}
MULTIPLY_2_F16, MULTIPLY_2_BF16 = (MULTIPLY[2, half] for half in ("f16", "bf16"))
MULTIPLY_3_F16, MULTIPLY_3_BF16 = (MULTIPLY[3, half] for half in ("f16", "bf16"))
MULTIPLY_4_F16, MULTIPLY_4_BF16 = (MULTIPLY[4, half] for half in ("f16", "bf16"))
MULTIPLY_8_F16, MULTIPLY_8_BF16 = (MULTIPLY[8, half] for half in ("f16", "bf16"))
MULTIPLY_E8P_F16, MULTIPLY_E8P_BF16 = (MULTIPLY[E8P, half] for half in ("f16", "bf16"))
SIX_FLOATS = tl.constexpr((tl.float32,) * 6)
THREE_WORDS, FOUR_WORDS = tl.constexpr((tl.int32,) * 3), tl.constexpr((tl.int32,) * 4)
SIXTEEN_WORDS, MANY_WORDS = (tl.constexpr((tl.int32,) * n) for n in (16, 32))
OUT_3, OUT_4 = (tl.constexpr("=r," * n + "l,r") for n in (3, 4))  # codes where there are any
OUT_8, OUT_16, OUT_32 = (tl.constexpr("=r," * n + "l") for n in (8, 16, 32))
# of `_multiply`, by the number of its inputs
OUT_2, OUT_23, OUT_25, OUT_17 = (tl.constexpr("=f," * 6 + ",".join("r" * n)) for n in (41, 23, 25, 17))


@triton.jit
def _store_tables(tables_ptr, thread):
    """E8P's tables to shared memory."""
    tl.inline_asm_elementwise(STORE_TABLES, "=r,l,r", [tables_ptr.to(tl.int64) + thread * 0, thread], tl.int32, False, 1)


@triton.jit
def _load_codes(codes_ptr, index, valid, KIND: tl.constexpr):
    """A lane's words of codes, from byte `index` on."""
    arguments = [codes_ptr.to(tl.int64) + index, valid.to(tl.int32)]
    if KIND == 3:
        return tl.inline_asm_elementwise(LOAD_THREE, OUT_3, arguments, THREE_WORDS, False, 1)
    else:
        return tl.inline_asm_elementwise(LOAD_FOUR, OUT_4, arguments, FOUR_WORDS, False, 1)


@triton.jit
def _load_x(address, KIND: tl.constexpr):
    """x's values that a lane's codes meet, two a word."""
    if KIND == 8:
        return tl.inline_asm_elementwise(LOAD_X_8, OUT_8, [address], EIGHT_WORDS, False, 1)
    elif KIND == 3 or KIND == 4:
        return tl.inline_asm_elementwise(LOAD_X_16, OUT_16, [address], SIXTEEN_WORDS, False, 1)
    else:
        return tl.inline_asm_elementwise(LOAD_X_32, OUT_32, [address], MANY_WORDS, False, 1)


@triton.jit
def _multiply(first, second, x, lane, KIND: tl.constexpr, BF16: tl.constexpr):
    """What the tensor cores make of a lane's unit: the sums of code times x and more, in (row lane // 4 | that + 8) x (columns
    lane % 4 * 2 and that + 1); what of these is base's share, and the sum of x, both of column lane // 4 of x, the lane's own."""
    arguments = first + second + x + (lane * 4,)
    if KIND == 2:
        return tl.inline_asm_elementwise(MULTIPLY_2_BF16 if BF16 else MULTIPLY_2_F16, OUT_2, arguments, SIX_FLOATS, False, 1)
    elif KIND == 3:
        return tl.inline_asm_elementwise(MULTIPLY_3_BF16 if BF16 else MULTIPLY_3_F16, OUT_23, arguments, SIX_FLOATS, False, 1)
    elif KIND == 4:
        return tl.inline_asm_elementwise(MULTIPLY_4_BF16 if BF16 else MULTIPLY_4_F16, OUT_25, arguments, SIX_FLOATS, False, 1)
    elif KIND == 8:
        return tl.inline_asm_elementwise(MULTIPLY_8_BF16 if BF16 else MULTIPLY_8_F16, OUT_17, arguments, SIX_FLOATS, False, 1)
    else:
        return tl.inline_asm_elementwise(MULTIPLY_E8P_BF16 if BF16 else MULTIPLY_E8P_F16, OUT_2, arguments, SIX_FLOATS, False, 1)
