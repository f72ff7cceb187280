"""One worker at a time, whoever starts it; nothing is lost when the worker, the page, or both die."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import psutil
import pytest

from lowvram_tuner.config import ConfigError, TrainConfig
from lowvram_tuner.train import supervisor as sup
from lowvram_tuner.train.lock import Busy, holder, take
from lowvram_tuner.train.run_dir import RunDir, list_runs
from lowvram_tuner.train.supervisor import Supervisor, make_room, settle

FAKE = (sys.executable, str(Path(__file__).with_name("fake_worker.py")))
posix = pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "my runs ü"
    yield folder
    if (found := holder(folder)) and found.pid != os.getpid():
        psutil.Process(found.pid).kill()


@pytest.fixture
def supervisor(root):
    return Supervisor(root, FAKE)


def until(condition, seconds=20.0):
    give_up = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < give_up, "waited too long"
        time.sleep(0.01)
    return value


def ended(run):
    """The final state, once the worker has also let go."""
    until(lambda: run.state()["status"] in ("finished", "stopped", "failed") and holder(run.path.parent) is None)
    return run.state()


def config(kind, **options):
    return TrainConfig(model=kind, **options)


def stepping(run):
    return until(lambda: run.state()["status"] == "training" and len(run.metrics()) >= 12)


def test_a_run_starts_and_finishes(supervisor, root):
    run = RunDir(root / supervisor.start(config("quick")))
    state = ended(run)
    assert (state["status"], state["error"], state["pid"]) == ("finished", None, None)
    assert [m["step"] for m in run.metrics()] == [1, 2, 3]
    assert supervisor.active() is None


def test_a_second_start_is_refused_and_names_the_run(supervisor, root):
    first = supervisor.start(config("slow", max_steps=10_000))
    assert supervisor.active() == first
    with pytest.raises(Busy, match=f"Run {first} is in progress"):
        supervisor.start(config("quick"))
    with pytest.raises(Busy):
        Supervisor(root, FAKE).resume(first)
    assert [r.id for r in list_runs(root)] == [first]
    assert supervisor.stop() == first
    assert ended(RunDir(root / first))["status"] == "stopped"


@pytest.mark.parametrize("pages", [1, 4], ids=["same-page", "four-pages"])
def test_simultaneous_starts_make_one_run(root, pages):
    supervisors = [Supervisor(root, FAKE) for _ in range(pages)]
    results = []

    def press(n):
        try:
            results.append(supervisors[n % pages].start(config("slow", max_steps=10_000)))
        except Busy:
            results.append(None)

    threads = [threading.Thread(target=press, args=(n,)) for n in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    started = [r for r in results if r]
    assert len(started) == 1 and len(results) == 4
    assert [r.id for r in list_runs(root)] == started
    supervisors[0].stop(force=True)


@posix
def test_a_killed_worker_is_failed_with_the_reason_and_resumes(supervisor, root):
    run = RunDir(root / supervisor.start(config("slow", max_steps=40)))
    stepping(run)
    os.kill(run.state()["pid"], signal.SIGKILL)
    state = ended(run)
    assert state["status"] == "failed"
    assert "killed, most likely because the computer ran out of memory" in state["error"]["what"]
    assert "Resume goes on from step 10" in state["error"]["fix"]
    assert run.events()[0][-1]["status"] == "failed"
    assert supervisor.resume(run.id) == run.id
    state = ended(run)
    assert (state["status"], state["error"]) == ("finished", None)
    assert [m["step"] for m in run.metrics()] == list(range(1, 41))


DEATHS = {
    "bad": ("model='bad' is not a model; give 'demo'.", "Change that and start again."),
    "oom": ("The card ran out of memory.", "Take fewer bits, a smaller batch"),
    "bug": ("ZeroDivisionError: division by zero", "This is a fault of the program"),
    "exit": ("exit code 7. Its last words: fatal: the driver went away", "resuming starts over"),
    "segfault": ("signal 11 (SIGSEGV)", "worker.log"),
}


@posix
@pytest.mark.parametrize("kind", DEATHS)
def test_every_death_is_explained(supervisor, root, kind):
    run = RunDir(root / supervisor.start(config(kind)))
    error = ended(run)["error"]
    what, fix = DEATHS[kind]
    assert what in error["what"] and fix in error["fix"]
    assert "\n" not in error["what"]
    log = run.log.read_text()
    assert ("Traceback" in log) == (kind in ("bad", "oom", "bug"))


@pytest.mark.parametrize("status", ["preparing", "checking", "training", "saving"])
def test_stop_works_in_every_state(supervisor, root, status):
    run = RunDir(root / supervisor.start(config(f"stuck-in-{status}")))
    until(lambda: run.state()["message"] == "Busy.")
    assert run.state()["status"] == status
    supervisor.stop()
    assert ended(run)["status"] == "stopped"


def test_stop_right_after_start_is_not_lost(supervisor, root):
    run = RunDir(root / supervisor.start(config("slow", max_steps=10_000)))
    supervisor.stop()
    assert ended(run)["status"] == "stopped"
    assert run.state()["step"] < 10_000


def test_an_old_stop_does_not_end_the_resumed_run(supervisor, root):
    run = RunDir(root / supervisor.start(config("slow", max_steps=60)))
    stepping(run)
    supervisor.stop()
    stopped_at = ended(run)["step"]
    supervisor.resume(run.id)
    assert ended(run)["status"] == "finished"
    assert [m["step"] for m in run.metrics()] == list(range(1, 61))
    assert 0 < stopped_at < 60


def test_a_forced_stop_is_stopped_not_failed(supervisor, root):
    run = RunDir(root / supervisor.start(config("slow", max_steps=10_000)))
    stepping(run)
    assert supervisor.stop(force=True) == run.id
    state = ended(run)
    assert (state["status"], state["error"]) == ("stopped", None)
    assert "Resume goes on from step" in state["message"]
    assert supervisor.stop() is None


def page(root, then):
    """A page process: starts a slow run, prints its id, then does `then`."""
    script = f"""
        import os, time
        from lowvram_tuner.config import TrainConfig
        from lowvram_tuner.train.supervisor import Supervisor
        s = Supervisor({str(root)!r}, {FAKE!r})
        print(s.start(TrainConfig(model="slow", max_steps=60)), flush=True)
        {then}
    """
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, text=True, start_new_session=True
    )


@posix
def test_a_killed_page_does_not_end_the_run_and_a_new_page_finds_it(root):
    process = page(root, "time.sleep(600)")
    run = RunDir(root / process.stdout.readline().strip())
    os.killpg(process.pid, signal.SIGKILL)  # the page and all in its process group
    process.wait()
    again = Supervisor(root, FAKE)
    assert again.active() == run.id
    with pytest.raises(Busy):
        again.start(config("quick"))
    assert ended(run)["status"] == "finished"
    assert [m["step"] for m in run.metrics()] == list(range(1, 61))
    assert again.active() is None


@posix
def test_a_worker_that_dies_after_its_page_is_found_by_the_next(root):
    process = page(root, "os._exit(0)")
    run = RunDir(root / process.stdout.readline().strip())
    process.wait()
    attached = Supervisor(root, FAKE)
    assert attached.active() == run.id
    stepping(run)
    os.kill(run.state()["pid"], signal.SIGKILL)
    until(lambda: attached.active() is None)  # the page's poll notices
    assert run.state()["status"] == "failed"
    assert "ended without saying why" in run.state()["error"]["what"]


@posix
def test_both_dead_is_found_at_the_next_start_of_the_page(root):
    process = page(root, "time.sleep(600)")
    run = RunDir(root / process.stdout.readline().strip())
    stepping(run)
    worker = run.state()["pid"]
    os.killpg(process.pid, signal.SIGKILL)
    os.kill(worker, signal.SIGKILL)
    process.wait()
    until(lambda: holder(root) is None)  # a dead process keeps its lock until its last thread is gone
    assert run.state()["status"] == "training"
    again = Supervisor(root, FAKE)
    assert run.state()["status"] == "failed"
    again.resume(run.id)
    assert ended(run)["status"] == "finished"


def test_a_run_that_is_just_starting_is_not_declared_dead(root):
    run = RunDir.create(root, config("quick"))
    settle(run)
    assert run.state()["status"] == "preparing"
    run.write_state({**run.state(), "updated": time.time() - sup.START_SECONDS - 1})
    settle(run)
    assert run.state()["status"] == "failed"


def test_a_dead_run_is_buried_while_another_one_is_at_work(supervisor, root):
    dead = RunDir.create(root, config("quick"))
    dead.write_state({**dead.state(), "status": "training", "pid": 2**22 + 1})
    first = supervisor.start(config("slow", max_steps=10_000))
    supervisor.runs()
    assert dead.state()["status"] == "failed"
    assert RunDir(root / first).state()["status"] in ("preparing", "training")
    supervisor.stop(force=True)


def test_a_full_disk_does_not_end_the_page_and_the_run_is_buried_later(root, monkeypatch, capsys):
    dead = RunDir.create(root, config("quick"))
    dead.write_state({**dead.state(), "status": "training", "pid": 2**22 + 1})

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as m:
        m.setattr(RunDir, "write_state", full)
        supervisor = Supervisor(root, FAKE)
    assert "No space left on device" in capsys.readouterr().err
    assert dead.state()["status"] == "training"
    supervisor.runs()
    assert dead.state()["status"] == "failed"


def test_a_start_waits_for_a_run_that_has_said_its_last_word(root):
    run = RunDir.create(root, config("quick"))
    lock = take(root, "train", run.id)
    run.write_state({**run.state(), "status": "finished"})
    threading.Timer(0.3, lock.release).start()
    before = time.monotonic()
    make_room(root)
    assert time.monotonic() - before >= 0.25
    assert holder(root) is None


def test_a_chat_is_asked_to_leave_for_training(supervisor, root):
    script = f"""
        import time
        from lowvram_tuner.train.lock import take
        with take({str(root)!r}, "chat") as lock:
            print("warm", flush=True)
            while not lock.asked_to_leave():
                time.sleep(0.02)
    """
    chat = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, text=True)
    assert chat.stdout.readline() == "warm\n"
    assert supervisor.active() is None
    run = RunDir(root / supervisor.start(config("quick")))
    assert chat.wait(timeout=10) == 0
    assert ended(run)["status"] == "finished"


def test_a_chat_that_does_not_leave_is_named(root):
    with take(root, "chat"), pytest.raises(Busy, match="A chat is using the card"):
        make_room(root, seconds=0.1)


def test_resuming_with_another_option_is_refused_by_name(supervisor, root):
    run = RunDir(root / supervisor.start(config("quick")))
    ended(run)
    with pytest.raises(ConfigError, match="is finished; give it more steps"):
        supervisor.resume(run.id)
    with pytest.raises(ConfigError, match=r"with lora_r=4: it was 16"):
        supervisor.resume(run.id, lora_r=4, max_steps=9)
    assert run.config().max_steps == 0
    supervisor.resume(run.id, max_steps=9)
    assert ended(run)["step"] == 9
    assert run.config().max_steps == 9


def test_the_page_side_imports_no_torch():
    code = "import sys, lowvram_tuner.train.supervisor; print('torch' in sys.modules, 'numpy' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out == "False False\n"


def test_config_and_state_are_plain_json_for_other_tools(supervisor, root):
    run = RunDir(root / supervisor.start(config("quick")))
    ended(run)
    assert json.loads((run.path / "config.json").read_text())["model"] == "quick"
    assert json.loads((run.path / "state.json").read_text())["total_steps"] == 3
