"""What the Train tab says for given control values: pure decisions, no Gradio. `train_tab` puts them on the page."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from html import escape
from typing import Any

from lowvram_tuner.config import DEMO_DATASET, ConfigError, TrainConfig
from lowvram_tuner.data.names import split
from lowvram_tuner.memory.plan import COMPONENT_LABELS, Remedy
from lowvram_tuner.ui.controls import to_config
from lowvram_tuner.ui.desk import Answer, Desk
from lowvram_tuner.ui.gauge import Live, gauge_html, table_html, verdict, words_html
from lowvram_tuner.ui.words import BUSY, gb, short_data, short_model, short_status


@dataclass(frozen=True)
class Gauge:
    """The memory part of the tab."""

    bar: str
    verdict: str
    table: str
    remedies: tuple[Remedy, ...] = ()


@dataclass(frozen=True)
class Starting:
    """The Start button: whether it can be pressed, and the reason when not."""

    enabled: bool
    reason: str = ""


def gauge_for(desk: Desk, values: dict[str, Any], data: dict[str, Any] | None) -> tuple[Gauge, Starting]:
    """The gauge and the Start button for the controls' values. `data`: the report of the data check, where there is one."""
    try:
        config = to_config(values, output_dir=str(desk.root))
    except ConfigError as error:
        budget = desk.answer(TrainConfig()).budget
        return Gauge(gauge_html(budget), _said("bad", str(error)), ""), Starting(False, str(error))
    answer = desk.answer(config)
    return _gauge(config, answer, data), _starting(desk, config, answer, data)


def gauge_while_running(desk: Desk, state: dict[str, Any], config: TrainConfig) -> Gauge:
    """During a run: what was planned for it, with what it really takes inside."""
    answer = desk.answer(config)
    now = state.get("vram_now_bytes")
    live = Live(now, state.get("vram_peak_bytes"), state.get("planned_bytes"))
    others = max(0, answer.budget.others_bytes - (now or 0))
    budget = type(answer.budget)(answer.budget.total_bytes, others, answer.budget.limit_bytes, answer.budget.kind)
    plan = answer.plan
    words = words_html(plan) if plan else ""
    table = table_html(plan, COMPONENT_LABELS) if plan else ""
    sentence = f"Running as planned: {gb(live.planned_bytes)}." if live.planned_bytes else "A run is in progress."
    if live.planned_bytes and live.peak_bytes and live.peak_bytes > 1.02 * live.planned_bytes:
        sentence = f"The run takes {gb(live.peak_bytes - live.planned_bytes)} more than planned."
    return Gauge(gauge_html(budget, plan, live), _said("good", sentence) + words, table)


def steps_of(config: TrainConfig, data: dict[str, Any] | None) -> int | None:
    """Optimizer steps of a run; None while the data has not been read."""
    if config.max_steps:
        return config.max_steps
    if not data or not data.get("kept"):
        return None
    rows = data["kept"] * (1 - config.held_out)
    if config.packing and data.get("tokens"):
        rows = min(rows, data["tokens"] * (1 - config.held_out) / (0.9 * config.max_seq_length))
    batches = math.ceil(rows / config.micro_batch_size)
    return max(1, math.ceil(config.num_epochs * batches / config.gradient_accumulation_steps))


def missing_data(dataset: str) -> str:
    """Why a dataset cannot be there, as far as a look at the disk tells; "" when nothing speaks against it."""
    for part in split(dataset):
        if part.path is None and part.name != DEMO_DATASET and not part.may_be_on_hub:
            return f"There is no file or folder {part.name!r}; choose a dataset."
    return ""


def length_cost(desk: Desk, values: dict[str, Any], length: int) -> str:
    """What another sequence length costs in memory, as words to append; "" when the planner cannot say."""
    try:
        config = to_config(values)
        now, then = desk.answer(config).plan, desk.answer(dataclasses.replace(config, max_seq_length=length)).plan
    except ConfigError:
        return ""
    if now is None or then is None:
        return ""
    more = then.process_bytes - now.process_bytes
    if not then.fits:
        return ", but do not fit"
    return f" ({gb(abs(more))} {'more' if more > 0 else 'less'} memory)" if abs(more) >= 5e6 else ""


def header_html(desk: Desk, state: dict[str, Any] | None) -> str:
    """The line at the top: the card, the driver, and what happens now."""
    machine = desk.machine()
    if machine.card:
        facts = [machine.card.name.removeprefix("NVIDIA "), gb(machine.card.total_bytes), f"driver {machine.card.driver}"]
    else:
        facts = ["No NVIDIA card", f"{gb(machine.ram.total_bytes)} RAM"]
    owner = desk.holder()
    busy = state and state.get("status") in BUSY
    word = short_status(state) if busy else "chatting" if owner and owner.kind == "chat" else "idle"
    kind = state["status"] if busy else "idle"
    said = " · ".join(escape(f) for f in facts)
    return (
        '<div class="top"><h1>LowVRAM Tuner</h1>'
        f'<p class="facts">{said} · <span class="now"><i class="dot {escape(kind)}" aria-hidden="true"></i>{escape(word)}</span></p></div>'
    )


def run_title_html(name: str, config: TrainConfig | None) -> str:
    """Which run the progress below belongs to."""
    if config is None:
        return ""
    facts = f"{short_model(config.model)} · {config.bits}-bit · {short_data(config.dataset)}"
    return f'<p class="run-title"><b>{escape(name)}</b> <span>{escape(facts)}</span></p>'


def _gauge(config: TrainConfig, answer: Answer, data: dict[str, Any] | None) -> Gauge:
    if answer.plan is None:
        return Gauge(gauge_html(answer.budget), _said("open" if answer.asking else "bad", answer.problem), "")
    plan, steps = answer.plan, steps_of(config, data)
    seconds = steps * plan.step_s if steps else None
    kind = "good" if plan.fits else "bad"
    words = words_html(plan) if plan.fits else ""
    ask = ' <span class="ask">Press a remedy:</span>' if plan.remedies else "" if plan.fits else _no_remedy()
    table = table_html(plan, COMPONENT_LABELS)
    return Gauge(gauge_html(answer.budget, plan), _said(kind, verdict(plan, seconds), ask) + words, table, plan.remedies)


def _starting(desk: Desk, config: TrainConfig, answer: Answer, data: dict[str, Any] | None) -> Starting:
    if desk.active():
        return Starting(False, "A run is in progress; stop it or wait until it ends.")
    if answer.plan is None:
        return Starting(False, answer.problem)
    if not answer.plan.fits:
        return Starting(False, "It does not fit; press a remedy above or choose something smaller.")
    reason = missing_data(config.dataset)
    if not reason and data and (data.get("error") or data.get("kept") == 0):
        reason = data.get("error") or "Nothing in this dataset can be trained on; look at the data below."
    return Starting(not reason, reason)


def _no_remedy() -> str:
    return ' <span class="ask">No single change helps: choose a smaller model or a card with more memory.</span>'


def _said(kind: str, text: str, more: str = "") -> str:
    mark = {"good": "✓", "bad": "✕", "open": "?"}[kind]
    return f'<p class="said {kind}"><i aria-hidden="true">{mark}</i> <span>{escape(text)}{more}</span></p>'
