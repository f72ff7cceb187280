"""A worker whose training is a few lines: what it does is the model's name, so that the supervisor can be tested fast.

quick: three steps. slow: steps until it is asked to stop, a checkpoint each tenth. The others end in the way they say.
"""

import json
import os
import signal
import sys
import time

from lowvram_tuner.config import ConfigError
from lowvram_tuner.train import worker


class OutOfMemoryError(RuntimeError):
    """Named as torch's."""


def training(config, run, reporter, resume):
    kind = config.model
    if kind == "bad":
        raise ConfigError("model='bad' is not a model; give 'demo'.")
    if kind == "oom":
        raise OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")
    if kind == "bug":
        raise ZeroDivisionError("division by zero")
    if kind == "segfault":
        print("loading CUDA", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGSEGV)
    if kind == "exit":
        print("fatal: the driver went away", flush=True)
        os._exit(7)
    if kind.startswith("stuck-in-"):
        reporter.status(kind.removeprefix("stuck-in-"), "Busy.")
        while not reporter.stop_requested():
            time.sleep(0.01)
        reporter.status("stopped", "Stopped before the first step.")
        return {"status": "stopped"}
    if kind == "chatty":
        for _ in range(60):
            print("x" * 100_000)
    return _steps(config, run, reporter, resume)


def _steps(config, run, reporter, resume):
    first = 1 + max((int(p.name[5:]) for p in run.checkpoints.glob("step-*")), default=0) if resume else 1
    total = config.max_steps or 3
    reporter.status("training", "Training.")
    reporter.planned(total, 10**9)
    for step in range(first, total + 1):
        reporter.step(step, loss=1.0 / step)
        if step % 10 == 0:
            _checkpoint(run, reporter, step)
        if reporter.stop_requested():
            reporter.status("saving", "Saving.")
            _checkpoint(run, reporter, step)
            reporter.status("stopped", f"Stopped at step {step}.")
            return {"status": "stopped"}
        if config.model == "slow":
            time.sleep(0.01)
    return {"status": "finished"}


def _checkpoint(run, reporter, step):
    path = run.checkpoints / f"step-{step}"
    path.mkdir(exist_ok=True)
    (path / "manifest.json").write_text(json.dumps({}))
    reporter.checkpointed(step, path)


if __name__ == "__main__":
    sys.exit(worker.main(training=training))
