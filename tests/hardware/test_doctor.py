"""doctor.py: its facts, and the sentence for each way that torch, the driver or Triton can fail."""

from __future__ import annotations

import importlib.util
import json

import pytest

from lowvram_tuner.hardware import doctor as doctor_module
from lowvram_tuner.hardware.card import Card
from lowvram_tuner.hardware.doctor import doctor, run_smoke_kernel

torch = pytest.importorskip("torch")

KEYS = {
    "python", "torch", "cuda", "gpu_name", "compute_capability", "vram_total_gb", "vram_free_gb", "triton", "smoke_kernel",
    "warnings",
}  # fmt: skip
CARD = Card("RTX 3060", 6_000_000_000, 5_000_000_000, 1_000_000_000, "580.65", (8, 6), 0, "GPU-1")


@pytest.fixture
def machine(monkeypatch):
    """Pretends a card as the driver sees it, and one as torch sees it with a smoke kernel that ends as given."""

    def install(card: Card | None, usable: bool = False, kernel: str | Exception = "ok", reason: str = "") -> None:
        def smoke() -> str:
            if isinstance(kernel, Exception):
                raise kernel
            return kernel

        monkeypatch.setattr(doctor_module, "read_card", lambda: card)
        monkeypatch.setattr(doctor_module, "why_no_card", lambda: reason)
        monkeypatch.setattr(doctor_module, "on_battery", lambda: False)
        monkeypatch.setattr(doctor_module, "run_smoke_kernel", smoke)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: usable)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "RTX 3060")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 6))

    return install


def test_facts_of_a_machine_without_a_card(machine):
    machine(None, reason="no NVIDIA driver is installed.")
    facts = doctor()
    assert set(facts) == KEYS
    assert json.loads(json.dumps(facts)) == facts
    assert facts["torch"] == torch.__version__
    assert (facts["gpu_name"], facts["vram_total_gb"], facts["compute_capability"]) == (None, None, None)
    assert (facts["smoke_kernel"], facts["warnings"]) == ("no card, runs on the CPU", [])


def test_facts_of_a_machine_with_a_card(machine):
    machine(CARD, usable=True)
    facts = doctor()
    assert set(facts) == KEYS
    assert (facts["gpu_name"], facts["compute_capability"]) == ("RTX 3060", "8.6")
    assert (facts["vram_total_gb"], facts["vram_free_gb"]) == (6.0, 5.0)
    assert (facts["smoke_kernel"], facts["warnings"]) == ("ok", [])


def test_a_sleeping_driver_is_a_warning(machine):
    machine(None, reason="the NVIDIA driver is installed but not loaded; restart the computer.")
    assert doctor()["warnings"] == ["no card is used: the NVIDIA driver is installed but not loaded; restart the computer."]


@pytest.mark.parametrize(
    ("cuda", "words"),
    [
        (None, "RTX 3060 is there but this PyTorch is a CPU build; start with --reinstall."),
        ("13.0", "PyTorch, built for CUDA 13.0, cannot use RTX 3060 with driver 580.65; update the NVIDIA driver"),
    ],
)
def test_a_card_that_torch_cannot_use(machine, monkeypatch, cuda, words):
    machine(CARD, usable=False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    facts = doctor()
    assert facts["smoke_kernel"] == "failed: PyTorch cannot use the card"
    assert facts["warnings"][0].startswith(words)


@pytest.mark.parametrize(
    ("failure", "words"),
    [
        (RuntimeError("Failed to find C compiler. Please specify via CC"), "sudo apt install build-essential"),
        (RuntimeError("fatal error: Python.h: No such file or directory"), "-dev' and start again"),
        (RuntimeError("CUDA error: no kernel image is available for execution"), "has no code for compute capability 8.6"),
        (ImportError("DLL load failed"), "the test kernel does not run on RTX 3060 (ImportError: DLL load failed)"),
        ("failed: the test kernel is wrong by 0.5", "(the test kernel is wrong by 0.5)"),
    ],
)
def test_a_kernel_that_fails_says_what_to_do(machine, failure, words):
    machine(CARD, usable=True, kernel=failure)
    facts = doctor()
    assert facts["smoke_kernel"].startswith("failed: ")
    assert len(facts["warnings"]) == 1
    assert words in facts["warnings"][0]
    assert "\n" not in facts["warnings"][0]


def test_torch_itself_failing_is_a_sentence_too(machine, monkeypatch):
    machine(CARD, usable=True)

    def broken() -> bool:
        raise OSError("libcudart.so.13: cannot open shared object file\nand more lines")

    monkeypatch.setattr(torch.cuda, "is_available", broken)
    facts = doctor()
    assert facts["warnings"][0].startswith("PyTorch does not work (OSError: libcudart.so.13: cannot open shared object file)")
    assert facts["gpu_name"] == "RTX 3060"


def test_little_memory_and_a_battery_are_warned_of(machine, monkeypatch):
    machine(Card("RTX 3060", 6_000_000_000, 900_000_000, 5_100_000_000, "580.65", (8, 6), 0, "GPU-1"), usable=True)
    monkeypatch.setattr(doctor_module, "on_battery", lambda: True)
    first, second = doctor()["warnings"]
    assert first == "only 0.9 GB of VRAM are free; close other programs that use the card."
    assert "plug it in" in second


def test_the_clashing_package_is_warned_of(machine, monkeypatch):
    machine(CARD, usable=True)
    monkeypatch.setattr(doctor_module, "kernels_clash", lambda: "the package 'kernels' clashes.")
    assert doctor()["warnings"] == ["the package 'kernels' clashes."]


def test_this_machine_as_it_is():
    facts = doctor()
    assert set(facts) == KEYS
    assert facts["smoke_kernel"] in ("ok", "no card, runs on the CPU")


@pytest.mark.gpu
def test_the_smoke_kernel_runs_on_a_card():
    assert run_smoke_kernel() == "ok"


@pytest.mark.gpu
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
def test_a_wrong_kernel_is_noticed(monkeypatch):
    from kernels import dequant_nf4

    right = dequant_nf4.dequantize
    monkeypatch.setattr(dequant_nf4, "dequantize", lambda packed, out, start=0: right(packed, out, start).mul_(1.01))
    assert run_smoke_kernel().startswith("failed: the test kernel is wrong by")
