"""The data as the page shows it: one line under the control, and a preview with every token as it is trained on.

Reading happens in a process of its own (`data_probe`), started when the settings have stood still for a moment, and ended
when they change again. All text of the data is escaped: it is looked at, never run.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from lowvram_tuner.config import DEMO_DATASET, ConfigError, TrainConfig
from lowvram_tuner.ui.controls import to_config
from lowvram_tuner.ui.desk import Desk
from lowvram_tuner.ui.train_view import missing_data

SETTLED_S = 0.8
ROWS = 8
_MATTER = ("model", "dataset", "max_seq_length", "train_on", "system_prompt", "columns", "held_out", "seed")
_PROJECT = Path(__file__).resolve().parents[2]


class Probe:
    """One background reading at a time, the newest wanted one; its answer is remembered until something else is wanted."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._wanted: str = ""
        self._since = 0.0
        self._running: tuple[str, subprocess.Popen[bytes]] | None = None
        self._answers: dict[str, dict[str, Any]] = {}

    def ask(self, config: TrainConfig, first: int) -> dict[str, Any] | None:
        """The answer for these settings, or None while it is being found. Starts the reading when they have settled."""
        values = {k: v for k, v in config.to_dict().items() if k in _MATTER}
        key = json.dumps([values, _stamp(config.dataset), first], sort_keys=True)
        with self._lock:
            if key in self._answers:
                return self._answers[key]
            now = time.monotonic()
            if key != self._wanted:
                self._wanted, self._since = key, now
            running = self._running
            if running and running[0] == key:
                return None
            if now - self._since >= SETTLED_S:
                if running:
                    running[1].kill()
                self._start(key, {"config": values, "first": first, "count": ROWS})
        return None

    def _start(self, key: str, asked: dict[str, Any]) -> None:
        path = os.pathsep.join(filter(None, [str(_PROJECT), os.environ.get("PYTHONPATH")]))
        environment = {**os.environ, "PYTHONPATH": path, "PYTHONUTF8": "1", "CUDA_VISIBLE_DEVICES": ""}
        process = subprocess.Popen(
            [sys.executable, "-m", "lowvram_tuner.ui.data_probe"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment,
        )  # fmt: skip
        self._running = (key, process)
        threading.Thread(target=self._collect, args=(key, process, asked), daemon=True).start()

    def _collect(self, key: str, process: subprocess.Popen[bytes], asked: dict[str, Any]) -> None:
        out, problems = process.communicate(json.dumps(asked).encode() + b"\n")
        with self._lock:
            if self._running and self._running[1] is process:
                self._running = None
            if process.returncode and process.returncode < 0:
                return  # replaced by a newer question
            self._answers = {**dict(list(self._answers.items())[-7:]), key: _answer(out, problems)}


class DataPanel:
    """The data's line and preview for one page."""

    ENDINGS = (".json", ".jsonl", ".csv", ".tsv", ".parquet", ".txt", ".md")

    def __init__(self, desk: Desk) -> None:
        self.desk = desk
        self.probe = Probe()
        self.first = 0

    def build(self) -> None:
        """The preview's place, inside the caller's accordion."""
        with gr.Row(elem_id="data-steps"):
            self.row = gr.Number(1, label="From example", minimum=1, step=ROWS, precision=0, elem_id="data-row-number", scale=0, min_width=140, interactive=True)
        self.panel = gr.HTML("", elem_id="data-preview")

    def wire(self, fields: list[Any], names: list[str]) -> None:
        self.row.change(self._go, self.row, None, queue=False, show_progress="hidden", api_visibility="private", preprocess=False)

    def _go(self, number: Any) -> None:
        self.first = max(0, int(number or 1) - 1)

    def answer(self, values: dict[str, Any], wait: bool = False) -> dict[str, Any] | None:
        """What the reading says: {"report", "rows", ...} or {"error"}; None while nothing is known. `wait`: start none now."""
        try:
            config = to_config(values)
        except ConfigError:
            return None
        if wait or missing_data(config.dataset):
            return None
        return self.probe.ask(config, self.first)

    def report(self, values: dict[str, Any], wait: bool = False) -> dict[str, Any] | None:
        """The counts alone, with the error where there is one."""
        answer = self.answer(values, wait)
        if answer is None:
            return None
        return {"error": answer["error"]} if "error" in answer else answer["report"]

    def words(self, values: dict[str, Any], report: dict[str, Any] | None) -> str:
        """The line under the control: "312 rows · chat · 41,200 tokens"."""
        dataset = str(values.get("dataset") or "").strip()
        if dataset and missing_data(dataset):
            return f'<p class="quiet warn">{escape(missing_data(dataset))}</p>'
        if report is None:
            return '<p class="quiet">' + ("The demo's own data: a keeper with a story." if dataset == DEMO_DATASET else "Reading the data …") + "</p>"
        if report.get("error"):
            return f'<p class="quiet warn">{escape(report["error"])}</p>'
        parts = [f"{report['kept']:,} examples", str(report["format"]), f"{report['tokens']:,} tokens"]
        parts += [f"{report[k]:,} {k}" for k in ("dropped", "truncated") if report.get(k)]
        return f'<p class="quiet{" warn" if report.get("dropped") else ""}">{escape(" · ".join(parts))}</p>'

    def html(self, values: dict[str, Any]) -> str:
        """The preview: counts, lengths, problems by line, and examples with trained tokens marked."""
        return preview_html(self.answer(values, wait=self.desk.active() is not None))


def preview_html(answer: dict[str, Any] | None) -> str:
    """An answer of the probe as HTML. Pure."""
    if answer is None:
        return '<p class="quiet">The examples appear here once the data has been read.</p>'
    if "error" in answer:
        return f'<p class="quiet warn">{escape(answer["error"])}</p>'
    report = answer["report"]
    facts = (
        f"{report['rows']:,} rows read as {report['format']}: {report['kept']:,} kept, {report['dropped']:,} dropped, "
        f"{report['truncated']:,} cut. {report['trained_tokens']:,} of {report['tokens']:,} tokens are learned; "
        f"{answer['held_out']:,} examples are held out to measure with."
    )
    rows = "".join(_example(r) for r in answer["rows"])
    key = '<p class="quiet token-key"><span class="t on">learned</span> <span class="t">read only</span> <span class="t sp">special token</span></p>'
    return f'<p>{escape(facts)}</p>{_problems(report.get("problems") or [])}{_lengths(answer["lengths"])}{key}<ol class="examples">{rows}</ol>'


def _example(row: dict[str, Any]) -> str:
    tokens = "".join(
        f'<span class="t{" on" if trained else ""}{" sp" if special else ""}">{_visible(text)}</span>' for text, trained, special in row["pieces"]
    )
    where = " · held out" if row["held_out"] else ""
    return f'<li><h4>Example {row["number"]:,} · {row["length"]:,} tokens{where}</h4><p class="tokens" dir="auto">{tokens}</p></li>'


def _visible(text: str) -> str:
    return escape(text).replace("\n", "⏎<br>")


def _problems(problems: list[Any]) -> str:
    if not problems:
        return ""
    items = "".join(f"<li>{escape(_problem(p))}</li>" for p in problems[:50])
    more = f"<li>and {len(problems) - 50:,} more kinds</li>" if len(problems) > 50 else ""
    return f'<h4>Problems</h4><ul class="notes">{items}{more}</ul>'


def _problem(problem: Any) -> str:
    """One problem: line, reason, and how often."""
    if not isinstance(problem, dict):
        return str(problem)
    count = problem.get("count") or 1
    line = f"line {problem['line']}: " if problem.get("line") else ""
    return f"{line}{problem.get('reason', '')}" + (f" ({count:,} times)" if count > 1 else "")


def _lengths(bins: list[Any]) -> str:
    if not bins:
        return ""
    most = max(count for _, count in bins) or 1
    bars = "".join(f'<i style="height:{100 * count / most:.0f}%" title="up to {end:,} tokens: {count:,} examples"></i>' for end, count in bins)
    return f'<h4>Lengths</h4><div class="lengths" role="img" aria-label="Lengths of the examples in tokens, up to {bins[-1][0]:,}">{bars}</div>'


def _answer(out: bytes, problems: bytes) -> dict[str, Any]:
    try:
        return json.loads(out)
    except ValueError:
        last = [line for line in problems.decode("utf-8", "replace").splitlines() if line.strip()][-1:]
        return {"error": f"The data could not be read: {last[0] if last else 'the reader ended without a word'}."[:500]}


def _stamp(dataset: str) -> list[float]:
    """Size and time of a local file, so that a changed one is read again."""
    try:
        stat = Path(dataset).expanduser().stat()
    except (OSError, ValueError, RuntimeError):
        return []
    return [stat.st_size, stat.st_mtime]
