"""An adapter merged while NF4 is dequantized: both kernels against fp64, the one for newer cards with its PTX told in Triton."""

from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("triton")
import triton.language as tl
from test_gemv_nf4 import product, shifted, values
from test_nf4 import weight

from kernels import gemv, merge_nf4, merge_nf4_tiles, reference_nf4

interpreted = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="the kernels are compiled here")
NAME = "nf4 with an adapter"


def check_merged(shape, rank, device, dtype, rows):
    """W + s B A in fp32, rounded once, with a guard row behind the output; and W alone where B is zero."""
    first, count = rows
    generator = torch.Generator().manual_seed(rank)
    a, b = torch.randn(rank, shape[1], generator=generator), torch.randn(shape[0], rank, generator=generator)
    a, b = a.to(device, dtype), b.to(device, dtype)
    b[first + 1] = 0.0
    for double in (True, False):
        packed = reference_nf4.quantize(weight(shape, device=device), double)
        guard = torch.full((count + 1, shape[1]), torch.nan, dtype=dtype, device=device)
        merge_nf4.merge(packed, guard[:-1], a, b[first : first + count].clone(), 0.5, first)
        w = reference_nf4.dequantize(packed, torch.empty(shape, device=device))[first : first + count].double()
        want = w + 0.5 * (b[first : first + count].double() @ a.double())
        step = {torch.float32: 2**-22, torch.float16: 2**-11, torch.bfloat16: 2**-8}[dtype]
        size = w.abs() + 0.5 * (b[first : first + count].double().abs() @ a.double().abs())  # what an fp32 sum may be off by
        size += 2**-3 if dtype == torch.float16 else 0.0  # its step near zero: 2^-25 is half of it
        assert bool(((guard[:-1].double() - want).abs() <= step * want.abs() + 2**-22 * size).all()), (double, dtype)
        assert torch.equal(guard[1], w[1].to(dtype)) and guard[-1].isnan().all()


@interpreted
@pytest.mark.parametrize("rank", [1, 16, 20])
@pytest.mark.parametrize("shape, rows", [((70, 128), (0, 70)), ((70, 192), (5, 33))], ids=str)
def test_an_adapter_is_merged_while_dequantizing(shape, rows, rank):
    check_merged(shape, rank, "cpu", torch.float32, rows)


@interpreted
def test_merging_rounds_once():
    check_merged((70, 128), 16, "cpu", torch.float16, (0, 70))


@pytest.fixture
def anywhere(monkeypatch):
    """Takes what a card would."""
    monkeypatch.setattr(merge_nf4_tiles, "capable", lambda device: True)
    monkeypatch.setattr(gemv, "_right", {(torch.device("cpu"), NAME): True})


def halves(word):
    """The two fp16 values of a word, the lower one first."""
    return [((word >> shift) & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) for shift in (0, 16)]


@pytest.fixture
def told(anywhere, monkeypatch):
    """Each line of PTX as the interpreter can run it. A load that is passed by gives what would show if it were used."""
    tables = {}

    def store(map_ptr, nested_map_ptr, thread, DOUBLE):
        tables["levels"] = tl.load(map_ptr + tl.arange(0, 16))
        tables["shares"] = nested_map_ptr

    def load_b(ptr, index, valid):
        return tuple(tl.where(valid, values(ptr, tl.where(valid, index // 2 + i, 0), tl.int32), 0) for i in range(2))

    def load_a(ptr, index, cols, valid):
        bits = lambda row, column: values(ptr, tl.where(valid, index + row * cols + column, 0), tl.int16).to(tl.int32) & 0xFFFF  # noqa: E731
        pairs = [(bits(2 * k, j) | (bits(2 * k + 1, j) << 16)) for j in range(8) for k in range(2)]
        return tuple(tl.where(valid, pair, 0) for pair in pairs)

    def merge(places, codes, scales, b, a, BF16, CHUNKS):
        for j in range(8):  # product j: its columns of a lane are the j-th of the first and of the second eight
            sums = [tl.zeros(codes[0].shape, tl.float32)] * 4
            for chunk in range(int(CHUNKS)):
                for k in range(4):
                    of_a = halves(a[16 * chunk + 2 * j + k // 2])[k % 2]
                    for row in range(2):
                        part = product(halves(b[4 * chunk + 2 * row + k // 2])[k % 2], of_a)
                        sums[2 * row], sums[2 * row + 1] = sums[2 * row] + part[0], sums[2 * row + 1] + part[1]
            for row in range(2):
                for half in range(2):
                    code = (codes[2 * row + half] >> (j // 2 * 8 + 4 - j % 2 * 4)) & 15
                    value = tl.gather(tables["levels"], code, 0) * scales[row] + scales[2] * sums[2 * row + half]
                    place = (places[row] + half * 64 + j * 2).to(tl.pointer_type(tl.float16))
                    tl.store(place, value.to(tl.float16), mask=places[2 + row] != 0)

    monkeypatch.setattr(merge_nf4_tiles, "_store_tables", store)
    monkeypatch.setattr(merge_nf4_tiles, "_share", lambda absmax: tl.load(tables["shares"] + absmax))
    monkeypatch.setattr(merge_nf4_tiles, "_load_byte", lambda ptr, index, valid: values(ptr, index, tl.uint8).to(tl.int32))
    monkeypatch.setattr(merge_nf4_tiles, "_load_float", lambda ptr, index: values(ptr, index, tl.float32))
    monkeypatch.setattr(merge_nf4_tiles, "_load_codes", lambda ptr, index: tuple(values(ptr, index // 4 + 4 * i, tl.int32) for i in range(2)))
    monkeypatch.setattr(merge_nf4_tiles, "_load_b", load_b)
    monkeypatch.setattr(merge_nf4_tiles, "_load_a", load_a)
    monkeypatch.setattr(merge_nf4_tiles, "_merge", merge)


@interpreted
@pytest.mark.parametrize("rank", [4, 20, 32])
@pytest.mark.parametrize("shape, rows", [((70, 128), (0, 70)), ((45, 320), (5, 33)), ((6, 64), (0, 6))], ids=str)
def test_tiles_interpreted(shape, rows, rank, told, monkeypatch):
    """Rows and blocks that fill no whole tile and program, one program for all tiles and one each, products not whole."""
    for count in (1, 100):
        monkeypatch.setattr(merge_nf4_tiles, "processors", lambda device, count=count: count)
        check_merged(shape, rank, "cpu", torch.float16, rows)


@interpreted
def test_it_is_tried_once_before_it_is_trusted(told, monkeypatch, caplog):
    packed, out = reference_nf4.quantize(torch.ones(8, 64)), torch.empty(8, 64).half()
    operands = packed, out, torch.zeros(16, 64).half(), torch.zeros(8, 16).half()
    gemv._right.clear()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert merge_nf4_tiles.takes(*operands) and gemv._right == {(torch.device("cpu"), NAME): True}
    gemv._right.clear()
    monkeypatch.setattr(merge_nf4_tiles, "_share", lambda absmax: absmax.to(tl.float32))
    assert not merge_nf4_tiles.takes(*operands) and "is wrong on this card" in caplog.text


def test_what_is_taken(anywhere):
    packed = reference_nf4.quantize(torch.ones(8, 64))
    packed["weight"] = shifted(packed["weight"], 0)

    def taken(rank=16, dtype=torch.float16, of_b=torch.float16, by=(0, 0, 0)):
        made = (torch.zeros(8, 64, dtype=dtype), torch.zeros(rank, 64, dtype=dtype), torch.zeros(8, rank, dtype=of_b))
        return merge_nf4_tiles.takes(packed, *(shifted(t, i) for t, i in zip(made, by)))

    assert all(taken(rank) for rank in (4, 8, 16, 20, 32)) and taken(dtype=torch.bfloat16, of_b=torch.bfloat16)
    assert not taken(18) and not taken(36) and not taken(of_b=torch.bfloat16) and not taken(dtype=torch.float32, of_b=torch.float32)
    assert not any(taken(by=tuple(4 if i == n else 0 for i in range(3))) for n in range(3)), "an address that a load does not suit"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(576, 1536), (45, 576), (4096, 4096), (1024, 11008)], ids=str)
def test_an_adapter_is_merged_on_the_card(shape, dtype):
    """Ranks of one and two products, whole or not, and some that only the other kernel takes."""
    if torch.cuda.get_device_capability()[0] < 8:
        pytest.skip("merging needs tensor cores")
    assert gemv.trusted(torch.device("cuda", 0), NAME, merge_nf4_tiles._tried)
    for rank in (8, 16, 20, 32, 18, 64, 128):
        check_merged(shape, rank, "cuda", dtype, (0, shape[0]))
        check_merged(shape, rank, "cuda", dtype, (3, shape[0] - 5))
