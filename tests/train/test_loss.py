"""The tiled loss against torch's cross-entropy over full logits: value and gradient, whatever the tiles and the head."""

from __future__ import annotations

import pytest
import torch

from lowvram_tuner.quant.linear import QuantLinear
from lowvram_tuner.quant.registry import quant_format, resolve
from lowvram_tuner.quant.spec import Scratch
from lowvram_tuner.train import loss
from lowvram_tuner.train.loss import Head, head_loss, head_losses

ROWS, HIDDEN, VOCABULARY = 23, 64, 1000


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + shape[0]))


@pytest.fixture
def rows():
    """Hidden states and labels: the first and last word, words at a tile's edges, and rows that only fill up."""
    labels = torch.randint(0, VOCABULARY, (ROWS,), generator=torch.Generator().manual_seed(2))
    labels[:6] = torch.tensor([0, VOCABULARY - 1, 299, 300, -100, -100])
    return randn(ROWS, HIDDEN) * 0.7, labels


def oracle(hidden, labels, w, cap=0.0):
    leaf = hidden.double().requires_grad_()
    logits = leaf @ w.double().t()
    logits = cap * torch.tanh(logits / cap) if cap else logits
    total = torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
    (gradient,) = torch.autograd.grad(total, leaf)
    return total.item(), gradient


def check(got, want, limit=2e-6):
    total, gradient = got
    assert float(total) == pytest.approx(want[0], rel=1e-6)
    assert float((gradient.double() - want[1]).norm() / want[1].norm()) < limit


@pytest.mark.parametrize("cap", [0.0, 5.0], ids=["plain", "capped"])
@pytest.mark.parametrize("tile", [300, 1000, 5000])
def test_a_plain_head(rows, tile, cap, monkeypatch):
    monkeypatch.setattr(loss, "VOCABULARY_TILE", tile)
    monkeypatch.setattr(loss, "LOSS_ROWS", 7)
    w = randn(VOCABULARY, HIDDEN, seed=1) * 0.4
    head = Head(None, w, Scratch(0, "cpu"), cap)
    check(head_loss(*rows, head), oracle(*rows, w, cap))
    each = head_losses(*rows, head)
    assert each.shape == rows[1].shape and not each[rows[1] < 0].any()
    for place in (0, len(each) // 2, len(each) - 1):
        one = slice(place, place + 1)
        assert float(each[place]) == pytest.approx(oracle(rows[0][one], rows[1][one], w, cap)[0], rel=1e-5, abs=1e-6)
    assert float(each.sum()) == pytest.approx(oracle(*rows, w, cap)[0], rel=1e-6)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_packed_head_is_unpacked_tile_by_tile(rows, bits):
    fmt = quant_format(resolve(bits))
    packed = QuantLinear(HIDDEN, VOCABULARY, fmt)
    scratch = Scratch(300 * HIDDEN * 4, "cpu")  # 256 or 300 of the 1000 rows at a time
    packed.bind(fmt.quantize(randn(VOCABULARY, HIDDEN, seed=1) * 0.4), scratch)
    head = Head(packed, None, scratch)
    sizes = [w.shape[0] for _, w in head.tiles(torch.float32)]
    assert len(sizes) > 1 and sum(sizes) == VOCABULARY
    check(head_loss(*rows, head), oracle(*rows, packed.dense()))


def test_an_unquantized_head_is_used_as_it_lies(rows):
    packed = QuantLinear(HIDDEN, VOCABULARY, quant_format(resolve(16)))
    w = randn(VOCABULARY, HIDDEN, seed=1)
    packed.bind({"weight": w}, Scratch(0, "cpu"))
    head = Head(packed, None, Scratch(0, "cpu"))
    assert next(head.tiles(torch.float32))[1].data_ptr() == w.data_ptr()
    check(head_loss(*rows, head), oracle(*rows, w))


def test_rows_that_only_fill_up_count_nothing(rows):
    hidden, labels = rows
    head = Head(None, randn(VOCABULARY, HIDDEN, seed=1), Scratch(0, "cpu"))
    total, gradient = head_loss(hidden, labels, head)
    assert not gradient[labels < 0].any() and gradient[labels >= 0].abs().sum(1).min() > 0
    kept = labels >= 0
    fewer, part = head_loss(hidden[kept], labels[kept], head)
    assert float(fewer) == pytest.approx(float(total), rel=1e-6)
    torch.testing.assert_close(part, gradient[kept], rtol=1e-5, atol=1e-6)
    nothing, zero = head_loss(hidden, torch.full_like(labels, -100), head)
    assert float(nothing) == 0.0 and not zero.any()


def test_large_logits_do_not_overflow(rows):
    hidden, labels = rows
    w = randn(VOCABULARY, HIDDEN, seed=1) * 40
    check(head_loss(hidden, labels, Head(None, w, Scratch(0, "cpu"))), oracle(hidden, labels, w), 1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, limit", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)], ids=["fp32", "bf16"])
def test_on_a_card(rows, dtype, limit, monkeypatch):
    monkeypatch.setattr(loss, "VOCABULARY_TILE", 300)
    hidden, labels = rows[0].to("cuda", dtype), rows[1].cuda()
    w = (randn(VOCABULARY, HIDDEN, seed=1) * 0.4).to("cuda", dtype)
    total, gradient = head_loss(hidden, labels, Head(None, w, Scratch(0, "cuda")))
    wanted = oracle(hidden.cpu(), labels.cpu(), w.cpu())
    assert float(total) == pytest.approx(wanted[0], rel=limit)
    assert float((gradient.double().cpu() - wanted[1]).norm() / wanted[1].norm()) < limit
