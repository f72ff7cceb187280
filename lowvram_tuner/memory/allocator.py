"""Holds PyTorch's allocator to a plan's budget, says what is left of it, and keeps graphs' memory in their pools."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch

from lowvram_tuner.memory.plan import Plan


def cap_allocator(device: torch.device, plan: Plan) -> None:
    """Caps PyTorch's allocator at the budget, so that a driver cannot silently spill into system memory.

    Also has it grow segments in place, which leaves no gaps between them, take pinned memory as asked for and not up to twice
    that (it rounds to powers of two; torch before 2.13 knows no other way), and cuBLAS take 8 MB a stream instead of 32.
    To be called before anything runs on the card.
    """
    if device.type != "cuda":
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:2:16:8")
    settings = ["expandable_segments:True"] if sys.platform == "linux" else []
    if tuple(int(n) for n in torch.__version__.split(".")[:2]) >= (2, 13):
        settings.append("pinned_max_round_threshold_mb:16")
    if settings:
        # The older name warns where both exist.
        change = getattr(torch._C, "_accelerator_setAllocatorSettings", None) or torch.cuda.memory._set_allocator_settings
        change(",".join(settings))
    if plan.budget.limit_bytes:
        total = torch.cuda.get_device_properties(device).total_memory
        share = (plan.budget.limit_bytes - plan.budget.context_bytes) / total
        torch.cuda.set_per_process_memory_fraction(min(1.0, max(share, 0.01)), device)


def room(device: torch.device, plan: Plan) -> int:
    """Bytes that PyTorch can still take: of what is free on the card, as much as the plan's cap leaves."""
    free, limit = torch.cuda.mem_get_info(device)[0], plan.budget.limit_bytes
    return min(free, limit - plan.budget.context_bytes - torch.cuda.memory_reserved(device)) if limit else free


@contextmanager
def recording(graph: torch.cuda.CUDAGraph, pool: tuple[int, int]) -> Iterator[None]:
    """Captures into `pool` what the block does; what eager passes left is given back first.

    cuBLAS keeps a stream's workspace, which here lies in the pool, for the next capture too. That one may have another pool, and
    once the first is given back the workspace would go while a graph works in it: so it is dropped, as the pool keeps its memory.
    """
    torch._C._cuda_clearCublasWorkspaces()
    try:
        # torch.cuda.graph synchronizes and empties the allocator's cache before it begins.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            yield
    finally:
        torch._C._cuda_clearCublasWorkspaces()


def abandon_capture(graph: torch.cuda.CUDAGraph, pool: tuple[int, int]) -> None:
    """Gives back the memory of a capture into `pool` that failed.

    PyTorch does so where a capture came to its end. One that CUDA invalidated, as running out of memory does, would keep what
    it had taken for good: `CUDAGraph::capture_end` raises before it lets go of its pool (torch 2.11).
    """
    try:
        graph.pool()
    except RuntimeError:
        device = torch.cuda.current_device()
        with suppress(RuntimeError):  # a PyTorch that lets go first has nothing left to end
            torch._C._cuda_endAllocateToPool(device, pool)
            torch._C._cuda_releasePool(device, pool)
    graph.reset()
    torch.cuda.empty_cache()
