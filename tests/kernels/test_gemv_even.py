"""The product of a few rows with evenly spaced levels: its PTX evaluated, the kernel with that PTX told in Triton, and on a card."""

from __future__ import annotations

import itertools
import os
import re

import numpy as np
import pytest
import torch

pytest.importorskip("triton")
import triton.language as tl
from test_gemv_nf4 import meet, product, shifted, take_from, values

from kernels import e8p, gemv, gemv_even, gemv_even_ptx, matmul_e8p, matmul_grouped, packing
from kernels.gemv_even_ptx import E8P, UNIT, WORDS
from kernels.reference_grouped import INDEX, ROW, Grouping, dequantize

interpreted = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="the kernels are compiled here")
LIMITS = {torch.float16: 1e-3, torch.bfloat16: 6e-3}  # of y's error, beside y
ZEROS = {"none": None, "bytes": torch.uint8, "halves": torch.float16}


def evaluated(lines: list[str], registers: dict[str, int], shared: np.ndarray) -> dict[str, int]:
    """What the integer instructions of PTX leave in their registers; `ld.shared` reads 32-bit words."""

    def value(name: str) -> int:
        return registers[name] if name in registers else int(name, 0)

    logic = {0xEA: lambda a, b, c: a & b | c, 0x96: lambda a, b, c: a ^ b ^ c}
    step = {
        "mov.b32": lambda a: a, "shr.u32": lambda a, n: a >> n, "shl.b32": lambda a, n: a << n, "and.b32": lambda a, b: a & b,
        "mad.lo.u32": lambda a, b, c: a * b + c, "lop3.b32": lambda a, b, c, table: logic[table](a, b, c),
        "shf.r.wrap.b32": lambda low, high, n: (high << 32 | low) >> n, "ld.shared.b32": lambda at: int(shared[at // 4]),
        "prmt.b32": lambda a, b, order: sum(((b << 32 | a) >> 8 * (order >> 4 * i & 7) & 255) << 8 * i for i in range(4)),
    }  # fmt: skip
    for line in " ".join(lines).split(";"):
        if line.strip():
            name, rest = line.split(None, 1)
            target, *sources = [part.strip() for part in rest.replace("[", "").replace("]", "").split(",")]
            given = [sum(value(term.strip()) for term in source.split("+")) for source in sources]
            registers[target] = step[name](*given) & 0xFFFFFFFF
    return registers


def halves(word: int, half: str) -> tuple[float, float]:
    """The two values of a register."""
    bits = torch.tensor([word & 0xFFFF, word >> 16], dtype=torch.int32).to(torch.int16)
    return tuple(bits.view(torch.bfloat16 if half == "bf16" else torch.float16).double().tolist())


def codes_of(kind: int, words: list[int]) -> list[float]:
    """A unit's codes as integers."""
    raw = torch.from_numpy(np.array(words, dtype=np.uint32).view(np.int32))
    if kind != E8P:
        return packing.unpack(raw[None], kind, UNIT[kind])[0].double().tolist() if UNIT[kind] % 32 == 0 else raw.view(torch.uint8).double().tolist()
    codes = raw.view(torch.int16).to(torch.int64) & 0xFFFF
    return (2 * e8p.codebook()[codes].double() + 7.5).flatten().tolist()


@pytest.mark.parametrize("half", ["f16", "bf16"])
@pytest.mark.parametrize("kind", UNIT)
def test_operands_are_base_and_code_and_meet_their_x(kind, half):
    """Every register of a row holds two codes at its place above base, the pair of x beside it their two columns, and each
    column is met once (of 8 bits in two halves)."""
    rng = np.random.default_rng(kind)
    tables = np.repeat(gemv_even.tables(torch.device("cpu")).numpy().view(np.uint32), 32)  # there for each lane
    lane = int(rng.integers(32))
    for words in (rng.integers(0, 1 << 32, WORDS[kind]).tolist(), [0] * WORDS[kind], [0xFFFFFFFF] * WORDS[kind]):
        x = [2 * i + 1 << 16 | 2 * i for i in range(UNIT[kind] // 2)]  # the columns themselves
        registers = {f"w{i}": word for i, word in enumerate(words)} | {f"x{i}": word for i, word in enumerate(x)} | {"table": 4 * lane}
        lines, places = gemv_even_ptx._operands(kind, half, "a", [f"w{i}" for i in range(WORDS[kind])])
        order, pairs = gemv_even_ptx._pairs(kind, [f"x{i}" for i in range(len(x))])
        registers = evaluated(order + lines, registers, tables)
        assert len(pairs) == len(places) == 16 * (1 + (UNIT[kind] == 64))
        base = ((2176 if half == "bf16" else 2048) if kind == 8 else 1024 if half == "f16" else 128)
        got, bases = np.zeros(UNIT[kind]), np.zeros(UNIT[kind])
        for i, (pair, place) in enumerate(zip(pairs, places)):
            for column, value in zip((registers[pair] & 0xFFFF, registers[pair] >> 16), halves(registers[f"a{i}"], half)):
                got[column] += value / 2**place
                bases[column] = base / 2**place
        np.testing.assert_array_equal(got - bases, codes_of(kind, words))


def test_a_product_takes_every_operand_once():
    """With others of its place, and x's sum takes every pair of x once, by the same place."""
    for (kind, half), text in gemv_even_ptx.MULTIPLY.items():
        _, places = gemv_even_ptx._operands(kind, half, "a", ["w"] * 4)
        _, pairs = gemv_even_ptx._pairs(kind, ["x"] * (UNIT[kind] // 2))
        taken = []
        for place, *operands, sums in re.findall(r"\{c(\d)_0, .*?\}, \{a(\d+), b(\d+), a(\d+), b(\d+)\}, \{(p\d+), (p\d+)\}, \{c(\d)_0, ", text.value):
            i, j = int(operands[0]), int(operands[2])
            assert operands == [str(i), str(i), str(j), str(j), pairs[i], pairs[j]] and {places[i], places[j]} == {int(place)} == {int(sums)}
            taken += [i, j]
        assert sorted(taken) == list(range(len(places))), (kind, half)
        summed = [(names.split(", "), int(place)) for names, place in re.findall(r"\{d0, d1, d2, d3\}, \{(p.*?)\}, \{w(\d), w\2\}", text.value)]
        assert sorted((name, place) for names, place in summed for name in names) == sorted(set(zip(pairs, places))), (kind, half)


@pytest.fixture
def anywhere(monkeypatch):
    """Takes what a card would, wherever it lies."""
    monkeypatch.setattr(gemv_even, "capable", lambda device: True)
    monkeypatch.setattr(gemv, "_right", {(torch.device("cpu"), name): True for name in ("2 bits", "3 bits", "4 bits", "8 bits", "E8P")})


@pytest.fixture
def told(anywhere, monkeypatch):
    """Each line of PTX as the interpreter can run it; x in words of one value. What is not loaded would show if it were used."""
    tables = []

    def codes(ptr, index, valid, KIND):
        return tuple(values(ptr, tl.where(valid, index // 4 + i, 0), tl.int32) for i in range(3 if KIND == 3 else 4))

    def load_x(address, KIND):
        return tuple(tl.load((address + 2 * i).to(tl.pointer_type(tl.float16))).to(tl.float32) for i in range(UNIT[int(KIND)]))

    def code(words, i, kind):
        if kind == E8P:
            whole = (words[i // 16] >> (i // 8 % 2 * 16)) & 0xFFFF
            at = lambda index: tl.load(tables[-1] + index)  # noqa: E731
            word = at(whole & 255) ^ at(256 + ((whole >> 8) & 15)) ^ at(272 + (whole >> 12))
            return (word >> (i % 8 * 4)) & 15
        first, shift = divmod(i * kind, 32)
        low = (words[first].to(tl.int64) & 0xFFFFFFFF) >> shift
        high = (words[first + 1].to(tl.int64) & 0xFFFFFFFF) << (32 - shift) if shift + kind > 32 else 0
        return (low | high) & ((1 << kind) - 1)

    def multiply(first, second, x, lane, KIND, BF16):
        kind = int(KIND)
        base = 2048.0 if kind == 8 else 1024.0
        sums = [tl.zeros(lane.shape, tl.float32)] * 6
        ones = tl.zeros(lane.shape, tl.float32) + 1.0
        for i in range(UNIT[kind]):
            weight = 0.25 if kind == 2 and i % 2 else 1.0  # as if these codes stood two bits higher
            for row, words in ((0, first), (1, second)):
                part = product(code(words, i, kind).to(tl.float32) + base * weight, x[i])
                sums[2 * row], sums[2 * row + 1] = sums[2 * row] + part[0], sums[2 * row + 1] + part[1]
            part = product(x[i], ones)[0]
            sums[4], sums[5] = sums[4] + part * weight, sums[5] + part
        return tuple(sums)

    def narrow(ptr, index, valid, kind):
        return tl.where(valid, values(ptr, tl.where(valid, index, 0), kind).to(tl.int32), 0)

    monkeypatch.setattr(gemv_even, "_store_tables", lambda ptr, thread: tables.append(ptr))
    monkeypatch.setattr(gemv_even, "_load_codes", codes)
    monkeypatch.setattr(gemv_even, "_load_byte", lambda ptr, index, valid: narrow(ptr, index, valid, tl.uint8))
    monkeypatch.setattr(gemv_even, "_load_half", lambda ptr, index, valid: narrow(ptr, index, valid, tl.uint16))
    monkeypatch.setattr(gemv_even, "_load_x", load_x)
    monkeypatch.setattr(gemv_even, "_multiply", multiply)
    monkeypatch.setattr(gemv_even, "_only", lambda x, where, WORDS: tuple(tl.where(where, value, 0.0) for value in x))
    monkeypatch.setattr(gemv_even, "_take_from", take_from)
    monkeypatch.setattr(gemv_even, "_meet", meet)


def weight(rows: int, cols: int, bits: int, size: int, zeros: torch.dtype | None, device: str = "cpu", seed: int = 0):
    """(qweight, scales, zeros) of random codes, and W in fp64."""
    generator = torch.Generator().manual_seed(seed)
    codes = packing.pack(torch.randint(0, 1 << bits, (rows, cols), generator=generator), bits)
    groups = -(-cols // size)
    scales = torch.rand(rows, groups, generator=generator).add(0.5).half()
    z = None if zeros is None else (torch.rand(rows, groups, generator=generator) * (1 << bits)).to(zeros)
    exact = dequantize(codes, scales, z, None, Grouping(ROW, size, groups), bits, torch.empty(rows, cols))
    return tuple(None if t is None else t.to(device) for t in (codes, scales, z)), exact.double()


def check(y: torch.Tensor, x: torch.Tensor, w: torch.Tensor) -> None:
    wanted = x.double().cpu() @ w.t()
    assert y.shape == wanted.shape and y.dtype == x.dtype
    assert (y.cpu().double() - wanted).norm() <= LIMITS[x.dtype] * wanted.norm()


def check_grouped(sizes, cols, bits, size, zeros, m=1, device="cpu", dtype=torch.float16):
    parts = [weight(rows, cols, bits, size, zeros, device, seed=i) for i, rows in enumerate(sizes)]
    x = torch.randn(m, cols, generator=torch.Generator().manual_seed(9)).to(dtype).to(device)
    grouping = Grouping(ROW, size, -(-cols // size))
    weights = [(*read, None, grouping, bits) for read, _ in parts]
    check(matmul_grouped.matmul_stacked(x, weights), x, torch.cat([w for _, w in parts]))
    for rest, (_, w) in zip(weights, parts):
        check(matmul_grouped.matmul(x, *rest), x, w)


def check_e8p(rows, cols, second, m=1, device="cpu", dtype=torch.float16):
    generator = torch.Generator().manual_seed(rows)
    codes, finer = (torch.randint(-(1 << 15), 1 << 15, (rows, cols // 8), generator=generator).to(torch.int16) for _ in range(2))
    finer = finer if second else None
    w = e8p.dequantize(codes, torch.empty(rows, cols), finer, 3.45).double()
    x = torch.randn(m, cols, generator=generator).to(dtype).to(device)
    check(matmul_e8p.matmul(x, codes.to(device), None if finer is None else finer.to(device), 3.45), x, w)


def takes_few(bits: int, size: int) -> bool:
    """Whether several rows of x are for the kernel of this file."""
    return (bits, size) != (2, 64)


@pytest.fixture
def taken(monkeypatch):
    """How many products the kernel of this file was given, but those that a process tries it with once."""
    launched, launch, trusted = [], gemv_even._launch, gemv_even.trusted

    def uncounted(*arguments) -> bool:
        before = len(launched)
        right = trusted(*arguments)
        del launched[before:]
        return right

    monkeypatch.setattr(gemv_even, "_launch", lambda *arguments: launched.append(1) or launch(*arguments))
    monkeypatch.setattr(gemv_even, "trusted", uncounted)
    return launched


GROUPED = [  # rows of each weight, in, bits, group, zeros
    ((5,), 64, 4, 32, "none"), ((33,), 1088, 4, 64, "halves"), ((9, 20), 4224, 4, 128, "bytes"), ((3,), 288, 4, 288, "halves"),
    ((17,), 640, 3, 128, "none"), ((5, 1, 7), 96, 3, 32, "halves"), ((40,), 1024, 2, 128, "bytes"), ((6,), 704, 2, 64, "halves"),
    ((2,), 1280, 2, 1280, "none"), ((21,), 80, 8, 80, "halves"), ((5, 4), 1024, 8, 32, "bytes"), ((3,), 384, 8, 128, "none"),
]  # fmt: skip


@interpreted
@pytest.mark.parametrize("sizes, cols, bits, size, zeros", GROUPED, ids=str)
def test_grouped_interpreted(sizes, cols, bits, size, zeros, told, taken, monkeypatch):
    """Fewer rows than a tile, columns that end within a step, several turns, several tiles a program, each way to tell groups
    apart; one row of x and more."""
    for count, m in ((1, 1), (100, 1), (100, 8)):
        monkeypatch.setattr(gemv, "processors", lambda device, count=count: count)
        check_grouped(sizes, cols, bits, size, ZEROS[zeros], m)
    assert len(taken) == (2 + takes_few(bits, size)) * (1 + len(sizes))


@interpreted
@pytest.mark.parametrize("rows, cols, second", [(33, 192, False), (7, 2240, False), (20, 320, True), (3, 2048, True)])
def test_e8p_interpreted(rows, cols, second, told, taken, monkeypatch):
    for count, m in ((1, 1), (100, 1), (1, 8), (100, 2)):
        monkeypatch.setattr(gemv, "processors", lambda device, count=count: count)
        check_e8p(rows, cols, second, m)
    assert len(taken) == 4


def test_what_is_taken(anywhere):
    def takes(x, *weights, size=64, bits=4):
        return gemv_even.takes_grouped(x, [tuple(shifted(t, 0) for t in w) for w in weights], size, bits)

    (codes, scales, zeros), _ = weight(4, 512, 4, 64, torch.float16)
    x = shifted(torch.zeros(1, 512).half(), 0)
    whole = (codes, scales, zeros)
    assert takes(x, whole, whole) and takes(shifted(x.bfloat16(), 0), whole)
    assert takes(x, whole, size=512) and takes(x, whole, size=32) and takes(x, whole, size=256)
    assert not takes(x.float(), whole), "fp32"
    assert takes(shifted(torch.zeros(8, 512).half(), 0), whole)
    assert not takes(shifted(torch.zeros(9, 512).half(), 0), whole), "more rows than columns of a product"
    assert not gemv_even.takes_grouped(shifted(torch.zeros(2, 1024).half(), 0)[:, :512], [whole], 64, 4), "rows apart"
    assert not takes(x, whole, size=16), "a lane's codes in two groups"
    assert not takes(x, whole, size=192), "four lanes' codes that end within a group"
    assert not takes(x, whole, size=32, bits=2), "a lane has 64 codes of 2 bits"
    assert takes(x, whole, bits=2) and not takes(shifted(torch.zeros(2, 512).half(), 0), whole, bits=2), "more than the registers hold"
    assert not takes(shifted(x[:, :496], 0), whole), "columns that end within a lane's"
    assert not takes(x, (codes, scales.float(), zeros)) and not takes(x, (codes, scales, zeros.float()))
    assert not takes(shifted(x, 1), whole) and not gemv_even.takes_grouped(x, [(shifted(codes, 1), scales, zeros)], 64, 4)

    codes = shifted(torch.zeros(4, 64, dtype=torch.int16), 0)
    assert gemv_even.takes_e8p(x, codes, None) and gemv_even.takes_e8p(x, codes, codes)
    assert not gemv_even.takes_e8p(x, codes, torch.zeros(4, 64, dtype=torch.uint8)), "the 3-bit form's second layer"
    assert not gemv_even.takes_e8p(x, shifted(codes, 4), None) and not gemv_even.takes_e8p(x, shifted(torch.zeros(4, 128, dtype=torch.int16), 0)[:, ::2], None)


def test_columns_in_any_order_go_to_the_other_kernel(anywhere, taken, monkeypatch):
    (codes, scales, _), _ = weight(4, 512, 4, 64, None)
    grouping, order = Grouping(INDEX, 64, 8), torch.arange(512, dtype=torch.int32) % 8
    other = []
    monkeypatch.setattr(matmul_grouped, "matmul", lambda x, *rest: other.append(1) or x.new_zeros(1, 4))
    y = matmul_grouped.matmul_stacked(torch.zeros(1, 512).half(), [(codes, scales, None, order, grouping, 4)] * 2)
    assert y.shape == (1, 8) and len(other) == 2 and not taken


@interpreted
def test_it_is_tried_once_before_it_is_trusted(told, monkeypatch, caplog):
    """By kind: what is wrong for one is not used for that one."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(gemv_even, "COLUMNS_TRIED", 320)
    x, (read, _) = shifted(torch.zeros(1, 64).half(), 0), weight(4, 64, 4, 64, None)
    read = shifted(read[0], 0), read[1], None
    codes = shifted(torch.zeros(4, 8, dtype=torch.int16), 0)
    gemv._right.clear()
    assert gemv_even.takes_grouped(x, [read], 64, 4) and gemv_even.takes_e8p(x, codes, None)
    assert gemv._right == {(torch.device("cpu"), "4 bits"): True, (torch.device("cpu"), "E8P"): True}
    gemv._right.clear()
    monkeypatch.setattr(gemv_even, "_meet", lambda first, second, thread, PARTS: first)
    assert not gemv_even.takes_grouped(x, [read], 64, 4) and not gemv_even.takes_e8p(x, codes, None)
    assert "(4 bits) is wrong on this card" in caplog.text and "(E8P)" in caplog.text


@pytest.mark.gpu
@pytest.mark.parametrize("zeros", ZEROS)
@pytest.mark.parametrize("bits, size", [(2, 64), (2, 128), (2, -1), (3, 32), (3, 128), (4, 32), (4, 64), (4, 128), (8, 32), (8, 128)])
def test_grouped_on_a_card(bits, size, zeros, taken):
    if not gemv.capable(torch.device("cuda")):
        pytest.skip("an older card: `matmul_grouped.py` alone")
    cases = [((33,), 4096, 1, torch.float16), ((896, 128, 128), 896, 1, torch.bfloat16), ((4096, 1024), 4096, 1, torch.bfloat16),
             ((1024,), 14336, 1, torch.bfloat16), ((33,), 4096, 8, torch.float16), ((4096, 1024), 4096, 3, torch.bfloat16)]  # fmt: skip
    for sizes, cols, m, dtype in cases:
        check_grouped(sizes, cols, bits, cols if size == -1 else size, ZEROS[zeros], m, "cuda", dtype)
    assert len(taken) == sum(1 + len(sizes) for sizes, _, m, _ in cases if m == 1 or takes_few(bits, size))


@pytest.mark.gpu
@pytest.mark.parametrize("second", [False, True])
def test_e8p_on_a_card(second, taken):
    if not gemv.capable(torch.device("cuda")):
        pytest.skip("an older card: `matmul_e8p.py` alone")
    shapes = [(16, 64), (33, 4096), (896, 4864), (1024, 14336), (4096, 11008)]
    for (rows, cols), dtype, m in itertools.product(shapes, (torch.float16, torch.bfloat16), (1, 5)):
        check_e8p(rows, cols, second, m, "cuda", dtype)
    assert len(taken) == 4 * len(shapes)
