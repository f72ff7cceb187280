"""The run's folder: whole files under concurrent reading, events by position, names, deletion, metrics after a resume."""

import json
import math
import threading

import pytest

from lowvram_tuner.config import ConfigError, TrainConfig
from lowvram_tuner.train import files
from lowvram_tuner.train.events import MESSAGE_LENGTH, Reporter
from lowvram_tuner.train.lock import take
from lowvram_tuner.train.run_dir import EMPTY_STATE, RunDir, find_run, list_runs


@pytest.fixture
def run(tmp_path):
    return RunDir.create(tmp_path / "runs", TrainConfig(seed=5, target_modules=("q_proj",)))


def test_a_new_run_has_its_config_and_a_full_state(run):
    assert run.config() == TrainConfig(seed=5, target_modules=("q_proj",))
    state = run.state()
    assert state.keys() == EMPTY_STATE.keys() | {"name"}
    assert (state["status"], state["name"], state["pid"]) == ("preparing", run.id, None)


def test_local_paths_are_made_absolute_and_hub_ids_are_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data.jsonl").write_text("{}\n")
    run = RunDir.create("runs", TrainConfig(dataset="data.jsonl", model="org/name"))
    assert run.config().dataset == str(tmp_path / "data.jsonl")
    assert run.config().model == "org/name"


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"output_dir=.*file"):
        RunDir.create(tmp_path / "file", TrainConfig())


def test_readers_never_see_half_a_state(run):
    reporter = Reporter(run)
    done, seen = threading.Event(), []

    def read():
        while not done.is_set():
            seen.append(json.loads((run.path / "state.json").read_text())["message"])

    reader = threading.Thread(target=read)
    reader.start()
    for n in range(300):
        reporter.status("training", f"{n} " + "x" * n)
    done.set()
    reader.join()
    assert len(seen) > 50
    assert all(m == "Starting." or len(m.split(" ")[1]) == int(m.split(" ")[0]) for m in seen)


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path, monkeypatch):
    target = tmp_path / "state.json"
    files.write_json(target, {"a": 1})
    monkeypatch.setattr(files, "patiently", lambda action: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        files.write_json(target, {"a": 2})
    assert json.loads(target.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["state.json"]


def test_events_are_read_on_from_a_position(run):
    reporter = Reporter(run)
    reporter.status("training", "Go.")
    first, position = run.events()
    assert [e["kind"] for e in first] == ["status"]
    for step in (1, 2, 3):
        reporter.step(step, loss=1.0 / step)
    some, middle = run.events(position, limit=2)
    rest, end = run.events(middle)
    assert [e["step"] for e in some + rest] == [1, 2, 3]
    assert run.events(end) == ([], end)


def test_a_half_written_line_waits_and_a_torn_one_is_skipped(run):
    Reporter(run).note("one")
    with (run.path / "events.jsonl").open("ab") as out:
        out.write(b'{"kind": "note", "te')
    events, position = run.events()
    assert [e["text"] for e in events] == ["one"]
    Reporter(run).note("two")  # a new writer after a power cut
    assert [e["text"] for e in run.events(position)[0]] == ["two"]


def test_numbers_json_cannot_hold_become_null(run):
    Reporter(run).step(1, loss=math.nan, grad_norm=math.inf, tokens=7)
    (event,) = run.events()[0]
    assert (event["loss"], event["grad_norm"], event["tokens"]) == (None, None, 7)
    assert "NaN" not in (run.path / "state.json").read_text()


def test_state_stays_small_however_long_the_run(run):
    reporter = Reporter(run)
    for step in range(1, 3001):
        reporter.step(step, loss=2.0, epoch=0.1)
    reporter.note("y" * 100_000)
    reporter.failed("x" * 100_000, "z" * 100_000)
    assert (run.path / "state.json").stat().st_size < 4 * MESSAGE_LENGTH
    assert len(run.metrics()) == 3000
    assert run.state()["step"] == 3000


def test_metrics_hold_each_step_once_after_a_resume(run):
    first = Reporter(run)
    for step in range(1, 8):
        first.step(step, loss=float(step))
    first.evaluated(5, 0.5)
    again = Reporter(run)  # resumed from the checkpoint of step 5
    again.step(6, loss=60.0)
    again.step(7, loss=70.0)
    steps = [(m["step"], m["loss"]) for m in run.metrics() if m["kind"] == "step"]
    assert steps == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0), (5, 5.0), (6, 60.0), (7, 70.0)]
    assert [m["eval_loss"] for m in run.metrics() if m["kind"] == "eval"] == [0.5]
    assert [e["step"] for e in run.events()[0] if e["kind"] == "resumed"] == [5]


def test_progress_is_thinned_out_but_its_end_is_told(run):
    reporter = Reporter(run)
    for done in range(0, 5001):
        reporter.status("preparing", "Loading.", done, 5000, "layers")
    told = [e["progress"]["done"] for e in run.events()[0]]
    assert told[0] == 0 and told[-1] == 5000 and len(told) < 500
    assert run.state()["progress"] == {"done": 5000, "total": 5000, "unit": "layers"}


def test_unknown_status_and_verdict_are_refused(run):
    with pytest.raises(ConfigError, match="status='done' is unknown; use one of preparing"):
        Reporter(run).status("done", "")
    with pytest.raises(ConfigError, match="verdict='good' is unknown; use one of learned"):
        Reporter(run).verdict("good", "")


def test_stop_reaches_the_reporter_and_can_be_cleared(run):
    reporter = Reporter(run)
    assert not reporter.stop_requested()
    run.request("stop")
    assert reporter.stop_requested()
    run.clear_requests()
    assert not reporter.stop_requested()
    with pytest.raises(ConfigError, match="action='pause' is unknown"):
        run.request("pause")


def test_a_tracker_that_fails_is_dropped_and_the_run_goes_on(run):
    reporter, seen = Reporter(run), []

    def broken(values, step):
        raise ConnectionError("no network")

    reporter.attach("wandb", broken)
    reporter.attach("own", lambda values, step: seen.append((step, values["loss"])))
    reporter.step(1, loss=2.0)
    reporter.step(2, loss=1.0)
    assert seen == [(1, 2.0), (2, 1.0)]
    assert [e["text"] for e in run.events()[0] if e["kind"] == "note"] == ["Logging to wandb stopped: no network"]


def test_rename_survives_the_worker_and_refuses_what_cannot_be_shown(run):
    reporter = Reporter(run)
    run.rename("  My   pirate ")
    reporter.status("training", "Go.")
    assert run.state()["name"] == "My pirate"
    run.rename("")
    assert run.state()["name"] == run.id
    with pytest.raises(ConfigError, match="up to 80"):
        run.rename("x" * 81)
    with pytest.raises(ConfigError, match="printable"):
        run.rename("a\x07b")


def test_runs_are_listed_newest_first_and_found_by_id_name_and_path(tmp_path, monkeypatch):
    root = tmp_path / "runs"
    assert list_runs(root) == []
    times = iter(["20260101-000000", "20260102-000000"])
    monkeypatch.setattr("lowvram_tuner.train.run_dir.time.strftime", lambda _: next(times))
    old, new = RunDir.create(root, TrainConfig()), RunDir.create(root, TrainConfig())
    (root / ".lock").write_text("")
    (root / "stray").mkdir()
    assert [r.id for r in list_runs(root)] == [new.id, old.id]
    old.rename("first")
    assert find_run(root, "first").id == find_run(root, old.id).id == find_run("elsewhere", str(old.path)).id == old.id
    with pytest.raises(ConfigError, match=f"run='nope' is not a run .* {new.id}"):
        find_run(root, "nope")


def test_a_deleted_run_is_gone_and_a_running_one_is_refused(run):
    with take(run.path.parent, "train", run.id), pytest.raises(ConfigError, match="in use; stop it"):
        run.delete()
    run.delete()
    assert not run.path.exists()
    assert list_runs(run.path.parent) == []


def test_last_words_are_the_last_line_that_says_something(run):
    assert run.last_words() == ""
    run.log.write_bytes(b"a\n" * 9000 + b"progress 1\rprogress 2\nCUDA error: device-side assert\n\n  \n")
    assert run.last_words() == "CUDA error: device-side assert"
