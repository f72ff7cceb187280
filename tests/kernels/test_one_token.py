"""What a token's step adds to the products: attention over a static cache, and adapter, bias and residual in place."""

from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("triton")
from kernels import attention_cache, thin

interpreted = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="the kernels are compiled here")
HEADS = [(4, 2, 24), (8, 8, 64), (9, 3, 64), (7, 1, 80), (4, 1, 256)]  # heads, kv_heads, head_dim
LIMITS = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def filled(capacity, used, kv_heads, d, dtype, device="cpu"):
    """A cache whose unused positions are NaN, so that reading one shows."""
    cache = torch.full((capacity, 2, kv_heads, d), torch.nan)
    cache[:used] = torch.randn(used, 2, kv_heads, d, generator=torch.Generator().manual_seed(used))
    return cache.to(device, dtype)


def oracle(q, cache, start, scale):
    """Attention by its definition, fp64, one token at a time."""
    group, rows = q.shape[1] // cache.shape[2], []
    for i, token in enumerate(q.double()):
        k, v = cache[: start + i + 1].double().repeat_interleave(group, 2).unbind(1)  # [n, heads, d]
        p = torch.einsum("hd,nhd->hn", token, k).mul(scale).softmax(-1)
        rows.append(torch.einsum("hn,nhd->hd", p, v).reshape(-1))
    return torch.stack(rows)


def relative(got, want):
    return float((got.double() - want).norm() / want.norm())


def check_one(heads, kv_heads, d, capacity, used, dtype, device="cpu"):
    cache = filled(capacity, used, kv_heads, d, dtype, device)
    q = (3 * torch.randn(1, heads, d, generator=torch.Generator().manual_seed(1))).to(device, dtype)
    position = torch.tensor([used - 1], device=device)
    out = attention_cache.attend_one(q, cache, position, d**-0.5)
    assert out.shape == (1, heads * d) and out.dtype == dtype
    assert relative(out, oracle(q, cache, used - 1, d**-0.5)) <= LIMITS[dtype]


@interpreted
@pytest.mark.parametrize("shape", HEADS, ids=str)
def test_one_token_interpreted(shape):
    for used in (1, 64, 65, 200):
        check_one(*shape, 200, used, torch.float32)
    check_one(*shape, 512, 130, torch.float16)


@interpreted
def test_a_part_is_more_than_a_block_when_the_cache_is_long_interpreted():
    check_one(2, 1, 16, 8192, 5000, torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [*HEADS, (32, 8, 128)], ids=str)
def test_one_token_on_a_card(shape):
    for dtype in (torch.float16, torch.bfloat16):
        for capacity, used in ((512, 1), (512, 512), (8192, 4100), (32768, 20001)):
            check_one(*shape, capacity, used, dtype, "cuda")


def check_prompt(heads, kv_heads, d, dtype, device="cpu"):
    for start, tokens in ((0, 1), (0, 17), (40, 1), (40, 23)):
        cache = filled(96, start + tokens, kv_heads, d, dtype, device)
        q = torch.randn(tokens, heads, d, generator=torch.Generator().manual_seed(2)).to(device, dtype)
        assert relative(attention_cache.attend(q, cache, start, d**-0.5), oracle(q, cache, start, d**-0.5)) <= LIMITS[dtype]


@pytest.mark.parametrize("shape", HEADS, ids=str)
def test_a_prompt_sees_what_is_before_it(shape):
    check_prompt(*shape, torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [*HEADS, (32, 8, 128)], ids=str)
def test_a_prompt_on_a_card(shape):
    for dtype in (torch.float16, torch.bfloat16):
        check_prompt(*shape, dtype, "cuda")


def check_finish(dtype, device="cpu"):
    cols, sizes, ranks, scales = 1100, (70, 20, 33), (8, 0, 4), (2.0, 1.0, 0.5)
    draw = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(shape, generator=draw).to(device, dtype)

    x, y, bias, residual = randn(1, cols), randn(1, sum(sizes)), randn(sum(sizes)), randn(1, sum(sizes))
    a, b = randn(sum(ranks), cols), torch.zeros(sum(sizes), max(ranks), device=device, dtype=dtype)
    first, want = torch.zeros(sum(sizes), dtype=torch.int32, device=device), y.double() + bias.double() + residual.double()
    scaling = torch.cat([torch.full((r,), s) for r, s in zip(ranks, scales)]).to(device)
    for i, (size, rank, scale) in enumerate(zip(sizes, ranks, scales)):
        rows = slice(sum(sizes[:i]), sum(sizes[: i + 1]))
        b[rows, :rank] = randn(size, rank)
        first[rows] = sum(ranks[:i])
        down = x.double() @ a[sum(ranks[:i]) : sum(ranks[: i + 1])].double().t()
        want[:, rows] += scale * down @ b[rows, :rank].double().t()
    stacked = thin.Thin(a, scaling, b, first)
    assert relative(thin.finish(y.clone(), x, stacked, bias, residual), want) <= LIMITS[dtype]
    plain = thin.finish(y.clone(), x, None, bias, residual)
    assert relative(plain, y.double() + bias.double() + residual.double()) <= LIMITS[dtype]
    assert thin.finish(y, x) is y


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_adapters_of_several_ranks_interpreted(dtype):
    check_finish(dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_adapters_on_a_card(dtype):
    check_finish(dtype, "cuda")


def test_launchers_check_what_they_are_given():
    with pytest.raises(ValueError, match=r"q \[2, 4, 8\] and cache \[64, 2, 2, 8\]"):
        attention_cache.attend_one(torch.empty(2, 4, 8), torch.empty(64, 2, 2, 8), torch.zeros(1, dtype=torch.int64), 1.0)
    with pytest.raises(ValueError, match=r"one contiguous row .* y is \[2, 8\]"):
        thin.finish(torch.empty(2, 8), torch.empty(2, 4), None, torch.empty(8))
