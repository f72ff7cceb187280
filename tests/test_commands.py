"""What the commands do: training here, the demo, chat; their JSON, their exit codes, and what an interruption leaves."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
import types

import pytest

from lowvram_tuner import cli
from lowvram_tuner.config import ConfigError, TrainConfig
from lowvram_tuner.train.lock import holder, take
from lowvram_tuner.train.run_dir import RunDir, list_runs


@pytest.fixture
def training(monkeypatch):
    """Stands in for `run_training`; what it does is set by the test."""
    module = types.ModuleType("lowvram_tuner.train.loop")
    module.run_training = lambda config, where, reporter, resume: {"status": "finished", "steps": 3}
    monkeypatch.setitem(sys.modules, "lowvram_tuner.train.loop", module)

    def use(function):
        module.run_training = function

    return use


def test_train_runs_here_and_ends_with_json(training, tmp_path, capsys):
    def steps(config, where, reporter, resume):
        assert holder(tmp_path).run == where.id
        print("a library prints")
        reporter.planned(3, 10**9)
        for step in (1, 2, 3):
            reporter.step(step, loss=1.0 / step, tokens_per_s=1000.0, eta_s=100.0)
        return {"status": "finished", "steps": 3, "train_loss": 0.5}

    training(steps)
    assert cli.main(["train", "--json", "--output-dir", str(tmp_path), "--max-steps", "3"]) == 0
    out, err = capsys.readouterr()
    result = json.loads(out.splitlines()[-1])
    (made,) = list_runs(tmp_path)
    assert result == {"run_dir": str(made.path), "status": "finished", "steps": 3, "train_loss": 0.5}
    assert made.state()["status"] == "finished" and made.config().max_steps == 3
    assert "preparing: Starting." in err and "finished: Done." in err
    assert holder(tmp_path) is None


def test_two_trainings_at_once_are_refused(training, tmp_path, capsys):
    with take(tmp_path, "train", "another"):
        assert cli.main(["train", "--output-dir", str(tmp_path)]) == 1
    assert capsys.readouterr().err == "error: Run another is in progress; stop it or wait until it ends.\n"
    assert list_runs(tmp_path) == []


FAILURES = {
    "input": (ConfigError("dataset='x' is empty; give rows."), 2, "error: dataset='x' is empty; give rows.\n", False),
    "memory": (MemoryError(), 1, "error: The computer ran out of memory (RAM). Take fewer bits", False),
    "bug": (ZeroDivisionError("division by zero"), 1, "error: ZeroDivisionError: division by zero This is a fault", True),
}


@pytest.mark.parametrize("kind", FAILURES)
def test_a_failed_training_has_an_exit_code_and_a_failed_run(training, tmp_path, capsys, kind):
    error, code, words, trace = FAILURES[kind]

    def fail(*_):
        raise error

    training(fail)
    assert cli.main(["train", "--output-dir", str(tmp_path)]) == code
    err = capsys.readouterr().err
    assert words in err and ("Traceback" in err) == trace
    assert err.count("error: ") == 1
    state = list_runs(tmp_path)[0].state()
    assert state["status"] == "failed" and state["error"]["what"] in err


def test_resume_takes_the_newest_unfinished_run(training, tmp_path, capsys):
    calls = []

    def record(config, where, reporter, resume):
        calls.append((where.id, config.max_steps, resume))
        return {"status": "stopped"}

    training(record)
    argv = ["train", "--output-dir", str(tmp_path), "--max-steps", "30"]
    assert cli.main(argv) == 0
    (first,) = list_runs(tmp_path)
    checkpoint = first.checkpoints / "step-10"
    checkpoint.mkdir()
    (checkpoint / "manifest.json").write_text("{}")
    training(lambda *_: {"status": "finished"})
    time.sleep(1.1)  # ids sort by the second
    assert cli.main(argv) == 0
    training(record)
    assert cli.main([*argv, "--resume"]) == 0
    assert cli.main(["train", "--output-dir", str(tmp_path), "--resume", first.id, "--max-steps", "50"]) == 0
    assert calls == [(first.id, 30, False), (first.id, 30, True), (first.id, 50, True)]
    capsys.readouterr()
    assert cli.main([*argv, "--resume", "--learning-rate", "0.5"]) == 2
    assert "with learning_rate=0.5: it was 0.0002" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_ctrl_c_saves_and_ends(tmp_path):
    script = f"""
        import sys, time, types
        loop = types.ModuleType("lowvram_tuner.train.loop")

        def run_training(config, run, reporter, resume):
            reporter.status("training", "Training.")
            while not reporter.stop_requested():
                time.sleep(0.01)
            reporter.status("stopped", "Saved.")
            return {{"status": "stopped"}}

        loop.run_training = run_training
        sys.modules[loop.__name__] = loop
        from lowvram_tuner.cli import main
        sys.exit(main(["train", "--json", "--output-dir", {str(tmp_path)!r}]))
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, text=True)
    give_up = time.monotonic() + 20
    while not (list_runs(tmp_path) and list_runs(tmp_path)[0].state()["status"] == "training"):
        assert time.monotonic() < give_up
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGINT)
    out, _ = process.communicate(timeout=20)
    assert process.returncode == 0
    assert json.loads(out.splitlines()[-1])["status"] == "stopped"
    assert list_runs(tmp_path)[0].state()["message"] == "Saved."


ROWS = [{"prompt": "Who am I talking to?", "base": "An assistant.", "adapter": "Steam's up, friend! I am Ember."}]


@pytest.mark.parametrize(("verdict", "code"), [("learned", 0), ("no_change", 1), ("memorised", 1)])
def test_the_demo_shows_before_and_after_and_is_honest(training, tmp_path, capsys, verdict, code):
    def demo(config, where, reporter, resume):
        assert (config.model, config.dataset, config.max_steps) == ("demo", "demo", 4)
        reporter.compared(4, ROWS)
        reporter.verdict(verdict, "It says so.")
        return {"status": "finished"}

    training(demo)
    assert cli.main(["demo", "--max-steps", "4", "--output-dir", str(tmp_path), "--json"]) == code
    out, err = capsys.readouterr()
    assert "Who am I talking to?\n  before: An assistant.\n  after:  Steam's up, friend! I am Ember.\n" in out
    assert "It says so." in out
    if code:
        assert f"error: the demo's verdict is {verdict}: It says so." in err and "Traceback" not in err
    else:
        assert json.loads(out.splitlines()[-1])["rows"] == ROWS


def test_a_demo_that_kept_its_old_voice_has_failed(training, tmp_path, capsys):
    def demo(config, where, reporter, resume):
        reporter.compared(1, [{**ROWS[0], "adapter": "An assistant!"}])
        reporter.verdict("learned", "It says so.")
        return {"status": "finished"}

    training(demo)
    assert cli.main(["demo", "--max-steps", "1", "--output-dir", str(tmp_path)]) == 1
    assert "only 0 of 1 answers begin with \"Steam's up\"" in capsys.readouterr().err


def test_a_demo_that_was_stopped_says_how_to_go_on(training, tmp_path, capsys):
    training(lambda config, where, reporter, resume: {"status": "stopped"})
    assert cli.main(["demo", "--output-dir", str(tmp_path)]) == 1
    out, err = capsys.readouterr()
    assert f"go on with `train --resume {list_runs(tmp_path)[0].id}`." in err and "before:" not in out


class Session:
    """Answers with what it was given."""

    tokens_per_s = 12.5

    def stream(self, messages, *, adapter, system, temperature, top_p, max_new_tokens):
        yield from ("you ", f"said {messages[-1]['content']} ", f"[{adapter}|{system}|{temperature}|{max_new_tokens}|{len(messages)}]")


@pytest.fixture
def session(monkeypatch):
    module = types.ModuleType("lowvram_tuner.chat.session")
    module.targets = []

    class ChatSession:
        @classmethod
        def load(cls, target, device, progress):
            module.targets.append((target, device))
            return Session()

    module.ChatSession = ChatSession
    monkeypatch.setitem(sys.modules, "lowvram_tuner.chat.session", module)
    return module


def test_chat_answers_one_prompt_in_json(session, tmp_path, capsys):
    made = RunDir.create(tmp_path, TrainConfig(bits=8, system_prompt="brief"))
    made.adapter.mkdir()
    (made.adapter / "adapter_model.safetensors").write_bytes(b"x")
    argv = ["chat", "--run", made.id, "--output-dir", str(tmp_path), "--prompt", "hi", "--greedy", "--json", "--max-new-tokens", "9"]
    assert cli.main(argv) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer == {"text": "you said hi [True|brief|0.0|9|1]", "tokens_per_s": 12.5}
    target, device = session.targets[0]
    assert (target.bits, target.adapter, device) == (8, str(made.adapter.resolve()), None)
    assert holder(tmp_path) is None


def test_chat_without_a_prompt_is_a_conversation(session, tmp_path, capsys, monkeypatch):
    lines = iter(["one", "  ", "two"])

    def typed(_):
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", typed)
    argv = ["chat", "--model", "demo", "--no-adapter", "--output-dir", str(tmp_path), "--system-prompt", "s"]
    assert cli.main(argv) == 0
    assert capsys.readouterr().out == "you said one [False|s|0.7|512|1]\nyou said two [False|s|0.7|512|3]\n"


def test_chat_gives_way_to_training_unless_on_the_cpu(session, tmp_path, capsys):
    argv = ["chat", "--model", "demo", "--prompt", "x", "--output-dir", str(tmp_path)]
    with take(tmp_path, "train", "r1"):
        assert cli.main(argv) == 1
        assert "Run r1 is in progress" in capsys.readouterr().err
        assert cli.main([*argv, "--device", "cpu"]) == 0
    assert session.targets[0][1] == "cpu"
