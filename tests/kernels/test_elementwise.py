"""RMSNorm, rotary embedding, SwiGLU, the running softmax and AdamW: each kernel against torch's autograd in fp32.

The CPU code and the interpreted kernels are held to the same oracle; on a card the compiled kernels are, in bf16 too.
"""

from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("triton")
from kernels import adamw, gather, loss, norm, rope, swiglu

WAYS = ["cpu", "interpreted", pytest.param("card", marks=pytest.mark.gpu)]


class Way:
    """How a kernel is run: its CPU code, the Triton kernel interpreted on CPU tensors, or compiled on a card."""

    def __init__(self, name: str) -> None:
        if name == "interpreted" and os.environ.get("TRITON_INTERPRET") != "1":
            pytest.skip("the kernels are compiled here")
        self.interpreted, self.device = name == "interpreted", "cuda" if name == "card" else "cpu"


@pytest.fixture(params=WAYS)
def way(request) -> Way:
    return Way(request.param)


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def poisoned(*shape, like):
    return torch.full(shape, torch.nan, dtype=like.dtype, device=like.device)


def close(got, want, limit=2e-6):
    assert torch.isfinite(got.float()).all()
    error = float((got.double().cpu() - want.double().cpu()).norm() / want.double().norm())
    assert error < limit, error


# RMSNorm


def run_norm(way, x, w):
    if not way.interpreted:
        return norm.rms_norm(x, w, 1e-5)
    y, rstd = poisoned(*x.shape, like=x), poisoned(x.shape[0], like=x.float())
    norm._forward_kernel[(x.shape[0],)](x, w, y, rstd, x.stride(0), x.shape[1], 1e-5, BLOCK=128)
    return y, rstd


@pytest.mark.parametrize("cols", [100, 65])
def test_norm_and_its_gradient(way, cols):
    wide = randn(3, cols + 9).to(way.device)
    x, w, gy, residual = wide[:, :cols], randn(cols), randn(3, cols, seed=1), randn(3, cols, seed=2)
    oracle = x.detach().cpu().clone().requires_grad_()
    wanted = torch.nn.functional.rms_norm(oracle, (cols,), w, 1e-5)
    wanted.backward(gy)
    w, gy, total = w.to(way.device), gy.to(way.device), residual.to(way.device, copy=True)
    y, rstd = run_norm(way, x, w)  # a row stride larger than the row
    close(y, wanted.detach())
    if way.interpreted:
        norm._backward_kernel[(3,)](gy, x, w, rstd, total, x.stride(0), cols, BLOCK=128)
    else:
        assert norm.rms_norm_backward(gy, x, w, rstd, total) is total
    close(total, residual + oracle.grad)


# rotary embedding


def oracle_rope(qkv, cos, sin, heads, kv, d, weights):
    x = qkv.view(qkv.shape[0], heads + 2 * kv, d)
    q, k, v = x.split([heads, kv, kv], 1)
    if weights is not None:
        q, k = (torch.nn.functional.rms_norm(t, (d,), w, 1e-6) for t, w in zip((q, k), weights))
    both = torch.cat([q, k], 1)
    half = torch.cat([-both[..., d // 2 :], both[..., : d // 2]], -1)
    both = both * cos[:, None] + half * sin[:, None]
    return both[:, :heads], both[:, heads:], v


@pytest.mark.parametrize("normed", [False, True], ids=["plain", "head norm"])
@pytest.mark.parametrize("d", [24, 16])
def test_rope_and_its_gradient(way, d, normed):
    t, heads, kv = 5, 4, 2
    qkv, angle = randn(t, (heads + 2 * kv) * d), randn(t, d // 2, seed=5)
    cos, sin = torch.cat([angle.cos()] * 2, 1), torch.cat([angle.sin()] * 2, 1)
    weights = (1 + 0.3 * randn(d), 1 + 0.3 * randn(d, seed=7)) if normed else None
    leaf = qkv.clone().requires_grad_()
    q, k, v = oracle_rope(leaf, cos, sin, heads, kv, d, weights)
    grads = [randn(*part.shape, seed=n) for n, part in enumerate((q, k, v))]
    torch.autograd.backward((q, k, v), grads)

    move = lambda x: x.to(way.device, copy=True)  # noqa: E731
    qkv, cos, sin, grads = move(qkv), move(cos), move(sin), [move(g) for g in grads]
    head_norm = rope.HeadNorm(move(weights[0]), move(weights[1]), 1e-6) if normed else None
    before = qkv.clone()
    if way.interpreted:
        out = poisoned(t, (heads + kv) * d, like=qkv) if normed else qkv[:, : (heads + kv) * d]
        w = (head_norm.q_weight, head_norm.k_weight, 1e-6) if normed else (qkv, qkv, 0.0)
        rope._forward_kernel[(t, 2)](
            qkv, out, cos, sin, w[0], w[1], qkv.stride(0), out.stride(0), cos.stride(0), heads, heads + kv, w[2],
            D=d, HALF=16, NORM=normed, HEADS=4,
        )  # fmt: skip
        g = poisoned(*qkv.shape, like=qkv)
        rope._backward_kernel[(t, 2)](
            *grads, before, g, cos, sin, w[0], w[1], before.stride(0), cos.stride(0), heads, kv, w[2],
            D=d, HALF=16, NORM=normed, HEADS=4,
        )  # fmt: skip
    else:
        out = rope.rope(qkv, cos, sin, heads, kv, head_norm)
        g = rope.rope_backward(*grads, before if normed else None, cos, sin, head_norm)
    close(out.reshape(t, -1, d), torch.cat([q, k], 1).detach())
    assert (out.data_ptr() == qkv.data_ptr()) == (not normed)  # in place only where nothing needs the rows again
    assert torch.equal(qkv[:, (heads + kv) * d :], before[:, (heads + kv) * d :])
    close(g, leaf.grad)


# SwiGLU


@pytest.mark.parametrize("cols", [37, 1500])
def test_swiglu_and_its_gradient(way, cols):
    gate_up, ga = randn(2, 2 * cols) * 3, randn(2, cols, seed=1)
    leaf = gate_up.clone().requires_grad_()
    wanted = torch.nn.functional.silu(leaf[:, :cols]) * leaf[:, cols:]
    wanted.backward(ga)
    gate_up, ga = gate_up.to(way.device), ga.to(way.device)
    if way.interpreted:
        grid, a = (2, -(-cols // 1024)), poisoned(2, cols, like=ga)
        swiglu._forward_kernel[grid](gate_up, a, cols, BLOCK=1024)
        swiglu._backward_kernel[grid](gate_up, ga, cols, BLOCK=1024)
    else:
        a = swiglu.swiglu(gate_up)
        swiglu.swiglu_backward(gate_up, ga)
    close(a, wanted.detach())
    close(ga, wanted.detach())  # the upstream gradient becomes the activation again
    close(gate_up, leaf.grad)


# running softmax


@pytest.mark.parametrize("cap", [0.0, 5.0], ids=["plain", "capped"])
def test_running_softmax(way, cap):
    rows, vocabulary, tile = 5, 101, 40  # the last tile is narrower
    logits = randn(rows, vocabulary) * 6
    logits[1] += 300  # would overflow without the running maximum
    labels = torch.tensor([0, 39, 40, 100, -100])
    leaf = logits.double().requires_grad_()
    capped = cap * torch.tanh(leaf / cap) if cap else leaf
    wanted = torch.nn.functional.cross_entropy(capped, labels, reduction="none")
    wanted.sum().backward()

    state = loss.RunningSoftmax(labels.to(way.device), cap)
    parts = []
    for start in range(0, vocabulary, tile):
        block = logits[:, start : start + tile].to(way.device, copy=True)
        wide = torch.full((rows, tile + 3), torch.nan, device=way.device)
        part = wide[:, : block.shape[1]].copy_(block)
        if way.interpreted:
            stats = (state.labels, state.maximum, state.total, state.picked, state.rescale, state.slope)
            loss._tile_kernel[(rows,)](part, *stats, wide.stride(0), start, part.shape[1], cap, CAP=cap > 0, BLOCK=32)
            rescale = state.rescale[:, None].clone()
        else:
            rescale = state.add(part, start, slice(0, rows)).clone()
        assert wide[:, part.shape[1] :].isnan().all()
        parts = [p * rescale for p in parts] + [part]
    close(state.losses(), wanted.detach().float())
    assert state.losses()[4] == 0
    gradient = torch.cat(parts, 1) / state.total[:, None]
    for row, label in enumerate(labels[:4].tolist()):
        gradient[row, label] -= state.slope[row]
    close(gradient[[0, 2, 3]], leaf.grad[[0, 2, 3]], 3e-6)
    assert float((gradient[1].cpu() - leaf.grad[1]).abs().max()) < 1e-5


# AdamW


def run_adamw(way, w, g, state, factor, step, lr=1e-2, decay=0.1):
    if not way.interpreted:
        return adamw.adamw(w, g, state, factor, lr, step, decay=decay)
    eight = "m_scale" in state
    scales = (state["m_scale"], state["v_scale"]) if eight else (factor, factor)
    grid = (-(-w.numel() // (adamw.BLOCK * adamw.ROWS)),)
    adamw._adamw_kernel[grid](
        w, g, state["m"], state["v"], *scales, state.get("low", state.get("master", factor)), factor, w.numel(), step, lr, 0.9, 0.999,
        1 - 0.9**step, 1 - 0.999**step, 1e-8, decay, EIGHT=eight, SPLIT="low" in state, MASTER="master" in state,
        ROWS=adamw.ROWS, BLOCK=adamw.BLOCK,
    )  # fmt: skip


def master_of(w, state):
    return adamw.join(w, state["low"]) if "low" in state else state.get("master", w)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_adamw_with_32_bit_moments_is_torchs(way, dtype):
    n = 300  # not a multiple of the block
    w = randn(n).to(way.device, dtype)
    leaf = torch.nn.Parameter(w.float().cpu())
    oracle = torch.optim.AdamW([leaf], lr=1e-2, weight_decay=0.1)
    state = adamw.make_state(w, 32)
    for step in range(1, 4):
        g = (randn(n, seed=step) * torch.logspace(-6, 0, n)).to(dtype)
        leaf.grad = g.float() * 0.5
        oracle.step()
        run_adamw(way, w, g.to(way.device), state, torch.tensor(0.5, device=way.device), step)
    close(master_of(w, state), leaf.detach(), 3e-7)
    assert torch.equal(w, master_of(w, state).to(dtype))  # the parameter is the rounded master


@pytest.mark.parametrize("name", ["interpreted", pytest.param("card", marks=pytest.mark.gpu)])
def test_8_bit_moments_of_the_kernel_are_the_references(name):
    way, n = Way(name), 700
    w = randn(n).to(torch.bfloat16)
    ours, theirs = w.to(way.device, copy=True), w.clone()
    state, reference = adamw.make_state(ours, 8), adamw.make_state(theirs, 8)
    for step in range(1, 5):
        g = (randn(n, seed=step) * torch.logspace(-6, 0, n)).to(torch.bfloat16)
        run_adamw(way, ours, g.to(way.device), state, torch.tensor(0.7, device=way.device), step)
        adamw.adamw(theirs, g, reference, torch.tensor(0.7), 1e-2, step, decay=0.1)
    for key in ("m", "v"):  # a code may fall on the other side of a rounding edge
        gap = (state[key].cpu().int() - reference[key].int()).abs()
        assert gap.max() <= 1 and (gap > 0).float().mean() < 0.02
    close(master_of(ours, state), master_of(theirs, reference), 1e-4)


@pytest.mark.parametrize("bits", [8, 32])
def test_nothing_changes_when_the_factor_is_not_finite(way, bits):
    for bad in (torch.nan, torch.inf):
        w = randn(300).to(way.device)
        state = adamw.make_state(w, bits)
        before = [w.clone(), *[t.clone() for t in state.values()]]
        run_adamw(way, w, torch.ones_like(w), state, torch.tensor(bad, device=way.device), 1)
        assert all(torch.equal(a, b) for a, b in zip(before, [w, *state.values()]))


# rows of a table


def test_gather(way):
    table, ids = randn(11, 37).to(way.device), torch.tensor([3, 0, 10, 3], device=way.device)
    if way.interpreted:
        out = poisoned(4, 37, like=table)
        gather._gather_kernel[(4,)](ids, table, out, 37, BLOCK=16)
    elif way.device == "cuda":
        out = gather.gather_rows(ids, table.cpu().pin_memory())
    else:
        out = gather.gather_rows(ids, table)
    assert torch.equal(out, table[ids])
