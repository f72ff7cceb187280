"""What a chat talks to: a model at some bits, with the adapter of a run or of a folder, or without one. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lowvram_tuner.config import ConfigError, TrainConfig
from lowvram_tuner.train.run_dir import RunDir, find_run

WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True)
class Target:
    """The same target means the same resident model, so that a warm worker can be kept."""

    model: str
    bits: int = 4
    method: str = "auto"
    adapter: str | None = None  # folder
    stamp: float = 0.0  # when the adapter was written: a run that went on has another adapter in the same folder
    label: str = ""
    system_prompt: str = ""
    group_size: int = 128


def target_of_run(run: RunDir) -> Target:
    """What a run has trained. ConfigError when it has saved no adapter yet."""
    config, state = run.config(), run.state()
    weights = run.adapter / WEIGHTS
    if not weights.is_file():
        raise ConfigError(f"Run {run.name} has no adapter yet; let it finish, or stop it, which saves one.")
    label = f"{run.name}, step {state['step']}"
    stamp = weights.stat().st_mtime
    return Target(config.model, config.bits, config.method, str(run.adapter.resolve()), stamp, label, config.system_prompt, config.group_size)


def target_of_model(config: TrainConfig, adapter: Path | None = None) -> Target:
    """A model, alone or with the adapter in a folder."""
    if adapter is None:
        words = {"label": config.model, "system_prompt": config.system_prompt, "group_size": config.group_size}
        return Target(config.model, config.bits, config.method, **words)
    weights = adapter / WEIGHTS
    if not weights.is_file():
        raise ConfigError(f"adapter={str(adapter)!r} holds no {WEIGHTS}; give the folder of a trained adapter.")
    where, stamp = str(adapter.resolve()), weights.stat().st_mtime
    label = f"{config.model} with {adapter.name}"
    return Target(config.model, config.bits, config.method, where, stamp, label, config.system_prompt, config.group_size)


def target_of(config: TrainConfig, run: str | None, adapter: Path | None, given_model: bool) -> Target:
    """The target a command line asks for: --run, or --model with or without --adapter; not both."""
    if run and (given_model or adapter):
        raise ConfigError("--run brings its own model and adapter; leave out --model and --adapter, or --run.")
    if run:
        return target_of_run(find_run(config.output_dir, run))
    if not given_model:
        raise ConfigError("give --run with a run's id, or --model with a model to talk to, such as --model demo.")
    return target_of_model(config, adapter)
