"""Starts and watches the worker process for the page. Holds no state that a restart would lose, and no torch.

The worker holds the lock, writes the run's folder and lives in a session of its own: it goes on when the page dies, and a
new supervisor finds it by the lock. A worker that died without a final state is reported as failed, with the reason.
"""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path

from lowvram_tuner.config import ConfigError, TrainConfig
from lowvram_tuner.train.checkpoints import FREE_OPTIONS, steps
from lowvram_tuner.train.events import Reporter
from lowvram_tuner.train.failures import explain_death
from lowvram_tuner.train.lock import UNKNOWN, Busy, ask_to_leave, holder, if_free
from lowvram_tuner.train.process import kill_family, spawn
from lowvram_tuner.train.run_dir import ACTIVE, FINAL, RunDir, anchored, find_run, list_runs
from lowvram_tuner.train.worker import BUSY_EXIT

START_SECONDS = 60.0  # for Python to start and take the lock; a cold disk on Windows needs many seconds
LEAVE_SECONDS = 30.0  # for a chat, or for a run that has said its last word, to let go of the card
WORKER = (sys.executable, "-m", "lowvram_tuner.train.worker")


class Supervisor:
    """One per page. Several, in one process or in many, agree through the lock."""

    def __init__(self, root: Path | str, command: tuple[str, ...] = WORKER) -> None:
        self.root = Path(root)
        self._command = command
        self._starting = threading.Lock()
        self._last_active: str | None = None
        self.runs()

    def start(self, config: TrainConfig) -> str:
        """Starts a run and returns its id once its worker has the card. Busy when a run is in progress.

        A chat that holds the card is asked to leave first.
        """
        with self._starting:
            make_room(self.root)
            run = RunDir.create(self.root, config)
            try:
                self._launch(run, resume=False)
            except Busy:
                run.delete()
                raise
            return run.id

    def resume(self, run_id: str, **changes: object) -> str:
        """Goes on with a stopped or failed run from its newest checkpoint, or from the start when it has none.

        `changes` may set options that leave it the same run (`checkpoints.FREE_OPTIONS`); a finished run needs more steps.
        """
        with self._starting:
            run = find_run(self.root, run_id)
            make_room(self.root)
            settle(run)
            prepare_resume(run, changes)
            self._launch(run, resume=bool(steps(run.checkpoints)))
            return run.id

    def stop(self, force: bool = False) -> str | None:
        """Asks the active run to save and end; `force` kills it (its checkpoints stay). Returns its id, None without one."""
        found = holder(self.root)
        if found is None or found.kind != "train" or not found.run:
            return None
        run = RunDir(self.root / found.run)
        run.request("kill" if force else "stop")
        if force:
            kill_family(found.pid)
            settle(run, wait=True)
        return run.id

    def active(self) -> str | None:
        """The id of the run in progress, whoever started it."""
        found = holder(self.root)
        run_id = found.run if found and found.kind == "train" else None
        if self._last_active and self._last_active != run_id:
            settle(RunDir(self.root / self._last_active))
        self._last_active = run_id
        if run_id and RunDir(self.root / run_id).state()["status"] in FINAL:
            return None
        return run_id

    def runs(self) -> list[RunDir]:
        """All runs, the newest first; those whose worker died unseen are marked as failed."""
        found = list_runs(self.root)
        for run in found:
            if run.state()["status"] in ACTIVE:
                settle(run)
        return found

    def _launch(self, run: RunDir, resume: bool) -> None:
        """Starts the worker and waits until it has the lock, or has ended."""
        run.clear_requests()
        with run.log.open("ab") as log:
            command = [*self._command, str(run.path), *(["--resume"] if resume else [])]
            process = spawn(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        give_up = time.monotonic() + START_SECONDS
        while process.poll() is None and not _holds(self.root, run):
            if time.monotonic() > give_up:
                kill_family(process.pid)
            time.sleep(0.02)
        if process.poll() == BUSY_EXIT:
            raise Busy(holder(self.root) or UNKNOWN)
        self._last_active = run.id
        threading.Thread(target=lambda: settle(run, process.wait(), wait=True), daemon=True).start()


def make_room(root: Path | str, seconds: float = LEAVE_SECONDS) -> None:
    """Waits until the card is free: asks a chat to leave, lets a run that has ended let go. Busy when a run goes on."""
    root = Path(root)
    give_up = time.monotonic() + seconds
    while (found := holder(root)) is not None:
        ending = found.run is not None and RunDir(root / found.run).state()["status"] in FINAL
        if found.kind == "chat":
            ask_to_leave(root, found)
        elif not ending:
            raise Busy(found)
        if time.monotonic() > give_up:
            raise Busy(found)
        time.sleep(0.05)


def prepare_resume(run: RunDir, changes: dict[str, object]) -> TrainConfig:
    """The options with which `run` goes on: its own with `changes`. ConfigError when that would be another run."""
    config = run.config()
    wanted = anchored(TrainConfig.from_dict({**config.to_dict(), **changes}))
    other = [k for k in wanted.to_dict() if k not in FREE_OPTIONS and getattr(wanted, k) != getattr(config, k)]
    if other:
        was, now = getattr(config, other[0]), getattr(wanted, other[0])
        raise ConfigError(f"Cannot resume {run.name} with {other[0]}={now!r}: it was {was!r}. Leave it, or start a new run.")
    longer = wanted.max_steps > config.max_steps or wanted.num_epochs > config.num_epochs
    if run.state()["status"] == "finished" and not longer:
        raise ConfigError(f"Run {run.name} is finished; give it more steps or epochs to go on, or start a new run.")
    if wanted != config:
        run.set_config(wanted)
    return wanted


def settle(run: RunDir, code: int | None = None, wait: bool = False) -> None:
    """Gives a run whose worker is gone its final state. Does nothing while any worker lives or the run just starts.

    `code`: the worker's exit code where known. `wait`: the worker is known to be ending, so wait for its lock.
    """
    give_up = time.monotonic() + (LEAVE_SECONDS if wait else 0.0)
    while _holds(run.path.parent, run):
        if time.monotonic() > give_up:
            return
        time.sleep(0.02)
    with if_free(run.path.parent) as free:
        # While another worker has the lock this run cannot be started; while nobody has it, this block keeps it so.
        if (free or not _holds(run.path.parent, run)) and not _just_starting(run.state(), known_dead=wait):
            _bury(run, code)


def _bury(run: RunDir, code: int | None) -> None:
    """Writes the last word for a worker that could not. The caller keeps the lock from being taken."""
    if not run.path.is_dir() or run.state()["status"] not in ACTIVE:
        return
    try:
        _write_last_word(run, code)
    except OSError as error:  # the disk that ended the run is still full: the next look tries again
        print(f"{run.path / 'state.json'} cannot be written: {error}", file=sys.stderr)


def _write_last_word(run: RunDir, code: int | None) -> None:
    done = steps(run.checkpoints)
    onward = f"Resume goes on from step {done[-1]}." if done else "There is no checkpoint yet: resuming starts over."
    reporter = Reporter(run)
    if run.requested() == "kill":
        reporter.status("stopped", f"Stopped at once. {onward}")
        return
    failure = explain_death(code, run.last_words())
    reporter.failed(failure.what, f"{failure.fix} {onward}")


def _just_starting(state: dict, known_dead: bool) -> bool:
    """True for a run whose worker may not have taken the lock yet."""
    return not known_dead and state["pid"] is None and time.time() - (state["updated"] or 0) < START_SECONDS


def _holds(root: Path, run: RunDir) -> bool:
    found = holder(root)
    return found is not None and found.run == run.id
