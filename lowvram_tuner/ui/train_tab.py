"""The Train tab: what to train on the left, the memory gauge and the run on the right.

Every control change and every tick ask the same function, `look`, for what the tab says; only what differs from what the
browser has is sent.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from html import escape
from typing import Any

import gradio as gr

from lowvram_tuner.config import ConfigError
from lowvram_tuner.train.lock import Busy
from lowvram_tuner.train.run_dir import RunDir
from lowvram_tuner.ui import controls
from lowvram_tuner.ui.data_panel import DataPanel
from lowvram_tuner.ui.desk import Desk, config_of
from lowvram_tuner.ui.form import Form, bits_words
from lowvram_tuner.ui.plot import plot_html
from lowvram_tuner.ui.run_view import answers_html, notes_html, progress_html
from lowvram_tuner.ui.train_view import gauge_for, gauge_while_running, header_html, missing_data, run_title_html
from lowvram_tuner.ui.words import BUSY

REMEDIES = 4
QUIET = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}  # for what answers at once
Update = dict[Any, Any]  # what to change, by component


@dataclass(frozen=True)
class Sent:
    """What one browser tab has been sent, by part; and the problem it is told about until something is changed."""

    parts: dict[str, Any] = field(default_factory=dict)
    problem: str = ""


class TrainTab:
    """Builds the tab inside the caller's `gr.Tab` and wires it. `header` is the page's top line, which it keeps up to date."""

    def __init__(self, desk: Desk, header: gr.HTML, data: DataPanel | None = None) -> None:
        self.desk = desk
        self.data = data or DataPanel(desk)
        self.form = Form(desk)
        self.html = {"header": header}  # parts that are plain HTML, by name
        with gr.Row(elem_id="train", equal_height=False):
            with gr.Column(scale=0, min_width=400, elem_id="what", elem_classes="card"):
                self.form.build()
            with gr.Column(scale=1, min_width=480, elem_id="right"):
                with gr.Column(elem_classes="card", elem_id="memory"):
                    self._memory()
                with gr.Column(elem_classes="card", elem_id="run"):
                    self._run()
        self.html |= {"bits_words": self.form.bits_words, "data_words": self.form.data_words}
        self.sent = gr.State(Sent())
        # The id of the run whose settings the controls show, unchangeable. A hidden part of the page and not a State: the
        # browser hears of a changed State only from queued events, and ticks are not queued.
        self.locked = gr.HTML("", visible="hidden", elem_id="locked")

    def build_data(self) -> None:
        """Builds the Data tab inside the caller's `gr.Tab`; it shows the data that this tab names."""
        self.data.build()
        self.html |= self.data.html

    def _memory(self) -> None:
        for part, elem_id in (("bar", "vram-gauge"), ("verdict", "verdict")):
            self.html[part] = gr.HTML("", elem_id=elem_id)
        with gr.Row(elem_id="remedies", visible=False) as self.remedy_row:
            self.remedies = [gr.Button("", size="sm", visible=False, min_width=120, elem_id=f"remedy-{i}") for i in range(REMEDIES)]
        with gr.Accordion("Where every byte goes", open=False, elem_id="bytes"):
            self.form.budget()
            self.html["table"] = gr.HTML("")

    def _run(self) -> None:
        with gr.Row(elem_id="buttons", equal_height=True):
            self.start = gr.Button("Start training", variant="primary", size="md", elem_id="start", interactive=False, scale=0, min_width=170)
            self.stop = gr.Button("Stop and save", variant="stop", size="md", elem_id="stop", visible=False, scale=0, min_width=150)
            self.resume = gr.Button("Resume", size="md", elem_id="resume", visible=False, scale=0, min_width=190)
            self.html["reason"] = gr.HTML("", elem_id="start-reason")
        for part, elem_id in (("title", "run-title"), ("progress", "progress"), ("plot", "loss-plot")):
            self.html[part] = gr.HTML("", elem_id=elem_id)
        with gr.Row(elem_id="next", visible=False) as self.next_row:
            self.chat_button = gr.Button("Chat with the result", variant="primary", size="sm", elem_id="next-chat", scale=0, min_width=170)
            self.longer = gr.Button("Train longer", size="sm", elem_id="next-longer", scale=0, min_width=130)
        for part in ("answers", "notes"):
            self.html[part] = gr.HTML("", elem_id=part)

    # what the tab says -------------------------------------------------------------------------------------------------

    def look(self, values: dict[str, Any], first: Any = 1) -> dict[str, Any]:
        """Everything the tab says for these control values now, by part. `first`: the row that the data panel starts at."""
        run = self.desk.current()
        state = run.state() if run else None
        config = config_of(run) if run and state["status"] in BUSY else None
        data_said, data = self.data.look(values, first, busy=config is not None)
        if config is not None:
            gauge, enabled, reason = gauge_while_running(self.desk, state, config), False, ""
            if run.requested() == "stop":
                reason = "Stopping: the step under way is finished and saved first."
        else:
            gauge, starting = gauge_for(self.desk, values, data)
            enabled, reason = starting.enabled, starting.reason
        said = {
            "header": header_html(self.desk, state),
            "bar": gauge.bar,
            "verdict": gauge.verdict,
            "table": gauge.table,
            "remedies": tuple(r.label for r in gauge.remedies[:REMEDIES]),
            "start": enabled,
            "stop": self._stop_label(run) if config is not None else "",
            "reason": _reason(reason),
            "bits_words": bits_words(values.get("bits"), values.get("method"), values.get("model")),
        }
        return said | data_said | self._run_part(run, state)

    def _stop_label(self, run: RunDir) -> str:
        return "Stop at once" if self.desk.stop_is_late(run) else "Stop and save"

    def _run_part(self, run: RunDir | None, state: dict[str, Any] | None) -> dict[str, Any]:
        if run is None or state is None:
            return {"title": "", "progress": progress_html(None), "plot": plot_html([]), "answers": "", "notes": "", "resume": "", "next": False}
        story, status = self.desk.stories.of(run), state["status"]
        label = f"Resume from step {story.saved_step:,}" if story.saved_step else "Start it again"
        return {
            "title": run_title_html(state["name"], config_of(run)),
            "progress": progress_html(state),
            "plot": plot_html(story.series(), state.get("total_steps") or 0),
            "answers": answers_html(story.rows, story.verdict, story.rows_step, story.answers),
            "notes": notes_html(story.notes),
            "resume": label if status in ("stopped", "failed") else "",
            "next": status == "finished",
        }

    @property
    def outputs(self) -> list[gr.components.Component]:
        """What `updates` fills."""
        buttons = [self.start, self.stop, self.resume, self.remedy_row, *self.remedies, self.next_row, self.data.use_length]
        return [self.sent, *self.html.values(), *buttons, *self.data.roles.values()]

    def updates(self, said: dict[str, Any], sent: Sent, problem: str = "") -> Update:
        """Updates for what differs from what the browser has. `problem` stands in for the reason beside Start."""
        if problem:
            said = {**said, "reason": _reason(problem, bad=True)}
        new = {k: v for k, v in said.items() if k not in sent.parts or sent.parts[k] != v}
        found: Update = {self.html[k]: v for k, v in new.items() if k in self.html}
        if "start" in new:
            found[self.start] = gr.update(interactive=new["start"], value="Start training")
        if "next" in new:
            found[self.next_row] = gr.update(visible=new["next"])
        for part, button in (("stop", self.stop), ("resume", self.resume), ("use_length", self.data.use_length)):
            if part in new:
                found[button] = gr.update(visible=bool(new[part]), value=new[part] or " ")
        if "remedies" in new:
            found |= self._remedies(new["remedies"])
        if "roles" in new:
            found |= self.data.role_updates(new["roles"])
        if found or problem != sent.problem:
            found[self.sent] = Sent({**sent.parts, **new}, problem)
        return found or {self.start: gr.skip()}

    def _remedies(self, labels: tuple[str, ...]) -> Update:
        found: Update = {self.remedy_row: gr.update(visible=bool(labels))}
        for i, button in enumerate(self.remedies):
            label = labels[i] if i < len(labels) else ""
            found[button] = gr.update(value=label[:1].upper() + label[1:], visible=bool(label))
        return found

    # events ------------------------------------------------------------------------------------------------------------

    def wire(self, page: gr.Blocks, timer: gr.Timer) -> None:
        """Connects controls, buttons, the timer and the page's load."""
        fields = self.form.inputs
        inputs = [*fields, self.data.first, self.sent]
        raw = {**QUIET, "preprocess": False}
        gr.on([c.change for c in (*fields, self.data.first)], self.changed, inputs, self.outputs, trigger_mode="always_last", **raw)
        for i, button in enumerate(self.remedies):
            button.click(lambda *values, i=i: self.form.remedy(i, *values), fields, fields, **raw)
        self.longer.click(self.form.longer, None, fields, **raw)
        roles = list(self.data.roles.values())
        gr.on([r.input for r in roles], self.data.mapped, roles, self.form.fields["columns"], **raw)
        length = self.form.fields["max_seq_length"]
        self.data.use_length.click(self.length_pressed, [*fields, self.data.first], length, **raw)
        self.start.click(lambda: gr.update(interactive=False, value="Starting …"), None, self.start, **QUIET)
        for button, action in ((self.start, self.start_pressed), (self.stop, self.stop_pressed), (self.resume, self.resume_pressed)):
            button.click(action, inputs, self.outputs, trigger_mode="once", **raw)
        ticking = {"fn": self.tick, "inputs": [*inputs, self.locked], "outputs": [*self.outputs, self.locked], **raw}
        self.form.wire(page, self.locked, QUIET).then(**ticking)
        # Gradio rewrites a hidden progress display in every output of an event, once as it begins and once as it ends. The timer has none.
        timer.tick(trigger_mode="once", show_progress_on=timer, **ticking)

    def tick(self, *values: Any) -> Update:
        """Once a second: what changed by itself, and whether a run has taken or left the controls."""
        *fields, first, sent, locked = values
        found = self.updates(self.look(self.form.values(fields), first), sent, sent.problem)
        now = self.desk.active() or ""
        return found if now == (locked or "") else {**found, self.locked: now}

    def changed(self, *values: Any) -> Update:
        """A control was changed."""
        *fields, first, sent = values
        form = self.form.values(fields)
        if not self.desk.active():
            self.desk.save_form(form)
        return self.updates(self.look(form, first), sent)

    def length_pressed(self, *values: Any) -> Any:
        """Takes over the sequence length that the data suggests."""
        *fields, first = values
        return self.data.suggested(self.form.values(fields), first) or gr.skip()

    def start_pressed(self, *values: Any) -> Update:
        """Starts a run. Two presses, in one tab or in two, start one: the worker's lock decides."""

        def start(form: dict[str, Any]) -> None:
            config = controls.to_config(form, output_dir=str(self.desk.root))
            problem = missing_data(config.dataset)
            if problem:
                raise ConfigError(problem)
            self.desk.start(config)

        return self._act(start, values)

    def stop_pressed(self, *values: Any) -> Update:
        return self._act(lambda _: self.desk.stop(), values)

    def resume_pressed(self, *values: Any) -> Update:
        run = self.desk.current()
        return self._act(lambda _: self.desk.resume(run.id) if run else None, values)

    def _act(self, action: Callable[[dict[str, Any]], Any], values: tuple[Any, ...]) -> Update:
        """Does it, then says how things are; what could not be done stands beside the button in one sentence."""
        *fields, first, sent = values
        form, problem = self.form.values(fields), ""
        try:
            action(form)
        except (Busy, ConfigError) as error:
            problem = str(error)
        self.desk.refresh()
        parts = {k: v for k, v in sent.parts.items() if k != "start"}  # the press itself has changed the button
        return self.updates(self.look(form, first), Sent(parts, sent.problem), problem)


def _reason(text: str, bad: bool = False) -> str:
    if not text:
        return ""
    return f'<p class="reason{" bad" if bad else ""}" id="reason-text"{" role=alert" if bad else ""}>{escape(text)}</p>'
