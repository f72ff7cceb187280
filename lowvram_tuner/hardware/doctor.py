"""What this machine can do, found out by trying: torch, the card, Triton, and one of the program's own kernels.

torch is imported inside the functions, in the calling process. Whatever is wrong becomes a sentence in `warnings`, the most
important one first; nothing here raises.
"""

from __future__ import annotations

import importlib.metadata
import platform
from dataclasses import dataclass, field
from typing import Any

from lowvram_tuner.environment import kernels_clash
from lowvram_tuner.hardware.card import Card, read_card, why_no_card
from lowvram_tuner.hardware.ram import on_battery

_NO_DRIVER = "no NVIDIA driver is installed."
_TIGHT = 2 * 10**9  # bytes of free VRAM below which even small models hardly train


@dataclass
class _Findings:
    """torch's own view of the machine, and what is wrong with it."""

    torch: str | None = None
    cuda: str | None = None
    gpu_name: str | None = None
    capability: str | None = None
    smoke_kernel: str = "not run"
    warnings: list[str] = field(default_factory=list)


def doctor() -> dict[str, Any]:
    """The facts of the `doctor` command: plain JSON values, sizes in GB = 10^9 bytes, None where there is nothing to say.

    smoke_kernel: "ok", "no card, runs on the CPU", or "failed: why". cuda: the CUDA version torch was built for.
    """
    card = read_card()
    found = _Findings()
    try:
        _examine(found, card)
    except Exception as error:  # any library may fail in any way here, and saying so is the whole task
        found.warnings.insert(0, f"PyTorch does not work ({_short(error)}); start with --reinstall.")
    found.warnings += _more_warnings(card)
    return {
        "python": platform.python_version(),
        "torch": found.torch,
        "cuda": found.cuda,
        "gpu_name": found.gpu_name or (card.name if card else None),
        "compute_capability": found.capability or (_dotted(card.compute_capability) if card else None),
        "vram_total_gb": round(card.total_bytes / 1e9, 3) if card else None,
        "vram_free_gb": round(card.free_bytes / 1e9, 3) if card else None,
        "triton": _version("triton") or _version("triton-windows"),
        "smoke_kernel": found.smoke_kernel,
        "warnings": found.warnings,
    }


def run_smoke_kernel() -> str:
    """Runs the NF4 dequantize kernel on the card and compares it with its plain torch reference: "ok" or "failed: why"."""
    import torch

    from kernels import dequant_nf4, reference_nf4

    generator = torch.Generator().manual_seed(0)
    packed = reference_nf4.quantize(torch.randn(96, 160, generator=generator))
    expected = reference_nf4.dequantize(packed, torch.empty(96, 160, dtype=torch.float16))
    on_card = {name: tensor.cuda() for name, tensor in packed.items()}
    result = dequant_nf4.dequantize(on_card, torch.full((96, 160), torch.nan, dtype=torch.float16, device="cuda"))
    worst = (result.cpu().float() - expected.float()).abs().max().item()
    if not worst <= 2e-3:  # one unit in the last place of fp16 at these values; NaN fails too
        return f"failed: the test kernel is wrong by {worst:.3g}"
    return "ok"


def _examine(found: _Findings, card: Card | None) -> None:
    import torch

    found.torch, found.cuda = torch.__version__, torch.version.cuda
    if not torch.cuda.is_available():
        found.smoke_kernel = "no card, runs on the CPU"
        if card is not None:
            found.smoke_kernel = "failed: PyTorch cannot use the card"
            found.warnings.append(_why_unused(card, torch.version.cuda))
        return
    found.gpu_name = torch.cuda.get_device_name(0)
    found.capability = _dotted(torch.cuda.get_device_capability(0))
    try:
        found.smoke_kernel = run_smoke_kernel()
    except Exception as error:  # Triton fails with errors of many libraries and of the compiler
        found.smoke_kernel = f"failed: {_short(error)}"
    if found.smoke_kernel != "ok":
        found.warnings.append(_kernel_advice(found))


def _why_unused(card: Card, cuda: str | None) -> str:
    if cuda is None:
        return f"{card.name} is there but this PyTorch is a CPU build; start with --reinstall."
    return (
        f"PyTorch, built for CUDA {cuda}, cannot use {card.name} with driver {card.driver or 'unknown'}; "
        "update the NVIDIA driver and restart the computer."
    )


def _kernel_advice(found: _Findings) -> str:
    """What to do about a kernel that does not run."""
    problem = found.smoke_kernel.removeprefix("failed: ")
    if "compiler" in problem.lower() or "gcc" in problem or "Python.h" in problem:
        major, minor, _ = platform.python_version_tuple()
        return (
            f"Triton found no complete C compiler ({problem}); on Debian and Ubuntu run "
            f"'sudo apt install build-essential python{major}.{minor}-dev' and start again."
        )
    if "no kernel image" in problem:
        return (
            f"this PyTorch has no code for compute capability {found.capability} of {found.gpu_name}; start with --reinstall."
        )
    return f"the test kernel does not run on {found.gpu_name} ({problem}); update the NVIDIA driver or start with --reinstall."


def _more_warnings(card: Card | None) -> list[str]:
    found = [kernels_clash()]
    reason = why_no_card()
    if card is None and reason != _NO_DRIVER:
        found.append(f"no card is used: {reason}")
    if card is not None and card.free_bytes < _TIGHT:
        found.append(f"only {card.free_bytes / 1e9:.1f} GB of VRAM are free; close other programs that use the card.")
    if card is not None and on_battery():
        found.append("the computer runs on its battery, which slows the card down; plug it in.")
    return [sentence for sentence in found if sentence]


def _version(package: str) -> str | None:
    return next((d.version for d in importlib.metadata.distributions(name=package) if d.version), None)


def _short(error: BaseException) -> str:
    """An exception as one short line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def _dotted(numbers: tuple[int, ...]) -> str:
    return ".".join(map(str, numbers))
