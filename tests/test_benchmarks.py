"""The measuring scripts as far as no card is needed: their cases are possible, their files go on, their tables say what was measured."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))

import bench_plan
import bench_train
import measured_table
import train_cases
from train_cases import CASES, ORDER, PEER_CASES, Case, Must, PeerCase

from lowvram_tuner import cli
from lowvram_tuner.memory.plan import GB
from lowvram_tuner.models.catalogue import ModelShape, shape_of

TINY = ModelShape("tiny", "qwen3", 64, 160, 3, 4, 2, 24, 2000, False, False, 512)


def namespace(tmp_path, **changes) -> argparse.Namespace:
    values = {
        "out": tmp_path / "out.json", "only": [], "peers": ["all"], "minutes": 10.0, "alpaca": None, "models": tmp_path / "models",
        "keep": False, "again": False,
    }  # fmt: skip
    return argparse.Namespace(**values | changes)


# the cases of training and peers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_every_case_is_a_command_line_that_is_understood(case):
    if "--decode" in case.options:
        pytest.importorskip("lowvram_tuner.chat.speed")
    args = cli.build_parser().parse_args([case.command, *case.options])
    config = cli.config_of(args)
    assert config.model in (case.model, train_cases.FOLDER) and shape_of(case.model)
    assert not (case.cap_gb and config.vram_gb)


def test_what_a_case_is_compared_with_is_measured_too():
    keys = [case.key for case in ORDER]
    assert len(set(keys)) == len(keys) == len(CASES) + len(PEER_CASES)
    for case in CASES:
        assert case.musts and all(m.metric in measured_table.UNITS and m.relation in ("<=", ">=") for m in case.musts)
        assert all(m.against in keys for m in case.musts if m.against)


def test_a_must_is_held_broken_or_open():
    absolute, ratio = Must("process_gb", "<=", 4.3), Must("step_ms", "<=", 0.25, "peer")
    assert absolute.held({"process_gb": 4.3}, {}) is True and absolute.held({"process_gb": 4.31}, {}) is False
    assert absolute.held({}, {}) is None and ratio.held({"step_ms": 10}, {}) is None
    assert ratio.held({"step_ms": 80}, {"peer": {"step_ms": 325}}) is True
    assert ratio.held({"step_ms": 82}, {"peer": {"step_ms": 325}}) is False
    assert Must("tokens_per_s", ">=", 1.3, "peer").held({"tokens_per_s": 131}, {"peer": {"tokens_per_s": 100}}) is True
    assert train_cases.FINITE.held({"loss_last": float("nan")}, {}) is False


def measured(case: Case | PeerCase) -> dict:
    return {
        "peak_allocated_gb": 3.5, "process_gb": 4.2, "step_ms": 60.0, "tokens_per_s": 9000.0, "samples_per_s": 30.0,
        "decode_tokens_per_s": 250.0, "gpu_busy_share": 0.93, "kernels": 4000, "load_s": 8.0, "load_of_peak": 0.9, "loss_last": 10.1,
        "command": f"python -m lowvram_tuner {case.key}",
    }  # fmt: skip


def test_the_table_has_each_case_its_command_and_whether_it_was_kept():
    results = {case.key: measured(case) for case in ORDER}
    results["13B in 7.6 GB"]["process_gb"] = 7.9
    results["32B 1x512, cap 5.2 GB"] = {"error": "out of memory", "command": "x"}
    del results[PEER_CASES[0].key]
    lines = measured_table.table(results).splitlines()
    rows = {line.split(" | ")[1]: line for line in lines if line.startswith("| ") and line[2].isdigit()}
    assert rows.keys() == {case.name for case in CASES}
    assert rows["7B in 4.3 GB"].endswith("| yes |") and "3.50 GB allocated, 4.20 GB process" in rows["7B in 4.3 GB"]
    assert rows["13B in 7.6 GB"].endswith("| no |") and "failed: out of memory" in rows["32B 1x512, cap 5.2 GB"]
    assert rows["8B 1x512, whole card"].endswith("| open |") and "not measured here" in rows["8B 1x512, whole card"]
    assert sum(line.startswith("| Unsloth, ") for line in lines) == sum(c.peer == "unsloth" for c in PEER_CASES) - 1
    assert sum(". `python -m lowvram_tuner " in line for line in lines) == len(CASES) - 1
    assert "30.0 samples/s" in next(line for line in lines if line.startswith("| Unsloth") and "8x512 rows" in line)


def test_the_readme_gets_the_table_between_its_markers(root):
    readme = (root / "README.md").read_text(encoding="utf-8")
    changed = measured_table.into_readme(readme, "a table")
    assert f"{measured_table.BEGIN}\na table\n{measured_table.END}" in changed
    assert measured_table.into_readme(changed, "a table") == changed
    head, tail = readme.split(measured_table.BEGIN)[0], readme.split(measured_table.END)[1]
    assert changed.startswith(head) and changed.endswith(tail)
    with pytest.raises(ValueError, match="needs one"):
        measured_table.into_readme("no markers", "a table")


def test_what_is_measured_next(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench_train, "missing", lambda peer: ["unsloth"] if peer == "unsloth" else [])
    done = {"7B in 4.3 GB": {"step_ms": 1}, "13B in 7.6 GB": {"error": "out of memory"}}
    keys = [c.key for c in bench_train.chosen(namespace(tmp_path), done)]
    assert "7B in 4.3 GB" not in keys and "13B in 7.6 GB" in keys and not any("Alpaca" in k or "unsloth" in k for k in keys)
    said = capsys.readouterr().err
    assert "Unsloth is left out: unsloth cannot be imported" in said and "give the examples with --alpaca" in said
    again = bench_train.chosen(namespace(tmp_path, again=True, only=["7B", "Alpaca"], peers=["none"], alpaca=Path("x")), done)
    assert [c.key for c in again if "Alpaca" not in c.key] == ["7B in 4.3 GB", "7B 1x512, whole card", "7B 2-bit, 1x128 r8"]
    assert sum("Alpaca" in c.key for c in again) == 2
    whole = namespace(tmp_path, only=["hf: Llama-3.1-8B-Instruct 1x512", "8B in"], peers=["hf"], alpaca=Path("x"))
    assert [c.key for c in bench_train.chosen(whole, {})] == ["8B in 4.95 GB", "hf: Llama-3.1-8B-Instruct 1x512"], "a whole name is that case"


def test_a_run_keeps_every_result_and_ends_in_time(tmp_path, monkeypatch):
    commands = []

    def child(command, minutes):
        commands.append(command)
        return {"step_ms": 5.0, "peak_allocated_gb": 2.0, "load_peak_gb": 1.0} if len(commands) == 1 else {"error": "out of memory"}

    monkeypatch.setattr(bench_train, "child", child)
    monkeypatch.setattr(bench_train, "read_card", lambda: None)
    chosen = [replace(CASES[1], name="capped"), replace(CASES[4], name="fails"), replace(CASES[5], name="late", minutes=11.0)]
    bench = bench_train.Bench(namespace(tmp_path), {})
    bench.run(chosen)
    bench.close()
    kept = bench_train.read(tmp_path / "out.json")
    assert kept.keys() == {"capped", "fails"} and kept["fails"]["error"] == "out of memory"
    assert kept["capped"]["load_of_peak"] == 0.5 and kept["capped"]["command"].startswith("python -m lowvram_tuner bench --model meta-llama/")
    assert commands[0][-1] == f"{train_cases.UNSLOTH_16_GB + 0.45:.3f}" and "--json" in commands[0]


def test_a_child_that_answers_fails_or_hangs():
    def run(code, minutes=0.1):
        return bench_train.child([sys.executable, "-c", code], minutes)

    assert run("print('progress'); print('{\"step_ms\": 3}')") == {"step_ms": 3}
    assert run("import sys; sys.exit('error: no such model')") == {"error": "error: no such model"}
    assert run("print('{\"step_ms\": 3}'); print('good bye')") == {"step_ms": 3}
    assert "no JSON" in run("print('hello')")["error"]
    assert "more than 3 s" in run("import time; time.sleep(30)", minutes=-0.95 / 3)["error"]


def test_samples_a_second_come_from_the_events_of_an_epoch(tmp_path):
    run, cache = tmp_path / "run", tmp_path / "cache" / "key"
    run.mkdir()
    cache.mkdir(parents=True)
    (cache / "meta.json").write_text(json.dumps({"report": {"kept": 300}}), encoding="utf-8")
    seconds = [9.0] * bench_train.SKIPPED_STEPS + [0.5] * (30 - bench_train.SKIPPED_STEPS)
    events = [{"kind": "status"}, *({"kind": "step", "step_s": s} for s in seconds)]
    (run / "events.jsonl").write_text("\n".join(map(json.dumps, events)), encoding="utf-8")
    assert bench_train.samples(run) == {"samples_per_s": 20.0, "step_ms": 500.0, "rows": 300}


# predictions -------------------------------------------------------------------------------------------------------------


def test_the_predictions_cover_what_was_asked():
    cases = bench_plan.cases()
    assert len({c.name for c in cases}) == len(cases) >= 60
    assert len({c.shape for c in cases}) == 8 and len({c.shape.split("-")[0] for c in cases}) == 5
    assert {c.bits for c in cases} == {2, 3, 4, 8, 16} and {c.method for c in cases} == {"nf4", "quip", "hqq", "int8", "gptq", "none"}
    for values, low, high in (([c.batch for c in cases], 1, 16), ([c.length for c in cases], 128, 4096), ([c.rank for c in cases], 4, 128)):
        assert (min(values), max(values)) == (low, high)


def test_each_case_has_a_plan_inside_its_budget():
    streamed = kept = 0
    for case in bench_plan.cases():
        config = bench_plan.config_for(case, "model", 600 * 10**6)
        plan = bench_plan.planned(case, config, int(config.vram_gb * GB), 600 * 10**6)
        assert plan.fits, case.name
        streamed, kept = streamed + (plan.streamed > 0), kept + (plan.keep_all == case.layers)
    assert streamed >= 20 and kept >= 10 and streamed + kept < 60


def test_a_shape_with_fewer_layers_is_what_bench_reads(tmp_path):
    for case in bench_plan.cases()[::8]:
        found = shape_of(str(bench_plan.write_config(case, tmp_path)))
        assert found == bench_plan.small_shape(case)
        assert found.linears() == shape_of(bench_plan.SHAPES[case.shape][0]).linears() and found.num_hidden_layers == case.layers


def test_the_summary_of_the_predictions(tmp_path):
    row = {"layers": 8, "streamed": 0, "predicted_ms": 10.0, "measured_ms": 20.0, "left_over_mb": 0.0, "card": "H100"}
    rows = {
        "good": row | {"name": "good", "predicted_gb": 2.02, "measured_gb": 2.0},
        "low": row | {"name": "low", "predicted_gb": 1.96, "measured_gb": 2.0, "streamed": 4},
        "high": row | {"name": "high", "predicted_gb": 2.1, "measured_gb": 2.0, "left_over_mb": 9.0},
        "bad": {"name": "bad", "error": "RuntimeError: x"},
        "good, own process": row | {"name": "good, own process", "fresh": "good", "predicted_gb": 2.02, "measured_gb": 2.003},
    }
    bench_plan.write(tmp_path / "plan.json", rows)
    assert bench_plan.read(tmp_path / "plan.json") == rows
    found = bench_plan.summary(rows)
    assert (found["cases"], found["failed"], found["held"], found["streamed"], found["unclean"]) == (3, 1, 1, 1, ["high"])
    assert found["most_too_low"] == ["low", -0.02] and found["most_too_high"] == ["high", 0.05]
    assert found["fresh_differs_mb"] == pytest.approx(3)
    text = bench_plan.table(rows)
    assert "| high | 0 of 8 | 2.100 GB | 2.000 GB | +5.0% ** | 0.50 |" in text and "1 of 3 predictions within +3%/-1%" in text
    assert bench_plan.summary({})["cases"] == 0 and bench_plan.table({})


# folders of random weights -----------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    import random_checkpoint

    monkeypatch.setattr(random_checkpoint, "shape_of", lambda model: TINY)
    made = random_checkpoint.make("tiny", tmp_path / "tiny", device="cpu")
    stamp = (made / "config.json").stat().st_mtime_ns
    assert random_checkpoint.make("tiny", made) == made and (made / "config.json").stat().st_mtime_ns == stamp  # made once
    return made


def test_a_folder_of_random_weights_is_a_model(folder, tmp_path):
    """This program's loader takes every tensor of it, and its examples become a peer's padded batches."""
    import peers
    import torch

    from lowvram_tuner.models.load import load_model
    from lowvram_tuner.models.source import load_tokenizer
    from lowvram_tuner.quant.registry import resolve
    from tests.engine_cases import make_plan

    loaded = load_model(str(folder), resolve(4), make_plan(head_bits=16), torch.device("cpu"), torch.float32)
    assert len(loaded.layers) == 3 and loaded.source.folder == folder
    batches = list(peers.row_batches("demo", str(folder), load_tokenizer(str(folder)), 4, 256, str(tmp_path / "runs")))
    assert len(batches) >= 10
    for batch in batches[:10]:
        assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape and batch["input_ids"].shape[0] == 4
        counted = batch["labels"] >= 0
        assert counted.any() and not counted[batch["attention_mask"] == 0].any()
        assert torch.equal(batch["labels"][counted], batch["input_ids"][counted])


@pytest.mark.gpu
@pytest.mark.parametrize("peer", train_cases.PEERS)
def test_a_peer_is_measured(folder, peer, root):
    if bench_train.missing(peer):
        pytest.skip(f"{peer} is not installed")
    command = [sys.executable, str(root / "tests/benchmarks/peers.py"), peer, str(folder), "--length", "64", "--steps", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["process_gb"] > found["peak_allocated_gb"] > 0 and found["kernels"] > 0 and 0 < found["gpu_busy_share"] <= 1
