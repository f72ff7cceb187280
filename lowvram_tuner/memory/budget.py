"""How much memory a run may use, where, and how fast the machine is there. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lowvram_tuner.config import TrainConfig
from lowvram_tuner.hardware.measured import measured

if TYPE_CHECKING:
    from lowvram_tuner.hardware.card import Card
    from lowvram_tuner.hardware.ram import Ram

MB = 10**6
GB = 10**9
CONTEXT_BYTES = 450 * MB  # CUDA's context of one process until a card's own was measured (`hardware.measured`)
RAM_PROCESS_BYTES = 580 * MB  # Python, torch, transformers and datasets, imported, on a machine without a card
DESKTOP_RESERVE = 300 * MB  # left for the desktop when the user names no budget


@dataclass(frozen=True)
class Rates:
    """What a card does per second. The defaults are a 6 GB laptop card's (RTX 3060 or 4050 class, eight lanes of PCIe 4).

    They stand for a card that was never measured, one that is not here included; `memory.calibrate` measures the others.
    """

    flops: float = 20e12
    copy_bytes: float = 250e9
    host_bytes: float = 8e9


CPU_RATES = Rates(flops=60e9, copy_bytes=10e9, host_bytes=10e9)  # two laptop cores


@dataclass(frozen=True)
class Budget:
    """Memory that a run may use. `limit_bytes` is the most for this program's process, CUDA's own share included.

    `note` is a sentence for the user where the budget is not the one asked for, or not of this machine.
    """

    total_bytes: int
    others_bytes: int
    limit_bytes: int
    kind: str  # "vram" or "ram"
    context_bytes: int = CONTEXT_BYTES
    rates: Rates = Rates()
    note: str = ""
    host_limit_bytes: int = 8 * GB  # RAM that streamed layers leave to activations; of a machine that is not here, a guess

    @classmethod
    def of(cls, config: TrainConfig, card: Card | None, ram: Ram | None = None) -> Budget:
        """The budget the config asks for, else what is free on the card (or in RAM without one) less a reserve.

        More than the card has becomes what is free on it, and `note` says so.
        """
        if card is None:
            total, free = (ram.total_bytes, ram.available_bytes) if ram else (0, 0)
            return cls(total, total - free, max(0, free - DESKTOP_RESERVE), "ram", RAM_PROCESS_BYTES, CPU_RATES)
        total, free, asked, note = card.total_bytes, card.free_bytes, int(config.vram_gb * GB), ""
        if asked > total:
            note = f"{config.vram_gb:g} GB were asked for; the card has {total / GB:.1f} GB, and the {free / GB:.1f} GB free on it are used"
        limit = free if note else asked or max(0, free - DESKTOP_RESERVE)
        host = ram.available_bytes // 2 if ram else 0
        known = measured(card.uuid)
        rates = Rates(**{k: known[k] for k in ("flops", "copy_bytes", "host_bytes") if k in known})
        return cls(total, total - free, limit, "vram", int(known.get("context_bytes", CONTEXT_BYTES)), rates, note, host)

    @classmethod
    def of_absent_card(cls, vram_gb: float) -> Budget:
        """The budget of a card that is not in this machine, empty but for this program, with a laptop card's speed."""
        size = int(vram_gb * GB)
        note = f"a card of {vram_gb:g} GB that is not in this machine, with the speed of a 6 GB laptop card"
        return cls(size, 0, size, "vram", note=note)
