"""The Data tab: what is in the data, which column holds what, and any row as the tokens that are trained on."""

from __future__ import annotations

from typing import Any

import gradio as gr

from lowvram_tuner.config import ConfigError
from lowvram_tuner.data.names import KINDS, ROLES, UNUSED, column_items
from lowvram_tuner.ui.controls import to_config
from lowvram_tuner.ui.data_check import DataCheck
from lowvram_tuner.ui.data_view import (
    facts_html,
    lengths_html,
    problems_html,
    report_of,
    rows_html,
    suggested_length,
    words_html,
)
from lowvram_tuner.ui.desk import Desk
from lowvram_tuner.ui.train_view import length_cost, missing_data

ENDINGS = tuple(KINDS)
ROWS = 8
AUTOMATIC = ""
Choices = tuple[tuple[str, str], ...]


class DataPanel:
    """Built inside the caller's tab; `look` says what it shows for given control values."""

    def __init__(self, desk: Desk, check: DataCheck | None = None) -> None:
        self.desk = desk
        self.check = check or DataCheck()

    def build(self) -> None:
        with gr.Row(elem_id="data", equal_height=False):
            with gr.Column(scale=0, min_width=400, elem_id="data-left"):
                with gr.Column(elem_classes="card"):
                    self.facts = gr.HTML("", elem_id="data-facts")
                with gr.Column(elem_classes="card", elem_id="data-columns"):
                    gr.HTML('<h3 class="group">What the columns hold</h3>')
                    self.roles = {
                        role: gr.Dropdown([("automatic", AUTOMATIC)], value=AUTOMATIC, label=label, filterable=False, elem_id=f"role-{role}", min_width=150)
                        for role, label in ROLES.items()
                    }
                with gr.Column(elem_classes="card"):
                    self.lengths = gr.HTML("", elem_id="data-lengths")
                    self.use_length = gr.Button("", size="sm", elem_id="data-length", visible=False)
                with gr.Column(elem_classes="card"):
                    self.problems = gr.HTML("", elem_id="data-problems")
            with gr.Column(scale=1, min_width=480, elem_id="data-right", elem_classes="card"):
                self.first = gr.Number(1, label="Rows from number", minimum=1, step=ROWS, elem_id="data-first", interactive=True)
                self.rows = gr.HTML("", elem_id="data-preview")

    @property
    def html(self) -> dict[str, gr.HTML]:
        """The parts of `look` that are plain HTML."""
        return {"data_facts": self.facts, "data_lengths": self.lengths, "data_problems": self.problems, "data_rows": self.rows}

    def look(self, values: dict[str, Any], first: Any, busy: bool) -> tuple[dict[str, Any], dict[str, Any] | None]:
        """(what to show by part, the report for Start and the estimate). `busy`: a run needs the machine, nothing new is read."""
        dataset = str(values.get("dataset") or "").strip()
        missing = missing_data(dataset) if dataset else "Choose a dataset."
        answer = None if missing else self._answer(values, first, busy)
        length = suggested_length(answer, values.get("max_seq_length"))
        label = f"Use {length:,} tokens, which suit this data{length_cost(self.desk, values, length)}" if length else ""
        said = {
            "data_words": words_html(dataset, missing, answer, busy),
            "data_facts": facts_html(answer, missing, busy),
            "data_lengths": lengths_html(answer, values.get("max_seq_length")),
            "data_problems": problems_html(answer),
            "data_rows": rows_html(answer),
            "use_length": label,
            "roles": (busy, *(_role_choices(role, values.get("columns"), answer) for role in ROLES)),
        }
        return said, report_of(answer)

    def role_updates(self, said: tuple[Any, ...]) -> dict[Any, Any]:
        """Updates of the dropdowns from the part "roles" of `look`."""
        busy, *roles = said
        return {
            self.roles[role]: gr.update(value=value, choices=list(choices), interactive=not busy)
            for role, (value, choices) in zip(ROLES, roles, strict=True)
        }

    def mapped(self, *columns: str) -> str:
        """The option "columns" that the dropdowns say."""
        return ", ".join(f"{role}={column}" for role, column in zip(ROLES, columns, strict=True) if column)

    def suggested(self, values: dict[str, Any], first: Any) -> int:
        """The length that the button offers."""
        return suggested_length(self._answer(values, first, busy=False), values.get("max_seq_length"))

    def _answer(self, values: dict[str, Any], first: Any, busy: bool) -> dict[str, Any] | None:
        try:
            config = to_config(values)
            start = max(1, int(first or 1))
        except (ConfigError, ValueError, OverflowError):
            return None
        return self.check.ask(config, start, ROWS, known_only=busy)


def _role_choices(role: str, columns: Any, answer: dict[str, Any] | None) -> tuple[str, Choices]:
    """(chosen, choices) of one role: found automatically, not used, or one of the columns."""
    chosen = dict(tuple(part.strip() for part in item.partition("=")[::2]) for item in column_items([str(columns or "")])).get(role, AUTOMATIC)
    files = (answer or {}).get("files") or []
    found = list(dict.fromkeys(f["roles"][role] for f in files if role in f["roles"])) if not chosen else []
    names = dict.fromkeys(c for f in files for c in f["columns"])
    if chosen not in (AUTOMATIC, UNUSED):
        names.setdefault(chosen)
    automatic = f"found: {found[0]}" if len(found) == 1 else "automatic, by file" if found else "automatic"
    return chosen, ((automatic, AUTOMATIC), ("not used", UNUSED), *((name, name) for name in names))
