"""The page's chat: one warm worker, answers in pieces, stop, errors in words, and giving the card to a training run."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from lowvram_tuner.chat.client import ChatClient, ChatError
from lowvram_tuner.chat.target import Target, target_of, target_of_run
from lowvram_tuner.config import ConfigError, TrainConfig
from lowvram_tuner.train.lock import Busy, holder
from lowvram_tuner.train.run_dir import RunDir
from lowvram_tuner.train.supervisor import Supervisor, make_room

HERE = Path(__file__).parent
CHAT = (sys.executable, str(HERE / "fake_chat_worker.py"))
TRAIN = (sys.executable, str(HERE.parent / "train" / "fake_worker.py"))
posix = pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")


@pytest.fixture
def client(tmp_path):
    client = ChatClient(tmp_path / "runs", CHAT)
    yield client
    client.close()


def until(condition, seconds=20.0):
    give_up = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < give_up, "waited too long"
        time.sleep(0.01)
    return value


def say(client, text, **options):
    return "".join(client.stream([{"role": "user", "content": text}], **options))


def test_an_answer_comes_in_pieces_with_the_options_given(client):
    client.open(Target("demo", label="demo"))
    pieces = list(client.stream([{"role": "user", "content": "one two three"}], system="sys", temperature=0.5))
    assert pieces == ["[adapter|sys|0.5]", " one", " two", " three"]
    assert client.tokens_per_s == 10.0
    assert say(client, "x", adapter=False) == "[base||0.7] x"
    assert (client.status().state, client.status().message) == ("ready", "Ready: demo.")


def test_the_worker_stays_warm_for_the_same_target_and_changes_for_another(client):
    client.open(Target("demo"))
    say(client, "x")
    first = holder(client.root).pid
    client.open(Target("demo"))
    say(client, "x")
    assert holder(client.root).pid == first
    client.open(Target("demo", bits=8))
    say(client, "x")
    assert holder(client.root).pid != first


def test_loading_is_shown(client):
    client.open(Target("slow"))
    status = until(lambda: client.status() if client.status().progress else None)
    assert (status.state, status.message) == ("loading", "loading layers")
    assert status.progress[1] == 3


def test_stop_ends_the_answer_and_the_next_one_works(client):
    client.open(Target("demo"))
    pieces = []
    for piece in client.stream([{"role": "user", "content": "endless"}]):
        pieces.append(piece)
        if len(pieces) == 5:
            assert client.status().state == "answering"
            client.stop()
    assert 5 <= len(pieces) < 500
    assert say(client, "again") == "[adapter||0.7] again"


def test_leaving_an_answer_stops_it(client):
    client.open(Target("demo"))
    stream = client.stream([{"role": "user", "content": "endless"}])
    next(stream)
    stream.close()
    assert say(client, "again") == "[adapter||0.7] again"


def test_two_tabs_do_not_mix(client):
    client.open(Target("demo"))
    stream = client.stream([{"role": "user", "content": "endless"}])
    next(stream)
    with pytest.raises(ChatError, match="Another answer is being written"):
        say(client, "me too")
    stream.close()


def test_errors_are_told_in_words_and_the_worker_stays(client):
    client.open(Target("demo"))
    with pytest.raises(ChatError) as caught:
        say(client, "bad")
    assert caught.value.what == "the message has 9 tokens; this model reads 4."
    assert say(client, "fine") == "[adapter||0.7] fine"


def test_left_out_messages_are_told(client):
    client.open(Target("demo"))
    say(client, "overflow")
    assert client.note == "The 2 oldest messages no longer fit and were left out."
    say(client, "short")
    assert client.note == ""


def test_a_model_that_cannot_be_loaded_is_said(client):
    client.open(Target("missing"))
    with pytest.raises(ChatError, match="model='missing' is not a model"):
        say(client, "x")
    assert client.status().state == "failed"
    client.open(Target("demo"))
    assert say(client, "x") == "[adapter||0.7] x"


def test_a_crash_ends_the_answer_with_a_message_and_can_be_reopened(client):
    client.open(Target("demo"))
    with pytest.raises(ChatError, match=r"ended unexpectedly \(exit code 3\)"):
        say(client, "crash")
    client.open(Target("demo"))
    assert say(client, "x") == "[adapter||0.7] x"


def test_training_takes_the_card_from_a_warm_chat_even_in_mid_answer(client):
    client.open(Target("demo"))
    stream = client.stream([{"role": "user", "content": "endless"}])
    next(stream)
    supervisor = Supervisor(client.root, TRAIN)
    run = RunDir(client.root / supervisor.start(TrainConfig(model="slow", max_steps=100_000)))
    with pytest.raises(ChatError, match="closed because training needs the card"):
        list(stream)
    assert client.blocked_by().id == run.id
    with pytest.raises(Busy, match=f"Run {run.id} is in progress"):
        client.open(Target("demo"))
    client.open(Target("demo"), device="cpu")
    assert say(client, "on the cpu") == "[adapter||0.7] on the cpu"
    supervisor.stop(force=True)
    assert client.blocked_by() is None


def test_a_chat_that_is_still_loading_leaves_too(client):
    client.open(Target("slow"))
    until(lambda: holder(client.root))
    before = time.monotonic()
    make_room(client.root)
    assert time.monotonic() - before < 4.0
    until(lambda: client.status().state == "closed")


def test_an_idle_worker_leaves_and_says_so(tmp_path):
    client = ChatClient(tmp_path, (*CHAT, "--idle-seconds", "0.2"))
    client.open(Target("demo"))
    say(client, "x")
    until(lambda: client.status().state == "closed")
    assert "idle" in client.status().message
    assert holder(tmp_path) is None
    with pytest.raises(ChatError, match="idle and made room"):
        say(client, "x")


@posix
def test_the_worker_ends_with_a_killed_page(tmp_path):
    script = f"""
        import time
        from lowvram_tuner.chat.client import ChatClient
        from lowvram_tuner.chat.target import Target
        c = ChatClient({str(tmp_path)!r}, {CHAT!r})
        c.open(Target("demo"))
        print("".join(c.stream([{{"role": "user", "content": "x"}}])), flush=True)
        time.sleep(600)
    """
    page = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, text=True)
    assert page.stdout.readline().endswith("x\n")
    assert holder(tmp_path).kind == "chat"
    os.kill(page.pid, signal.SIGKILL)
    page.wait()
    until(lambda: holder(tmp_path) is None)


def test_opening_from_many_tabs_at_once_makes_one_worker(client):
    answers = []

    def tab():
        client.open(Target("demo"))
        try:
            answers.append(say(client, "x"))
        except ChatError as error:
            answers.append(error.what)

    threads = [threading.Thread(target=tab) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(answers) == 4 and "[adapter||0.7] x" in answers
    assert set(answers) <= {"[adapter||0.7] x", "Another answer is being written."}


def test_the_page_side_imports_no_torch():
    code = "import sys, lowvram_tuner.chat.client, lowvram_tuner.chat.target; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_a_runs_target_names_it_and_changes_when_it_went_on(tmp_path):
    run = RunDir.create(tmp_path, TrainConfig(bits=8, system_prompt="be brief"))
    with pytest.raises(ConfigError, match="has no adapter yet; let it finish, or stop it"):
        target_of_run(run)
    run.adapter.mkdir()
    (run.adapter / "adapter_model.safetensors").write_bytes(b"x")
    run.write_state({**run.state(), "step": 40})
    first = target_of_run(run)
    assert (first.model, first.bits, first.label) == ("demo", 8, f"{run.id}, step 40")
    assert (first.adapter, first.system_prompt) == (str(run.adapter.resolve()), "be brief")
    assert target_of_run(run) == first
    os.utime(run.adapter / "adapter_model.safetensors", (1, 1))
    assert target_of_run(run) != first


def test_what_a_command_line_asks_for(tmp_path):
    config = TrainConfig(output_dir=str(tmp_path))
    assert target_of(config, None, None, given_model=True).label == "demo"
    with pytest.raises(ConfigError, match="give --run with a run's id, or --model"):
        target_of(config, None, None, given_model=False)
    with pytest.raises(ConfigError, match="leave out --model and --adapter"):
        target_of(config, "r", None, given_model=True)
    with pytest.raises(ConfigError, match=r"holds no adapter_model\.safetensors"):
        target_of(config, None, tmp_path, given_model=True)
    with pytest.raises(ConfigError, match="run='r' is not a run"):
        target_of(config, "r", None, given_model=False)
