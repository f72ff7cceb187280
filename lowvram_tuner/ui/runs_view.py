"""The table of runs and what stands below it, as HTML. Pure functions; names, models and paths are escaped."""

from __future__ import annotations

from html import escape
from typing import Any

from lowvram_tuner.config import TrainConfig
from lowvram_tuner.ui.plot import Series, plot_html
from lowvram_tuner.ui.watch import Story
from lowvram_tuner.ui.words import ago, number, short_data, short_model, short_status

SHOWN = 200
_COLUMNS = ("Name", "Model", "Bits", "Data", "Steps", "Loss", "Held-out", "When", "Status")


def table_html(rows: list[dict[str, Any]]) -> str:
    """The runs, newest first; `rows` hold id, state and config (None when damaged)."""
    if not rows:
        return '<div class="plot empty"><p>No runs yet. Start one in the Train tab; it appears here.</p></div>'
    head = "".join(f'<th scope="col" class="{_column(c)}">{escape(c)}</th>' for c in _COLUMNS)
    body = "".join(_row(r["id"], r["state"], r["config"]) for r in rows[:SHOWN])
    more = f'<p class="quiet">and {len(rows) - SHOWN:,} older runs in the runs folder</p>' if len(rows) > SHOWN else ""
    return f'<table class="runs"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{more}'


def compare_html(stories: list[tuple[str, Story]]) -> str:
    """The curves of one run, or of two on the same axes."""
    if len(stories) == 1:
        return plot_html(stories[0][1].series(), empty="This run has no steps yet.")
    lines: list[Series] = []
    for (name, story), style in zip(stories, ("", "second ")):
        for s in story.series():
            lines.append(Series(f"{name}: {s.label}", f"{style}{s.style}", s.points, s.smooth))
    return plot_html(lines, empty="These runs have no steps yet.")


def _row(run_id: str, state: dict[str, Any], config: TrainConfig | None) -> str:
    name, box = escape(state["name"]), f"pick-{escape(run_id, quote=True)}"
    status = state.get("status") or "idle"
    total = state.get("total_steps") or 0
    steps = f"{state.get('step') or 0:,}" + (f" / {total:,}" if total else "")
    cells = [
        short_model(config.model) if config else "–",
        str(config.bits) if config else "–",
        short_data(config.dataset) if config else "–",
        steps,
        number(state.get("loss")),
        number(state.get("eval_loss")),
        ago(state.get("started")),
    ]
    pick = (
        f'<th scope="row" class="name"><label for="{box}" title="{name}"><input type="checkbox" id="{box}" data-run="{escape(run_id, quote=True)}"> '
        f"{name}</label></th>"
    )
    tds = "".join(f'<td class="{_column(c)}" title="{escape(text, quote=True)}">{escape(text)}</td>' for c, text in zip(_COLUMNS[1:], cells))
    done = f'<td class="status"><i class="dot {escape(status)}" aria-hidden="true"></i>{escape(short_status(state))}</td>'
    return f"<tr>{pick}{tds}{done}</tr>"


def _column(title: str) -> str:
    return title.lower().replace("-", "")
