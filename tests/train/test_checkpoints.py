"""Checkpoints: exact round trips, every kind of damage, a full disk, a cut at any point, pruning, other data or options."""

import random
import shutil
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch

from lowvram_tuner.config import ConfigError, TrainConfig
from lowvram_tuner.train import checkpoints as ck

META = {"step": 3, "nested": {"list": [1, 2.5, None, "ü"], "lr": 0.1 + 0.2}}


def tensors(seed=0):
    g = torch.Generator().manual_seed(seed)
    return {
        "a.fp32": torch.randn(17, 5, generator=g),
        "b.bf16": torch.randn(9, generator=g).bfloat16(),
        "c.uint8": torch.arange(256, dtype=torch.uint8),
        "d.scalar": torch.tensor(7, dtype=torch.int64),
        "e.empty": torch.empty(0, 4),
    }


def saved(folder, *numbers):
    return [ck.save(folder / f"step-{n}", tensors(n), {**META, "step": n}) for n in numbers]


def test_what_is_loaded_is_bit_for_bit_what_was_saved(tmp_path):
    (path,) = saved(tmp_path, 3)
    loaded, meta = ck.load(path)
    assert meta == META
    assert loaded.keys() == tensors().keys()
    for name, value in tensors(3).items():
        assert loaded[name].dtype == value.dtype and loaded[name].shape == value.shape
        assert torch.equal(loaded[name], value)


def test_tied_and_strided_tensors_are_kept(tmp_path):
    base = torch.arange(12.0).view(3, 4)
    path = ck.save(tmp_path / "step-1", {"x": base, "tied": base, "column": base[:, 1], "t": base.t()}, {})
    loaded, _ = ck.load(path)
    assert torch.equal(loaded["tied"], base) and torch.equal(loaded["column"], base[:, 1])
    assert torch.equal(loaded["t"], base.t())


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "bit-in-tensors": (lambda p: flip(p / ck.TENSORS), "the contents of tensors.safetensors changed"),
    "bit-in-meta": (lambda p: flip(p / ck.META), "the contents of meta.json changed"),
    "cut-tensors": (lambda p: (p / ck.TENSORS).write_bytes((p / ck.TENSORS).read_bytes()[:-1]), "bytes instead of"),
    "no-tensors": (lambda p: (p / ck.TENSORS).unlink(), "tensors.safetensors: No such file"),
    "no-manifest": (lambda p: (p / ck.MANIFEST).unlink(), "manifest.json is missing or unreadable"),
    "half-manifest": (lambda p: (p / ck.MANIFEST).write_text('{"files": {'), "manifest.json is missing or unreadable"),
    "zeroed-manifest": (lambda p: (p / ck.MANIFEST).write_bytes(b"\0" * 300), "manifest.json is missing or unreadable"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_newest_falls_back_to_the_one_before_and_says_why(tmp_path, kind):
    damage, words = DAMAGE[kind]
    older, newest = saved(tmp_path, 9, 10)  # 10 > 9 by number, not by name
    assert ck.newest_valid(tmp_path) == newest
    damage(newest)
    said = []
    assert ck.newest_valid(tmp_path, said.append) == older
    assert len(said) == 1 and "step-10 is damaged" in said[0] and words in said[0]
    with pytest.raises(ck.CheckpointError, match="step-10 is damaged"):
        ck.load(newest)


def test_nothing_valid_is_none(tmp_path):
    assert ck.newest_valid(tmp_path / "absent") is None
    (path,) = saved(tmp_path, 1)
    flip(path / ck.TENSORS)
    assert ck.newest_valid(tmp_path) is None


def test_a_full_disk_is_said_and_leaves_the_others(tmp_path, monkeypatch):
    (older,) = saved(tmp_path, 1)
    monkeypatch.setattr(ck.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 90, 10))
    with pytest.raises(ck.CheckpointError, match=r"No room for step-2: the disk has 0.00 GB free. Make room"):
        saved(tmp_path, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-1"]
    assert ck.newest_valid(tmp_path) == older


@pytest.mark.skipif(sys.platform == "win32", reason="file size limits are POSIX")
def test_a_disk_that_fills_up_while_writing_leaves_the_others(tmp_path):
    """The system refuses the write half-way (a file size limit stands in for a full disk)."""
    (older,) = saved(tmp_path, 1)
    script = f"""
        import resource, signal, torch
        from lowvram_tuner.train import checkpoints as ck
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
        try:
            ck.save({str(tmp_path / "step-2")!r}, {{"x": torch.zeros(100_000)}}, {{}})
        except ck.CheckpointError as error:
            print(error)
    """
    out = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True)
    assert "step-2 could not be written" in out.stdout and "older checkpoints are untouched" in out.stdout, out.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["step-1"]
    assert ck.newest_valid(tmp_path) == older


def test_a_full_disk_seen_only_by_safetensors_is_recognised(tmp_path, monkeypatch):
    import safetensors.torch

    def full(*_):
        raise safetensors.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(ck.CheckpointError, match="No room for step-1"):
        saved(tmp_path, 1)
    assert list(tmp_path.iterdir()) == []


CUTS = ["_write_tensors", "_sha256", "write_json", "why_invalid", "_put_in_place"]


class PowerCut(BaseException):
    """Nothing after this runs: no handler, no clean-up."""


@pytest.mark.parametrize("where", CUTS)
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_cut_at_any_point_leaves_a_whole_checkpoint(tmp_path, monkeypatch, where, when):
    saved(tmp_path, 1)
    real = getattr(ck, where)

    def cut(*args, **kwargs):
        if when == "after":
            real(*args, **kwargs)
        raise PowerCut

    with monkeypatch.context() as m, pytest.raises(PowerCut):
        m.setattr(ck, where, cut)
        saved(tmp_path, 2)
    found = ck.newest_valid(tmp_path)
    assert found.name == ("step-2" if (where, when) == ("_put_in_place", "after") else "step-1")
    assert torch.equal(ck.load(found)[0]["a.fp32"], tensors(int(found.name[5:]))["a.fp32"])
    saved(tmp_path, 3)
    assert not [p.name for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_saving_a_step_again_replaces_it_and_a_cut_between_keeps_the_old(tmp_path, monkeypatch):
    (path,) = saved(tmp_path, 4)
    ck.save(path, tensors(99), {**META, "again": True})
    assert ck.load(path)[1]["again"] is True
    monkeypatch.setattr(ck, "sync_folder", lambda _: None)
    real = type(path).rename

    def cut(self, target):
        if self.name.endswith(".tmp"):
            raise PowerCut
        return real(self, target)

    with monkeypatch.context() as m, pytest.raises(PowerCut):
        m.setattr(type(path), "rename", cut)
        ck.save(path, tensors(5), META)
    assert ck.newest_valid(tmp_path) == path
    assert ck.load(path)[1]["again"] is True


def test_pruning_keeps_the_newest_and_the_best(tmp_path):
    saved(tmp_path, 2, 4, 6, 8, 10)
    ck.mark_best(tmp_path / "step-4", 1.25)
    removed = ck.prune(tmp_path, keep=2)
    assert sorted(p.name for p in removed) == ["step-2", "step-6"]
    assert ck.steps(tmp_path) == [4, 8, 10]
    assert ck.best(tmp_path) == (tmp_path / "step-4", 1.25)
    ck.mark_best(tmp_path / "step-10", 1.0)
    ck.prune(tmp_path, keep=2)
    assert ck.steps(tmp_path) == [8, 10]
    shutil.rmtree(tmp_path / "step-10")
    assert ck.best(tmp_path) is None


def test_the_same_run_may_be_resumed_with_free_options_changed():
    meta = {"config": TrainConfig(seed=1).to_dict(), "fingerprint": "f"}
    again = TrainConfig(seed=1, output_dir="elsewhere", vram_gb=6, save_steps=3, max_steps=90, report_to="wandb")
    assert ck.same_run(meta, again, "f") == []
    ck.require_same_run(meta, again, "f")


def test_a_changed_option_or_other_data_is_refused_by_name():
    meta = {"config": TrainConfig(dataset="a.jsonl").to_dict(), "fingerprint": "f"}
    changed = TrainConfig(dataset="a.jsonl", learning_rate=0.5, lora_r=4)
    assert ck.same_run(meta, changed, "f") == ["lora_r was 16 and is now 4", "learning_rate was 0.0002 and is now 0.5"]
    with pytest.raises(ConfigError, match=r"lora_r was 16 and is now 4; learning_rate was 0.0002.*start a new run"):
        ck.require_same_run(meta, changed, "f")
    with pytest.raises(ConfigError, match=r"the contents of dataset='a.jsonl' changed"):
        ck.require_same_run(meta, TrainConfig(dataset="a.jsonl"), "g")


def test_an_optimizers_state_survives_packing(tmp_path):
    weight = torch.nn.Parameter(torch.randn(4, 3))
    optimizer = torch.optim.AdamW([weight], lr=1e-3)
    weight.sum().backward()
    optimizer.step()
    kept = {}
    packed = ck.pack(optimizer.state_dict(), "optimizer", kept)
    path = ck.save(tmp_path / "step-1", kept, {"optimizer": packed})
    loaded, meta = ck.load(path)
    state = ck.unpack(meta["optimizer"], loaded)
    expected = optimizer.state_dict()
    assert state["param_groups"] == expected["param_groups"]
    assert isinstance(state["param_groups"][0]["betas"], tuple)
    assert state["state"].keys() == {0}
    for name, value in expected["state"][0].items():
        assert torch.equal(state["state"][0][name], value), name
    with pytest.raises(TypeError, match="a set cannot be kept"):
        ck.pack({1: {2}}, "x", {})


def test_every_generator_goes_on_where_it_was(tmp_path):
    def draw():
        return random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(5).tolist()

    draw()
    kept = {}
    packed = ck.random_state(kept)
    path = ck.save(tmp_path / "step-1", kept, {"random": packed})
    expected = [draw(), draw()]
    loaded, meta = ck.load(path)
    ck.set_random_state(meta["random"], loaded)
    assert [draw(), draw()] == expected
