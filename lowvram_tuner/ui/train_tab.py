"""The Train tab: what to train on the left, the memory gauge and the run on the right.

Every control change and every tick ask the same function, `look`, for what the tab says; only texts that differ from those
already on the page are sent.
"""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from typing import Any

import gradio as gr

from lowvram_tuner.config import ConfigError, TrainConfig
from lowvram_tuner.presets import load_presets
from lowvram_tuner.train.lock import Busy
from lowvram_tuner.train.run_dir import RunDir
from lowvram_tuner.ui import controls
from lowvram_tuner.ui.data_view import DataPanel
from lowvram_tuner.ui.desk import Desk, config_of
from lowvram_tuner.ui.plot import plot_html
from lowvram_tuner.ui.run_view import answers_html, notes_html, progress_html
from lowvram_tuner.ui.train_view import gauge_for, gauge_while_running, header_html, missing_data, run_title_html
from lowvram_tuner.ui.words import BITS_WORDS, BUSY

REMEDIES = 4
QUIET = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}  # for what answers at once
KEPT_BY_PRESETS = ("dataset", "columns", "system_prompt", "train_on", "compare_prompts", "report_to")


@dataclass(frozen=True)
class Sent:
    """What a tab of a browser has been sent, by component: a text equal to it is not sent again."""

    texts: dict[str, Any]


class TrainTab:
    """Builds the tab inside the caller's `gr.Tab` and wires it. `header` is the page's top line, which it keeps up to date."""

    def __init__(self, desk: Desk, header: gr.HTML) -> None:
        self.desk = desk
        self.header = header
        self.presets = load_presets()
        self.data = DataPanel(desk)
        self.fields: dict[str, gr.components.Component] = {}
        with gr.Row(elem_id="train", equal_height=False):
            with gr.Column(scale=0, min_width=400, elem_id="what", elem_classes="card"):
                self._what()
            with gr.Column(scale=1, min_width=480, elem_id="right"):
                with gr.Column(elem_classes="card", elem_id="memory"):
                    self._memory()
                with gr.Column(elem_classes="card", elem_id="run"):
                    self._run()
        with gr.Accordion("Look at the data", open=False, elem_id="data-panel"):
            self.data.build()
        self.names = list(self.fields)
        self.sent = gr.State(Sent({}))
        self.locked = gr.State("")  # id of the run whose settings the controls show and that nobody can change now

    # layout ------------------------------------------------------------------------------------------------------------

    def _what(self) -> None:
        choices = [(p.label, p.name) for p in self.presets.values()]
        self.preset = gr.Dropdown(choices, value=choices[0][1], label="Preset", filterable=False, elem_id="preset", interactive=True,
                                  info="A set of choices for a card; everything can be changed afterwards.")  # fmt: skip
        for name in ("model", "bits"):
            self.fields[name] = controls.control(name)
        self.bits_words = gr.HTML(_bits_words(4), elem_id="bits-words")
        self.fields["micro_batch_size"] = controls.control("micro_batch_size")
        with gr.Row(elem_id="data-row", equal_height=True):
            self.fields["dataset"] = controls.control("dataset")
            self.upload = gr.UploadButton("Upload", size="md", elem_id="dataset-upload", file_types=list(self.data.ENDINGS), min_width=76, scale=0)
        self.data_words = gr.HTML("", elem_id="data-words")
        with gr.Accordion("More", open=False, elem_id="more"):
            for title, names in controls.grouped().items():
                gr.HTML(f'<h3 class="group">{escape(title)}</h3>')
                with gr.Row(elem_classes="options"):
                    for name in names:
                        self.fields[name] = controls.control(name)

    def _memory(self) -> None:
        self.bar = gr.HTML("", elem_id="vram-gauge")
        self.verdict = gr.HTML("", elem_id="verdict")
        with gr.Row(elem_id="remedies", visible=False) as self.remedy_row:
            self.remedies = [gr.Button("", size="sm", visible=False, min_width=120, elem_id=f"remedy-{i}") for i in range(REMEDIES)]
        with gr.Accordion("Where every byte goes", open=False, elem_id="bytes"):
            self.table = gr.HTML("")

    def _run(self) -> None:
        with gr.Row(elem_id="buttons", equal_height=True):
            self.start = gr.Button("Start training", variant="primary", elem_id="start", interactive=False, scale=0, min_width=170)
            self.stop = gr.Button("Stop and save", variant="stop", elem_id="stop", visible=False, scale=0, min_width=140)
            self.resume = gr.Button("Resume", elem_id="resume", visible=False, scale=0, min_width=140)
            self.reason = gr.HTML("", elem_id="start-reason")
        self.title = gr.HTML("", elem_id="run-title")
        self.progress = gr.HTML("", elem_id="progress")
        self.plot = gr.HTML("", elem_id="loss-plot")
        with gr.Row(elem_id="next", visible=False) as self.next_row:
            self.chat_button = gr.Button("Chat with the result", variant="primary", size="sm", elem_id="next-chat", scale=0, min_width=170)
            self.longer = gr.Button("Train longer", size="sm", elem_id="next-longer", scale=0, min_width=130)
        self.answers = gr.HTML("", elem_id="answers")
        self.notes = gr.HTML("", elem_id="notes")

    # what the tab says -------------------------------------------------------------------------------------------------

    def look(self, values: dict[str, Any]) -> dict[str, Any]:
        """Everything the tab says for these control values now: text or property by component name."""
        run = self.desk.current()
        state = run.state() if run else None
        busy = bool(state and state["status"] in BUSY)
        data = self.data.report(values, wait=busy)
        config = config_of(run) if busy and run else None
        if config is not None:
            gauge, starting = gauge_while_running(self.desk, state, config), None
        else:
            gauge, starting = gauge_for(self.desk, values, data)
        reason = "" if starting is None else starting.reason
        said = {
            "header": header_html(self.desk, state),
            "bar": gauge.bar,
            "verdict": gauge.verdict,
            "table": gauge.table,
            "remedies": tuple(r.label for r in gauge.remedies[:REMEDIES]),
            "start": bool(starting and starting.enabled),
            "stop": busy,
            "reason": f'<p class="reason" id="reason-text">{escape(reason)}</p>' if reason else "",
            "bits_words": _bits_words(values.get("bits")),
            "data_words": self.data.words(values, data),
            "data_panel": self.data.html(values),
        }
        return said | self._run_part(run, state)

    def _run_part(self, run: RunDir | None, state: dict[str, Any] | None) -> dict[str, Any]:
        if run is None or state is None:
            return {"title": "", "progress": progress_html(None), "plot": plot_html([]), "answers": "", "notes": "", "resume": "", "next": ""}
        story, status = self.desk.stories.of(run), state["status"]
        again = status in ("stopped", "failed")
        label = f"Resume from step {story.saved_step:,}" if story.saved_step else "Start it again"
        return {
            "title": run_title_html(state["name"], config_of(run)),
            "progress": progress_html(state),
            "plot": plot_html(story.series(), state.get("total_steps") or 0),
            "answers": answers_html(story.rows, story.verdict, story.rows_step),
            "notes": notes_html(story.notes),
            "resume": label if again else "",
            "next": run.id if status == "finished" else "",
        }

    @property
    def outputs(self) -> list[gr.components.Component]:
        """What `updates` fills, besides the remembered `sent`."""
        return [
            self.sent, self.header, self.bar, self.verdict, self.table, self.start, self.stop, self.resume, self.reason,
            self.bits_words, self.data_words, self.data.panel, self.title, self.progress, self.plot, self.answers, self.notes,
            self.remedy_row, *self.remedies, self.next_row,
        ]  # fmt: skip

    def updates(self, said: dict[str, Any], sent: Sent) -> dict[Any, Any]:
        """Updates for what differs from what the browser has, by component."""
        new = {k: v for k, v in said.items() if sent.texts.get(k) != v or k not in sent.texts}
        plain = {"header": self.header, "bar": self.bar, "verdict": self.verdict, "table": self.table, "reason": self.reason,
                 "bits_words": self.bits_words, "data_words": self.data_words, "data_panel": self.data.panel, "title": self.title,
                 "progress": self.progress, "plot": self.plot, "answers": self.answers, "notes": self.notes}  # fmt: skip
        found: dict[Any, Any] = {plain[k]: v for k, v in new.items() if k in plain}
        if "start" in new:
            found[self.start] = gr.update(interactive=new["start"])
        if "stop" in new:
            found[self.stop] = gr.update(visible=new["stop"])
        if "resume" in new:
            found[self.resume] = gr.update(visible=bool(new["resume"]), value=new["resume"] or "Resume")
        if "next" in new:
            found[self.next_row] = gr.update(visible=bool(new["next"]))
        if "remedies" in new:
            labels = new["remedies"]
            found[self.remedy_row] = gr.update(visible=bool(labels))
            for i, button in enumerate(self.remedies):
                found[button] = gr.update(value=labels[i].capitalize() if i < len(labels) else "", visible=i < len(labels))
        if found:
            found[self.sent] = Sent({**sent.texts, **new})
        return found

    # events ------------------------------------------------------------------------------------------------------------

    def wire(self, page: gr.Blocks, timer: gr.Timer) -> None:
        """Connects controls, buttons, the timer and the page's load."""
        fields = [self.fields[n] for n in self.names]
        inputs = [*fields, self.sent]
        for name in self.names:
            self.fields[name].change(self.changed, inputs, self.outputs, trigger_mode="always_last", preprocess=False, **QUIET)
        self.fields["bits"].change(_methods_update, [self.fields["bits"], self.fields["method"]], self.fields["method"], preprocess=False, **QUIET)
        self.preset.input(self.preset_chosen, [self.preset, *fields], fields, preprocess=False, **QUIET)
        self.upload.upload(self.uploaded, self.upload, self.fields["dataset"], show_progress="minimal", queue=False, api_visibility="private")
        for i, button in enumerate(self.remedies):
            button.click(lambda *values, i=i: self.remedy_pressed(i, *values), fields, fields, preprocess=False, **QUIET)
        acting = {"queue": False, "show_progress": "hidden", "api_visibility": "private", "preprocess": False, "trigger_mode": "once"}
        self.start.click(self.start_pressed, inputs, self.outputs, **acting)
        self.stop.click(self.stop_pressed, inputs, self.outputs, **acting)
        self.resume.click(self.resume_pressed, inputs, self.outputs, **acting)
        self.longer.click(self.longer_pressed, fields, fields, preprocess=False, **QUIET)
        self.data.wire(fields, self.names)
        restored = page.load(self.restore, None, [self.preset, *fields], **QUIET)
        restored.then(self.tick, [*inputs, self.locked], [*self.outputs, self.locked], preprocess=False, **QUIET)
        timer.tick(self.tick, [*inputs, self.locked], [*self.outputs, self.locked], preprocess=False, trigger_mode="once", **QUIET)
        self.locked.change(self.lock, self.locked, fields, **QUIET)

    def tick(self, *values: Any) -> dict[Any, Any]:
        """Once a second: what changed by itself, and whether a run has taken or left the controls."""
        *form, sent, locked = values
        found = self.updates(self.look(self._named(form)), sent)
        now = self.desk.active() or ""
        if now != locked:
            found[self.locked] = now
        return found or {self.start: gr.skip()}

    def changed(self, *values: Any) -> dict[Any, Any]:
        """A control was changed."""
        *form, sent = values
        named = self._named(form)
        found = self.updates(self.look(named), sent)
        if not self.desk.active():
            self.desk.save_form(named)
        return found or {self.start: gr.skip()}

    def lock(self, run_id: str) -> list[Any]:
        """During a run the controls show its settings and rest; afterwards they can be changed again."""
        if not run_id:
            return [gr.update(interactive=True) for _ in self.names]
        try:
            updates = controls.shown(self.desk.run(run_id).config(), self.names)
        except ConfigError:
            updates = [gr.update() for _ in self.names]
        return [{**u, "interactive": False} for u in updates]

    def restore(self) -> list[Any]:
        """The controls as they were: the active run's settings, else what was last chosen, else the first preset."""
        active = self.desk.active()
        try:
            config = self.desk.run(active).config() if active else controls.to_config(self._known(self.desk.saved_form()))
        except ConfigError:
            config = next(iter(self.presets.values())).config()
        return [gr.skip(), *controls.shown(config, self.names)]

    def _known(self, form: dict[str, Any]) -> dict[str, Any]:
        if not form:
            raise ConfigError("nothing is saved yet")
        return {k: v for k, v in form.items() if k in self.names}

    def preset_chosen(self, preset: str, *values: Any) -> list[Any]:
        """A preset sets everything but the data, unless it names data itself."""
        chosen = self.presets.get(preset)
        if chosen is None:
            return [gr.skip() for _ in self.names]
        kept = {k: v for k, v in self._named(values).items() if k in KEPT_BY_PRESETS}
        try:
            config = controls.to_config({**kept, **{k: controls.to_control(k, v) for k, v in chosen.overrides.items()}})
        except ConfigError:
            config = chosen.config()
        return controls.shown(config, self.names)

    def remedy_pressed(self, index: int, *values: Any) -> list[Any]:
        """Changes the controls as the remedy says; the gauge follows by itself."""
        form = self._named(values)
        gauge, _ = gauge_for(self.desk, form, None)
        if index >= len(gauge.remedies):
            return [gr.skip() for _ in self.names]
        changes = gauge.remedies[index].changes
        config = controls.to_config({**form, **{k: controls.to_control(k, v) for k, v in changes.items()}})
        return [u if n in changes or n == "method" else gr.skip() for n, u in zip(self.names, controls.shown(config, self.names))]

    def longer_pressed(self, *values: Any) -> list[Any]:
        """The finished run's settings with twice the steps, ready to be started."""
        run = self.desk.current()
        if run is None:
            return [gr.skip() for _ in self.names]
        config = run.config()
        changes = {"max_steps": 2 * config.max_steps} if config.max_steps else {"num_epochs": 2 * config.num_epochs}
        return controls.shown(TrainConfig.from_dict({**config.to_dict(), **changes}), self.names)

    def uploaded(self, path: str | None) -> Any:
        return path or gr.skip()

    def start_pressed(self, *values: Any) -> dict[Any, Any]:
        """Starts a run. Two presses, in one tab or in two, start one: the worker's lock decides."""
        *form, sent = values
        named = self._named(form)

        def start() -> None:
            config = controls.to_config(named, output_dir=str(self.desk.root))
            problem = missing_data(config.dataset)
            if problem:
                raise ConfigError(problem)
            self.desk.start(config)

        return self._act(start, named, sent)

    def stop_pressed(self, *values: Any) -> dict[Any, Any]:
        *form, sent = values
        return self._act(self.desk.stop, self._named(form), sent)

    def resume_pressed(self, *values: Any) -> dict[Any, Any]:
        *form, sent = values
        run = self.desk.current()
        return self._act(lambda: self.desk.resume(run.id) if run else None, self._named(form), sent)

    def _act(self, action: Any, form: dict[str, Any], sent: Sent) -> dict[Any, Any]:
        """Does it, then says how things are; what could not be done stands beside the button in one sentence."""
        problem = ""
        try:
            action()
        except (Busy, ConfigError) as error:
            problem = str(error)
        self.desk.refresh()
        said = self.look(form)
        if problem:
            said["reason"] = f'<p class="reason bad" id="reason-text" role="alert">{escape(problem)}</p>'
        return self.updates(said, sent) or {self.start: gr.skip()}

    def _named(self, values: Any) -> dict[str, Any]:
        return dict(zip(self.names, values))


def _bits_words(bits: Any) -> str:
    missing = controls.missing_bits()
    if bits in missing:
        return f'<p class="quiet warn">{bits}-bit is not available in this version; choose another.</p>'
    rest = f" ({', '.join(map(str, missing))} bits: not in this version.)" if missing else ""
    return f'<p class="quiet">{escape(BITS_WORDS.get(bits, "") + rest)}</p>'


def _methods_update(bits: Any, method: Any) -> Any:
    """The quantizers there are for these bits; one that cannot do them gives way to 'auto'."""
    choices = controls.methods_for(bits)
    return gr.update(choices=choices, value=method if method in choices else "auto")
