"""The form: every control of a run, and what fills it besides fingers: presets, remedies, a reload, a run in progress.

Methods that fill it return one update per control, in the order of `names`; the gauge follows by itself, because a control
that is changed from here changes like one that is changed by hand.
"""

from __future__ import annotations

from html import escape
from typing import Any

import gradio as gr

from lowvram_tuner.config import ConfigError, TrainConfig
from lowvram_tuner.presets import load_presets
from lowvram_tuner.quant.checkpoint import stored_spec
from lowvram_tuner.quant.registry import methods, quant_format, resolve
from lowvram_tuner.quant.spec import QuantError, QuantSpec
from lowvram_tuner.ui import controls
from lowvram_tuner.ui.data_panel import ENDINGS
from lowvram_tuner.ui.desk import Desk
from lowvram_tuner.ui.train_view import gauge_for
from lowvram_tuner.ui.words import BITS_WORDS, OWN_FILES, made_once, quality

KEPT_BY_PRESETS = ("dataset", "columns", "system_prompt", "train_on", "compare_prompts", "report_to")


class Form:
    """Built in two places of the page: `build` in the left column, `budget` beside the gauge."""

    def __init__(self, desk: Desk) -> None:
        self.desk = desk
        self.presets = load_presets()
        self.fields: dict[str, gr.components.Component] = {}
        card = desk.machine().card
        self.card_bytes = card.total_bytes if card else 0

    @property
    def names(self) -> list[str]:
        return list(self.fields)

    @property
    def inputs(self) -> list[gr.components.Component]:
        return list(self.fields.values())

    def build(self) -> None:
        """Preset, model, bits, batch and data; everything else under "More"."""
        choices = [(p.label, p.name) for p in self.presets.values()]
        self.preset = gr.Dropdown(choices, value=choices[0][1], label="Preset", filterable=False, elem_id="preset", interactive=True,
                                  info="A set of choices for a card; everything can be changed afterwards, and your data stays.")  # fmt: skip
        for name in ("model", "bits"):
            self.fields[name] = controls.control(name)
        self.bits_words = gr.HTML(bits_words(self.fields["bits"].value), elem_id="bits-words")
        self.fields["micro_batch_size"] = controls.control("micro_batch_size")
        with gr.Row(elem_id="data-row", equal_height=True):
            self.fields["dataset"] = controls.control("dataset")
            self.upload = gr.UploadButton("Upload", size="md", elem_id="dataset-upload", file_types=list(ENDINGS), file_count="multiple", min_width=76, scale=0)
        with gr.Row(elem_id="data-said", equal_height=True):
            self.data_words = gr.HTML("", elem_id="data-words")
            self.look_button = gr.Button("Look at it", size="sm", elem_id="data-look", scale=0, min_width=84)
        with gr.Accordion("More", open=False, elem_id="more"):
            for title, names in controls.grouped().items():
                gr.HTML(f'<h3 class="group">{escape(title)}</h3>')
                with gr.Row(elem_classes="options"):
                    for name in names:
                        self.fields[name] = controls.control(name)

    def budget(self) -> None:
        """The budget's slider; without a card there is nothing to set."""
        self.fields["vram_gb"] = controls.budget_slider(self.card_bytes)

    def wire(self, page: gr.Blocks, locked: gr.HTML, quiet: dict[str, Any]) -> Any:
        """Connects what fills the form; returns the page's load event, for what has to follow it."""
        raw = {**quiet, "preprocess": False}
        bits, method = self.fields["bits"], self.fields["method"]
        bits.change(_methods_update, [bits, method], method, **raw)
        self.fields["model"].change(_stored_bits, self.fields["model"], bits, **raw)
        self.preset.input(self.preset_chosen, [self.preset, *self.inputs], self.inputs, **raw)
        self.upload.upload(lambda paths: ", ".join(paths or []) or gr.skip(), self.upload, self.fields["dataset"], **{**quiet, "show_progress": "minimal"})
        locked.change(self.lock, locked, [*self.inputs, self.preset, self.upload], **quiet)
        return page.load(self.restore, None, self.inputs, **quiet)

    def values(self, values: Any) -> dict[str, Any]:
        """Raw control values by option."""
        return dict(zip(self.names, values))

    def show(self, config: TrainConfig) -> list[Any]:
        return controls.shown(config, self.names, round(self.card_bytes / 1e9, 1))

    def unchanged(self) -> list[Any]:
        return [gr.skip() for _ in self.names]

    def restore(self) -> list[Any]:
        """The controls as they were: the active run's settings, else what was last chosen, else the first preset."""
        active, saved = self.desk.active(), self.desk.saved_form()
        known = {k: v for k, v in saved.items() if k in self.names}
        try:
            if active:
                return self.show(self.desk.run(active).config())
            if known:
                return self.show(controls.to_config(known))
        except ConfigError:
            pass  # a form that an older version saved, or one left half filled in, is no reason for an empty page
        return self.show(next(iter(self.presets.values())).config())

    def lock(self, run_id: str) -> list[Any]:
        """During a run the controls show its settings and rest; afterwards they can be changed again."""
        if not run_id:
            return [gr.update(interactive=True) for _ in range(len(self.names) + 2)]
        try:
            updates = self.show(self.desk.run(run_id).config())
        except ConfigError:
            updates = self.unchanged()
        return [{**u, "interactive": False} for u in (*updates, gr.skip(), gr.skip())]

    def preset_chosen(self, preset: str, *values: Any) -> list[Any]:
        """A preset sets everything but the data, unless it names data itself."""
        chosen = self.presets.get(preset)
        if chosen is None:
            return self.unchanged()
        kept = {k: v for k, v in self.values(values).items() if k in KEPT_BY_PRESETS}
        try:
            return self.show(controls.to_config({**kept, **_as_controls(chosen.overrides)}))
        except ConfigError:
            return self.show(chosen.config())

    def remedy(self, index: int, *values: Any) -> list[Any]:
        """Changes the controls as a remedy of the present plan says."""
        form = self.values(values)
        gauge, _ = gauge_for(self.desk, form, None)
        if index >= len(gauge.remedies):
            return self.unchanged()
        changes = gauge.remedies[index].changes
        updates = self.show(controls.to_config({**form, **_as_controls(changes)}))
        return [u if n in changes or n == "method" else gr.skip() for n, u in zip(self.names, updates)]

    def longer(self) -> list[Any]:
        """The shown run's settings with twice the steps, ready to be started."""
        run = self.desk.current()
        try:
            config = run.config() if run else None
        except ConfigError:
            config = None
        if config is None:
            return self.unchanged()
        changes = {"max_steps": 2 * config.max_steps} if config.max_steps else {"num_epochs": 2 * config.num_epochs}
        return self.show(TrainConfig.from_dict({**config.to_dict(), **changes}))


def bits_words(bits: Any, method: Any = "auto", model: Any = "") -> str:
    """What a bit width costs with a quantizer, which widths there are not, and which ones a model's own files leave."""
    stored = _stored(model)
    if stored and bits != stored.bits:
        return f'<p class="quiet warn">This model\'s files hold {stored.bits}-bit weights; choose {stored.bits}.</p>'
    missing = controls.missing_bits()
    if bits in missing:
        return f'<p class="quiet warn">{bits}-bit is not available in this version; choose another.</p>'
    rest = f" ({', '.join(map(str, missing))} bits: not in this version.)" if missing else ""
    if bits not in BITS_WORDS:
        return ""
    spec = resolve(bits, method if method in methods(bits) else "auto")
    once = made_once(spec.method, bits) if quant_format(spec).calibrated else ""
    costs = (OWN_FILES,) if stored else (quality(spec.method, bits), once)
    text = " ".join(t for t in (BITS_WORDS[bits], *costs) if t)
    return f'<p class="quiet">{escape(text + rest)}</p>'


def _as_controls(values: dict[str, Any]) -> dict[str, Any]:
    return {k: controls.to_control(k, v) for k, v in values.items()}


def _stored(model: Any) -> QuantSpec | None:
    """How a model is held that is quantized already; None for others, a half-typed path, or what the gauge says more about."""
    try:
        return stored_spec(str(model))
    except (QuantError, OSError, RuntimeError):  # an unknown home is a RuntimeError
        return None


def _stored_bits(model: Any) -> Any:
    """The bits of a model that is quantized already: there is nothing to choose."""
    stored = _stored(model)
    return stored.bits if stored else gr.skip()


def _methods_update(bits: Any, method: Any) -> Any:
    """The quantizers there are for these bits; one that cannot do them gives way to 'auto'."""
    choices = controls.methods_for(bits)
    return gr.update(choices=choices, value=method if method in choices else "auto")
