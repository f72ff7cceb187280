"""Trackers besides the run's own metrics: TensorBoard, Weights & Biases and trackio, through accelerate's trackers."""

from __future__ import annotations

from pathlib import Path

from lowvram_tuner.config import TrainConfig
from lowvram_tuner.train.events import Reporter, Tracker

PROJECT = "lowvram-tuner"


def attach_trackers(reporter: Reporter, config: TrainConfig) -> None:
    """Attaches each of `config.report_to`. One that cannot start (not installed, no login) is named in a note."""
    for name in config.report_to:
        try:
            reporter.attach(name, _start(name, reporter.run.path, config))
        except Exception as error:
            reporter.note(f"Logging to {name} could not start: {error}")


def _start(name: str, folder: Path, config: TrainConfig) -> Tracker:
    """A running tracker as a function of (values, step)."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    made = LOGGER_TYPE_TO_CLASS[name]
    options = {"logging_dir": str(folder)} if made.requires_logging_directory else {}
    tracker = made("tensorboard" if options else PROJECT, **options)
    tracker.start()
    tracker.store_init_configuration({k: v if isinstance(v, (int, float)) else str(v) for k, v in config.to_dict().items()})
    return lambda values, step: tracker.log(values, step=step)
