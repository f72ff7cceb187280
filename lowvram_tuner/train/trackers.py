"""Trackers besides the run's own metrics: TensorBoard, Weights & Biases and trackio, through accelerate's trackers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lowvram_tuner.config import TrainConfig
from lowvram_tuner.train.events import Reporter

PROJECT = "lowvram-tuner"


@contextmanager
def trackers(reporter: Reporter, config: TrainConfig) -> Iterator[None]:
    """Inside, each of `config.report_to` gets every step and check; afterwards it is told that the run has ended.

    One that cannot start or end (not installed, no login, no network) is named in a note; the run goes on.
    """
    started: dict[str, Any] = {}
    for name in config.report_to:
        try:
            started[name] = _start(name, reporter.run.path, config)
        except Exception as error:
            reporter.note(f"Logging to {name} could not start: {error}")
        else:
            reporter.attach(name, _logging(started[name]))
    try:
        yield
    finally:
        for name, tracker in started.items():
            try:
                tracker.finish()
            except Exception as error:
                reporter.note(f"Logging to {name} could not be ended: {error}")


def _start(name: str, folder: Path, config: TrainConfig) -> Any:
    """A running tracker of accelerate's."""
    from accelerate import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    if find_spec(name) is None:
        raise ModuleNotFoundError(f"the package {name} is not installed; install it into the program's environment: pip install {name}")
    PartialState(cpu=True)  # the trackers write to accelerate's log, which wants to know which process this is
    made = LOGGER_TYPE_TO_CLASS[name]
    if made.requires_logging_directory:
        tracker = made(name, logging_dir=str(folder))
    else:  # what else wandb writes lies in the run's folder too
        tracker = made(PROJECT, name=folder.name, **({"dir": str(folder)} if name == "wandb" else {}))
    tracker.start()
    tracker.store_init_configuration({k: v if isinstance(v, (int, float)) else str(v) for k, v in config.to_dict().items()})
    return tracker


def _logging(tracker: Any) -> Any:
    return lambda values, step: tracker.log(values, step=step)
