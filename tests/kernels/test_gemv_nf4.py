"""The product of a few rows on newer cards: what it takes, and the kernel with its PTX told in Triton."""

from __future__ import annotations

import itertools
import os

import pytest
import torch

pytest.importorskip("triton")
import triton
import triton.language as tl
from test_matmul_nf4 import check_stacked, packed_weight

from kernels import gemv, gemv_nf4, matmul_nf4

interpreted = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="the kernels are compiled here")
STACKS = [  # rows of each weight, in
    ((5,), 64), ((33,), 4096), ((1,), 4096), ((66, 9), 128), ((13, 5, 5), 1088), ((896, 128, 128), 896), ((896,), 4864),
    ((4096,), 4096), ((1024,), 4096), ((4096,), 14336), ((14336,), 4096), ((11008,), 4096), ((4096, 1024, 1024), 4096),
    ((14336, 14336), 4096), ((1, 7, 33), 3072),
]  # fmt: skip


@pytest.fixture
def anywhere(monkeypatch):
    """Takes what a card would, wherever it lies."""
    monkeypatch.setattr(gemv_nf4, "capable", lambda device: True)
    monkeypatch.setattr(gemv, "_right", {(torch.device("cpu"), "nf4"): True})


@triton.jit
def values(ptr, index, TYPE: tl.constexpr):
    return tl.load(ptr.to(tl.pointer_type(TYPE)) + index)


def product(a, b):
    """What the tensor cores make of a register of each lane: rows lane // 4 of one times rows lane // 4 of the other, the sum
    over a group of four lanes, as the two columns that a lane holds."""
    warps = a.shape[0] // 32
    both = tl.reshape(a, (warps, 8, 1, 4)) * tl.reshape(b, (warps, 1, 8, 4))
    return [tl.reshape(part, a.shape) for part in tl.split(tl.reshape(tl.sum(both, 3), (warps, 8, 4, 2)))]


def take_from(value, lane):
    """`gemv._take_from`."""
    warps = lane.shape[0] // 32
    return tl.reshape(tl.gather(tl.reshape(value, (warps, 32)), tl.reshape(lane, (warps, 32)), 1), lane.shape)


def meet(first, second, thread, PARTS):
    """`gemv._meet`."""
    warps = thread.shape[0] // 32
    rows = tl.reshape(tl.permute(tl.join(first, second).reshape(warps, 8, 4, 2), (0, 3, 1, 2)), (warps // PARTS, PARTS, 16, 4))
    whole = tl.sum(tl.where(tl.arange(0, 4)[None, None, None, :] == 0, rows, 0.0), 3)  # the others' copies are not read
    return tl.gather(tl.reshape(tl.sum(whole, 1), (warps // PARTS * 16,)), thread % (warps // PARTS * 16), 0)


@pytest.fixture
def told(anywhere, monkeypatch):
    """Each line of PTX as the interpreter can run it. A load that is passed by gives what would show if it were used."""
    levels, shares = [], []

    def store(map_ptr, nested_map_ptr, thread, BF16, DOUBLE):
        levels.append(tl.load(map_ptr + tl.arange(0, 16)).to(tl.float16).to(tl.float32))
        shares.append(nested_map_ptr)

    def codes(ptr, index, left):
        return tuple(values(ptr, tl.where(left > i // 2, index // 4 + i // 2 * 8 + i % 2, 0), tl.int32) for i in range(8))

    def codes_wide(ptr, index, left):
        return tuple(values(ptr, tl.where(left > i // 4 * 2, index // 4 + i // 4 * 16 + i % 4, 0), tl.int32) for i in range(8))

    def load_x(ptr, index, valid):
        return tuple(values(ptr, tl.where(valid, index + i, 0), tl.float16).to(tl.float32) * valid for i in range(16))

    def multiply(first0, first1, second0, second1, x, lane, BF16):
        sums = [tl.zeros(lane.shape, tl.float32)] * 4
        for i in range(16):
            for row, words in enumerate(((first0, first1), (second0, second1))):
                code = (words[i // 8] >> (i % 8 // 2 * 8 + 4 - i % 2 * 4)) & 15
                part = product(tl.gather(levels[-1], code, 0), x[i])
                sums[2 * row], sums[2 * row + 1] = sums[2 * row] + part[0], sums[2 * row + 1] + part[1]
        return tuple(sums)

    monkeypatch.setattr(gemv_nf4, "_store_tables", store)
    monkeypatch.setattr(gemv_nf4, "_share", lambda absmax: tl.load(shares[-1] + absmax))
    monkeypatch.setattr(gemv_nf4, "_meet", meet)
    monkeypatch.setattr(gemv_nf4, "_load_codes", codes)
    monkeypatch.setattr(gemv_nf4, "_load_codes_wide", codes_wide)
    monkeypatch.setattr(
        gemv_nf4, "_load_byte", lambda ptr, index, valid: tl.where(valid, values(ptr, index, tl.uint8).to(tl.int32), 0)
    )
    monkeypatch.setattr(gemv_nf4, "_load_float", lambda ptr, index: values(ptr, index, tl.float32))
    monkeypatch.setattr(gemv_nf4, "_take_from", take_from)
    monkeypatch.setattr(gemv_nf4, "_load_x", load_x)
    monkeypatch.setattr(gemv_nf4, "_multiply", multiply)


@interpreted
@pytest.mark.parametrize("double", [True, False], ids=["double", "single"])
@pytest.mark.parametrize(
    "sizes, cols, m", [((5,), 64, 1), ((33,), 1088, 8), ((3,), 4160, 3), ((9, 20), 2304, 1), ((1, 7, 33), 192, 2)], ids=str
)
def test_interpreted(sizes, cols, m, double, told, monkeypatch):
    """Fewer rows than a tile, blocks that end within a step, several turns, and several tiles a program."""
    for count in (1, 100):
        monkeypatch.setattr(gemv, "processors", lambda device, count=count: count)
        check_stacked(sizes, cols, "cpu", torch.float16, double, m)


def test_the_old_kernel_does_the_rest(anywhere, monkeypatch):
    taken = []
    monkeypatch.setattr(gemv_nf4, "multiply", lambda x, packed, out_features: taken.append(out_features))
    packed, _ = packed_weight(5, 64)
    for dtype in (torch.float16, torch.bfloat16):
        for m in (1, 8):
            matmul_nf4.matmul(torch.zeros(m, 64, dtype=dtype), packed, 5)
            matmul_nf4.matmul_stacked(torch.zeros(m, 64, dtype=dtype), [packed] * 3, [5] * 3)
    assert taken == [[5], [5] * 3] * 4


def shifted(tensor, by):
    """`tensor` at an address of its own that is `by` elements from one that suits every load."""
    room = torch.zeros(tensor.numel() + 64, dtype=tensor.dtype)
    first = by - room.data_ptr() % 64 // room.itemsize
    return room[first % 64 :][: tensor.numel()].view(tensor.shape).copy_(tensor)


def test_what_is_taken(anywhere):
    packed, _ = packed_weight(4, 64)
    single, _ = packed_weight(4, 64, double=False)
    x = shifted(torch.zeros(1, 64).half(), 0)
    packed["weight"], single["weight"] = shifted(packed["weight"], 0), shifted(single["weight"], 16)
    packed["quant_map"], single["quant_map"] = shifted(packed["quant_map"], 0), shifted(single["quant_map"], 4)
    bf16, eight = shifted(x.bfloat16(), 0), shifted(torch.zeros(8, 64).half(), 0)
    assert gemv_nf4.takes(x, [packed] * 3) and gemv_nf4.takes(bf16, [packed]) and gemv_nf4.takes(x, [single])
    assert gemv_nf4.takes(eight, [packed])
    assert not gemv_nf4.takes(x.float(), [packed]), "fp32"
    assert not gemv_nf4.takes(torch.zeros(9, 64).half(), [packed]), "nine rows"
    assert not gemv_nf4.takes(torch.zeros(1, 96).half(), [packed]), "blocks that cross rows"
    assert not gemv_nf4.takes(shifted(x, 1), [packed]) and gemv_nf4.takes(shifted(x, 8), [packed])
    for name, by in (("weight", 1), ("weight", 8), ("quant_map", 1), ("quant_map", 2)):
        assert not gemv_nf4.takes(x, [packed, packed | {name: shifted(packed[name], by)}]), (name, by)


@interpreted
def test_it_is_tried_once_before_it_is_trusted(told, monkeypatch, caplog):
    packed, _ = packed_weight(4, 64)
    x = torch.zeros(1, 64).half()
    gemv._right.clear()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not gemv_nf4.takes(x, [packed]) and not gemv._right, "nothing is tried while a graph is captured"
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert gemv_nf4.takes(x, [packed]) and gemv._right == {(torch.device("cpu"), "nf4"): True}

    gemv._right.clear()
    monkeypatch.setattr(gemv_nf4, "_take_from", lambda value, lane: value)
    assert not gemv_nf4.takes(x, [packed]) and "is wrong on this card" in caplog.text
    monkeypatch.setattr(gemv_nf4, "_tried", None)
    assert not gemv_nf4.takes(x, [packed])


@pytest.mark.parametrize("capability, interpret, takes", [((7, 5), False, False), ((8, 0), False, True), ((9, 0), True, False)])
def test_cards_that_run_it(capability, interpret, takes, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(triton.knobs.runtime, "interpret", interpret)
    assert gemv.capable.__wrapped__(torch.device("cuda:0")) == takes
    assert not gemv.capable.__wrapped__(torch.device("cpu"))


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 2, 8])
@pytest.mark.parametrize("sizes, cols", STACKS, ids=str)
def test_on_a_card(sizes, cols, m, monkeypatch):
    if not gemv.capable(torch.device("cuda")):
        pytest.skip("an older card: `matmul_nf4.py` alone")
    taken = []
    multiply = gemv_nf4.multiply
    monkeypatch.setattr(gemv_nf4, "multiply", lambda *arguments: taken.append(1) or multiply(*arguments))
    for dtype, double in itertools.product((torch.float16, torch.bfloat16), (True, False)):
        check_stacked(sizes, cols, "cuda", dtype, double, m)
    assert taken
