"""What the command line shows while it works: one line on stderr, rewritten in place on a terminal."""

from __future__ import annotations

import sys
import time
from typing import Any

from lowvram_tuner.train.events import Reporter

TERMINAL_SECONDS, FILE_SECONDS = 0.1, 5.0  # how often the line is renewed on a terminal, and how often a log gets one


class ProgressLine:
    """One line of progress. `show` renews it, `end` leaves it and goes on below."""

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self._last = 0.0
        self._width = 0

    def show(self, text: str, important: bool = False) -> None:
        """`important`: shown even right after another one."""
        now = time.monotonic()
        if not important and now - self._last < (TERMINAL_SECONDS if self._terminal else FILE_SECONDS):
            return
        self._last = now
        if self._terminal:
            sys.stderr.write("\r" + text.ljust(self._width))
            self._width = len(text)
        else:
            sys.stderr.write(text + "\n")
        sys.stderr.flush()

    def end(self) -> None:
        if self._width:
            sys.stderr.write("\n")
            self._width = 0

    def __call__(self, what: str, done: float | None = None, total: float | None = None, unit: str = "") -> None:
        """The `progress` callback of long work."""
        self.show(f"{what}{amount(done, total, unit)}")


class ConsoleReporter(Reporter):
    """A reporter that also shows on stderr what the page would show."""

    def __init__(self, run: Any, line: ProgressLine) -> None:
        self._line = line
        super().__init__(run)

    def status(self, status: str, message: str, done: int | None = None, total: int | None = None, unit: str = "") -> None:
        news = status != self.state()["status"] or done is None
        super().status(status, message, done, total, unit)
        self._line.show(f"{status}: {message}{amount(done, total, unit)}", important=news)

    def step(self, step: int, **values: Any) -> None:
        super().step(step, **values)
        self._line.show(step_words(self.state()))

    def evaluated(self, step: int, loss: float) -> None:
        super().evaluated(step, loss)
        self._line.show(f"step {step}: held-out loss {loss:.3f}", important=True)

    def note(self, text: str) -> None:
        super().note(text)
        self._line.show(text, important=True)


def step_words(state: dict[str, Any]) -> str:
    """'step 140/600 · loss 1.32 · 412 tokens/s · 51 min left', leaving out what is not known."""
    parts = [f"step {state['step']}" + (f"/{state['total_steps']}" if state["total_steps"] else "")]
    if state["loss"] is not None:
        parts.append(f"loss {state['loss']:.3f}")
    if state["tokens_per_s"]:
        parts.append(f"{state['tokens_per_s']:,.0f} tokens/s")
    if state["eta_s"] is not None:
        parts.append(f"{duration(state['eta_s'])} left")
    return " · ".join(parts)


def amount(done: float | None, total: float | None, unit: str) -> str:
    """' 3 of 30 layers', ' 40 %' of a number of bytes, or nothing when nothing is known."""
    if done is None:
        return ""
    if unit == "bytes" and total:
        return f" {100 * done / total:.0f} %"
    return f" {done:g}" + (f" of {total:g}" if total else "") + (f" {unit}" if unit else "")


def duration(seconds: float) -> str:
    """A time as a person says it: '40 s', '12 min', '2 h 5 min'."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
