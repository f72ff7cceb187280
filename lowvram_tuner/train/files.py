"""Files that other processes read while they are written: whole or absent, never half.

A file is written to a temporary sibling and put in place by one rename. On Windows a rename fails for a moment while
somebody else has the file open, so it is tried again for a short while.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

RETRY_SECONDS = 2.0
_T = TypeVar("_T")


def patiently(action: Callable[[], _T], seconds: float = RETRY_SECONDS) -> _T:
    """`action()`, tried again for up to `seconds` while Windows says that somebody else has the file open."""
    give_up = time.monotonic() + seconds
    while True:
        try:
            return action()
        except PermissionError:
            if sys.platform != "win32" or time.monotonic() > give_up:
                raise
            time.sleep(0.01)


def write_text(path: Path, text: str, durable: bool = False) -> None:
    """Puts `text` (UTF-8) at `path` in one step; `durable` also survives a power cut right after."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8", newline="\n") as out:
            out.write(text)
            if durable:
                out.flush()
                os.fsync(out.fileno())
        patiently(lambda: temporary.replace(path))
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    if durable:
        sync_folder(path.parent)


def write_json(path: Path, value: Any, durable: bool = False) -> None:
    """Puts `value` as JSON at `path` in one step."""
    write_text(path, to_json(value, indent=1) + "\n", durable)


def read_json(path: Path) -> Any:
    """The JSON at `path`, or None when there is no such file or it is not JSON."""
    try:
        return json.loads(patiently(lambda: path.read_text(encoding="utf-8")))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None


def to_json(value: Any, indent: int | None = None) -> str:
    """Strict JSON: NaN and infinities become null, tensors' and numpy's scalars plain numbers, paths text."""
    return json.dumps(_plain(value), ensure_ascii=False, allow_nan=False, indent=indent)


def sync_folder(folder: Path) -> None:
    """Makes renames inside `folder` durable. Windows has no such call and needs none."""
    if sys.platform == "win32":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, str):  # a lone surrogate from a broken file cannot be written as UTF-8
        return value.encode("utf-8", "replace").decode("utf-8")
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if hasattr(value, "item"):
        return _plain(value.item())
    return str(value)
