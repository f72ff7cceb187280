"""What a real run on a tiny model leaves as proof: checks, answers at each checkpoint, the best adapter, the command that repeats it."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from lowvram_tuner import cli
from lowvram_tuner.config import ConfigError, TrainConfig
from lowvram_tuner.train import checkpoints as ck
from lowvram_tuner.train import loop
from lowvram_tuner.train.answers import Questions
from lowvram_tuner.train.evaluate import perplexity
from lowvram_tuner.train.events import Reporter
from lowvram_tuner.train.optimizer import Optimizer
from lowvram_tuner.train.run_dir import RunDir, list_runs
from lowvram_tuner.train.step import FusedStep
from lowvram_tuner.train.worker import conduct


@pytest.fixture
def config(files, tmp_path):
    model, data = files
    return TrainConfig(
        model=str(model), dataset=str(data), bits=16, micro_batch_size=4, gradient_accumulation_steps=1, max_seq_length=64, lora_r=4,
        learning_rate=1e-2, warmup_steps=1, max_steps=12, save_steps=4, eval_steps=4, precision="fp32", packing=False,
        compare_prompts=("Hello?", "Who?"), output_dir=str(tmp_path / "runs"),
    )  # fmt: skip


def trained(config: TrainConfig, losses: list[float] | None = None, monkeypatch=None) -> RunDir:
    """A finished run. losses: what the held-out checks are made to say."""
    if losses:
        left = iter(losses)

        def said(step, examples, *_):
            return next(left) * loop.target_counts(examples).astype(float)

        monkeypatch.setattr(loop, "held_out_losses", said)
    run = RunDir.create(config.output_dir, config)
    conduct(run, Reporter(run), resume=False)
    return run


def events(run: RunDir, kind: str) -> list[dict]:
    return [e for e in run.events()[0] if e["kind"] == kind]


def adapter_of(step: int, run: RunDir) -> dict[str, torch.Tensor]:
    tensors, _ = ck.load(run.checkpoints / f"step-{step}")
    return {k.removeprefix("adapter."): v for k, v in tensors.items() if k.startswith("adapter.")}


def test_the_questions_are_answered_at_every_checkpoint(config):
    run = trained(config)
    asked = events(run, "compare")
    assert [e["step"] for e in asked] == [4, 8, 12] == [e["step"] for e in events(run, "checkpoint")]
    assert [[r["prompt"] for r in e["rows"]] for e in asked] == [["Hello?", "Who?"]] * 3
    assert len({json.dumps([r["base"] for r in e["rows"]]) for e in asked}) == 1
    assert len({json.dumps([r["adapter"] for r in e["rows"]]) for e in asked}) > 1
    assert [e["step"] for e in events(run, "eval")] == [0, 4, 8, 12]
    assert len(events(run, "verdict")) == 1


ALONE = """
import socket, sys
from pathlib import Path

asked, real = [], socket.getaddrinfo
socket.getaddrinfo = lambda host, *rest, **options: asked.append(host) or real(host, *rest, **options)

from lowvram_tuner import cli

model, data, runs = sys.argv[1:]
few = ["--max-steps", "2", "--save-steps", "1", "--max-seq-length", "64", "--compare-prompts", "Hi"]
assert cli.main(["train", "--model", model, "--dataset", data, "--output-dir", runs, *few]) == 0
(adapter,) = Path(runs).glob("*/adapter")
assert cli.main(["chat", "--model", model, "--adapter", str(adapter), "--prompt", "Hi", "--max-new-tokens", "2"]) == 0
assert not asked, asked
"""


def test_a_local_run_and_its_chat_ask_no_other_computer(files, tmp_path):
    """PEFT would ask the hub for a model of the folder's name."""
    online = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", ALONE, *map(str, files), tmp_path], env=online, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_best_checkpoint_is_kept_and_answers(config, monkeypatch):
    run = trained(config, [3.0, 2.0, 2.5, 2.6], monkeypatch)
    assert ck.best(run.checkpoints)[0].name == "step-4"
    kept = load_file(run.adapter / "adapter_model.safetensors")
    assert all(torch.equal(kept[k], v) for k, v in adapter_of(4, run).items())
    asked = events(run, "compare")
    assert [e["step"] for e in asked] == [4, 8, 12, 4] and asked[-1]["rows"] == asked[0]["rows"]
    verdict = events(run, "verdict")[0]
    assert verdict["verdict"] == "memorised" and "The adapter kept is that of epoch 1 (step 4)" in verdict["text"]


def test_the_least_bad_checkpoint_is_kept_where_the_base_was_better(config, monkeypatch):
    run = trained(config, [2.0, 2.4, 2.3, 2.6], monkeypatch)
    kept = load_file(run.adapter / "adapter_model.safetensors")
    assert all(torch.equal(kept[k], v) for k, v in adapter_of(8, run).items())
    assert "worse from the start" in events(run, "verdict")[0]["text"]


def test_the_run_stops_early_when_nothing_improves(config, monkeypatch):
    config = TrainConfig.from_dict({**config.to_dict(), "patience": 2, "max_steps": 100})
    run = trained(config, [3.0, 2.0, 2.0, 2.0001, 1.0], monkeypatch)
    assert run.state()["step"] == 12 and run.state()["status"] == "finished"
    assert any("Stopped at step 12: no improvement in 2 checks." in e["text"] for e in events(run, "note"))


def poison(monkeypatch, steps):
    """Has the updates of those steps leave nothing of the adapter."""
    real = Optimizer.step

    def step(self, rate):
        norm = real(self, rate)
        if self.steps in steps:
            self.adapter.parameters.fill_(torch.inf)
        return norm

    monkeypatch.setattr(Optimizer, "step", step)


def test_a_loss_that_is_no_number_any_more_ends_the_run_and_keeps_the_best_adapter(config, monkeypatch):
    poison(monkeypatch, [5])
    with pytest.raises(ConfigError, match=r"learning_rate=0.01 is too high .* since step 6\. The adapter of step 4, .*, is kept\.$"):
        trained(replace(config, max_steps=100, save_steps=100))
    run = list_runs(config.output_dir)[0]
    assert run.state()["status"] == "failed" and run.state()["step"] == 10 and "is too high" in run.state()["message"]
    kept = load_file(run.adapter / "adapter_model.safetensors")
    assert all(torch.equal(kept[k], v) and v.isfinite().all() for k, v in adapter_of(4, run).items())


def test_nothing_is_kept_of_a_run_that_never_learned(config, monkeypatch):
    poison(monkeypatch, [1])
    with pytest.raises(ConfigError, match=r"no number since step 2\.$"):
        trained(replace(config, max_steps=100, save_steps=100, eval_steps=100))
    assert not list_runs(config.output_dir)[0].adapter.exists()


def test_one_loss_that_is_no_number_ends_nothing(config, monkeypatch):
    real, calls = FusedStep.accumulate, []

    def accumulate(self, *args):
        calls.append(1)
        return real(self, *args) * (torch.nan if len(calls) == 6 else 1.0)

    monkeypatch.setattr(FusedStep, "accumulate", accumulate)
    assert trained(config).state()["status"] == "finished"


@pytest.mark.parametrize("held_out", [0.1, 0.0])
def test_a_base_without_a_loss_is_refused(config, tmp_path, held_out):
    folder = shutil.copytree(config.model, tmp_path / "damaged")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"].fill_(3e38)  # finite, but nothing after it is
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"damaged' gives no number for a loss before any training: .*; get the model again"):
        trained(replace(config, model=str(folder), held_out=held_out))
    (tmp_path / "text.txt").write_text("Hello, what is this?")
    with pytest.raises(ConfigError, match="damaged' gives no number for a loss on this text"):
        perplexity(replace(config, model=str(folder)), None, tmp_path / "text.txt")


def test_no_memory_for_the_answers_costs_only_the_answers(config, monkeypatch):
    real, calls = Questions.ask, []

    def ask(self, *args):
        calls.append(1)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, *args)

    monkeypatch.setattr(Questions, "ask", ask)
    run = trained(config)
    assert run.state()["status"] == "finished"
    assert [e["step"] for e in events(run, "compare")] == [8, 12]
    assert any("were not asked at step 4" in e["text"] for e in events(run, "note"))


def test_losses_by_example_add_up_to_the_check(config, monkeypatch):
    seen = []
    real = loop.held_out_losses

    def noted(step, examples, *args):
        seen.append((real(step, examples, *args), loop.target_counts(examples), [step.evaluate]))
        return seen[-1][0]

    monkeypatch.setattr(loop, "held_out_losses", noted)
    run = trained(config)
    for (losses, tokens, _), event in zip(seen, events(run, "eval"), strict=True):
        assert len(losses) == len(tokens) == 4 and (losses > 0).all()
        assert event["loss"] == pytest.approx(losses.sum() / tokens.sum(), rel=1e-12)
    packed = TrainConfig.from_dict({**config.to_dict(), "packing": True, "micro_batch_size": 1, "max_steps": 1})
    trained(packed)
    assert seen[4][0] == pytest.approx(seen[0][0], rel=1e-5)  # however the examples lie in batches


def test_the_command_in_the_folder_repeats_the_run(config):
    run = trained(config)
    words = shlex.split((run.path / "command.txt").read_text())
    assert words[:3] == ["python", "-m", "lowvram_tuner"]
    assert cli.main(words[3:]) == 0
    again = next(r for r in (RunDir(p) for p in run.path.parent.iterdir() if (p / "config.json").is_file()) if r.id != run.id)
    one, other = ([m.get("loss", m.get("eval_loss")) for m in r.metrics()] for r in (run, again))
    assert one == other and len(one) == 16
    assert again.config() == run.config()
