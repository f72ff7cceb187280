"""What a run's folder says, read once for all tabs and kept small: its curves, its answers before and after, its notes."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lowvram_tuner.train.run_dir import RunDir
from lowvram_tuner.ui.plot import Curve, Series

_NOTES = 20
_ANSWERS = 30  # checkpoints whose answers are kept
_KEPT_RUNS = 8


@dataclass
class Story:
    """One run's events so far. `read` continues where it stopped, so a tick costs only what is new."""

    run: RunDir
    loss: Curve = field(default_factory=Curve)
    held_out: Curve = field(default_factory=Curve)
    rows: list[dict[str, str]] = field(default_factory=list)  # the newest before/after answers
    rows_step: int = 0
    answers: dict[int, list[dict[str, str]]] = field(default_factory=dict)  # all of them, by the step whose adapter spoke
    verdict: dict[str, str] | None = None
    notes: list[str] = field(default_factory=list)
    saved_step: int | None = None
    _next: int = 0

    def read(self) -> Story:
        """Takes in what was appended since the last call."""
        while True:
            events, self._next = self.run.events(self._next)
            for event in events:
                self._take(event)
            if not events:
                return self

    def _take(self, event: dict[str, Any]) -> None:
        kind, step = event.get("kind"), event.get("step") or 0
        if kind == "step":
            self.loss.add(step, event.get("loss"))
        elif kind == "eval":
            self.held_out.add(step, event.get("loss"))
        elif kind == "compare":
            self.rows, self.rows_step = event.get("rows") or [], step
            self.answers = dict(sorted([*(self.answers | {step: self.rows}).items()])[-_ANSWERS:])
        elif kind == "verdict":
            self.verdict = {"verdict": event.get("verdict", ""), "text": event.get("text", "")}
        elif kind == "checkpoint":
            self.saved_step = step
        elif kind == "note":
            self.notes = [*self.notes, str(event.get("text", ""))][-_NOTES:]

    def series(self) -> list[Series]:
        """The curves as the plot draws them."""
        lines = [Series("training loss", "train", self.loss.all(), smooth=True)]
        held_out = self.held_out.all()
        return [*lines, Series("held-out loss", "held", held_out)] if held_out else lines


class Stories:
    """The stories of the runs looked at last, shared by every tab and thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._found: dict[Path, Story] = {}

    def of(self, run: RunDir) -> Story:
        """The story of a run, up to date."""
        with self._lock:
            story = self._found.pop(run.path, None) or Story(run)
            self._found[run.path] = story
            while len(self._found) > _KEPT_RUNS:
                del self._found[next(iter(self._found))]
            return story.read()

    def forget(self, run: RunDir) -> None:
        with self._lock:
            self._found.pop(run.path, None)
