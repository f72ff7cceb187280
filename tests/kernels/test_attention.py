"""Attention over sequences laid end to end against softmax(scale q k^T) v written out in fp32, forward and gradient."""

from __future__ import annotations

from itertools import accumulate, pairwise

import pytest
import torch

from kernels.attention import attention, attention_backward

CASES = [  # lengths, heads, heads of k and v, head dimension
    ((40, 1, 23), 4, 2, 16), ((32, 32, 32), 4, 1, 16), ((37, 37), 2, 2, 8), ((1, 1, 1), 2, 1, 8),
]  # fmt: skip
CARD_CASES = [
    ((512,) * 4, 32, 8, 128), ((2048,), 32, 8, 128), ((512, 300, 1, 77), 32, 8, 128), ((512,), 32, 32, 128), ((256,) * 3, 9, 3, 64),
    ((37,) * 5, 9, 3, 64), ((130,) * 3, 16, 8, 80), ((100,) * 2, 32, 32, 96), ((1,) * 64, 4, 2, 64), ((64,) * 2, 4, 2, 256),
]  # fmt: skip


def oracle(q, k, v, grad, lengths, scale):
    """out, gq, gk, gv in fp32."""
    q, k, v = (t.float().detach().requires_grad_() for t in (q, k, v))
    groups, outs = q.shape[1] // k.shape[1], []
    for a, b in pairwise(accumulate(lengths, initial=0)):
        one_q, one_k, one_v = q[a:b], *(t[a:b].repeat_interleave(groups, 1) for t in (k, v))
        scores = torch.einsum("ihd,jhd->hij", one_q, one_k) * scale
        ahead = torch.ones(b - a, b - a, dtype=torch.bool, device=q.device).triu(1)
        outs.append(torch.einsum("hij,jhd->ihd", scores.masked_fill(ahead, -torch.inf).softmax(-1), one_v))
    out = torch.cat(outs)
    out.backward(grad.float())
    return out.detach(), q.grad, k.grad, v.grad


def check(case, device: str, dtype: torch.dtype, limit: float) -> None:
    lengths, heads, kv_heads, d = case
    torch.manual_seed(0)
    qkv = torch.randn(sum(lengths), (heads + 2 * kv_heads) * d, device=device).to(dtype)  # as the engine has them: views of one tensor
    q, k, v = (t.unflatten(1, (-1, d)) for t in qkv.split([heads * d, kv_heads * d, kv_heads * d], 1))
    grad = torch.randn(sum(lengths), heads, d, device=device).to(dtype)
    edges = torch.tensor(list(accumulate(lengths, initial=0)), dtype=torch.int32, device=device)
    even = len(set(lengths)) == 1
    saved = attention(q, k, v, edges, max(lengths), 0.1, even)
    got = (saved.out, *attention_backward(grad, q, k, v, saved, edges, max(lengths), 0.1))
    for name, found, right in zip(("out", "gq", "gk", "gv"), got, oracle(q, k, v, grad, lengths, 0.1)):
        assert found.dtype == dtype and found.shape == right.shape
        # A sequence of one token has no gradient by q and k at all: there what comes in is the measure.
        assert float((found - right).norm() / max(right.norm(), 0.1 * grad.float().norm())) < limit, name


@pytest.mark.parametrize("case", CASES, ids=str)
def test_on_the_cpu(case):
    check(case, "cpu", torch.float32, 1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CARD_CASES, ids=str)
def test_on_the_card(case, dtype):
    check(case, "cuda", dtype, 1e-3 if dtype == torch.float16 else 8e-3)
