"""What went wrong, in plain words: what happened and what a person can do about it."""

from __future__ import annotations

import errno
import signal
from dataclasses import dataclass

from lowvram_tuner.config import ConfigError
from lowvram_tuner.quant.spec import QuantError
from lowvram_tuner.train.checkpoints import CheckpointError
from lowvram_tuner.train.lock import Busy

LESS_MEMORY = "Take fewer bits, a smaller batch or a shorter sequence length, or close other programs, then resume."


@dataclass(frozen=True)
class Failure:
    """`what` happened, how to `fix` it, and whether it is the program's own fault (`bug`): then its traceback helps."""

    what: str
    fix: str
    bug: bool = False


def is_bad_input(error: BaseException) -> bool:
    """True for errors whose message tells the user which value to change."""
    from lowvram_tuner.data.report import DataError

    return isinstance(error, (ConfigError, QuantError, DataError))


def explain(error: BaseException) -> Failure:
    """The failure that `error` is, recognised by type or, for torch's, by its words (torch need not be imported)."""
    text = first_line(error)
    if is_bad_input(error):
        return Failure(text, "Change that and start again.")
    if isinstance(error, Busy):
        return Failure(text, "")
    if isinstance(error, CheckpointError):
        return Failure(text, "Then resume the run.")
    if type(error).__name__ == "OutOfMemoryError" or "CUDA out of memory" in text:
        return Failure("The card ran out of memory.", LESS_MEMORY)
    if isinstance(error, MemoryError) or "not enough memory" in text or "can't allocate memory" in text:
        return Failure("The computer ran out of memory (RAM).", LESS_MEMORY)
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return Failure("The disk is full.", "Make room on the disk, then resume.")
    if "CUDA error" in text or "CUDA driver" in text:
        return Failure(f"The graphics card reported a fault: {text}", "Resume; if it comes back, restart the computer.", bug=True)
    if isinstance(error, ImportError):
        return Failure(f"A part of the program is missing: {text}", "Run the launcher again with --reinstall.", bug=True)
    return Failure(f"{type(error).__name__}: {text}", "This is a fault of the program; worker.log has the details.", bug=True)


def explain_death(code: int | None, last_words: str) -> Failure:
    """Why a worker ended without saying so: from its exit code (None: not known) and the last line of its log."""
    if code is None:
        what = "The worker ended without saying why."
    elif code == -getattr(signal, "SIGKILL", 9):
        return Failure("The worker was killed, most likely because the computer ran out of memory (RAM).", LESS_MEMORY)
    elif code < 0:
        what = f"The worker was ended by signal {_signal_name(-code)}."
    else:
        what = f"The worker ended with exit code {code}."
    if last_words:
        what += f" Its last words: {last_words}"
    return Failure(what, "worker.log in the run's folder has the details.")


def first_line(error: BaseException) -> str:
    """The first line of an error's message that says something, else its type."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _signal_name(number: int) -> str:
    try:
        return f"{number} ({signal.Signals(number).name})"
    except ValueError:
        return str(number)
