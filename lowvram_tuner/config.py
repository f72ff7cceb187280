"""Every default, limit and help text of a run, once.

`TrainConfig` is the only place where an option of a run is defined. The page's controls, the presets, the command line
and the README's table are made from its fields, and constructing it validates them. Importing this file needs no torch.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BITS = (2, 3, 4, 8, 16)
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
DEMO_MODEL = "demo"
DEMO_DATASET = "demo"


class ConfigError(ValueError):
    """A value the user gave that cannot be used: the message says which, what was seen and what is accepted."""


def option(default: Any, label: str, help: str, **limits: Any) -> Any:
    """A config field with its label and help text; `limits` may hold min, max, choices, unit, basic.

    `basic=True` marks what stands on the page's first screen; the rest stands under "More".
    """
    metadata = {"label": label, "help": help, **limits}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class TrainConfig:
    """One run, completely: what is trained, on what, how, and inside which memory budget."""

    model: str = option(
        DEMO_MODEL, "Model", "The demo model, a local folder, or the id of a model on the Hugging Face hub.", basic=True
    )
    dataset: str = option(
        DEMO_DATASET, "Data",
        "A file or folder (JSON, JSONL, CSV, TSV, Parquet, text), or a hub id; several are mixed with weights: a.jsonl:2, b.csv:0.5.",
        basic=True,
    )
    bits: int = option(
        4, "Bits", "How many bits a frozen weight takes. Fewer bits: less memory, a little less quality.",
        choices=BITS, basic=True,
    )
    method: str = option(
        "auto", "Quantizer", "How the frozen weights are quantized; 'auto' takes the sensible one for the bits.",
        choices=("auto", "none", "nf4", "int8", "gptq", "hqq", "quip"),
    )
    group_size: int = option(
        128, "Group size", "Weights that share one scale (gptq, hqq); -1 is a whole row.", choices=(32, 64, 128, -1)
    )
    micro_batch_size: int = option(
        1, "Batch", "Examples per pass. More keeps the card busier and takes more memory.", min=1, max=256, basic=True
    )
    gradient_accumulation_steps: int = option(
        8, "Accumulation", "Passes added up before the adapter changes. Effective batch = batch x accumulation.",
        min=1, max=4096,
    )
    max_seq_length: int = option(
        512, "Sequence length", "Longest example in tokens; longer ones are cut or split.", min=16, max=131072, unit="tokens"
    )
    packing: bool = option(
        True, "Packing", "Put several short examples into one sequence, kept apart by the attention. Faster, same result."
    )
    train_on: str = option(
        "answers", "Learn from", "'answers': only what the assistant says; 'everything': questions too.",
        choices=("answers", "everything"),
    )
    system_prompt: str = option("", "System prompt", "Replaces the system prompt of every example when not empty.")
    columns: tuple[str, ...] = option(
        (), "Columns",
        "Which column of the data holds what, as role=column (prompt=question; role=- for none), when detection needs help.",
    )
    held_out: float = option(
        0.1, "Held out", "Share of the examples kept aside to measure whether the model really learned.",
        min=0.0, max=0.5,
    )
    lora_r: int = option(16, "Adapter rank", "Size of the adapter. 8 to 32 suits most data.", min=1, max=256)
    lora_alpha: float = option(
        16.0, "Adapter alpha", "Strength of the adapter: its output is scaled by alpha / rank.", min=0.01, max=1024
    )
    lora_dropout: float = option(0.0, "Adapter dropout", "Share of adapter inputs zeroed while training.", min=0.0, max=0.9)
    target_modules: tuple[str, ...] = option(
        LINEARS, "Target layers", "Linear layers that get an adapter.", choices=LINEARS
    )
    trainable: str = option("lora", "What is trained", "'lora': the adapter.", choices=("lora",))
    learning_rate: float = option(2e-4, "Learning rate", "Size of a step. 1e-4 to 5e-4 suits adapters.", min=1e-8, max=1.0)
    warmup_steps: int = option(5, "Warm-up", "Steps over which the learning rate rises from zero.", min=0, max=100000)
    weight_decay: float = option(0.0, "Weight decay", "Pull of the adapter's weights towards zero.", min=0.0, max=1.0)
    max_grad_norm: float = option(1.0, "Gradient clipping", "Longest gradient allowed; 0 turns clipping off.", min=0.0, max=1000)
    num_epochs: float = option(1.0, "Epochs", "Passes over the data. Ignored when steps are given.", min=0.01, max=1000)
    max_steps: int = option(0, "Steps", "Stop after so many steps; 0 follows the epochs.", min=0, max=10_000_000)
    eval_steps: int = option(0, "Check every", "Steps between held-out checks; 0 picks about ten in a run.", min=0, max=1_000_000)
    save_steps: int = option(0, "Save every", "Steps between checkpoints; 0 picks about ten in a run.", min=0, max=1_000_000)
    patience: int = option(0, "Patience", "Stop after so many held-out checks without improvement; 0 never does.", min=0, max=1000)
    keep_checkpoints: int = option(2, "Checkpoints kept", "Newest checkpoints kept besides the best.", min=2, max=100)
    precision: str = option(
        "auto", "Arithmetic", "'auto' takes bf16 where the card has it, else fp16, and fp32 on the CPU.",
        choices=("auto", "bf16", "fp16", "fp32"),
    )
    vram_gb: float = option(
        0.0, "VRAM budget", "Most VRAM to use; 0 takes what is free less a reserve for the desktop.", min=0.0, max=2048.0,
        unit="GB",
    )
    seed: int = option(3407, "Seed", "The same seed gives the same run.", min=0, max=2**31 - 1)
    compare_prompts: tuple[str, ...] = option(
        (), "Compare on", "Prompts answered before training and at every checkpoint; empty takes a few held-out ones."
    )
    report_to: tuple[str, ...] = option(
        (), "Also log to", "Trackers besides the run's own metrics.", choices=("tensorboard", "wandb", "trackio")
    )
    output_dir: str = option("runs", "Runs folder", "Where runs are kept.")

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            object.__setattr__(self, f.name, _checked(f, getattr(self, f.name)))
        for name in ("model", "output_dir"):
            _check_path(name, getattr(self, name))
        object.__setattr__(self, "output_dir", str(Path(self.output_dir).expanduser()))  # a shell leaves --output-dir=~/x as it is
        if self.bits == 16 and self.method not in ("auto", "none"):
            raise ConfigError(f"method={self.method!r} cannot keep bits=16; use method 'auto' or fewer bits.")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainConfig:
        """A config from plain JSON values; an unknown name is an error that lists the known ones."""
        known = {f.name for f in dataclasses.fields(cls)}
        for name in values:
            if name not in known:
                raise ConfigError(f"unknown option {name!r}; the options are {', '.join(sorted(known))}.")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, the inverse of `from_dict`."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    def changed(self) -> dict[str, Any]:
        """The options that differ from their defaults: what a command line must repeat."""
        default = TrainConfig().to_dict()
        return {k: v for k, v in self.to_dict().items() if v != default[k]}


def options() -> dict[str, dataclasses.Field]:
    """Every option's field by name, for pages and command lines."""
    return {f.name: f for f in dataclasses.fields(TrainConfig)}


def _check_path(name: str, text: str) -> None:
    """ConfigError for what no folder of this computer can be called; a name that is not there may still be a hub id."""
    try:
        Path(text).expanduser().exists()
    except (OSError, ValueError, RuntimeError) as error:  # a name too long, a NUL in it, an unknown home
        reason = error.strerror if isinstance(error, OSError) else str(error)
        shown = repr(text) if len(text) <= 60 else f"{text[:60]!r}…"
        raise ConfigError(f"{name}={shown} cannot be looked up here: {reason.rstrip('.')}; give another.") from None


def _checked(f: dataclasses.Field, value: Any) -> Any:
    """`value` as the field's type, inside its limits, or ConfigError."""
    kind = str(f.type).split("[")[0]
    value = _converted(f.name, kind, value)
    choices = f.metadata.get("choices")
    for item in value if kind == "tuple" else [value]:
        if choices and item not in choices:
            raise ConfigError(f"{f.name}={item!r} is not one of {', '.join(map(str, choices))}.")
    low, high = f.metadata.get("min"), f.metadata.get("max")
    if low is not None and not low <= value <= high:  # NaN fails every comparison, so it is refused here too
        raise ConfigError(f"{f.name}={value} is outside {low} to {high}.")
    return value


def _converted(name: str, kind: str, value: Any) -> Any:
    try:
        if kind == "int":
            if isinstance(value, bool) or float(value) != int(float(value)):
                raise ValueError
            return int(float(value)) if not isinstance(value, int) else value
        if kind == "float":
            if isinstance(value, bool):
                raise ValueError
            return float(value)
        if kind == "bool":
            if not isinstance(value, bool):
                raise ValueError
            return value
        if kind == "tuple":
            items = value.split(",") if isinstance(value, str) else list(value)
            return tuple(i.strip() for i in items if i.strip())
        if not isinstance(value, str):
            raise ValueError
        return value
    except (TypeError, ValueError, OverflowError, AttributeError):
        words = {"int": "a whole number", "float": "a number", "bool": "true or false", "tuple": "a list of names",
                 "str": "text"}
        raise ConfigError(f"{name}={value!r} is not {words[kind]}.") from None
