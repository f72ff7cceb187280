"""The worker process: `python -m lowvram_tuner.train.worker RUN_DIR [--resume]`. It owns the card until it ends.

It takes the worker lock before torch is imported, runs the training, and always leaves a final state behind: finished,
stopped, or failed with what happened and what to do. `conduct` does the same inside another process for the command line.
"""

from __future__ import annotations

import argparse
import faulthandler
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lowvram_tuner.config import TrainConfig
from lowvram_tuner.train.events import Reporter
from lowvram_tuner.train.failures import explain
from lowvram_tuner.train.lock import Busy, take
from lowvram_tuner.train.run_dir import FINAL, RunDir

BUSY_EXIT = 75
LOG_LIMIT, LOG_KEPT = 4_000_000, 1_000_000  # bytes of worker.log: trimmed to its newest part when it grows beyond
LOG_SECONDS = 2.0

Training = Callable[[TrainConfig, RunDir, Reporter, bool], dict[str, Any]]


def main(argv: list[str] | None = None, training: Training | None = None) -> int:
    """Runs one worker. Exit code 0: finished or stopped; 1: failed, see the state; BUSY_EXIT: another worker is at it."""
    parser = argparse.ArgumentParser(prog="lowvram_tuner.train.worker")
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--resume", action="store_true")
    args = parser.parse_args(argv)
    run = RunDir(args.run_dir)
    try:
        lock = take(run.path.parent, "train", run.id)
    except Busy as busy:
        print(busy, file=sys.stderr)
        return BUSY_EXIT
    with lock:
        _own_log(run.log)
        try:
            conduct(run, Reporter(run), args.resume, training)
        except (Exception, KeyboardInterrupt):
            traceback.print_exc()
            return 1
    return 0


def conduct(run: RunDir, reporter: Reporter, resume: bool, training: Training | None = None) -> dict[str, Any]:
    """Trains `run` here and returns what `run_training` returns; the caller holds the lock.

    Interrupt and terminate signals ask the run to save and end; a second interrupt ends it at once. Whatever happens the
    run's state is final afterwards; errors are raised again.
    """
    try:
        with _signals_stop(run):
            reporter.status("preparing", "Starting.")
            result = _train(run, reporter, resume, training)
        if reporter.state()["status"] not in FINAL:
            reporter.status(result.get("status", "finished"), "Done.")
        return result
    except KeyboardInterrupt:
        reporter.status("stopped", "Stopped at once; what came after the newest checkpoint is lost.")
        raise
    except Exception as error:
        failure = explain(error)
        try:
            reporter.failed(failure.what, failure.fix)
        except OSError as full:  # the same full disk: the supervisor says it once there is room
            print(f"{run.path / 'state.json'} cannot be written: {full}", file=sys.stderr)
        raise


def _train(run: RunDir, reporter: Reporter, resume: bool, training: Training | None) -> dict[str, Any]:
    """Reads the options, starts the trackers and trains; torch is imported in here."""
    config = run.config()
    if training is None:
        from lowvram_tuner.train.loop import run_training as training
    if not config.report_to:
        return training(config, run, reporter, resume)
    from lowvram_tuner.train.trackers import trackers

    with trackers(reporter, config):
        return training(config, run, reporter, resume)


@contextmanager
def _signals_stop(run: RunDir) -> Iterator[None]:
    """Inside, SIGTERM and the first SIGINT ask the run to stop. Only the main thread can receive signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, _: object) -> None:
        if number == signal.SIGINT and run.requested():
            raise KeyboardInterrupt
        run.request("stop")
        print("Saving and ending; interrupt again to end at once.", file=sys.stderr)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _own_log(path: Path) -> None:
    """Sends everything this process prints, crashes included, to `path`, kept below LOG_LIMIT bytes."""
    log = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    faulthandler.enable()
    threading.Thread(target=_keep_short, args=(path,), daemon=True).start()


def _keep_short(path: Path) -> None:
    """Trims the log now and then. Appending writers go on at its new end; a line written meanwhile may be lost."""
    wait = threading.Event()
    while not wait.wait(LOG_SECONDS):
        trim(path)


def trim(path: Path) -> None:
    """Cuts `path` to its newest LOG_KEPT bytes when it is longer than LOG_LIMIT."""
    with path.open("r+b") as log:
        size = log.seek(0, os.SEEK_END)
        if size > LOG_LIMIT:
            log.seek(size - LOG_KEPT)
            kept = log.read()
            log.seek(0)
            log.truncate()
            log.write(b"[earlier output was cut]\n" + kept)


if __name__ == "__main__":
    sys.exit(main())
