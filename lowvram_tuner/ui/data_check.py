"""Keeps one `data_probe` process busy with what the page wants to know, and remembers its answers.

A question is asked once its settings have stood still for a moment; a newer one ends an older reading that still goes on.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from lowvram_tuner.config import TrainConfig
from lowvram_tuner.data.names import split

SETTLED_S = 0.8
REMEMBERED = 8
_MATTER = ("model", "dataset", "max_seq_length", "train_on", "system_prompt", "columns", "held_out", "seed")
_PROJECT = Path(__file__).resolve().parents[2]
_COMMAND = (sys.executable, "-m", "lowvram_tuner.ui.data_probe")


class DataCheck:
    """Shared by all tabs; every method returns at once."""

    def __init__(self, command: tuple[str, ...] = _COMMAND) -> None:
        self._command = command
        self._lock = threading.Lock()
        self._wanted, self._since = "", 0.0
        self._asked = ""  # what the process works on
        self._process: subprocess.Popen[bytes] | None = None
        self._answers: dict[str, dict[str, Any]] = {}

    def ask(self, config: TrainConfig, first: int, count: int, known_only: bool = False) -> dict[str, Any] | None:
        """The answer for these settings from row `first` on; None while it is not known yet. known_only: nothing is read for it."""
        values = {k: v for k, v in config.to_dict().items() if k in _MATTER}
        key = json.dumps([values, _stamp(config.dataset), first, count], sort_keys=True)
        with self._lock:
            if key in self._answers:
                return self._answers[key]
            if known_only:
                return None
            now = time.monotonic()
            if key != self._wanted:
                self._wanted, self._since = key, now
            if self._asked != key and now - self._since >= SETTLED_S:
                if self._asked:
                    self._end()
                self._asked = key
                question = json.dumps({"config": values, "first": first, "count": count}).encode() + b"\n"
                threading.Thread(target=self._exchange, args=(key, question), daemon=True).start()
        return None

    def close(self) -> None:
        """Ends the process."""
        with self._lock:
            self._end()

    def _exchange(self, key: str, question: bytes) -> None:
        """One question and its answer. A process that had ended after a pause is started once more."""
        answer: dict[str, Any] | None = None
        for _ in range(2):
            with self._lock:
                if self._asked != key:
                    return
                process = self._running()
            line = _say(process, question)
            if line:
                answer = json.loads(line)
                break
            process.wait()
        with self._lock:
            if self._asked != key:
                return  # a newer question took its place
            self._asked = ""
            answer = answer or {"error": "The data could not be read: the reader ended without a word."}
            self._answers = {**dict(list(self._answers.items())[1 - REMEMBERED :]), key: answer}

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            path = os.pathsep.join(filter(None, [str(_PROJECT), os.environ.get("PYTHONPATH")]))
            environment = {**os.environ, "PYTHONPATH": path, "PYTHONUTF8": "1", "CUDA_VISIBLE_DEVICES": ""}
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
            )
        return self._process

    def _end(self) -> None:
        self._asked = ""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


def _say(process: subprocess.Popen[bytes], question: bytes) -> bytes:
    """The answering line, b"" when the process has ended."""
    try:
        process.stdin.write(question)
        process.stdin.flush()
    except OSError:
        return b""
    return process.stdout.readline()


def _stamp(dataset: str) -> list[float]:
    """Size and time of local files, so that a changed one is read again."""
    found: list[float] = []
    for part in split(dataset):
        if part.path:
            try:
                stat = part.path.stat()
            except OSError:
                continue
            found += [stat.st_size, stat.st_mtime]
    return found
