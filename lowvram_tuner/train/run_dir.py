"""A run as a folder: what the page, the command line and the worker know of each other.

    config.json     the run's options               written when the run is made; by the worker when it quantized the model
    command.txt     the command that repeats it     with config.json
    state.json      where the run stands            written by the worker (by the supervisor when the worker died)
    events.jsonl    what happened, one line each    appended by the worker
    metrics.jsonl   one line per step and per check appended by the worker; steps that a resume repeats are replaced
    control.json    what the worker is asked to do  written by the page
    name.txt        the name a person gave it       written by the page
    checkpoints/step-N/, adapter/, worker.log

Each file has one writer at a time, so nothing is lost when both sides write at once. Needs no torch.
"""

from __future__ import annotations

import json
import secrets
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from lowvram_tuner.config import DEMO_MODEL, ConfigError, TrainConfig
from lowvram_tuner.data.names import joined, split
from lowvram_tuner.train.files import patiently, read_json, write_json, write_text
from lowvram_tuner.train.lock import holder
from lowvram_tuner.train.repeat import command_line

ACTIVE = ("preparing", "checking", "training", "saving")
FINAL = ("stopped", "finished", "failed")
NAME_LENGTH = 80
EVENTS_AT_ONCE = 20_000

EMPTY_STATE: dict[str, Any] = {
    "status": "preparing", "message": "", "progress": None, "step": 0, "total_steps": 0, "epoch": 0.0, "loss": None,
    "learning_rate": None, "tokens_per_s": None, "eta_s": None, "vram_now_bytes": None, "vram_peak_bytes": None,
    "planned_bytes": None, "eval_loss": None, "pid": None, "started": None, "updated": None, "error": None,
    "verdict": None,
}  # fmt: skip


class RunDir:
    """One run's folder. Reading never fails because another process is writing."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)

    @property
    def id(self) -> str:
        return self.path.name

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def log(self) -> Path:
        return self.path / "worker.log"

    @classmethod
    def create(cls, root: Path | str, config: TrainConfig) -> RunDir:
        """Makes a new run for `config` under `root`; its id sorts by time. ConfigError when the folder cannot be written."""
        run = cls(Path(root) / f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}")
        try:
            run.checkpoints.mkdir(parents=True)
            run.set_config(config)
            run.write_state({**EMPTY_STATE, "message": "Starting.", "started": time.time(), "updated": time.time()})
        except OSError as error:
            raise ConfigError(f"output_dir={str(root)!r} cannot be written ({error.strerror}); choose another folder.") from None
        return run

    def config(self) -> TrainConfig:
        """The run's options. ConfigError when config.json is missing or broken."""
        values = read_json(self.path / "config.json")
        if not isinstance(values, dict):
            raise ConfigError(f"{self.path / 'config.json'} is missing or damaged; start a new run instead.")
        return TrainConfig.from_dict(values)

    def set_config(self, config: TrainConfig) -> None:
        """Writes the options; again for a resume with some of them changed."""
        config = anchored(config)
        write_json(self.path / "config.json", config.to_dict())
        write_text(self.path / "command.txt", command_line(config) + "\n")

    def state(self) -> dict[str, Any]:
        """Where the run stands: every key of `EMPTY_STATE`, and its `name`."""
        found = read_json(self.path / "state.json")
        state = {**EMPTY_STATE, **(found if isinstance(found, dict) else {})}
        return {**state, "name": self.name}

    def write_state(self, state: dict[str, Any]) -> None:
        """Replaces the state in one step; for whoever holds the run: the worker, or the supervisor once it is dead."""
        write_json(self.path / "state.json", {k: v for k, v in state.items() if k != "name"})

    @property
    def name(self) -> str:
        """What a person called it, else its id."""
        try:
            return (self.path / "name.txt").read_text(encoding="utf-8").strip() or self.id
        except OSError:
            return self.id

    def rename(self, name: str) -> None:
        """Gives the run a name of its own; the empty name brings its id back."""
        clean = " ".join(name.split())
        if len(clean) > NAME_LENGTH or not clean.isprintable():
            raise ConfigError(f"name={clean[:NAME_LENGTH]!r} cannot be used; take up to {NAME_LENGTH} printable characters.")
        write_text(self.path / "name.txt", clean)

    def delete(self) -> None:
        """Removes the run and everything in it. ConfigError while it is being trained.

        The folder is renamed out of sight first, so that a deletion cut short leaves no half run in the list.
        """
        owner = holder(self.path.parent)
        if owner and owner.run == self.id:
            raise ConfigError(f"Run {self.name} is in use; stop it before deleting it.")
        doomed = self.path.with_name(f".deleted-{self.id}")
        patiently(lambda: self.path.rename(doomed))
        shutil.rmtree(doomed, ignore_errors=True)

    def request(self, action: str) -> None:
        """Asks the worker to 'stop' (save and end), or notes that it is about to be killed ('kill')."""
        if action not in ("stop", "kill"):
            raise ConfigError(f"action={action!r} is unknown; a run can be asked to 'stop'.")
        write_json(self.path / "control.json", {"action": action, "t": time.time()})

    def requested(self) -> str | None:
        """What the worker has been asked for."""
        found = read_json(self.path / "control.json")
        return found.get("action") if isinstance(found, dict) else None

    def clear_requests(self) -> None:
        """Forgets what an earlier worker was asked, before the next one starts."""
        patiently(lambda: (self.path / "control.json").unlink(missing_ok=True))

    def events(self, after: int = 0, limit: int = EVENTS_AT_ONCE) -> tuple[list[dict[str, Any]], int]:
        """(events, next): those after position `after` (0: the start), at most `limit`; pass `next` to read on.

        A line still being written is left for the next call.
        """
        return read_lines(self.path / "events.jsonl", after, limit)

    def metrics(self) -> list[dict[str, Any]]:
        """One dict per step and per held-out check, in order of steps."""
        return read_lines(self.path / "metrics.jsonl", 0, None)[0]

    def last_words(self) -> str:
        """The last line of worker.log that says something, for explaining a death."""
        try:
            with self.log.open("rb") as log:
                log.seek(max(0, self.log.stat().st_size - 8192))
                lines = log.read().decode("utf-8", "replace").replace("\r", "\n").split("\n")
        except OSError:
            return ""
        return next((line.strip() for line in reversed(lines) if line.strip()), "")[:500]


def list_runs(root: Path | str) -> list[RunDir]:
    """The runs under `root`, the newest first."""
    root = Path(root)
    if not root.is_dir():
        return []
    found = [p for p in root.iterdir() if not p.name.startswith(".") and (p / "config.json").is_file()]
    return [RunDir(p) for p in sorted(found, key=lambda p: p.name, reverse=True)]


def find_run(root: Path | str, which: str) -> RunDir:
    """A run by id, by the name a person gave it, or by path. ConfigError names what is there instead."""
    path = Path(which).expanduser()
    if which and (path / "config.json").is_file() and (path / "state.json").is_file():
        return RunDir(path.resolve())
    runs = list_runs(root)
    for run in runs:
        if which in (run.id, run.name):
            return run
    known = ", ".join(r.id for r in runs[:5]) or "none yet"
    raise ConfigError(f"run={which!r} is not a run under {str(root)!r}; the newest there: {known}.")


def read_lines(path: Path, after: int, limit: int | None) -> tuple[list[dict[str, Any]], int]:
    """Whole JSON lines of `path` from byte `after`; damaged ones (a power cut) are skipped."""
    found: list[dict[str, Any]] = []
    try:
        source = patiently(lambda: path.open("rb"))
    except FileNotFoundError:
        return found, after
    with source:
        source.seek(after)
        for line in source:
            if not line.endswith(b"\n") or (limit is not None and len(found) >= limit):
                break
            after += len(line)
            try:
                value = json.loads(line)
            except ValueError:
                continue
            if isinstance(value, dict):
                found.append(value)
    return found, after


def anchored(config: TrainConfig) -> TrainConfig:
    """`config` with existing local paths made absolute, so that the run can be resumed from any folder."""
    model = config.model
    if model != DEMO_MODEL and Path(model).expanduser().exists():
        model = str(Path(model).expanduser().resolve())
    return replace(config, model=model, dataset=joined(split(config.dataset)) or config.dataset)
