"""What the page knows and can do: hardware, plans, runs. All tabs share one desk; nothing here draws anything.

Runs are named by their folder's name and looked up in the list of runs, never joined into a path, so that no id from a
browser can point anywhere else. Nothing here imports torch.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowvram_tuner.config import ConfigError, TrainConfig
from lowvram_tuner.hardware.card import Card, process_bytes, read_card
from lowvram_tuner.hardware.ram import Ram, read_ram
from lowvram_tuner.memory.plan import Budget, Plan, plan_run
from lowvram_tuner.models.catalogue import shape_of
from lowvram_tuner.models.hub import is_id
from lowvram_tuner.models.kept import as_stored
from lowvram_tuner.quant.spec import QuantError
from lowvram_tuner.train.files import read_json, write_json
from lowvram_tuner.train.lock import Holder, holder
from lowvram_tuner.train.run_dir import RunDir, list_runs
from lowvram_tuner.train.supervisor import Supervisor
from lowvram_tuner.ui.hub_shapes import HubShapes
from lowvram_tuner.ui.watch import Stories

PATIENCE_S = 15.0
_FRESH_S = 0.4  # several tabs and events share one reading of the card, of the lock and of the list of runs


@dataclass(frozen=True)
class Machine:
    """The hardware at one moment; `card` is None without a usable one."""

    card: Card | None
    ram: Ram


@dataclass(frozen=True)
class Answer:
    """The planner's answer to a config: a plan, or the sentence that says why there is none."""

    budget: Budget
    plan: Plan | None
    problem: str = ""
    asking: bool = False  # the hub is asked for the model's size


class Desk:
    """`root` is the runs folder. `local`: the page is open to this computer only, so a folder may be opened on its desktop."""

    def __init__(self, root: Path | str, supervisor: Any = None, local: bool = True) -> None:
        self.root = Path(root).resolve()
        self.supervisor = supervisor or Supervisor(self.root)
        self.local = local
        self.stories = Stories()
        self.hub = HubShapes()
        self._lock = threading.Lock()
        self._cache: dict[str, tuple[float, Any]] = {}
        self._rows: dict[str, tuple[tuple, dict[str, Any]]] = {}

    # hardware and plans ------------------------------------------------------------------------------------------------

    def machine(self) -> Machine:
        """Card and RAM now. What this program's own chat holds counts as free: it leaves when training starts."""
        return self._fresh("machine", self._read_machine)

    def _read_machine(self) -> Machine:
        card, owner = read_card(), self.holder()
        if card and owner and owner.kind == "chat":
            own = process_bytes(owner.pid)
            card = dataclasses.replace(card, free_bytes=card.free_bytes + own, used_bytes=card.used_bytes - own)
        return Machine(card, read_ram())

    def answer(self, config: TrainConfig) -> Answer:
        """What the planner says about a config on this machine now."""
        machine = self.machine()
        budget = Budget.of(config, machine.card, machine.ram)
        try:
            shape = shape_of(config.model)
        except ConfigError as error:
            shape = self.hub.ask(config.model) if is_id(config.model) else str(error)
        if isinstance(shape, str):
            return Answer(budget, None, shape or "Asking the Hugging Face hub how large this model is ...", asking=not shape)
        try:
            return Answer(budget, plan_run(as_stored(config), shape, budget))
        except (ConfigError, QuantError) as error:
            return Answer(budget, None, str(error))

    # runs --------------------------------------------------------------------------------------------------------------

    def holder(self) -> Holder | None:
        """Who works with the card now."""
        return self._fresh("holder", lambda: holder(self.root))

    def active(self) -> str | None:
        """The id of the run that is being trained."""
        return self._fresh("active", self.supervisor.active)

    def runs(self) -> list[RunDir]:
        """All runs, the newest first."""
        return self._fresh("runs", lambda: list_runs(self.root))

    def table(self) -> list[dict[str, Any]]:
        """Every run's id, state and config (None when damaged); a file that has not changed is not read again."""
        return self._fresh("table", lambda: [self._row(run) for run in self.runs()])

    def _row(self, run: RunDir) -> dict[str, Any]:
        stamp = tuple(_changed_at(run.path / name) for name in ("state.json", "config.json", "name.txt"))
        found = self._rows.get(run.id)
        if found is None or found[0] != stamp:
            found = (stamp, {"id": run.id, "state": run.state(), "config": config_of(run)})
            self._rows[run.id] = found
        return found[1]

    def run(self, run_id: object) -> RunDir:
        """The run of that id, or ConfigError. Ids come from a browser: only an exact one from the list counts."""
        for run in list_runs(self.root):
            if run.id == run_id:
                return run
        raise ConfigError("That run does not exist any more; reload the page.")

    def current(self) -> RunDir | None:
        """The run that the Train tab shows: the active one, else the newest."""
        active, runs = self.active(), self.runs()
        return next((r for r in runs if r.id == active), runs[0] if runs else None)

    def start(self, config: TrainConfig) -> str:
        """Starts a run and returns its id. Raises Busy, ConfigError."""
        run_id = self.supervisor.start(config)
        self.refresh()
        return run_id

    def resume(self, run_id: str) -> str:
        self.supervisor.resume(self.run(run_id).id)
        self.refresh()
        return run_id

    def stop(self) -> None:
        """Asks the active run to save and end; one that was asked a while ago and goes on is ended at once."""
        run = self.current()
        self.supervisor.stop(force=run is not None and self.stop_is_late(run))
        self.refresh()

    def stop_is_late(self, run: RunDir) -> bool:
        """Whether a run was asked to stop `PATIENCE_S` ago: a second press sooner may be a double click."""
        return run.requested() == "stop" and time.time() - _changed_at(run.path / "control.json") / 1e9 > PATIENCE_S

    def delete(self, run_id: object, typed_name: str) -> str:
        """Removes a run once its name was typed; returns the name."""
        run = self.run(run_id)
        if typed_name.strip() != run.name:
            raise ConfigError(f"Type the run's name, {run.name}, to delete it; nothing was deleted.")
        self.stories.forget(run)
        run.delete()
        self.refresh()
        return typed_name

    def rename(self, run_id: object, name: str) -> None:
        self.run(run_id).rename(name)
        self.refresh()

    # the form ----------------------------------------------------------------------------------------------------------

    def saved_form(self) -> dict[str, Any]:
        """The values that the controls had last, so that a reload or a restart shows them again."""
        found = read_json(self.root / ".form.json")
        return found if isinstance(found, dict) else {}

    def save_form(self, values: dict[str, Any]) -> None:
        with self._lock:
            self.root.mkdir(parents=True, exist_ok=True)
            write_json(self.root / ".form.json", values)

    def refresh(self) -> None:
        """Forgets what is remembered for a moment, after something was changed here."""
        with self._lock:
            self._cache.clear()

    def _fresh(self, key: str, read: Any) -> Any:
        with self._lock:
            found = self._cache.get(key)
        if found and time.monotonic() - found[0] < _FRESH_S:
            return found[1]
        value = read()
        with self._lock:
            self._cache[key] = (time.monotonic(), value)
        return value


def config_of(run: RunDir) -> TrainConfig | None:
    """A run's options, None when they cannot be read."""
    try:
        return run.config()
    except ConfigError:
        return None


def _changed_at(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0
