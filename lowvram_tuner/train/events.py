"""What a run tells the world: the training loop speaks through a `Reporter`, everybody else reads the run's folder.

Every call appends one line to events.jsonl and renews state.json, which stays small however long the run is. Steps and
held-out checks also go to metrics.jsonl, and to the trackers of `report_to`. Needs no torch.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lowvram_tuner.config import ConfigError
from lowvram_tuner.train.files import patiently, to_json, write_text
from lowvram_tuner.train.run_dir import ACTIVE, EMPTY_STATE, FINAL, RunDir

STATE_SECONDS = 0.2  # steps may take milliseconds; state.json is renewed at most so often between changes of status
MESSAGE_LENGTH = 2000
VERDICTS = ("learned", "no_change", "memorised")
_STEP_STATE = ("step", "epoch", "loss", "learning_rate", "tokens_per_s", "eta_s", "vram_now_bytes", "vram_peak_bytes")

Tracker = Callable[[dict[str, float], int], None]  # (values, step)


class Reporter:
    """The one writer of a run's state and events. Used by one process: the worker, or the command line."""

    def __init__(self, run: RunDir | Path | str) -> None:
        self.run = run if isinstance(run, RunDir) else RunDir(run)
        self._state = {**EMPTY_STATE, **self.run.state()}
        self._state.update(pid=os.getpid(), error=None, progress=None, eta_s=None)
        self._events = _Lines(self.run.path / "events.jsonl")
        self._metrics = _Lines(self.run.path / "metrics.jsonl")
        self._trackers: dict[str, Tracker] = {}
        self._written = 0.0
        self._stepped = False

    def status(self, status: str, message: str, done: int | None = None, total: int | None = None, unit: str = "") -> None:
        """Says what happens now; with `done` and `total` how far it is (`unit`: layers, bytes, steps).

        Repeated calls that only move the progress are thinned out in events.jsonl.
        """
        if status not in ACTIVE + FINAL:
            raise ConfigError(f"status={status!r} is unknown; use one of {', '.join(ACTIVE + FINAL)}.")
        progress = None if done is None else {"done": done, "total": total, "unit": unit}
        same = status == self._state["status"] and progress is not None and self._state["progress"] is not None
        self._state.update(status=status, message=message[:MESSAGE_LENGTH], progress=progress)
        if status in FINAL:
            self._state.update(progress=None, eta_s=None, pid=None)
        if same and done != total and time.monotonic() - self._written < STATE_SECONDS:
            return
        self._event("status", status=status, message=self._state["message"], progress=progress)
        self._write()

    def planned(self, total_steps: int, planned_bytes: int) -> None:
        """Records what the run is going to be: its steps, and the memory it was planned to take."""
        self._state.update(total_steps=total_steps, planned_bytes=planned_bytes)
        self._write()

    def step(self, step: int, **values: Any) -> None:
        """One optimizer step: epoch, loss, learning_rate, grad_norm, tokens, tokens_per_s, step_s, eta_s, vram_*_bytes."""
        if not self._stepped:
            self._forget_from(step)
        self._event("step", step=step, **values)
        self._metrics.append({"t": time.time(), "kind": "step", "step": step, **values})
        self._state.update({k: v for k, v in {"step": step, **values}.items() if k in (*_STEP_STATE, "total_steps")})
        self._write(at_most_every=STATE_SECONDS)
        self._track({k: v for k, v in values.items() if isinstance(v, (int, float))}, step)

    def evaluated(self, step: int, loss: float) -> None:
        """The held-out loss after `step`."""
        self._event("eval", step=step, loss=loss)
        self._metrics.append({"t": time.time(), "kind": "eval", "step": step, "eval_loss": loss})
        self._state["eval_loss"] = loss
        self._write()
        self._track({"eval_loss": loss}, step)

    def checkpointed(self, step: int, path: Path | str) -> None:
        """A checkpoint of `step` is safe at `path`."""
        self._event("checkpoint", step=step, path=str(path))

    def compared(self, step: int, rows: list[dict[str, str]]) -> None:
        """The same prompts answered by the base and by the adapter: rows of prompt, base, adapter."""
        self._event("compare", step=step, rows=rows)

    def verdict(self, kind: str, text: str) -> None:
        """Whether it learned ('learned', 'no_change', 'memorised'), with the sentence that says so."""
        if kind not in VERDICTS:
            raise ConfigError(f"verdict={kind!r} is unknown; use one of {', '.join(VERDICTS)}.")
        self._event("verdict", verdict=kind, text=text)
        self._state["verdict"] = kind
        self._write()

    def note(self, text: str) -> None:
        """Something a person should read, that changes no status."""
        self._event("note", text=text[:MESSAGE_LENGTH])

    def failed(self, what: str, fix: str) -> None:
        """Ends the run as failed: what happened, and what to do, in plain words."""
        self._state["error"] = {"what": what[:MESSAGE_LENGTH], "fix": fix[:MESSAGE_LENGTH]}
        self.status("failed", what)

    def stop_requested(self) -> bool:
        """True once somebody asked the run to save and end. Cheap enough for every micro-batch."""
        return self.run.requested() == "stop"

    def attach(self, name: str, tracker: Tracker) -> None:
        """Sends every step and check to `tracker(values, step)` too."""
        self._trackers[name] = tracker

    def state(self) -> dict[str, Any]:
        """The state as the reporter knows it, newer than state.json by up to STATE_SECONDS."""
        return dict(self._state)

    def _event(self, kind: str, **values: Any) -> None:
        self._events.append({"t": time.time(), "kind": kind, **values})

    def _write(self, at_most_every: float = 0.0) -> None:
        now = time.monotonic()
        if now - self._written < at_most_every:
            return
        self._written = now
        self._state["updated"] = time.time()
        self.run.write_state(self._state)

    def _track(self, values: dict[str, float], step: int) -> None:
        """A tracker that fails (no network, no login) is dropped with a note; the run goes on."""
        for name, tracker in list(self._trackers.items()):
            try:
                tracker(values, step)
            except Exception as error:
                del self._trackers[name]
                self.note(f"Logging to {name} stopped: {error}")

    def _forget_from(self, step: int) -> None:
        """A resume repeats steps that a crash cut off: metrics.jsonl keeps each once, the events say 'resumed'."""
        self._stepped = True
        kept = self.run.metrics()
        fresh = [m for m in kept if m.get("step", 0) < step]
        if len(fresh) < len(kept):
            self._metrics.replace(fresh)
        if step > 1:
            self._event("resumed", step=step - 1)


class _Lines:
    """An append-only file of JSON lines. Each line is one write, so that a reader sees whole lines."""

    def __init__(self, path: Path) -> None:
        self._path = path
        if not _ends_whole(path):
            self._write(b"\n")  # a power cut left half a line: keep it from swallowing the next one

    def append(self, value: dict[str, Any]) -> None:
        self._write((to_json(value) + "\n").encode("utf-8"))

    def replace(self, values: list[dict[str, Any]]) -> None:
        write_text(self._path, "".join(to_json(v) + "\n" for v in values))

    def _write(self, data: bytes) -> None:
        def append() -> None:
            with self._path.open("ab", buffering=0) as out:
                out.write(data)

        patiently(append)


def _ends_whole(path: Path) -> bool:
    """True when `path` is absent, empty, or ends with a line break."""
    try:
        with path.open("rb") as source:
            if not source.seek(0, os.SEEK_END):
                return True
            source.seek(-1, os.SEEK_END)
            return source.read(1) == b"\n"
    except FileNotFoundError:
        return True
