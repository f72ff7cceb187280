"""The data panel: which rows are looked at, and the sequence length that the data suggests."""

from __future__ import annotations

from typing import Any

import gradio as gr

from lowvram_tuner.config import ConfigError
from lowvram_tuner.ui.controls import to_config
from lowvram_tuner.ui.data_check import DataCheck
from lowvram_tuner.ui.data_view import preview_html, report_of, suggested_length, words_html
from lowvram_tuner.ui.desk import Desk
from lowvram_tuner.ui.train_view import length_cost, missing_data

ENDINGS = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".txt", ".text", ".md", ".markdown")
ROWS = 8


class DataPanel:
    """Built inside the caller's accordion; `look` says what it shows for given control values."""

    def __init__(self, desk: Desk, check: DataCheck | None = None) -> None:
        self.desk = desk
        self.check = check or DataCheck()

    def build(self) -> None:
        with gr.Row(elem_id="data-steps", equal_height=True):
            self.first = gr.Number(1, label="From row", minimum=1, step=ROWS, elem_id="data-first", scale=0, min_width=140, interactive=True)
            self.use_length = gr.Button("", size="sm", elem_id="data-length", visible=False, scale=0, min_width=260)
        self.panel = gr.HTML("", elem_id="data-preview")

    def look(self, values: dict[str, Any], first: Any, busy: bool) -> tuple[dict[str, Any], dict[str, Any] | None]:
        """(what to show by part, the report for Start and the estimate). `busy`: a run needs the machine, read nothing now."""
        dataset = str(values.get("dataset") or "").strip()
        missing = missing_data(dataset) if dataset else "Choose a dataset."
        answer = None if missing or busy else self._answer(values, first)
        current = values.get("max_seq_length")
        length = suggested_length(answer, current)
        label = f"Use {length:,} tokens, which suit this data{length_cost(self.desk, values, length)}" if length else ""
        said = {"data_words": words_html(dataset, missing, answer), "data_panel": preview_html(answer), "use_length": label}
        return said, report_of(answer)

    def _answer(self, values: dict[str, Any], first: Any) -> dict[str, Any] | None:
        try:
            config = to_config(values)
            start = max(1, int(first or 1))
        except (ConfigError, ValueError, OverflowError):
            return None
        return self.check.ask(config, start, ROWS)

    def suggested(self, values: dict[str, Any], first: Any) -> int:
        """The length that the button offers."""
        return suggested_length(self._answer(values, first), values.get("max_seq_length"))
