"""The page's controls, made from the config's fields: default, limits, choices and help come from there and nowhere else.

Values come back unchecked (`preprocess=False`), so that `TrainConfig` is the one place that says what is wrong with one.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import gradio as gr

from lowvram_tuner.config import DEMO_MODEL, ConfigError, TrainConfig, options
from lowvram_tuner.data.names import column_items
from lowvram_tuner.models.catalogue import catalogue
from lowvram_tuner.quant.registry import methods
from lowvram_tuner.ui.words import short_model

SLIDER_TOP = 32  # a slider up to the config's 256 could not be set to 2; larger values stretch it
ELEM_IDS = {"micro_batch_size": "batch-size"}
HIDDEN = ("output_dir",)  # the page keeps its runs where it was started to
BESIDE_GAUGE = ("vram_gb",)
MORE = {
    "Data": ("max_seq_length", "packing", "train_on", "held_out", "system_prompt", "columns"),
    "Adapter": ("lora_r", "lora_alpha", "lora_dropout", "trainable", "target_modules"),
    "Learning": (
        "learning_rate", "num_epochs", "max_steps", "gradient_accumulation_steps", "warmup_steps", "weight_decay",
        "max_grad_norm", "patience", "seed",
    ),
    "Machine": ("method", "group_size", "precision"),
    "Checks and logs": ("eval_steps", "save_steps", "keep_checkpoints", "report_to", "compare_prompts"),
}  # fmt: skip
PLANNED_BY = (  # what the gauge depends on
    "model", "bits", "method", "group_size", "micro_batch_size", "gradient_accumulation_steps", "max_seq_length", "lora_r",
    "target_modules", "trainable", "precision", "vram_gb", "num_epochs", "max_steps", "packing",
)  # fmt: skip


def grouped() -> dict[str, tuple[str, ...]]:
    """The options under "More" by heading; one that no heading names stands under "Other"."""
    named = {name for names in MORE.values() for name in names}
    rest = tuple(n for n, f in options().items() if n not in named and n not in (*HIDDEN, *BESIDE_GAUGE) and not f.metadata.get("basic"))
    return {**MORE, "Other": rest} if rest else dict(MORE)


def budget_slider(total_bytes: int) -> gr.Slider:
    """The memory budget up to the card's size; 0 leaves it to the program."""
    f = options()["vram_gb"]
    return gr.Slider(0, round(max(1.0, total_bytes / 1e9), 1), value=f.default, step=0.1, label=_label(f), info=f.metadata["help"],
                     elem_id="vram-gb", interactive=True, buttons=[], visible=total_bytes > 0)  # fmt: skip


def control(name: str) -> gr.components.Component:
    """The control of one option."""
    f = options()[name]
    meta = f.metadata
    common = {"label": _label(f), "info": meta["help"], "elem_id": ELEM_IDS.get(name, name.replace("_", "-")), "interactive": True}
    value = to_control(name, f.default)
    kind = str(f.type).split("[")[0]
    if name == "model":
        return gr.Dropdown(model_choices(), value=value, allow_custom_value=True, **common)
    if name == "bits":
        return gr.Radio([(str(b), b) for b in meta["choices"]], value=value, elem_classes=[f"without-{b}" for b in missing_bits()], **common)
    if name == "micro_batch_size":
        return gr.Slider(meta["min"], SLIDER_TOP, value=value, step=1, buttons=[], **common)
    if kind == "tuple" and meta.get("choices"):
        return gr.CheckboxGroup(list(meta["choices"]), value=value, **common)
    if meta.get("choices"):
        choices = methods_for(options()["bits"].default) if name == "method" else list(meta["choices"])
        return gr.Dropdown(choices, value=value, filterable=False, **common)
    if kind == "bool":
        return gr.Checkbox(value=value, **common)
    if kind in ("int", "float"):
        return gr.Number(value=value, minimum=meta["min"], maximum=meta["max"], step=_step(kind, f.default), **common)
    if name == "dataset":
        return gr.Textbox(value=value, placeholder="a path, a hub id, or drop files here; mixed: a.jsonl:2, b.csv", **common)
    return gr.Textbox(value=value, lines=2 if name == "compare_prompts" else 1, max_lines=6, **common)


def model_choices() -> list[tuple[str, str]]:
    """The demo model and the known ones, by short name; anything else can be typed."""
    return [(short_model(DEMO_MODEL), DEMO_MODEL), *((short_model(name), name) for name in catalogue())]


def missing_bits() -> list[int]:
    """Bit widths that no quantizer offers yet; the page shows them, and why they cannot be chosen."""
    return [b for b in options()["bits"].metadata["choices"] if not methods(b)]


def methods_for(bits: Any) -> list[str]:
    """What "Quantizer" offers for a bit width."""
    return ["auto", *methods(bits)] if isinstance(bits, int) else ["auto"]


def to_control(name: str, value: Any) -> Any:
    """A config value as its control shows it."""
    if name == "compare_prompts":
        return "\n".join(value)
    if name == "columns":
        return ", ".join(value)
    return list(value) if isinstance(value, tuple) else value


def to_config(values: dict[str, Any], **fixed: Any) -> TrainConfig:
    """The config that the controls hold, or ConfigError with a sentence about the first value that cannot be used."""
    fields, read = options(), {}
    for name, value in values.items():
        label = fields[name].metadata["label"]
        if name == "compare_prompts":
            value = [line for line in str(value or "").splitlines() if line.strip()]
        elif name == "columns":
            value = column_items([str(value or "")])
        elif name in ("model", "dataset"):
            value = str(value or "").strip()
            if not value:
                raise ConfigError(f"Choose a {'model' if name == 'model' else 'dataset'}.")
        elif value is None or value == "":
            if not isinstance(fields[name].default, (str, tuple)):
                raise ConfigError(f"{label} is empty; give a value.")
            value = fields[name].default
        read[name] = value
    return TrainConfig.from_dict({**read, **fixed})


def shown(config: TrainConfig, names: list[str], vram_top: float = 0.0) -> list[Any]:
    """A config as updates of the controls `names`, ranges and choices included. `vram_top`: where the budget's slider ends."""
    return [_update(name, getattr(config, name), config, vram_top) for name in names]


def _update(name: str, value: Any, config: TrainConfig, vram_top: float) -> Any:
    if name == "micro_batch_size":
        return gr.update(value=value, maximum=max(SLIDER_TOP, value))
    if name == "vram_gb" and value:
        return gr.update(value=value, maximum=max(value, vram_top))
    if name == "method":
        return gr.update(value=value, choices=methods_for(config.bits))
    return gr.update(value=to_control(name, value))


def _label(f: dataclasses.Field) -> str:
    unit = f.metadata.get("unit")
    return f"{f.metadata['label']} ({unit})" if unit else f.metadata["label"]


def _step(kind: str, default: Any) -> float:
    if kind == "int":
        return 1
    return 0.0001 if 0 < default < 0.001 else 0.1 if default < 10 else 1
