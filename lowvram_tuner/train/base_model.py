"""The base model of a run, before anything else of it: fetched from the hub, and quantized where its method needs data. Both once for all
runs, with progress, and ended by Stop; what is done of them is kept."""

from __future__ import annotations

from lowvram_tuner.config import TrainConfig
from lowvram_tuner.models import kept
from lowvram_tuner.models.source import locate
from lowvram_tuner.train.events import Reporter
from lowvram_tuner.train.run_dir import RunDir
from lowvram_tuner.train.session import free_memory


class Stopped(Exception):
    """Somebody asked the run to end before it had anything to save. Its text: what was done with the model."""


def with_base_model(config: TrainConfig, run: RunDir, reporter: Reporter) -> TrainConfig:
    """The config on a model that is here; where a calibrated method made one, the run keeps it as its model. Raises Stopped."""
    _fetch(config.model, reporter)
    return _on_kept_checkpoint(config, run, reporter)


def _fetch(model: str, reporter: Reporter) -> None:
    """Gets a model of the hub that is not here yet."""

    def progress(done: int, total: int) -> None:
        if reporter.stop_requested():
            raise Stopped("fetched")
        if total:
            reporter.status("preparing", "Fetching the model, once for all runs.", done, total, "bytes")

    locate(model, progress=progress)


def _on_kept_checkpoint(config: TrainConfig, run: RunDir, reporter: Reporter) -> TrainConfig:
    """The config on a checkpoint of its calibrated method, made now where there is none; the run keeps it as its model."""

    def progress(what: str, done: float, total: float) -> None:
        if reporter.stop_requested():
            raise Stopped("quantized")
        left = what.partition(",")[2]
        reporter.status("preparing", f"Quantizing the model, once for all runs{',' + left if left else ''}.", int(done), int(total), "weights")

    found = kept.make(config, progress)
    if found != config:
        free_memory()
        run.set_config(found)
    return found
