"""The memory gauge: a plan and the card's numbers as one stacked bar to the card's true size. Pure text in, HTML out.

Left to right: other programs, the parts of the plan, what stays free. A mark shows the budget, and while a run is going a
second bar shows what it really takes inside what was planned. Parts differ by colour, by pattern and by the legend's text,
so that no information rests on colour alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from typing import Any

from lowvram_tuner.ui.words import duration, gb

# What the bar shows as one part each: the plan's components are finer, and stand in the table.
GROUPS = {
    "model": ("Model", ("weights", "embeddings", "head")),
    "adapter": ("Adapter and optimizer", ("adapter", "gradients", "optimizer")),
    "work": ("Working memory", ("activations", "layer_work", "loss", "scratch")),
    "context": ("CUDA itself", ("context",)),
}
_MIN_LABEL = 6.5  # a part narrower than this per cent of the bar carries no figure; the legend has it


@dataclass(frozen=True)
class Live:
    """What a run really takes, in bytes; None where it is not known yet."""

    now_bytes: int | None
    peak_bytes: int | None
    planned_bytes: int | None


@dataclass(frozen=True)
class Part:
    """One segment of the bar."""

    key: str
    label: str
    nbytes: int


def groups(components: Mapping[str, int], kind: str = "vram") -> list[Part]:
    """The plan's components gathered into the bar's parts; whatever is new among them counts as working memory."""
    known = {name for _, names in GROUPS.values() for name in names}
    extra = sum(n for name, n in components.items() if name not in known)
    parts = []
    for key, (label, names) in GROUPS.items():
        nbytes = sum(components.get(name, 0) for name in names) + (extra if key == "work" else 0)
        if nbytes > 0:
            parts.append(Part(key, "This program" if key == "context" and kind == "ram" else label, nbytes))
    return parts


def spare_bytes(plan: Any) -> int:
    """What stays of the budget under the plan; negative when it is too big."""
    return plan.budget.limit_bytes - plan.process_bytes


def verdict(plan: Any, run_seconds: float | None = None) -> str:
    """The plan as one sentence: whether it fits, by how much, and how long the run takes."""
    spare = spare_bytes(plan)
    if not plan.fits:
        return f"Too big by {gb(max(-spare, 0))}." if spare < -5e6 else "Does not fit."
    if plan.budget.kind == "ram":  # the predicted times are a card's
        return f"Fits: {gb(max(spare, 0))} of RAM to spare. No card: small models train on the processor."
    tail = f"About {duration(run_seconds)}." if run_seconds else f"About {_per_step(plan.step_s)} per step."
    if spare < 50e6:  # the planner turns spare memory into speed, so a large model fills its budget
        return f"Fits, using the whole budget of {gb(plan.budget.limit_bytes)}. {tail}"
    return f"Fits: {gb(spare)} to spare. {tail}"


def gauge_html(budget: Any, plan: Any = None, live: Live | None = None) -> str:
    """The bar, its legend, and while a run is going the second bar. Without a plan only what is taken and what is free."""
    parts = groups(plan.components, budget.kind) if plan is not None else []
    planned = sum(p.nbytes for p in parts)
    others = Part("others", "Other programs", max(0, budget.others_bytes))
    full = max(budget.total_bytes, others.nbytes + planned, 1)
    free = Part("free", "Free", max(0, budget.total_bytes - others.nbytes - planned))
    shown = [p for p in (others, *parts, free) if p.nbytes > 0]
    fits = plan is None or plan.fits
    bars = _bar(shown, full, _marks(budget, others.nbytes, full), "Planned")
    if live is not None:
        bars += _live_bar(others, live, budget, full)
    said = f"{_kind(budget)} {gb(budget.total_bytes)}: " + ", ".join(f"{p.label} {gb(p.nbytes)}" for p in shown)
    return (
        f'<div class="gauge{"" if fits else " over"}" data-fits="{str(fits).lower()}">'
        f'<div role="img" aria-label="{escape(said, quote=True)}">{bars}</div>'
        f'<ul class="legend">{"".join(_legend(p) for p in shown)}</ul></div>'
    )


def table_html(plan: Any, labels: Mapping[str, str]) -> str:
    """Where every byte goes: each component, its size, and the plan's words about what stays where."""
    if plan.budget.kind == "ram":
        labels = {**labels, "context": "this program"}
    rows = [(labels.get(name, name), nbytes) for name, nbytes in plan.components.items() if nbytes]
    body = "".join(f"<tr><th scope='row'>{escape(label)}</th><td>{_exact(n)}</td></tr>" for label, n in rows)
    body += f"<tr class='sum'><th scope='row'>Together</th><td>{_exact(sum(n for _, n in rows))}</td></tr>"
    if getattr(plan, "host_bytes", 0) and plan.budget.kind == "vram":
        body += f"<tr><th scope='row'>Besides, in the computer's RAM</th><td>{_exact(plan.host_bytes)}</td></tr>"
    return f'<table class="bytes"><tbody>{body}</tbody></table>'


def words_html(plan: Any) -> str:
    """What stays where, as one quiet line under the verdict."""
    return '<p class="quiet">' + escape(" · ".join(w.strip().rstrip(".") for w in plan.words)) + "</p>" if plan.words else ""


def _kind(budget: Any) -> str:
    return "VRAM" if budget.kind == "vram" else "RAM"


def _per_step(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 10 else duration(seconds)


def _exact(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 5e6 else f"{nbytes / 1e6:.1f} MB"


def _percent(nbytes: float, full: int) -> float:
    return round(100 * nbytes / full, 2)


def _bar(parts: list[Part], full: int, marks: str, name: str) -> str:
    cells = []
    for p in parts:
        width = _percent(p.nbytes, full)
        figure = f"{p.nbytes / 1e9:.1f}" if width >= _MIN_LABEL else ""
        cells.append(f'<span class="part {p.key}" style="width:{width}%" title="{escape(p.label)}: {gb(p.nbytes)}">{figure}</span>')
    return f'<div class="bar" data-bar="{name.lower()}">{"".join(cells)}{marks}</div>'


def _marks(budget: Any, others: int, full: int) -> str:
    """Where the budget ends, and where the card ends when the plan is larger than it."""
    marks = ""
    limit = others + budget.limit_bytes
    if budget.limit_bytes > 0 and limit < 0.995 * full:
        marks += f'<i class="mark" style="left:{_percent(limit, full)}%" title="Budget: {gb(budget.limit_bytes)}"></i>'
    if budget.total_bytes < 0.995 * full:
        marks += f'<i class="mark end" style="left:{_percent(budget.total_bytes, full)}%" title="The memory ends here"></i>'
    return marks


def _live_bar(others: Part, live: Live, budget: Any, full: int) -> str:
    if live.now_bytes is None:
        return '<p class="figures">Actual use: not measured yet.</p>'
    parts = [others, Part("actual", "This run now", live.now_bytes)]
    mark, figures = "", [f"now {gb(live.now_bytes)}"]
    if live.peak_bytes:
        left = _percent(others.nbytes + live.peak_bytes, full)
        mark = f'<i class="mark peak" style="left:{min(left, 100)}%" title="Highest so far: {gb(live.peak_bytes)}"></i>'
        figures.append(f"highest {gb(live.peak_bytes)}")
    if live.planned_bytes:
        figures.append(f"planned {gb(live.planned_bytes)}")
    bar = _bar([p for p in parts if p.nbytes > 0], full, mark, "Actual")
    return f'{bar}<p class="figures">This run: {" · ".join(figures)}</p>'


def _legend(part: Part) -> str:
    return f'<li><i class="swatch {part.key}"></i>{escape(part.label)} <b>{gb(part.nbytes)}</b></li>'
