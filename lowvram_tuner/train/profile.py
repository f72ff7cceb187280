"""Where a step's time goes on the card: how long it is busy, with how many kernels, and which take most of it.

The benchmark records peers with the same functions. Nothing here imports torch before a recording.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

COPIES = ("Memcpy", "Memset")  # how CUPTI names what is no kernel: streamed slabs are not the card computing
SHOWN = 15


class Kernel(NamedTuple):
    """One kernel or copy that ran on the card: begin and duration in microseconds."""

    name: str
    start_us: float
    us: float


def record(run: Callable[[], Any]) -> list[Kernel]:
    """Everything that the card does during `run`, replayed graphs included."""
    import torch
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        run()
        torch.cuda.synchronize()
    events = [e for e in trace.events() if e.device_type == DeviceType.CUDA]
    return [Kernel(e.name, e.time_range.start, e.time_range.elapsed_us()) for e in events]


def summary(recorded: list[Kernel], step_ms: float) -> dict[str, Any]:
    """gpu_ms: kernel times added up; busy_ms: time in which at least one runs; busy_share: of a step that takes `step_ms`
    unrecorded; kernels; copy_ms; top: the kernels that take most, {name, ms, calls, share of gpu_ms}."""
    kernels = [k for k in recorded if not k.name.startswith(COPIES)]
    by_name: dict[str, list[float]] = defaultdict(list)
    for kernel in kernels:
        by_name[kernel.name].append(kernel.us)
    total = sum(k.us for k in kernels)
    busy_ms = covered((k.start_us, k.start_us + k.us) for k in kernels) / 1e3
    top = sorted(by_name.items(), key=lambda item: -sum(item[1]))[:SHOWN]
    return {
        "gpu_ms": total / 1e3,
        "busy_ms": busy_ms,
        "busy_share": min(1.0, busy_ms / step_ms) if step_ms else 0.0,
        "kernels": len(kernels),
        "copy_ms": sum(k.us for k in recorded if k.name.startswith(COPIES)) / 1e3,
        "top": [{"name": n, "ms": sum(us) / 1e3, "calls": len(us), "share": sum(us) / total} for n, us in top],
    }


def covered(intervals: Iterable[tuple[float, float]]) -> float:
    """The length of the union of (begin, end) intervals."""
    length, reached = 0.0, float("-inf")
    for begin, end in sorted(intervals):
        length += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return length


def table(found: dict[str, Any]) -> str:
    """A summary as lines for people."""
    lines = [
        f"the card computes {found['busy_share']:.0%} of a step: {found['busy_ms']:.1f} ms, {found['kernels']} kernels; "
        f"copies take {found['copy_ms']:.1f} ms",
        f"{'ms':>9} {'share':>6} {'calls':>6}  kernel",
    ]
    lines += [f"{k['ms']:9.2f} {k['share']:6.1%} {k['calls']:6d}  {k['name'][:90]}" for k in found["top"]]
    return "\n".join(lines)
