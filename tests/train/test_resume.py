"""The real engine on a tiny model: a run cut in two, or killed, is bit for bit the run that was never interrupted."""

import json
import os
import signal
import sys
import time
from dataclasses import replace

import pytest
import torch
from tiny_model import make_data

from lowvram_tuner import cli
from lowvram_tuner.config import ConfigError, TrainConfig
from lowvram_tuner.train import checkpoints as ck
from lowvram_tuner.train.events import Reporter
from lowvram_tuner.train.lock import holder
from lowvram_tuner.train.run_dir import RunDir
from lowvram_tuner.train.supervisor import Supervisor
from lowvram_tuner.train.worker import conduct

STEPS, CUT = 20, 10


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """Sums of floats depend on how many threads share them, here and in the worker's process; and a tiny model needs one."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def config(tiny_run):
    return replace(tiny_run, warmup_steps=3, max_steps=STEPS, save_steps=5, eval_steps=5)


class StopAt(Reporter):
    """Asks its own run to stop after a step, as a press of Stop would."""

    def __init__(self, run, step):
        super().__init__(run)
        self._stop_at = step

    def stop_requested(self):
        return super().stop_requested() or self.state()["step"] >= self._stop_at


def whole(config):
    run = RunDir.create(config.output_dir, config)
    conduct(run, Reporter(run), resume=False)
    return run


def losses(run):
    return [(m["step"], m["loss"], m["learning_rate"]) for m in run.metrics() if m["kind"] == "step"]


def held_out(run):
    return [(m["step"], m["eval_loss"]) for m in run.metrics() if m["kind"] == "eval" and m["step"]]


def assert_equal_runs(one, other):
    """Same losses and rates at every step, same adapter, same state of optimizer and generators at the end."""
    assert [s for s, *_ in losses(one)] == list(range(1, STEPS + 1))
    assert losses(one) == losses(other)
    assert held_out(one) == held_out(other)
    a, b = (ck.load(ck.newest_valid(run.checkpoints)) for run in (one, other))
    assert a[1]["progress"] == b[1]["progress"] and a[1]["progress"]["step"] == STEPS
    assert a[1]["optimizer"] == b[1]["optimizer"]
    assert a[0].keys() == b[0].keys()
    for name in a[0]:
        assert torch.equal(a[0][name], b[0][name]), name
    assert (one.adapter / "adapter_model.safetensors").read_bytes() == (other.adapter / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize("changes", [{}, {"packing": True}, {"lora_dropout": 0.1}], ids=["plain", "packed", "dropout"])
def test_twenty_steps_are_ten_a_stop_and_ten_more(config, changes):
    config = TrainConfig.from_dict({**config.to_dict(), **changes})
    straight = whole(config)
    cut = RunDir.create(config.output_dir, config)
    conduct(cut, StopAt(cut, CUT), resume=False)
    assert cut.state()["status"] == "stopped"
    assert ck.steps(cut.checkpoints)[-1] == CUT
    torch.manual_seed(99)  # nothing may hang on what this process did meanwhile
    conduct(cut, Reporter(cut), resume=True)
    assert cut.state()["status"] == straight.state()["status"] == "finished"
    assert_equal_runs(straight, cut)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_a_worker_killed_in_mid_run_goes_on_as_if_nothing_had_happened(config):
    straight = whole(config)
    supervisor = Supervisor(config.output_dir)
    run = RunDir(supervisor.root / supervisor.start(config))
    wait(lambda: len(losses(run)) >= 7)
    os.kill(run.state()["pid"], signal.SIGKILL)
    wait(lambda: run.state()["status"] == "failed" and holder(supervisor.root) is None)
    assert len(losses(run)) < STEPS
    supervisor.resume(run.id)
    wait(lambda: run.state()["status"] == "finished")
    assert_equal_runs(straight, run)


def wait(condition, seconds=300.0):
    give_up = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < give_up, "waited too long"
        time.sleep(0.005)


def test_a_damaged_newest_checkpoint_is_passed_over_and_said(config):
    straight = whole(config)
    cut = RunDir.create(config.output_dir, config)
    conduct(cut, StopAt(cut, CUT), resume=False)
    tensors = cut.checkpoints / f"step-{CUT}" / ck.TENSORS
    tensors.write_bytes(tensors.read_bytes()[:-100])
    conduct(cut, Reporter(cut), resume=True)
    notes = [e["text"] for e in cut.events()[0] if e["kind"] == "note"]
    assert any(f"step-{CUT} is damaged" in note for note in notes)
    assert_equal_runs(straight, cut)


def test_other_data_or_options_are_refused_by_name(config, tmp_path):
    data = make_data(tmp_path / "mine.jsonl")
    config = TrainConfig.from_dict({**config.to_dict(), "dataset": str(data)})
    run = RunDir.create(config.output_dir, config)
    conduct(run, StopAt(run, 5), resume=False)
    run.set_config(TrainConfig.from_dict({**config.to_dict(), "learning_rate": 0.5}))
    with pytest.raises(ConfigError, match=r"learning_rate was 0\.01 and is now 0\.5"):
        conduct(run, Reporter(run), resume=True)
    run.set_config(config)
    make_data(data, rows=41)
    with pytest.raises(ConfigError, match=r"the contents of dataset=.* changed"):
        conduct(run, Reporter(run), resume=True)
    make_data(data)
    conduct(run, Reporter(run), resume=True)
    assert run.state()["status"] == "finished"


def test_train_and_chat_from_the_command_line(config, capsys):
    argv = ["train", "--json"]
    for name, value in config.changed().items():
        flag = f"--{name.replace('_', '-')}"
        argv += [flag.replace("--", "--no-")] if value is False else [flag, *map(str, value if isinstance(value, list) else [value])]
    assert cli.main(argv) == 0
    out, err = capsys.readouterr()
    result = json.loads(out.splitlines()[-1])
    assert {"run_dir", "adapter_dir", "status", "steps", "train_loss", "eval_loss", "peak_allocated_gb", "predicted_peak_gb"} <= result.keys()
    assert (result["status"], result["steps"]) == ("finished", STEPS)
    run = RunDir(result["run_dir"])
    first, last = losses(run)[0][1], losses(run)[-1][1]
    assert last < first - 0.4
    assert f"step {STEPS}" in err
    common = ["chat", "--json", "--greedy", "--prompt", "What is 7?", "--max-new-tokens", "12", "--output-dir", config.output_dir]
    texts = []
    for extra in (["--run", run.id], ["--run", run.id, "--no-adapter"], ["--model", config.model]):
        assert cli.main([*common, *extra]) == 0
        texts.append(json.loads(capsys.readouterr().out)["text"])
    assert texts[1] == texts[2] != texts[0]
