"""What the launcher is started with and from: flags, Pythons, folders, the scripts themselves, and errors in one line."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lowvram_tuner import bootstrap
from lowvram_tuner.bootstrap import check_python, command, parse
from lowvram_tuner.environment import Environment, LaunchError, kernels_clash, one_at_a_time


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
