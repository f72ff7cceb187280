"""Which build of PyTorch fits the card: decided before anything is installed, from what nvidia-smi says. Stdlib only.

A build serves a card when the driver is new enough for the build's CUDA and the build contains code for the card's compute
capability. The table holds PyTorch's own support matrix (https://github.com/pytorch/pytorch/blob/main/RELEASE.md): CUDA 13
dropped everything before Turing, cu126 ends with torch 2.14, and cu128, which Blackwell needs under a driver that is too
old for CUDA 13, ended with torch 2.11. cu130 is the build on the default index, cu132 the experimental one.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

OLDEST_TORCH, NEXT_TORCH = "2.11", "2.15"  # the range this program is tested with: from, below
PINNED_TORCH = "2.13.0"  # on the CPU, and from the default index where PyTorch's own cannot be reached
INDEX = "https://download.pytorch.org/whl/"
TRITON = {"2.11": "3.6", "2.12": "3.7", "2.13": "3.7", "2.14": "3.8"}  # from torch's own wheel metadata

_WINDOWS_SMI = Path(os.environ.get("SYSTEMROOT", r"C:\Windows")) / "System32" / "nvidia-smi.exe"
_WSL_SMI = Path("/usr/lib/wsl/lib/nvidia-smi")


class NoBuild(ValueError):
    """No build of PyTorch serves this card with this driver: one sentence with what to do."""


@dataclass(frozen=True)
class Gpu:
    """A card as nvidia-smi lists it. capability (0, 0): a driver too old to say."""

    name: str
    driver: tuple[int, ...]
    capability: tuple[int, int]
    total_mib: int = 0


@dataclass(frozen=True)
class Build:
    """What pip is told: `requirement` from PyTorch's index `name`, else `fallback` from the default index ("" for none)."""

    name: str
    requirement: str
    fallback: str
    why: str

    @property
    def index(self) -> str:
        """The address of the package index that has this build."""
        return INDEX + self.name


@dataclass(frozen=True)
class _Cuda:
    name: str
    driver: int  # the oldest major version that runs it
    oldest: tuple[int, int]  # compute capabilities it has code for
    newest: tuple[int, int]
    below: str = NEXT_TORCH
    on_default_index: bool = False


_CUDA = (  # in order of preference
    _Cuda("cu130", 580, (7, 5), (99, 9), on_default_index=True),
    _Cuda("cu126", 525, (5, 0), (9, 9)),
    _Cuda("cu128", 570, (7, 5), (99, 9), below="2.12"),
)


def choose(gpu: Gpu | None, system: str = sys.platform) -> Build:
    """The build for a card (None: no NVIDIA card), or NoBuild when only another driver would help.

    system: as `sys.platform` spells it. The default index has CUDA builds for Linux only.
    """
    if gpu is None:
        return _cpu("no NVIDIA card: the CPU build", system)
    if (0, 0) < gpu.capability < _CUDA[1].oldest:
        why = f"{gpu.name} (compute capability {_dotted(gpu.capability)}) is older than any current build: the CPU build"
        return _cpu(why, system)
    for cuda in _CUDA:
        if _serves(cuda, gpu):
            fallback = f"torch=={PINNED_TORCH}" if cuda.on_default_index and system == "linux" else ""
            why = f"{gpu.name}, compute capability {_dotted(gpu.capability)}, driver {_dotted(gpu.driver)}: the {cuda.name} build"
            return Build(cuda.name, f"torch>={OLDEST_TORCH},<{cuda.below}", fallback, why)
    raise NoBuild(
        f"driver {_dotted(gpu.driver)} of {gpu.name} is too old for PyTorch; install NVIDIA driver 580 or newer from "
        "nvidia.com/drivers and start again, or set CUDA_VISIBLE_DEVICES=-1 to train on the CPU."
    )


def keeps(installed: str, gpu: Gpu | None) -> bool:
    """Whether the installed build (its name, "cpu" or "cu126") can stay: a new driver alone is no reason to install again."""
    if gpu is None:
        return True
    if installed == "cpu":
        return choose(gpu).name == "cpu"
    return any(cuda.name == installed and _serves(cuda, gpu) for cuda in _CUDA)


def build_name(torch_version: str, system: str = sys.platform) -> str:
    """The build that an installed version is: "2.13.0+cu126" is cu126; without a tag it came from the default index."""
    _, _, tag = torch_version.partition("+")
    default = next(cuda.name for cuda in _CUDA if cuda.on_default_index)
    return tag or (default if system == "linux" else "cpu")


def triton_windows(torch_version: str) -> str:
    """The requirement on triton-windows that matches a torch version such as "2.14.1+cu130"."""
    minor = TRITON.get(".".join(torch_version.split(".")[:2]), "3.8")
    major, low = minor.split(".")
    return f"triton-windows>={minor},<{major}.{int(low) + 1}"


def read_gpu() -> tuple[Gpu | None, str]:
    """(the card with the most memory, "") or (None, why): the reason is "" where there simply is no NVIDIA driver."""
    if os.environ.get("CUDA_VISIBLE_DEVICES", "all").strip() in ("", "-1"):
        return None, "CUDA_VISIBLE_DEVICES hides every card"
    tool = _nvidia_smi()
    if tool is None:
        return None, ""
    wanted = "--query-gpu=name,driver_version,compute_cap,memory.total"
    code, text = _ask([tool, wanted, "--format=csv,noheader,nounits"])
    if code != 0 and "compute_cap" in text:  # a driver from before 2021 does not know the field
        code, text = _ask([tool, "--query-gpu=name,driver_version", "--format=csv,noheader,nounits"])
    gpus = [gpu for gpu in map(_parsed, text.splitlines()) if gpu] if code == 0 else []
    if not gpus:
        return None, f"nvidia-smi finds no usable card ({' '.join(text.split())[:200] or f'exit code {code}'})"
    return max(gpus, key=lambda gpu: gpu.total_mib), ""


def _cpu(why: str, system: str) -> Build:
    """The pinned version with its tag, so that no further index of the user's can slip a CUDA build of 3 GB in."""
    tag = "" if system == "darwin" else "+cpu"
    return Build("cpu", f"torch=={PINNED_TORCH}{tag}", f"torch=={PINNED_TORCH}", why)


def _serves(cuda: _Cuda, gpu: Gpu) -> bool:
    return gpu.driver[0] >= cuda.driver and (gpu.capability == (0, 0) or cuda.oldest <= gpu.capability <= cuda.newest)


def _nvidia_smi() -> str | None:
    found = shutil.which("nvidia-smi")
    return found or next((str(path) for path in (_WINDOWS_SMI, _WSL_SMI) if path.is_file()), None)


def _ask(command: list[str]) -> tuple[int, str]:
    """(exit code, what it printed); a tool that cannot start or hangs counts as failed with the reason as text."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=60, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired) as error:
        return -1, str(error)
    return done.returncode, done.stdout + done.stderr


def _parsed(line: str) -> Gpu | None:
    """A Gpu from "NVIDIA GeForce RTX 3060, 580.65.06, 8.6, 12288"; None for a line of another kind."""
    fields = [field.strip() for field in line.split(",")]
    if len(fields) < 2 or not re.fullmatch(r"\d+(\.\d+)*", fields[1]):
        return None
    capability = re.fullmatch(r"(\d+)\.(\d+)", fields[2]) if len(fields) > 2 else None
    return Gpu(
        name=fields[0],
        driver=tuple(int(part) for part in fields[1].split(".")),
        capability=(int(capability[1]), int(capability[2])) if capability else (0, 0),
        total_mib=int(fields[3]) if len(fields) > 3 and fields[3].isdigit() else 0,
    )


def _dotted(numbers: tuple[int, ...]) -> str:
    return ".".join(map(str, numbers))
