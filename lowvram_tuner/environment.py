"""The private environment of a project folder: where it is, what runs in it, what it holds. Stdlib only.

Everything goes through the environment's own python (`-m pip`, `-m pytest`), never through installed scripts: those carry the
folder's path inside and break where it has spaces or is moved.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


def say(sentence: str) -> None:
    """One line of progress on the terminal."""
    print(f"[LowVRAM Tuner] {sentence}", flush=True)


class LaunchError(Exception):
    """The program cannot start: one sentence that says why and what to do."""


@dataclass(frozen=True)
class Environment:
    """The private environment of a project folder. It is always used through its own python, never through scripts."""

    root: Path

    @property
    def path(self) -> Path:
        return self.root / ".venv"

    @property
    def scripts(self) -> Path:
        return self.path / ("Scripts" if sys.platform == "win32" else "bin")

    @property
    def python(self) -> Path:
        return self.scripts / ("python.exe" if sys.platform == "win32" else "python")

    @property
    def stamp_file(self) -> Path:
        return self.path / "lowvram-tuner.json"

    def packages(self) -> list[str]:
        """The folders that packages are installed in."""
        folders = [*self.path.glob("lib/python*/site-packages"), self.path / "Lib" / "site-packages"]
        return [str(folder) for folder in folders if folder.is_dir()]

    def variables(self, base: dict[str, str] | None = None) -> dict[str, str]:
        """The environment variables everything runs under: nothing of the user's other Pythons reaches in."""
        outer = dict(os.environ if base is None else base)
        for name in ("PYTHONHOME", "PYTHONPATH", "PYTHONSTARTUP", "PIP_TARGET", "PIP_PREFIX", "__PYVENV_LAUNCHER__"):
            outer.pop(name, None)
        local = "localhost,127.0.0.1,::1"
        no_proxy = ",".join(filter(None, [outer.get("NO_PROXY") or outer.get("no_proxy"), local]))
        return {
            "CUDA_DEVICE_ORDER": "PCI_BUS_ID",  # so that card numbers mean the same to CUDA and to the driver
            **outer,
            "PYTHONNOUSERSITE": "1",
            "PYTHONUTF8": "1",
            "NO_PROXY": no_proxy,
            "no_proxy": no_proxy,
            "PIP_USER": "0",
            "PIP_NO_INPUT": "1",
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "GRADIO_ANALYTICS_ENABLED": "False",
            "VIRTUAL_ENV": str(self.path),
            "PATH": os.pathsep.join([str(self.scripts), outer.get("PATH", os.defpath)]),
        }

    def run(self, *command: str, quiet: bool = False, timeout: float | None = None) -> tuple[int, str]:
        """Runs a command in the project's folder: (exit code, output). The output is shown and not kept unless `quiet`."""
        pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT} if quiet else {}
        try:
            done = subprocess.run(
                command, cwd=self.root, env=self.variables(), stdin=subprocess.DEVNULL, timeout=timeout,
                encoding="utf-8", errors="replace", **pipe,
            )  # fmt: skip
        except (OSError, subprocess.TimeoutExpired) as error:
            return -1, str(error)
        return done.returncode, done.stdout or ""

    def pip(self, *arguments: str) -> bool:
        """Runs pip; whether it succeeded."""
        return self.run(str(self.python), "-m", "pip", *arguments)[0] == 0

    def works(self) -> bool:
        """Whether its python starts and has pip."""
        return self.python.exists() and self.run(str(self.python), "-c", "import pip", quiet=True, timeout=120)[0] == 0

    def version(self, package: str) -> str:
        """The installed version of a package, "" when it is absent."""
        found = importlib.metadata.distributions(name=package, path=self.packages())
        return next((d.version for d in found if d.version), "")

    def stamp(self) -> dict[str, str]:
        """What the last complete installation wrote; {} when there was none."""
        try:
            stamp = json.loads(self.stamp_file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return stamp if isinstance(stamp, dict) else {}

    def remove(self) -> None:
        """Deletes it; the stamp goes first, so that a half-deleted one is not taken for complete."""
        try:
            self.stamp_file.unlink(missing_ok=True)
            if self.path.is_symlink():
                self.path.unlink()
            elif self.path.exists():
                shutil.rmtree(self.path)
        except OSError as error:
            raise LaunchError(f"{self.path} cannot be removed ({error}); close the program and start again.") from None

    def write_stamp(self, stamp: dict[str, str]) -> None:
        """Marks it complete."""
        new = self.stamp_file.with_suffix(".new")
        new.write_text(json.dumps(stamp), encoding="utf-8")
        new.replace(self.stamp_file)


def kernels_clash(path: list[str] | None = None, python: str = sys.executable) -> str:
    """A sentence when the distribution named `kernels` is installed beside this project, else "".

    transformers then takes the project's folder of that name for it and fails with an ImportError nobody understands.
    path: folders to look in, by default those of the running Python; python: whose packages these are.
    """
    where = {} if path is None else {"path": path}
    if not any(d.version for d in importlib.metadata.distributions(name="kernels", **where)):
        return ""
    return (
        "the package 'kernels' is installed and clashes with the program's own folder of that name; "
        f'remove it with: "{python}" -m pip uninstall -y kernels'
    )


@contextlib.contextmanager
def one_at_a_time(root: Path) -> Iterator[None]:
    """Holds an OS-level lock, so that two launchers never install into one folder; it dies with the process."""
    try:
        (root / ".cache").mkdir(exist_ok=True)
        file = (root / ".cache" / "launch.lock").open("a+")
    except OSError as error:
        raise LaunchError(f"{root} cannot be written to ({error}); move the program's folder to your own files.") from None
    with file:
        if not _lock(file.fileno(), wait=False):
            say("Another launcher is installing; waiting for it.")
            _lock(file.fileno(), wait=True)
        yield


def _lock(descriptor: int, wait: bool) -> bool:
    try:
        if sys.platform == "win32":
            import msvcrt

            while True:  # LK_LOCK gives up after ten seconds
                with contextlib.suppress(OSError):
                    msvcrt.locking(descriptor, msvcrt.LK_LOCK if wait else msvcrt.LK_NBLCK, 1)
                    return True
                if not wait:
                    return False
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
