"""The graphics card as the driver sees it, read through NVML: no CUDA context, no torch, a fresh answer at every call.

The page asks every second, so a reading takes well under 5 ms after the first. Whatever the driver refuses to say becomes
a zero, and a machine without a usable card gives None; `why_no_card` then says the reason in a sentence.

The card read is the one that `CUDA_VISIBLE_DEVICES` names, else the one with the most memory. CUDA counts devices in an
order of its own, so whoever starts a worker passes `CUDA_VISIBLE_DEVICES=card.uuid` on to it.
"""

from __future__ import annotations

import functools
import os
import platform
import sys
from dataclasses import dataclass
from typing import Any

# Bytes per second and direction of one PCIe lane, by generation, after line coding.
_LANE_RATE = {1: 250e6, 2: 500e6, 3: 985e6, 4: 1969e6, 5: 3938e6, 6: 7563e6}
_WDDM = 0  # NVML's number for the Windows driver model whose memory manager may move VRAM into system memory


@dataclass(frozen=True)
class Card:
    """One card, or one MIG slice of a card, at the moment of reading. Sizes in bytes."""

    name: str
    total_bytes: int
    free_bytes: int
    used_bytes: int  # by every program together, the driver's own share included: total - free
    driver: str  # "580.65.06"
    compute_capability: tuple[int, int]
    index: int  # NVML's, which is the order on the PCI bus
    uuid: str  # what CUDA_VISIBLE_DEVICES accepts
    pcie_generation: int = 0  # the best that card and slot agree on; an idle link reports less. 0: unknown
    pcie_width: int = 0  # lanes
    may_spill: bool = False  # the driver moves what does not fit into system memory instead of refusing it (Windows, WSL)
    cards: int = 1  # how many cards NVML sees

    @property
    def link_bytes_per_s(self) -> float:
        """What the PCIe link can carry in one direction at most; 0.0 when unknown. About 85 % of it is reached."""
        return _LANE_RATE.get(self.pcie_generation, 0.0) * self.pcie_width

    def spilled_bytes(self, allocated_bytes: int) -> int:
        """How much of `allocated_bytes`, as a process counts its own allocations, cannot be on the card.

        A lower bound: what all programs have on the card is at least what one of them has there, unless it was moved out.
        """
        return max(0, allocated_bytes - self.used_bytes)


def read_card() -> Card | None:
    """The card to train on as it is now, or None where there is none that the driver can talk to."""
    try:
        nvml = _nvml()
        return _card(nvml, *_chosen(nvml))
    except (_NoCard, *_nvml_errors()):
        return None


def why_no_card() -> str:
    """One sentence that says why `read_card` found nothing, or "" when it finds a card."""
    try:
        nvml = _nvml()
        _card(nvml, *_chosen(nvml))
    except _NoCard as error:
        return str(error)
    except _nvml_errors() as error:
        return _in_words(error)
    return ""


def process_bytes(pid: int) -> int:
    """VRAM that process `pid` holds on the card, its CUDA context included; 0 when the driver cannot say.

    Windows' display driver model and containers with process ids of their own give no answer per process.
    """
    try:
        nvml = _nvml()
        handle, parent, _ = _chosen(nvml)
        running = [*_attempt(nvml.nvmlDeviceGetComputeRunningProcesses, handle, default=[])]
        running += _attempt(nvml.nvmlDeviceGetGraphicsRunningProcesses, parent, default=[])
    except (_NoCard, *_nvml_errors()):
        return 0
    return max((p.usedGpuMemory or 0 for p in running if p.pid == pid), default=0)


class _NoCard(Exception):
    """No card to read, with the reason as a sentence."""


def _nvml_errors() -> tuple[type[Exception], ...]:
    try:
        import pynvml
    except ImportError:
        return ()
    return (pynvml.NVMLError,)


@functools.lru_cache(maxsize=1)  # a failure is not remembered, so a driver that wakes up later is found
def _nvml() -> Any:
    """The pynvml module, initialized once in this process."""
    try:
        import pynvml
    except ImportError:
        raise _NoCard("the package nvidia-ml-py is not installed; run the launcher once more.") from None
    pynvml.nvmlInit()
    return pynvml


def _chosen(nvml: Any) -> tuple[Any, Any, int]:
    """(handle to read, handle of the whole card, index): the two handles differ for a MIG slice."""
    count = nvml.nvmlDeviceGetCount()
    if not count:
        raise _NoCard("the NVIDIA driver is installed but sees no card; is it switched off or passed to another system?")
    wanted = os.environ.get("CUDA_VISIBLE_DEVICES")
    if wanted is not None:
        return _named(nvml, wanted.split(",")[0].strip(), count)
    handles = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(count)]
    largest = max(range(count), key=lambda i: (_memory(nvml, handles[i])[0], -i))
    return _slice(nvml, handles[largest]), handles[largest], largest


def _named(nvml: Any, wanted: str, count: int) -> tuple[Any, Any, int]:
    """The card that the first entry of CUDA_VISIBLE_DEVICES means: a number, the start of a GPU's UUID or a MIG UUID."""
    for index in range(count):
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        if wanted == str(index) or (wanted.startswith("GPU-") and nvml.nvmlDeviceGetUUID(handle).startswith(wanted)):
            return _slice(nvml, handle), handle, index
        for mig in _slices(nvml, handle):
            if wanted.startswith("MIG-") and nvml.nvmlDeviceGetUUID(mig).startswith(wanted):
                return mig, handle, index
    raise _NoCard(f"CUDA_VISIBLE_DEVICES={wanted!r} hides every card; remove the variable or name one of 0 to {count - 1}.")


def _slice(nvml: Any, handle: Any) -> Any:
    """The first MIG slice of a card that is cut into slices, else the card itself: what CUDA would take."""
    return next(iter(_slices(nvml, handle)), handle)


def _slices(nvml: Any, handle: Any) -> list[Any]:
    enabled, _ = _attempt(nvml.nvmlDeviceGetMigMode, handle, default=(0, 0))
    if not enabled:
        return []
    places = range(_attempt(nvml.nvmlDeviceGetMaxMigDeviceCount, handle, default=0))
    found = [_attempt(nvml.nvmlDeviceGetMigDeviceHandleByIndex, handle, i, default=None) for i in places]
    return [mig for mig in found if mig is not None]


def _card(nvml: Any, handle: Any, parent: Any, index: int) -> Card:
    total, free = _memory(nvml, handle)
    if not total:
        raise _NoCard("the NVIDIA driver does not say how much memory the card has; update the driver.")
    capability = _attempt(nvml.nvmlDeviceGetCudaComputeCapability, parent, default=(0, 0))
    return Card(
        name=_attempt(nvml.nvmlDeviceGetName, handle, default="NVIDIA card"),
        total_bytes=total,
        free_bytes=free,
        used_bytes=total - free,
        driver=_attempt(nvml.nvmlSystemGetDriverVersion, default=""),
        compute_capability=tuple(capability),
        index=index,
        uuid=_attempt(nvml.nvmlDeviceGetUUID, handle, default=""),
        pcie_generation=_attempt(nvml.nvmlDeviceGetMaxPcieLinkGeneration, parent, default=0),
        pcie_width=_attempt(nvml.nvmlDeviceGetMaxPcieLinkWidth, parent, default=0),
        may_spill=_may_spill(nvml, parent),
        cards=nvml.nvmlDeviceGetCount(),
    )


def _memory(nvml: Any, handle: Any) -> tuple[int, int]:
    """(total, free) in bytes; (0, 0) when the driver does not say."""
    info = _attempt(nvml.nvmlDeviceGetMemoryInfo, handle, default=None)
    return (int(info.total), int(info.free)) if info else (0, 0)


def _may_spill(nvml: Any, parent: Any) -> bool:
    if sys.platform == "win32":
        return _attempt(nvml.nvmlDeviceGetDriverModel, parent, default=[_WDDM])[0] == _WDDM
    return "microsoft" in platform.uname().release.lower()  # WSL's card is Windows' card


def _attempt(function: Any, *arguments: Any, default: Any) -> Any:
    """What NVML answers, or `default` where this driver, card or permission gives no answer."""
    try:
        return function(*arguments)
    except _nvml_errors():
        return default


def _in_words(error: Exception) -> str:
    """An NVML failure as a sentence with what to do."""
    import pynvml

    code = getattr(error, "value", None)
    if code == pynvml.NVML_ERROR_LIBRARY_NOT_FOUND:
        return "no NVIDIA driver is installed."
    if code == pynvml.NVML_ERROR_DRIVER_NOT_LOADED:
        return "the NVIDIA driver is installed but not loaded; restart the computer."
    if code == pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH:
        return "the NVIDIA driver was updated while the computer was running; restart it."
    if code == pynvml.NVML_ERROR_GPU_IS_LOST:
        return "the card has fallen off the bus; switch the computer off and on, and check its power and temperature."
    return f"the NVIDIA driver answers {str(error)!r}; restart the computer or reinstall the driver."
