"""One worker at a time: an OS-level lock on the runs folder, held by the worker process itself for its whole life.

The operating system frees the lock however the process ends, so a killed worker never blocks the next one, and a
restarted page finds a living one. Training and chat share it, because they share the card. Whoever holds it writes who
it is beside it; a chat that holds it can be asked to leave.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from lowvram_tuner.config import ConfigError
from lowvram_tuner.train.files import patiently, read_json, write_json

PATIENCE_SECONDS = 0.5  # others hold the lock for microseconds when they look whether it is free
NOTE_TRIES = 20
_LOCKED_BYTE = 1 << 30  # Windows locks are mandatory: far from anything a reader might touch


class Busy(RuntimeError):
    """Another worker holds the card: `holder` says which."""

    def __init__(self, holder: Holder) -> None:
        self.holder = holder
        if holder.kind == "chat":
            words = "a chat is using the card; close it first."
        else:
            words = f"run {holder.run or '(unknown)'} is in progress; stop it or wait until it ends."
        super().__init__(words[0].upper() + words[1:])


@dataclass(frozen=True)
class Holder:
    """Who holds the lock: `kind` is 'train' or 'chat', `run` the run's id or None."""

    kind: str
    run: str | None
    pid: int


UNKNOWN = Holder("train", None, 0)


class WorkerLock:
    """The lock while held; `release` (or the process's end) frees it."""

    def __init__(self, root: Path, handle: int, holder: Holder) -> None:
        self.root = root
        self.holder = holder
        self._handle = handle

    def asked_to_leave(self) -> bool:
        """True once somebody asked this very holder to leave."""
        found = read_json(self.root / ".leave.json")
        return isinstance(found, dict) and found.get("pid") == self.holder.pid

    def release(self) -> None:
        if self._handle >= 0:
            _forget(self.root / ".active.json")
            _unlock(self._handle)
            os.close(self._handle)
            self._handle = -1

    def __enter__(self) -> WorkerLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def take(root: Path | str, kind: str, run: str | None = None) -> WorkerLock:
    """Takes the lock for this process, or raises Busy naming who has it."""
    root = Path(root)
    give_up = time.monotonic() + PATIENCE_SECONDS
    handle = _open(root)
    while not _try_lock(handle):
        if time.monotonic() > give_up:
            os.close(handle)
            raise Busy(holder(root) or UNKNOWN)
        time.sleep(0.01)
    me = Holder(kind, run, os.getpid())
    _forget(root / ".leave.json")
    write_json(root / ".active.json", asdict(me))
    return WorkerLock(root, handle, me)


def holder(root: Path | str) -> Holder | None:
    """Who holds the lock now; None when nobody does."""
    root = Path(root)
    if not (root / ".lock").exists():
        return None
    for _ in range(NOTE_TRIES):
        with if_free(root) as free:
            if free:
                return None
        if found := _read_holder(root):
            return found
        time.sleep(0.01)
    return UNKNOWN


def ask_to_leave(root: Path | str, holder: Holder) -> None:
    """Asks a holder to end; a chat does so at once, a training run does not listen to this."""
    write_json(Path(root) / ".leave.json", {"pid": holder.pid})


@contextmanager
def if_free(root: Path | str) -> Iterator[bool]:
    """Keeps every worker from starting inside the block when it yields True; False when a worker has the lock."""
    handle = _open(Path(root))
    try:
        free = _try_lock(handle)
        yield free
        if free:
            _unlock(handle)
    finally:
        os.close(handle)


def _forget(note: Path) -> None:
    patiently(lambda: note.unlink(missing_ok=True))


def _read_holder(root: Path) -> Holder | None:
    """The note beside the lock. It is written just after locking: for a moment it is missing, or a dead holder's."""
    found = read_json(root / ".active.json")
    if isinstance(found, dict) and {"kind", "run", "pid"} <= found.keys() and psutil.pid_exists(found["pid"]):
        return Holder(found["kind"], found["run"], found["pid"])
    return None


def _open(root: Path) -> int:
    try:
        root.mkdir(parents=True, exist_ok=True)
        return os.open(root / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise ConfigError(f"output_dir={str(root)!r} cannot be written ({error.strerror}); choose another folder.") from None


if sys.platform == "win32":
    import msvcrt

    def _try_lock(handle: int) -> bool:
        os.lseek(handle, _LOCKED_BYTE, os.SEEK_SET)
        try:
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True

    def _unlock(handle: int) -> None:
        os.lseek(handle, _LOCKED_BYTE, os.SEEK_SET)
        msvcrt.locking(handle, msvcrt.LK_UNLCK, 1)
else:
    import fcntl

    def _try_lock(handle: int) -> bool:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def _unlock(handle: int) -> None:
        fcntl.flock(handle, fcntl.LOCK_UN)
