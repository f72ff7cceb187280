"""Measures a card, once: what CUDA itself takes, and what it multiplies, copies and receives per second. About a second."""

from __future__ import annotations

import os
import time

import torch

from lowvram_tuner.hardware.card import Card, process_bytes, read_card
from lowvram_tuner.hardware.measured import measured, remember

KERNEL_BYTES = 240 * 10**6  # kernels that load later, as an H100's driver counted them over a captured step
_SIZE = 4096


def measure(card: Card, dtype: torch.dtype) -> dict[str, float]:
    """The card's values, measured now unless they are known. To be called before anything else runs on the card."""
    known = measured(card.uuid)
    if known:
        return known
    before = card.used_bytes
    torch.cuda.init()
    torch.cuda.synchronize()
    # The card's own count is the second choice: another program that starts meanwhile would be remembered as CUDA's share.
    context = process_bytes(os.getpid()) or max(0, read_card().used_bytes - before)
    values = {"context_bytes": context + KERNEL_BYTES, **_rates(dtype)}
    torch._C._cuda_clearCublasWorkspaces()  # of the default size; `train.session` asks for smaller ones
    torch.cuda.empty_cache()
    remember(card.uuid, values)
    return values


def _rates(dtype: torch.dtype) -> dict[str, float]:
    device = torch.device("cuda")
    a, b = (torch.randn(_SIZE, _SIZE, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    host = torch.empty(32 << 20, dtype=torch.uint8, pin_memory=True)
    target = torch.empty_like(host, device=device)
    return {
        "flops": 2 * _SIZE**3 / _seconds(lambda: torch.mm(a, b, out=out)),
        "copy_bytes": 2 * out.nbytes / _seconds(lambda: out.copy_(a)),
        "host_bytes": host.numel() / _seconds(lambda: target.copy_(host, non_blocking=True)),
    }


def _seconds(run) -> float:
    """The median of a few runs."""
    times = []
    for _ in range(7):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        run()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return sorted(times)[3]
