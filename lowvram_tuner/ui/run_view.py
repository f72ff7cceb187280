"""A run as HTML: where it stands, how far it is, whether it learned. Pure functions; every text of a user is escaped."""

from __future__ import annotations

from html import escape
from typing import Any

from lowvram_tuner.ui.words import BUSY, duration, gb, number, rate, situation, steps

_VERDICTS = {"learned": "It learned", "no_change": "No measurable change", "memorised": "It memorised"}


def progress_html(state: dict[str, Any] | None) -> str:
    """The sentence, the bar and the figures of a run; the sentence alone when there is none."""
    status = (state or {}).get("status") or "idle"
    spoken = f'<span class="spoken" role="status">{escape(status)}</span>'  # only a change of status is read out
    sentence = f'<p class="situation {escape(status)}">{_dot(status)}{escape(situation(state))}</p>{spoken}'
    if state is None:
        return sentence
    return f'{sentence}{_bar(state)}<dl class="figures-row">{_figures(state)}</dl>'


Rows = list[dict[str, str]]


def answers_html(rows: Rows, verdict: dict[str, str] | None, step: int, by_step: dict[int, Rows] | None = None) -> str:
    """The same questions answered by the base and by the adapter, with the verdict on learning above them.

    by_step: the answers at other checkpoints too, folded away below.
    """
    if not rows and not verdict:
        return ""
    head = ""
    if verdict:
        kind, text = verdict.get("verdict", ""), verdict.get("text", "")
        title = _VERDICTS.get(kind, "Result")
        told = text[len(title) + 1 :] if text.startswith(f"{title}:") else f" {text}"
        head = f'<p class="verdict {escape(kind)}"><b>{escape(title)}:</b>{escape(told)}</p>'
    if not rows:
        return f'<section class="answers">{head}</section>'
    body = "".join(
        f'<tr><th scope="row" dir="auto">{_text(r.get("prompt"))}</th><td dir="auto">{_text(r.get("base"))}</td>'
        f'<td dir="auto">{_text(r.get("adapter"))}</td></tr>'
        for r in rows
    )
    return (
        f'<section class="answers">{head}<table><thead><tr><th scope="col">Question</th><th scope="col">Before</th>'
        f'<th scope="col">After step {step:,}</th></tr></thead><tbody>{body}</tbody></table>{_history(rows, by_step or {})}</section>'
    )


def _history(rows: Rows, by_step: dict[int, Rows]) -> str:
    """How the answer to each question changed from checkpoint to checkpoint."""
    if len(by_step) < 2:
        return ""
    body = ""
    for question in [r.get("prompt") for r in rows]:
        said = [(step, r.get("adapter")) for step, found in by_step.items() for r in found if r.get("prompt") == question]
        lines = "".join(f'<tr><th scope="row">step {step:,}</th><td dir="auto">{_text(answer)}</td></tr>' for step, answer in said)
        body += f'<tbody><tr><th colspan="2" scope="rowgroup" dir="auto"><b>{_text(question)}</b></th></tr>{lines}</tbody>'
    return f'<details><summary>The answers at every checkpoint</summary><table class="history">{body}</table></details>'


def notes_html(notes: list[str]) -> str:
    """What the run wants a person to read, newest first."""
    if not notes:
        return ""
    return '<ul class="notes">' + "".join(f"<li>{escape(n)}</li>" for n in reversed(notes)) + "</ul>"


def done_share(state: dict[str, Any]) -> float | None:
    """How far the present work is, 0 to 1; None when nobody knows."""
    progress = state.get("progress") or {}
    if state.get("status") != "training" and progress.get("total"):
        return min(1.0, (progress.get("done") or 0) / progress["total"])
    if state.get("total_steps"):
        return min(1.0, (state.get("step") or 0) / state["total_steps"])
    return None


def _bar(state: dict[str, Any]) -> str:
    share = done_share(state)
    if share is None:
        return '<div class="bar-done unknown"><i></i></div>' if state.get("status") in BUSY else ""
    percent = round(100 * share, 1)
    label = _progress_label(state)
    return (
        f'<div class="bar-done" role="progressbar" aria-label="{escape(label, quote=True)}" aria-valuemin="0" aria-valuemax="100" '
        f'aria-valuenow="{percent:.0f}"><i style="width:{percent}%"></i></div>'
    )


def _progress_label(state: dict[str, Any]) -> str:
    progress = state.get("progress") or {}
    if state.get("status") != "training" and progress.get("total"):
        unit = progress.get("unit") or ""
        if unit == "bytes":
            return f"{gb(progress.get('done') or 0)} of {gb(progress['total'])}"
        return f"{progress.get('done')} of {progress['total']} {unit}".strip()
    return f"step {steps(state)}"


def _figures(state: dict[str, Any]) -> str:
    items = [("step", steps(state))] if state.get("step") or state.get("status") == "training" else []
    progress = state.get("progress") or {}
    if state.get("status") in ("preparing", "checking", "saving") and progress.get("total"):
        items = [("done", _progress_label(state))]
    if state.get("epoch"):
        items.append(("epoch", f"{state['epoch']:.2f}"))
    if state.get("loss") is not None:
        items.append(("loss", number(state["loss"])))
    if state.get("eval_loss") is not None:
        items.append(("held-out loss", number(state["eval_loss"])))
    if state.get("tokens_per_s"):
        items.append(("speed", rate(state["tokens_per_s"])))
    if state.get("learning_rate") and state.get("status") == "training":
        items.append(("learning rate", f"{state['learning_rate']:.1e}"))
    if state.get("eta_s") and state.get("status") in BUSY:
        items.append(("left", duration(state["eta_s"])))
    if state.get("vram_peak_bytes"):
        now = f"{gb(state['vram_now_bytes'])}, " if state.get("vram_now_bytes") and state.get("status") in BUSY else ""
        items.append(("memory", f"{now}highest {gb(state['vram_peak_bytes'])}"))
    return "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in items)


def _dot(status: str) -> str:
    return f'<i class="dot {escape(status)}" aria-hidden="true"></i>'


def _text(value: object) -> str:
    return escape(str(value if value is not None else "")).replace("\n", "<br>")
