"""Worker processes: started so that they find this package, the same card as the page, and survive their parent."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil

from lowvram_tuner.hardware.card import read_card

_PACKAGE_ROOT = Path(__file__).resolve().parents[2]


def environment() -> dict[str, str]:
    """The environment of a worker: this package importable, UTF-8, output unbuffered, and the card that the page reads."""
    path = os.pathsep.join(filter(None, [str(_PACKAGE_ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, "PYTHONUTF8": "1", "PYTHONUNBUFFERED": "1", **chosen_card()}


def chosen_card() -> dict[str, str]:
    """CUDA_VISIBLE_DEVICES for the card that the gauge shows; empty with one card, or under torchrun, which spreads itself."""
    card = read_card()
    if card is None or card.cards < 2 or "LOCAL_RANK" in os.environ:
        return {}
    return {"CUDA_VISIBLE_DEVICES": card.uuid}


def spawn(command: list[str], **streams: Any) -> subprocess.Popen:
    """A process in a session of its own: what ends its parent, or the parent's terminal, does not end it."""
    if sys.platform == "win32":
        detached = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP | subprocess.CREATE_NO_WINDOW}
    else:
        detached = {"start_new_session": True}
    return subprocess.Popen(command, env=environment(), **streams, **detached)


def kill_family(pid: int) -> None:
    """Ends a process and what it started, at once."""
    try:
        process = psutil.Process(pid)
        family = [*process.children(recursive=True), process]
    except psutil.NoSuchProcess:
        return
    for member in family:
        try:
            member.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(family, timeout=10)
