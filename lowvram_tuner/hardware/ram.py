"""The machine around the card: system memory as this process may use it, and whether it is a laptop on battery."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import psutil

_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Ram:
    """System memory in bytes. `available` is what can be taken without swapping, file caches counted as free."""

    total_bytes: int
    available_bytes: int


def read_ram() -> Ram:
    """Memory now; inside a container with a limit of its own, that limit and what is left of it."""
    memory = psutil.virtual_memory()
    limit, used = _container_limit()
    if not 0 < limit < memory.total:
        return Ram(memory.total, memory.available)
    return Ram(limit, max(0, min(memory.available, limit - used)))


def is_laptop() -> bool:
    """Whether the machine has a battery: its card then shares heat and power with the processor."""
    return _battery() is not None


def on_battery() -> bool:
    """Whether the machine runs on its battery now, when most laptops hold the card's clocks down."""
    return getattr(_battery(), "power_plugged", None) is False


def _battery() -> object | None:
    read = getattr(psutil, "sensors_battery", None)  # missing on a few systems
    return read() if read else None


def _container_limit() -> tuple[int, int]:
    """(limit, used without file caches) of this process's control group, in bytes; (0, 0) where there is no limit."""
    for limit_name, used_name in (
        ("memory.max", "memory.current"),  # version 2
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),  # version 1
    ):
        limit, used = _number(_CGROUP / limit_name), _number(_CGROUP / used_name)
        if limit:
            return limit, max(0, used - _file_caches((_CGROUP / limit_name).parent / "memory.stat"))
    return 0, 0


def _number(path: Path) -> int:
    """The number in a file; 0 when it is absent, unreadable or says "max"."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return 0


def _file_caches(path: Path) -> int:
    """Bytes of file cache that the kernel gives back under pressure, from a memory.stat."""
    try:
        fields = dict(line.split() for line in path.read_text().splitlines())
        return int(fields.get("inactive_file", 0))
    except (OSError, ValueError):
        return 0
