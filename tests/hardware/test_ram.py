"""ram.py: what a container's limit leaves, and batteries."""

from __future__ import annotations

from types import SimpleNamespace

import psutil
import pytest

from lowvram_tuner.hardware import ram
from lowvram_tuner.hardware.ram import Ram, read_ram

GB = 10**9


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine with 16 GB, 10 of them available, whose control group files lie in the returned folder."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=16 * GB, available=10 * GB))
    monkeypatch.setattr(ram, "_CGROUP", tmp_path)
    return tmp_path


def test_without_a_limit(machine):
    assert read_ram() == Ram(16 * GB, 10 * GB)
    (machine / "memory.max").write_text("max\n")
    assert read_ram() == Ram(16 * GB, 10 * GB)


def test_a_container_limit_counts_caches_as_free(machine):
    (machine / "memory.max").write_text(f"{8 * GB}\n")
    (machine / "memory.current").write_text(f"{5 * GB}\n")
    (machine / "memory.stat").write_text(f"anon 123\ninactive_file {2 * GB}\n")
    assert read_ram() == Ram(8 * GB, 5 * GB)


def test_the_older_control_groups(machine):
    (machine / "memory").mkdir()
    (machine / "memory/memory.limit_in_bytes").write_text(str(4 * GB))
    (machine / "memory/memory.usage_in_bytes").write_text(str(3 * GB))
    assert read_ram() == Ram(4 * GB, 1 * GB)


def test_a_limit_above_the_machine_means_nothing(machine):
    (machine / "memory.max").write_text(str(2**63 - 4096))
    assert read_ram() == Ram(16 * GB, 10 * GB)


def test_an_overdrawn_limit_leaves_nothing(machine):
    (machine / "memory.max").write_text(str(2 * GB))
    (machine / "memory.current").write_text(str(3 * GB))
    assert read_ram().available_bytes == 0


@pytest.mark.parametrize(
    ("battery", "laptop", "unplugged"),
    [(None, False, False), (SimpleNamespace(power_plugged=True), True, False), (SimpleNamespace(power_plugged=False), True, True)],
)
def test_batteries(monkeypatch, battery, laptop, unplugged):
    monkeypatch.setattr(psutil, "sensors_battery", lambda: battery, raising=False)
    assert (ram.is_laptop(), ram.on_battery()) == (laptop, unplugged)


def test_this_machine():
    now = read_ram()
    assert 0 < now.available_bytes <= now.total_bytes
