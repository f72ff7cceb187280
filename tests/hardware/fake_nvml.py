"""A stand-in for the NVML library: cards as plain values, and any call can be told to fail."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pynvml

GB = 10**9


@dataclass
class FakeCard:
    """One card as NVML describes it. `refuses` maps a function's name to the NVML error code it raises."""

    name: str = "Fake 6 GB Laptop GPU"
    uuid: str = "GPU-00000000-aaaa"
    total: int = 6 * GB
    free: int = 5 * GB
    capability: tuple[int, int] = (8, 6)
    link: tuple[int, int] = (4, 8)  # generation, lanes
    slices: list[FakeCard] = field(default_factory=list)
    processes: dict[int, int | None] = field(default_factory=dict)
    refuses: dict[str, int] = field(default_factory=dict)


class FakeNvml:
    """The functions of pynvml that card.py calls, over a list of FakeCards; `starts` is the error nvmlInit raises."""

    def __init__(self, *cards: FakeCard, starts: int = pynvml.NVML_SUCCESS) -> None:
        self.cards, self.starts = list(cards), starts

    def install(self, monkeypatch: Any) -> None:
        """Puts this library in pynvml's place for one test."""
        for name in (n for n in dir(self) if n.startswith("nvml")):
            monkeypatch.setattr(pynvml, name, self._guarded(getattr(self, name)))

    @staticmethod
    def _guarded(function: Any) -> Any:
        def call(*arguments: Any) -> Any:
            if arguments and function.__name__ in getattr(arguments[0], "refuses", {}):
                raise pynvml.NVMLError(arguments[0].refuses[function.__name__])
            return function(*arguments)

        return call

    def nvmlInit(self) -> None:
        if self.starts:
            raise pynvml.NVMLError(self.starts)

    def nvmlSystemGetDriverVersion(self) -> str:
        return "580.65.06"

    def nvmlDeviceGetCount(self) -> int:
        return len(self.cards)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> FakeCard:
        return self.cards[index]

    def nvmlDeviceGetName(self, card: FakeCard) -> str:
        return card.name

    def nvmlDeviceGetUUID(self, card: FakeCard) -> str:
        return card.uuid

    def nvmlDeviceGetMemoryInfo(self, card: FakeCard) -> SimpleNamespace:
        return SimpleNamespace(total=card.total, free=card.free, used=card.total - card.free)

    def nvmlDeviceGetCudaComputeCapability(self, card: FakeCard) -> tuple[int, int]:
        return card.capability

    def nvmlDeviceGetMaxPcieLinkGeneration(self, card: FakeCard) -> int:
        return card.link[0]

    def nvmlDeviceGetMaxPcieLinkWidth(self, card: FakeCard) -> int:
        return card.link[1]

    def nvmlDeviceGetMigMode(self, card: FakeCard) -> list[int]:
        if not card.slices:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return [1, 1]

    def nvmlDeviceGetMaxMigDeviceCount(self, card: FakeCard) -> int:
        return 7

    def nvmlDeviceGetMigDeviceHandleByIndex(self, card: FakeCard, index: int) -> FakeCard:
        if index >= len(card.slices):
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
        return card.slices[index]

    def nvmlDeviceGetComputeRunningProcesses(self, card: FakeCard) -> list[SimpleNamespace]:
        return [SimpleNamespace(pid=pid, usedGpuMemory=used) for pid, used in card.processes.items()]

    def nvmlDeviceGetGraphicsRunningProcesses(self, card: FakeCard) -> list[SimpleNamespace]:
        return []
