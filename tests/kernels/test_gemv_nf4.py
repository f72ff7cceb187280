"""The product of one row on newer cards: what it takes, how it is tiled, and the kernel with its PTX told in Triton."""

from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("triton")
import triton
import triton.language as tl
from test_matmul_nf4 import check_stacked, packed_weight

from kernels import gemv_nf4, matmul_nf4

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
    monkeypatch.setattr(gemv_nf4, "_right", {torch.device("cpu"): True})


@triton.jit
def _values(ptr, index, TYPE: tl.constexpr):
    return tl.load(ptr.to(tl.pointer_type(TYPE)) + index)


@pytest.fixture
def told(anywhere, monkeypatch):
    """Each line of PTX as the interpreter can run it. A load that is passed by gives what would show if it were used."""
    levels = []

    def dot(word, x, acc):
        for k in range(8):
            code = (word >> (k // 2 * 8 + 4 - k % 2 * 4)) & 15
            acc += tl.reshape(tl.gather(levels[-1], tl.reshape(code, (code.numel.value,)), 0), code.shape) * x[k]
        return acc

    def codes(ptr, group, valid):
        return tuple(_values(ptr, group * 4 + i, tl.int32) * valid - (1 - valid) for i in range(4))

    monkeypatch.setattr(gemv_nf4, "_store_levels", lambda ptr, threads: levels.append(tl.load(ptr + tl.arange(0, 16))))
    monkeypatch.setattr(gemv_nf4, "_load_codes", codes)
    monkeypatch.setattr(gemv_nf4, "_load_byte", lambda ptr, index, valid: _values(ptr, index, tl.uint8).to(tl.int32) * valid)
    monkeypatch.setattr(gemv_nf4, "_load_float", lambda ptr, index: _values(ptr, index, tl.float32))
    monkeypatch.setattr(
        gemv_nf4, "_load_eight", lambda ptr, index, bf16: tuple(_values(ptr, index + i, tl.float16).to(tl.float32) for i in range(8))
    )
    monkeypatch.setattr(gemv_nf4, "_dot_eight", dot)


@interpreted
@pytest.mark.parametrize("double", [True, False], ids=["double", "single"])
@pytest.mark.parametrize("sizes, cols", [((5,), 64), ((33,), 1088), ((3,), 4160), ((9, 20), 1024), ((1, 7, 33), 192)], ids=str)
def test_interpreted(sizes, cols, double, told, monkeypatch):
    """Fewer rows than a tile, rows that end within a step, several steps, and several tiles a program."""
    for count in (1, 100):
        monkeypatch.setattr(gemv_nf4, "processors", lambda device, count=count: count)
        check_stacked(sizes, cols, "cpu", torch.float16, double)


def test_the_old_kernel_does_the_rest(anywhere, monkeypatch):
    taken = []
    monkeypatch.setattr(gemv_nf4, "multiply", lambda x, packed, out_features: taken.append(out_features))
    packed, _ = packed_weight(5, 64)
    for dtype in (torch.float16, torch.bfloat16):
        matmul_nf4.matmul(torch.zeros(1, 64, dtype=dtype), packed, 5)
        matmul_nf4.matmul_stacked(torch.zeros(1, 64, dtype=dtype), [packed] * 3, [5] * 3)
    assert taken == [[5], [5] * 3] * 2


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
    assert gemv_nf4.takes(x, [packed] * 3) and gemv_nf4.takes(x.bfloat16(), [packed]) and gemv_nf4.takes(x, [single])
    assert not gemv_nf4.takes(x.float(), [packed]), "fp32"
    assert not gemv_nf4.takes(torch.zeros(2, 64).half(), [packed]), "two rows"
    assert not gemv_nf4.takes(torch.zeros(1, 96).half(), [packed]), "blocks that cross rows"
    assert not gemv_nf4.takes(shifted(x, 1), [packed]) and gemv_nf4.takes(shifted(x, 8), [packed])
    for by in (1, 4, 8):
        assert not gemv_nf4.takes(x, [packed, packed | {"weight": shifted(packed["weight"], by)}]), by


@interpreted
def test_it_is_tried_once_before_it_is_trusted(told, monkeypatch, caplog):
    packed, _ = packed_weight(4, 64)
    x = torch.zeros(1, 64).half()
    gemv_nf4._right.clear()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not gemv_nf4.takes(x, [packed]) and not gemv_nf4._right, "nothing is tried while a graph is captured"
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert gemv_nf4.takes(x, [packed]) and gemv_nf4._right == {torch.device("cpu"): True}

    gemv_nf4._right.clear()
    monkeypatch.setattr(gemv_nf4, "_dot_eight", lambda word, x, acc: acc + x[0])
    assert not gemv_nf4.takes(x, [packed]) and "is wrong on this card" in caplog.text
    monkeypatch.setattr(gemv_nf4, "_tried", None)
    assert not gemv_nf4.takes(x, [packed])


@pytest.mark.parametrize("capability, interpret, takes", [((7, 5), False, False), ((8, 0), False, True), ((9, 0), True, False)])
def test_cards_that_run_it(capability, interpret, takes, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(triton.knobs.runtime, "interpret", interpret)
    assert gemv_nf4.capable.__wrapped__(torch.device("cuda:0")) == takes
    assert not gemv_nf4.capable.__wrapped__(torch.device("cpu"))


@pytest.mark.parametrize(
    "rows, cols, tile",
    [
        (4096, 14336, (4, 128, 96)), (28672, 4096, (4, 128, 128)), (6144, 4096, (4, 128, 128)), (1024, 4096, (2, 128, 96)),
        (9728, 896, (16, 32, 128)), (1152, 896, (4, 32, 96)), (896, 4864, (2, 64, 96)), (5, 64, (4, 32, 96)),
    ],
    ids=str,
)  # fmt: skip
def test_tiles_fit_a_weight(rows, cols, tile):
    """Rows and groups of a tile, registers of a thread."""
    assert gemv_nf4.tiling(rows, cols // 32) == tile


@pytest.mark.gpu
@pytest.mark.parametrize("double", [True, False], ids=["double", "single"])
@pytest.mark.parametrize("sizes, cols", STACKS, ids=str)
def test_on_a_card(sizes, cols, double, monkeypatch):
    if not gemv_nf4.capable(torch.device("cuda")):
        pytest.skip("an older card: `matmul_nf4.py` alone")
    taken = []
    multiply = gemv_nf4.multiply
    monkeypatch.setattr(gemv_nf4, "multiply", lambda *arguments: taken.append(1) or multiply(*arguments))
    for dtype in (torch.float16, torch.bfloat16):
        check_stacked(sizes, cols, "cuda", dtype, double)
    assert taken
