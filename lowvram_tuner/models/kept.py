"""Calibrated quantizations are made once and kept: ordinary checkpoints under `<output_dir>/models`, used again from then on.

A method like gptq or quip rounds a weight for the inputs it will see, which takes minutes to hours. So the first run that asks
for it makes a checkpoint from the model and its own training data, and trains on that; every later run with the same model,
bits, method and group size finds it. Interrupted, it goes on after the last finished layer. A model that somebody else has quantized
is used as it is.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

from lowvram_tuner.config import ConfigError, TrainConfig
from lowvram_tuner.models.source import locate
from lowvram_tuner.quant.calibrate import GROUPED, ROWS, Progress, quantize_model
from lowvram_tuner.quant.checkpoint import open_checkpoint, stored_spec
from lowvram_tuner.quant.registry import quant_format, resolve
from lowvram_tuner.quant.spec import QuantSpec

ROW = 512  # tokens of a calibration sequence, unless the run's are shorter


def find(config: TrainConfig) -> TrainConfig:
    """The config on its kept checkpoint, or as it is where none is needed or none was made yet."""
    folder = place(config)
    return replace(config, model=str(folder)) if folder is not None and folder.is_dir() else config


def make(config: TrainConfig, progress: Progress | None = None) -> TrainConfig:
    """The config on its kept checkpoint, which is made from the run's own data where it is missing.

    progress(what, weights done, weights) may raise: what is finished stays. Raises what `quantize_model` raises.
    """
    folder = place(config)
    if folder is None:
        return config
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        length = min(ROW, config.max_seq_length)
        quantize_model(config.model, _spec(config), config, folder, length, ROWS * ROW // length, progress=progress)
    return replace(config, model=str(folder))


def as_stored(config: TrainConfig) -> TrainConfig:
    """The config with the bits, method and group size of a checkpoint that is quantized already.

    ConfigError when the config asks for other bits or another method than the checkpoint has, QuantError when it cannot be read.
    """
    spec = stored_spec(config.model)
    if spec is None:
        return config
    if config.bits != spec.bits or config.method not in ("auto", spec.method):
        raise ConfigError(
            f"model={config.model!r} is quantized already: {spec.method} at {spec.bits} bits; "
            f"choose bits={spec.bits} and method 'auto', not bits={config.bits} and {config.method!r}."
        )
    group = spec.group_size if spec.group_size in (32, 64, 128, -1) else 32
    return replace(config, method=spec.method, group_size=group)


def place(config: TrainConfig) -> Path | None:
    """Where the checkpoint of a config lies or would lie; None when its method needs no data or the model is quantized."""
    spec = _spec(config)
    if not quant_format(spec).calibrated:
        return None
    source = locate(config.model)
    if source.gguf is None and open_checkpoint(source.folder) is not None:
        return None
    mark = hashlib.sha256(repr(source.stamps()).encode()).hexdigest()[:6]  # tells models apart by their weights' files
    group = f"-g{spec.group_size}" if spec.method in GROUPED else ""
    name = f"{source.public_id.split('/')[-1]}-{spec.method}-{spec.bits}bit{group}-{mark}"
    return Path(config.output_dir).resolve() / "models" / name


def _spec(config: TrainConfig) -> QuantSpec:
    return resolve(config.bits, config.method, group_size=config.group_size)
