"""A run at bits that need calibration makes its quantized model once, trains on it, and so do the runs after it."""

import os
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from lowvram_tuner.chat.target import target_of_run
from lowvram_tuner.config import TrainConfig
from lowvram_tuner.models import kept
from lowvram_tuner.quant.checkpoint import open_checkpoint
from lowvram_tuner.train import base_model
from lowvram_tuner.train.events import Reporter
from lowvram_tuner.train.run_dir import RunDir, list_runs
from lowvram_tuner.train.worker import conduct


@pytest.fixture
def config(files, tmp_path):
    model, data = files
    return TrainConfig(
        model=str(model), dataset=str(data), bits=3, group_size=32, micro_batch_size=2, gradient_accumulation_steps=1,
        max_seq_length=64, lora_r=4, max_steps=4, save_steps=2, eval_steps=4, precision="fp32", compare_prompts=("Hello?",),
        output_dir=str(tmp_path / "runs"),
    )  # fmt: skip


def train(config, run=None, reporter=Reporter, resume=False):
    run = run or RunDir.create(config.output_dir, config)
    run.clear_requests()
    return run, conduct(run, reporter(run), resume)


class StopWhileQuantizing(Reporter):
    """Presses Stop once the first layer, seven weights, and one more are quantized."""

    def stop_requested(self):
        progress = self.state()["progress"]
        return bool(progress and progress["done"] == 8 and "Quantizing" in self.state()["message"])


def messages(run):
    return [e["message"] for e in run.events()[0] if e["kind"] == "status"]


def test_the_first_run_quantizes_and_the_next_ones_use_it(config, monkeypatch):
    run, result = train(config)
    folder = kept.place(config)
    assert result["status"] == "finished" and folder.parent.name == "models" and kept.find(config).model == str(folder)
    spec = open_checkpoint(folder).spec
    assert (spec.method, spec.bits, spec.group_size, spec.sym) == ("gptq", 3, 32, False)
    assert any(m.startswith("Quantizing the model, once for all runs") for m in messages(run))
    assert run.config().model == str(folder) == target_of_run(run).model, "chat would answer with other weights than were trained on"
    assert [r.id for r in list_runs(config.output_dir)] == [run.id], "the kept model is no run"

    assert AutoTokenizer.from_pretrained(run.adapter).chat_template == AutoTokenizer.from_pretrained(config.model).chat_template

    monkeypatch.setattr(kept, "quantize_model", None)
    again, result = train(config)
    assert result["status"] == "finished" and again.config().model == str(folder)
    assert not any(m.startswith("Quantizing") for m in messages(again))
    losses = [[m["loss"] for m in r.metrics() if m["kind"] == "step"] for r in (run, again)]
    assert losses[0] == losses[1] and len(losses[0]) == 4


def test_a_model_of_the_hub_is_fetched_first_and_stop_is_heard_meanwhile(config, monkeypatch):
    class StopWhileFetching(Reporter):
        def stop_requested(self):
            progress = self.state()["progress"]
            return bool(progress and progress["done"] == 5 and "Fetching" in self.state()["message"])

    def locate(model, progress):
        for done in range(0, 11, 5):
            progress(done, 10)

    monkeypatch.setattr(base_model, "locate", locate)
    run, result = train(config, reporter=StopWhileFetching)
    assert result["status"] == "stopped" == run.state()["status"] and "while the model was fetched" in run.state()["message"]
    fetched = [e["progress"] for e in run.events()[0] if e["kind"] == "status" and e["message"].startswith("Fetching the model, once")]
    assert fetched[0] == {"done": 0, "total": 10, "unit": "bytes"}
    assert not any("Quantizing" in m or "Reading" in m for m in messages(run))


def test_a_run_stopped_while_quantizing_goes_on_with_the_next_layer(config, monkeypatch):
    run, result = train(config, reporter=StopWhileQuantizing)
    assert result["status"] == "stopped" == run.state()["status"] and "while the model was quantized" in run.state()["message"]
    assert not kept.place(config).exists() and run.config().model == config.model
    (partial,) = kept.place(config).parent.glob("*.partial")
    assert len(list(partial.glob("layer-*.safetensors"))) == 1
    seen = []
    inner = kept.quantize_model

    def watched(*args, progress, **more):
        return inner(*args, progress=lambda *what: (seen.append(what), progress(*what)), **more)

    monkeypatch.setattr(kept, "quantize_model", watched)
    run, result = train(config, run)
    assert result["status"] == "finished" and kept.place(config).is_dir()
    assert [done for _, done, _ in seen] == [0, 7, *range(8, 15), 14], "the first layer is not quantized again"
    assert not list(kept.place(config).parent.glob("*.partial"))


def test_what_needs_no_data_is_quantized_on_load(config, files):
    for bits, method in ((4, "auto"), (8, "auto"), (16, "auto"), (3, "hqq")):
        assert kept.place(TrainConfig.from_dict({**config.to_dict(), "bits": bits, "method": method})) is None
    assert kept.find(config) == config, "nothing was made yet"


def test_a_checkpoint_is_not_quantized_again(config):
    made = kept.make(config)
    assert kept.place(made) is None and kept.make(made) == made


def test_models_methods_and_groups_are_told_apart(config, files, tmp_path):
    places = {kept.place(config)}
    other = tmp_path / "elsewhere" / files[0].name
    other.parent.mkdir()
    other.symlink_to(files[0])
    for change in ({"bits": 2, "method": "gptq"}, {"method": "gptq", "group_size": 64}, {"bits": 4, "method": "gptq"}):
        places.add(kept.place(TrainConfig.from_dict({**config.to_dict(), **change})))
    assert len(places) == 4
    assert kept.place(TrainConfig.from_dict({**config.to_dict(), "model": str(other)})) in places, "the same files by another path"


def test_other_weights_in_the_same_folder_are_another_model(config, tmp_path):
    folder = shutil.copytree(config.model, tmp_path / "mine")
    mine = TrainConfig.from_dict({**config.to_dict(), "model": str(folder)})
    before = kept.place(mine)
    os.utime(folder / "model.safetensors", ns=(1, 1))
    assert kept.place(mine) != before


def test_data_shorter_than_a_row_is_enough(config, files, tmp_path):
    few = tmp_path / "few.jsonl"
    few.write_text("".join(files[1].read_text().splitlines(keepends=True)[:3]))
    short = TrainConfig.from_dict({**config.to_dict(), "dataset": str(few), "max_seq_length": 512, "held_out": 0.0})
    assert open_checkpoint(Path(kept.make(short).model)) is not None
