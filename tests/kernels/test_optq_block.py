"""A block's columns in one launch are the same codes as column by column: interpreted here, on a card for real."""

from __future__ import annotations

import os

import pytest
import torch

from lowvram_tuner.quant import optq
from lowvram_tuner.quant.registry import resolve

pytest.importorskip("triton")
from kernels import optq_block

interpreted = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="the kernels are compiled here")
WAYS = [pytest.param("cpu", marks=interpreted), pytest.param("cuda", marks=pytest.mark.gpu)]


def problem(columns, outs, bits, seed=0):
    """A block: weights with outliers, scales that some of them leave, and a Hessian whose columns differ much."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(columns, outs, generator=generator) * torch.logspace(-1, 1, columns)[:, None]
    x = torch.randn(4 * columns, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    h = x.t() @ x / len(x) + torch.eye(columns)
    scale = (torch.rand(columns, outs, generator=generator) + 0.5) * 4 / 2**bits
    zero = torch.randint(0, 2**bits, (columns, outs), generator=generator).float()
    return w, scale, zero, h, torch.linalg.cholesky(torch.linalg.inv(h), upper=True)


def objective(w, codes, scale, zero, h):
    d = (w - (codes - zero) * scale).double()
    return float(((h.double() @ d) * d).sum())


def same_codes(ours, theirs):
    """All but what lies on the border of two codes, where the last digit of a sum decides."""
    return float((ours.cpu() != theirs).float().mean()) <= 2e-3 and float((ours.cpu() - theirs).abs().max()) <= 1


@pytest.mark.parametrize("device", WAYS)
@pytest.mark.parametrize("columns, outs, bits", [(128, 70, 4), (37, 33, 2), (1, 5, 8), (128, 32, 3)])
def test_rounding(columns, outs, bits, device):
    w, scale, zero, h, upper = problem(columns, outs, bits)
    wide = torch.zeros(columns, columns + 9)  # a part of a larger factor
    wide[:, 4 : 4 + columns] = upper
    part = wide.t().contiguous().t().to(device)[:, 4 : 4 + columns]  # by columns, as a factorization leaves it
    codes, seen, errors = optq_block.round_columns(w.to(device), scale.to(device), zero.to(device), part, bits)
    wanted, seen_wanted, errors_wanted = optq.round_columns(w, scale, zero, upper, bits)
    assert same_codes(codes, wanted) and codes.min() >= 0 and codes.max() <= 2**bits - 1
    same = (codes.cpu() == wanted).all(0)  # rows of W that met no such border
    assert same.float().mean() >= 0.7
    torch.testing.assert_close(seen.cpu()[:, same], seen_wanted[:, same], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(errors.cpu()[:, same], errors_wanted[:, same], rtol=1e-4, atol=1e-4)
    assert objective(w, codes.cpu(), scale, zero, h) == pytest.approx(objective(w, wanted, scale, zero, h), rel=1e-3)
    assert torch.equal(seen[0].cpu(), w[0])


@pytest.mark.parametrize("device", WAYS)
@pytest.mark.parametrize("columns, outs, bits", [(128, 70, 4), (37, 33, 2), (1, 5, 8)])
def test_revisiting(columns, outs, bits, device):
    w, scale, zero, h, _ = problem(columns, outs, bits, 1)
    start = optq._codes(w, scale, zero, bits)
    results = []
    for function, where in ((optq.revisit_columns, "cpu"), (optq_block.revisit_columns, device)):
        codes, d = start.clone().to(where), (w - (start - zero) * scale).to(where)
        slope = h.to(where) @ d
        function(w.to(where), scale.to(where), zero.to(where), h.to(where), slope, codes, d, bits)
        torch.testing.assert_close(d.cpu(), w - (codes.cpu() - zero) * scale, rtol=1e-5, atol=1e-5)
        results.append(codes.cpu())
    assert same_codes(results[1], results[0])
    before, reference, ours = (objective(w, codes, scale, zero, h) for codes in (start, *results))
    assert ours == pytest.approx(reference, rel=1e-3) and (ours < before or columns == 1)


@pytest.mark.parametrize("device", WAYS)
@pytest.mark.parametrize("bits, act", [(4, False), (3, True)])
def test_a_whole_weight(bits, act, device, monkeypatch):
    """Several blocks, the last one short: as good a weight as by the loops."""
    generator = torch.Generator().manual_seed(2)
    w, x = torch.randn(40, 320, generator=generator), torch.randn(1024, 320, generator=generator) @ torch.randn(320, 320, generator=generator)
    h = x.t() @ x / len(x)
    monkeypatch.setattr(optq, "REVISITS", 1)
    errors = []
    for loops, where in ((optq, "cpu"), (optq_block, device)):
        monkeypatch.setattr(optq, "_column_loops", lambda _, loops=loops: (loops.round_columns, loops.revisit_columns))
        codes, scales, zeros, g_idx = (t.cpu() for t in optq.solve(w.to(where), h.to(where), resolve(bits, "gptq", desc_act=act), 64))
        errors.append(objective(w.t(), codes.float().t(), scales[:, g_idx].t(), zeros[:, g_idx].t(), h))
    assert errors[1] == pytest.approx(errors[0], rel=0.01)


@interpreted
def test_a_card_that_rounds_wrongly_gets_the_loops(monkeypatch, caplog):
    tried = optq._right_on.__wrapped__
    assert tried(torch.device("cpu")) and not caplog.text
    monkeypatch.setattr(optq_block, "round_columns", lambda left, *rest: (left.round(),))
    monkeypatch.setattr(optq_block, "revisit_columns", lambda *rest: None)
    assert not tried(torch.device("cpu")) and "is wrong on this card" in caplog.text


@pytest.mark.gpu
def test_this_card_rounds_rightly():
    assert optq._right_on(torch.device("cuda"))


def test_what_is_no_block_is_refused():
    w, scale, zero, _, upper = problem(8, 5, 4)
    with pytest.raises(ValueError, match=r"up to 128 columns .* strides \(1, 8\)"):
        optq_block.round_columns(w, scale, zero.t().contiguous().t(), upper, 4)
    with pytest.raises(ValueError, match=r"got \[129, 2\]"):
        optq_block.round_columns(*(torch.zeros(129, 2) for _ in range(3)), torch.zeros(129, 129), 4)
