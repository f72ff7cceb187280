"""Slabs and the ring: views lie where they should, streamed layers arrive intact, and streaming spreads evenly."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from lowvram_tuner.memory import slabs
from lowvram_tuner.memory.estimate import ALIGN, linear_bytes
from lowvram_tuner.memory.slabs import Ring, make_slab, slab_bytes, streamed_layers
from lowvram_tuner.quant.registry import quant_format, resolve
from lowvram_tuner.quant.spec import TensorSpec

LAYOUT = {
    "a": {"codes": TensorSpec((3, 7), "uint8"), "scale": TensorSpec((3,), "float32")},
    "b": {"codes": TensorSpec((5,), "int64")},
}


def test_views_are_aligned_typed_and_apart():
    slab = make_slab(LAYOUT, "cpu")
    assert slab.buffer.numel() == slab_bytes(LAYOUT) == 3 * ALIGN
    flat = [t for tensors in slab.views.values() for t in tensors.values()]
    for n, t in enumerate(flat):
        assert t.data_ptr() == slab.buffer.data_ptr() + n * ALIGN
        t.fill_(n + 1)
    assert [float(t.float().mean()) for t in flat] == [1, 2, 3]  # none overwrote another
    assert slab.views["a"]["scale"].dtype == torch.float32 and slab.views["b"]["codes"].shape == (5,)


def test_views_of_a_buffer_that_exists():
    buffer = torch.zeros(slab_bytes(LAYOUT) + 100, dtype=torch.uint8)
    make_slab(LAYOUT, "cpu", buffer=buffer).views["b"]["codes"].fill_(-1)
    assert buffer[2 * ALIGN : 2 * ALIGN + 40].eq(255).all() and not buffer[: 2 * ALIGN].any()


@pytest.mark.parametrize("bits, method", [(4, "nf4"), (8, "int8"), (3, "hqq"), (4, "gptq"), (2, "quip"), (16, "none")])
def test_the_estimates_formula_is_the_slabs_size(bits, method):
    spec, shapes = resolve(bits, method, group_size=64), ((256, 128), (64, 128), (128, 256))
    layout = {str(n): quant_format(spec).layout(*shape) for n, shape in enumerate(shapes)}
    assert linear_bytes(spec, shapes) == slab_bytes(layout) == make_slab(layout, "cpu").buffer.numel()


def test_streamed_layers_are_spread_evenly():
    assert streamed_layers(32, 0) == []
    assert streamed_layers(32, 32) == list(range(32))
    for layers in (2, 3, 7, 28, 32, 33):
        for count in range(1, layers + 1):
            chosen = streamed_layers(layers, count)
            assert len(chosen) == count and chosen[0] >= 0 and chosen[-1] < layers
            gaps = [b - a for a, b in itertools.pairwise(chosen)]
            assert not gaps or max(gaps) - min(gaps) <= 1


def ring(device="cpu", layers=(1, 3, 4, 6)):
    pinned = device == "cuda"
    host = {k: torch.full((1000 + k,), k, dtype=torch.uint8, pin_memory=pinned) for k in layers}
    return Ring(host, torch.device(device))


def walk(r, layers=8):
    """Runs forward and backward as a step does; says which value each streamed layer saw."""
    seen = []
    for direction, order in ((1, range(layers)), (-1, reversed(range(layers)))):
        for index in order:
            if index in r.host:
                r.fetch(index)
                seen.append((index, r.slots[r.slot_of(index)][: 1000 + index].clone()))
            r.prefetch(r.neighbour(index, direction))
    return seen


def test_every_layer_sees_its_own_bytes_in_both_directions():
    r = ring()
    for _ in range(2):
        seen = walk(r)
        assert [k for k, _ in seen] == [1, 3, 4, 6, 6, 4, 3, 1]
        assert all(bool((part == k).all()) for k, part in seen)
        r.reset()
    assert len(r.slots) == 2 and r.holds == [None, None]


def test_neighbours():
    r = ring()
    assert [r.neighbour(k, 1) for k in range(8)] == [1, 3, 3, 4, 6, 6, None, None]
    assert [r.neighbour(k, -1) for k in range(8)] == [None, None, 1, 1, 3, 4, 4, 6]
    assert [r.slot_of(k) for k in r.order] == [0, 1, 0, 1]


def test_a_slab_that_is_already_there_is_not_copied_again():
    r = ring()
    r.fetch(1)
    r.host[1].fill_(99)
    r.fetch(1)
    assert r.slots[0][0] == 1
    r.reset()
    r.fetch(1)
    assert r.slots[0][0] == 99


@pytest.mark.gpu
def test_on_a_card_the_bytes_are_right_while_copies_and_work_overlap():
    r = ring("cuda")
    for _ in range(20):
        assert all(bool((part == k).all()) for k, part in walk(r))
        r.reset()


@pytest.mark.gpu
def test_a_streamed_slab_is_pinned():
    assert make_slab(LAYOUT, "cuda", pinned=True).buffer.is_pinned()


@pytest.mark.parametrize("shape", [(1003,), (13, 40), (5, 4, 6)], ids=str)
def test_pieces_are_the_whole(shape, monkeypatch):
    monkeypatch.setattr(slabs, "PIECE", 64)
    source = torch.arange(math.prod(shape), dtype=torch.int32).view(shape)
    target = torch.full_like(source, -1)
    slabs.copy_in_pieces(target, source)
    assert torch.equal(target, source)
