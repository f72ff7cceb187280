"""The worker: a final state whatever happens, signals that ask to stop, a log that stays short, trackers."""

import os
import signal
import subprocess
import sys
import textwrap

import pytest

from lowvram_tuner.config import ConfigError, TrainConfig
from lowvram_tuner.train import failures, worker
from lowvram_tuner.train.checkpoints import CheckpointError
from lowvram_tuner.train.events import Reporter
from lowvram_tuner.train.lock import Busy, Holder, take
from lowvram_tuner.train.run_dir import RunDir
from lowvram_tuner.train.worker import BUSY_EXIT, conduct

posix = pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")


@pytest.fixture
def run(tmp_path):
    return RunDir.create(tmp_path / "runs", TrainConfig())


def work(run, training):
    return conduct(run, Reporter(run), False, training)


def test_the_training_gets_the_runs_own_config_and_its_result_is_returned(run):
    seen = []

    def training(config, where, reporter, resume):
        seen.append((config, where.id, reporter.run.id, resume))
        return {"steps": 3}

    assert work(run, training) == {"steps": 3}
    assert seen == [(TrainConfig(), run.id, run.id, False)]
    assert run.state()["status"] == "finished"


def test_the_loops_own_last_word_is_kept(run):
    def training(config, where, reporter, resume):
        reporter.status("stopped", "Stopped at step 4.")
        return {}

    work(run, training)
    assert (run.state()["status"], run.state()["message"]) == ("stopped", "Stopped at step 4.")


def test_a_damaged_config_fails_in_words(run):
    (run.path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="missing or damaged"):
        work(run, None)
    assert run.state()["status"] == "failed"


def test_a_disk_full_even_for_the_state_still_tells_the_first_error(run, monkeypatch, capsys):
    def training(config, where, reporter, resume):
        def full(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(RunDir, "write_state", full)
        reporter.status("saving", "Saving.")

    with pytest.raises(OSError, match="No space left"):
        work(run, training)
    assert "state.json cannot be written" in capsys.readouterr().err
    assert run.events()[0][-1]["message"] == "The disk is full."


@posix
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["terminate", "interrupt"])
def test_a_signal_asks_the_run_to_save_and_end(run, number, capsys):
    def training(config, where, reporter, resume):
        assert not reporter.stop_requested()
        os.kill(os.getpid(), number)
        assert reporter.stop_requested()
        reporter.status("stopped", "Saved.")
        return {}

    before = signal.getsignal(number)
    work(run, training)
    assert run.state()["message"] == "Saved."
    assert capsys.readouterr().err == "Saving and ending; interrupt again to end at once.\n"
    assert signal.getsignal(number) is before


@posix
def test_a_second_interrupt_ends_it_at_once(run):
    def training(config, where, reporter, resume):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        return {}

    with pytest.raises(KeyboardInterrupt):
        work(run, training)
    assert run.state()["status"] == "stopped"
    assert "Stopped at once" in run.state()["message"]


def test_a_second_worker_leaves_the_first_ones_run_alone(run):
    with take(run.path.parent, "train", "other"):
        assert worker.main([str(run.path)], training=None) == BUSY_EXIT
    assert run.state()["status"] == "preparing"


def test_the_log_is_cut_to_its_newest_part(run):
    run.log.write_text("short\n")
    worker.trim(run.log)
    assert run.log.read_text() == "short\n"
    run.log.write_text("first\n" + "y" * (worker.LOG_LIMIT + 10) + "\nlast\n")
    worker.trim(run.log)
    text = run.log.read_text()
    assert text.startswith("[earlier output was cut]\n") and text.endswith("\nlast\n")
    assert len(text) == worker.LOG_KEPT + len("[earlier output was cut]\n")


def test_everything_the_worker_prints_is_in_the_log_and_stays_short(run):
    script = f"""
        import os, sys, time
        from lowvram_tuner.train import worker
        worker.LOG_LIMIT, worker.LOG_KEPT, worker.LOG_SECONDS = 100_000, 10_000, 0.02

        def training(config, run, reporter, resume):
            for _ in range(100):
                print("x" * 10_000)
                os.system("echo from a child")
                time.sleep(0.005)
            print("the end", flush=True)
            return {{}}

        sys.exit(worker.main([{str(run.path)!r}], training))
    """
    out = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True)
    assert (out.returncode, out.stdout) == (0, ""), out.stderr
    text = run.log.read_text()
    assert "from a child" in text and run.last_words() == "the end"
    assert len(text) < 300_000


def test_tensorboard_gets_the_steps_and_a_missing_tracker_is_a_note(run, monkeypatch):
    pytest.importorskip("torch.utils.tensorboard")
    from lowvram_tuner.train import trackers

    run.set_config(TrainConfig(report_to=("tensorboard", "wandb")))
    real = trackers._start

    def start(name, *args):
        if name == "wandb":
            raise ModuleNotFoundError("No module named 'wandb'")
        return real(name, *args)

    monkeypatch.setattr(trackers, "_start", start)

    def training(config, where, reporter, resume):
        reporter.step(1, loss=1.5, epoch=0.1)
        reporter.evaluated(1, 1.25)
        return {}

    work(run, training)
    notes = [e["text"] for e in run.events()[0] if e["kind"] == "note"]
    assert notes == ["Logging to wandb could not start: No module named 'wandb'"]
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(run.path / "tensorboard"))
    read.Reload()
    assert [(s.step, s.value) for s in read.Scalars("loss")] == [(1, 1.5)]
    assert [(s.step, s.value) for s in read.Scalars("eval_loss")] == [(1, 1.25)]


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_tracker_starts_alone_in_a_fresh_process(name, tmp_path, root):
    """With a package of its name that only remembers: accelerate's own trackers do not start where its state is not made."""
    (tmp_path / f"{name}.py").write_text(
        textwrap.dedent("""
            class Config(dict):
                def update(self, values, allow_val_change): super().update(values)
            config = Config()
            class Run:
                def __init__(self): self.config = config
                def log(self, values, step=None, **rest): print("log", step, values["loss"])
                def finish(self): print("finish")
            def init(project, name, **rest): print("init", project, name); return Run()
            def finish(): print("finish")
        """)
    )
    script = f"""
        from pathlib import Path
        from lowvram_tuner.config import TrainConfig
        from lowvram_tuner.train import trackers
        tracker = trackers._start({name!r}, Path({str(tmp_path)!r}) / "a-run", TrainConfig())
        trackers._logging(tracker)({{"loss": 1.5}}, 3)
        tracker.finish()
    """
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (tmp_path, root)))}
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:2] == ["init lowvram-tuner a-run", "log 3 1.5"]


CASES = {
    "config": (ConfigError("bits=5 is not one of 2, 3."), "bits=5 is not one of 2, 3.", False),
    "busy": (Busy(Holder("train", "r1", 1)), "Run r1 is in progress; stop it or wait until it ends.", False),
    "checkpoint": (CheckpointError("No room for step-2."), "No room for step-2.", False),
    "cpu-oom": (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: x"), "(RAM)", False),
    "disk": (OSError(28, "No space left on device"), "The disk is full.", False),
    "driver": (RuntimeError("CUDA error: unspecified launch failure\nCompile with"), "card reported a fault: CUDA error", True),
    "import": (ModuleNotFoundError("No module named 'peft'"), "A part of the program is missing", True),
    "bug": (KeyError(""), "KeyError:", True),
}


@pytest.mark.parametrize("kind", CASES)
def test_errors_are_put_into_words(kind):
    error, words, bug = CASES[kind]
    failure = failures.explain(error)
    assert words in failure.what and failure.bug is bug
    assert (failure.fix.endswith(".") or kind == "busy") and "\n" not in failure.what


def test_torchs_own_out_of_memory_is_recognised():
    torch = pytest.importorskip("torch")
    failure = failures.explain(torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))
    assert failure.what == "The card ran out of memory."
