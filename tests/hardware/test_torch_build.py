"""Which PyTorch for which card: the table of cases, and reading nvidia-smi in all its moods."""

from __future__ import annotations

import stat
import sys

import pytest

from lowvram_tuner.hardware import torch_build
from lowvram_tuner.hardware.torch_build import Gpu, NoBuild, build_name, choose, keeps, read_gpu, triton_windows

FULL = "torch>=2.11,<2.15"


def gpu(capability: str, driver: str, name: str = "card") -> Gpu:
    return Gpu(name, tuple(map(int, driver.split("."))), tuple(map(int, capability.split("."))), 8192)


@pytest.mark.parametrize(
    ("capability", "driver", "system", "build", "requirement", "fallback"),
    [
        ("5.2", "580.65.06", "linux", "cu126", FULL, ""),  # Maxwell
        ("6.1", "580.65.06", "linux", "cu126", FULL, ""),  # Pascal: CUDA 13 has no code for it, whatever the driver
        ("6.1", "535.183.01", "win32", "cu126", FULL, ""),
        ("7.0", "580.65.06", "linux", "cu126", FULL, ""),  # Volta
        ("7.5", "580.65.06", "linux", "cu130", FULL, "torch==2.13.0"),  # Turing
        ("7.5", "581.29", "win32", "cu130", FULL, ""),  # the default index has only CPU builds for Windows
        ("8.6", "580.65.06", "linux", "cu130", FULL, "torch==2.13.0"),  # Ampere
        ("8.6", "579.99", "linux", "cu126", FULL, ""),
        ("8.6", "525.60.13", "linux", "cu126", FULL, ""),
        ("8.9", "610.10", "win32", "cu130", FULL, ""),  # Ada, a driver newer than any known
        ("9.0", "550.54.15", "linux", "cu126", FULL, ""),  # Hopper
        ("9.0", "580.65.06", "linux", "cu130", FULL, "torch==2.13.0"),
        ("10.0", "580.65.06", "linux", "cu130", FULL, "torch==2.13.0"),  # Blackwell
        ("12.0", "572.16", "win32", "cu128", "torch>=2.11,<2.12", ""),  # a driver too old for CUDA 13
        ("12.0", "580.65", "win32", "cu130", FULL, ""),
        ("13.0", "700.1", "linux", "cu130", FULL, "torch==2.13.0"),  # a card that does not exist yet
        ("0.0", "590.1", "linux", "cu130", FULL, "torch==2.13.0"),  # nvidia-smi would not say
        ("3.5", "470.82", "linux", "cpu", "torch==2.13.0+cpu", "torch==2.13.0"),  # Kepler: no current build has code for it
        ("3.5", "470.82", "win32", "cpu", "torch==2.13.0+cpu", "torch==2.13.0"),
    ],
)
def test_choice(capability, driver, system, build, requirement, fallback):
    chosen = choose(gpu(capability, driver), system)
    assert (chosen.name, chosen.requirement, chosen.fallback) == (build, requirement, fallback)
    assert chosen.index == f"https://download.pytorch.org/whl/{build}"


@pytest.mark.parametrize(
    ("system", "requirement"), [("linux", "torch==2.13.0+cpu"), ("win32", "torch==2.13.0+cpu"), ("darwin", "torch==2.13.0")]
)
def test_no_card_is_the_cpu_build(system, requirement):
    chosen = choose(None, system)
    assert (chosen.name, chosen.requirement, chosen.fallback) == ("cpu", requirement, "torch==2.13.0")


@pytest.mark.parametrize(("capability", "driver"), [("8.6", "470.82"), ("7.5", "524.99"), ("12.0", "560.94"), ("0.0", "440.1")])
def test_a_driver_that_is_too_old_is_said(capability, driver):
    with pytest.raises(NoBuild, match=rf"driver {driver} of card is too old .* install NVIDIA driver 580 or newer"):
        choose(gpu(capability, driver))


@pytest.mark.parametrize(
    ("installed", "capability", "driver", "stays"),
    [
        ("cu126", "8.6", "590.10", True),  # a newer driver is no reason to download again
        ("cu126", "12.0", "590.10", False),  # another card is
        ("cu130", "6.1", "590.10", False),
        ("cu130", "8.6", "550.10", False),  # and so is an older driver
        ("cpu", "8.6", "590.10", False),
        ("cpu", "3.5", "470.10", True),
        ("rocm6.4", "8.6", "590.10", False),
    ],
)
def test_an_installed_build_stays_while_it_serves(installed, capability, driver, stays):
    assert keeps(installed, gpu(capability, driver)) is stays
    assert keeps(installed, None)  # a card that is switched off today may be back tomorrow


@pytest.mark.parametrize(
    ("version", "system", "name"),
    [
        ("2.13.0+cpu", "linux", "cpu"),
        ("2.14.1+cu126", "win32", "cu126"),
        ("2.13.0", "linux", "cu130"),
        ("2.13.0", "win32", "cpu"),
        ("2.13.0", "darwin", "cpu"),
    ],
)
def test_build_of_an_installed_version(version, system, name):
    assert build_name(version, system) == name


@pytest.mark.parametrize(
    ("version", "requirement"),
    [
        ("2.11.0+cu128", "triton-windows>=3.6,<3.7"),
        ("2.12.1+cu130", "triton-windows>=3.7,<3.8"),
        ("2.13.0", "triton-windows>=3.7,<3.8"),
        ("2.14.1+cu126", "triton-windows>=3.8,<3.9"),
    ],
)
def test_triton_on_windows_matches_torch(version, requirement):
    assert triton_windows(version) == requirement


@pytest.fixture
def smi(monkeypatch, tmp_path):
    """Installs an nvidia-smi that runs the given shell lines."""
    if sys.platform == "win32":
        pytest.skip("writes a shell script")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def install(script: str) -> None:
        tool = tmp_path / "nvidia-smi"
        tool.write_text("#!/bin/sh\n" + script)
        tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")

    return install


def test_reads_nvidia_smi(smi):
    smi("echo 'NVIDIA GeForce RTX 3060 Laptop GPU, 580.65.06, 8.6, 6144'")
    assert read_gpu() == (Gpu("NVIDIA GeForce RTX 3060 Laptop GPU", (580, 65, 6), (8, 6), 6144), "")


def test_of_several_cards_the_one_with_the_most_memory(smi):
    smi("echo 'GT 1030, 572.16, 6.1, 2048'\necho 'RTX 4090, 572.16, 8.9, 24564'\necho 'RTX 2060, 572.16, 7.5, 6144'")
    assert read_gpu()[0].name == "RTX 4090"


def test_an_old_driver_that_does_not_know_compute_cap(smi):
    smi("""case "$1" in *compute_cap*) echo 'Field "compute_cap" is not a valid field to query.'; exit 2;; esac
echo 'Tesla K80, 470.57.02'""")
    found, reason = read_gpu()
    assert (found, reason) == (Gpu("Tesla K80", (470, 57, 2), (0, 0)), "")
    with pytest.raises(NoBuild, match=r"470\.57\.2"):
        choose(found)


def test_a_driver_that_does_not_answer_is_no_card_with_a_reason(smi):
    smi("echo 'NVIDIA-SMI has failed because it could not communicate with the NVIDIA driver.'; exit 9")
    found, reason = read_gpu()
    assert found is None
    assert "could not communicate with the NVIDIA driver" in reason


@pytest.mark.parametrize("answer", ["", "No devices were found", "[Insufficient Permissions], [N/A], x, y"])
def test_answers_without_a_card(smi, answer):
    smi(f"echo '{answer}'")
    found, reason = read_gpu()
    assert found is None
    assert reason.startswith("nvidia-smi finds no usable card")


@pytest.mark.parametrize("value", ["", "-1", " "])
def test_a_hidden_card_is_no_card(smi, monkeypatch, value):
    smi("echo 'RTX 4090, 580.65, 8.9, 24564'")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    assert read_gpu() == (None, "CUDA_VISIBLE_DEVICES hides every card")


def test_no_nvidia_smi_is_no_card_without_words(monkeypatch, tmp_path):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(torch_build, "_WSL_SMI", tmp_path / "none")
    assert read_gpu() == (None, "")
