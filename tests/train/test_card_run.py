"""Whole runs on a card, from data to chat, wherever a plan puts things and whatever is given back on the way."""

from dataclasses import replace

import pytest
from tiny_model import make_data, make_model

from lowvram_tuner.chat.session import ChatSession
from lowvram_tuner.models import load
from lowvram_tuner.train import session as sessions
from lowvram_tuner.train.answers import Questions
from lowvram_tuner.train.events import Reporter
from lowvram_tuner.train.graph import CapturedStep
from lowvram_tuner.train.run_dir import RunDir
from lowvram_tuner.train.worker import conduct
from tests.engine_cases import fails

pytestmark = pytest.mark.gpu
STEPS = 12
HOST = {"streamed": 2, "embeddings_on_host": True}
EVERYTHING = HOST | {
    "inputs_on_host": True, "optimizer_on_host": True, "optimizer_bits": 8, "head_bits": 8, "scratch_bytes": 1 << 20,
    "keep_all": 0, "keep_weights": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("untied")
    return make_model(folder / "model", tied=False), make_data(folder / "rows.jsonl")


@pytest.fixture
def config(tiny_run):
    return replace(
        tiny_run, micro_batch_size=4, warmup_steps=2, max_steps=STEPS, save_steps=4, eval_steps=4, precision="auto", packing=True
    )  # fmt: skip


def planned(monkeypatch, decisions):
    """Has every plan of a run say so."""
    original = sessions.make_plan
    monkeypatch.setattr(sessions, "make_plan", lambda *args: replace(original(*args), **decisions))


def finished(config):
    """(run, losses) of a run that nothing befell: no note but that of the fit check."""
    run = RunDir.create(config.output_dir, config)
    conduct(run, Reporter(run), resume=False)
    assert run.state()["status"] == "finished", run.state()["message"]
    notes = [e["text"] for e in run.events(0)[0] if e["kind"] == "note"]
    assert all(n.startswith(("It fits", "The adapter is that of")) for n in notes), notes
    losses = [m["loss"] for m in run.metrics() if m["kind"] == "step"]
    assert len(losses) == STEPS and losses[-1] < losses[0] - 0.5
    return run, losses


@pytest.mark.parametrize("options", [
    pytest.param({}, id="packed"), pytest.param({"packing": False}, id="several shapes"),
    pytest.param({"precision": "fp16"}, id="fp16"), pytest.param({"lora_dropout": 0.1}, id="by transformers"),
])  # fmt: skip
@pytest.mark.parametrize("decisions", [{}, EVERYTHING], ids=["on the card", "on the host"])
def test_a_run_from_data_to_chat(config, monkeypatch, decisions, options):
    planned(monkeypatch, decisions)
    config = replace(config, **options)
    run, _ = finished(config)
    answers = [e["rows"] for e in run.events(0)[0] if e["kind"] == "compare"]
    assert len(answers) >= 3 and answers[0][0]["base"] == answers[-1][0]["base"] != answers[-1][0]["adapter"]
    if decisions:
        original = load.reading_plan
        monkeypatch.setattr(load, "reading_plan", lambda *args: replace(original(*args), **HOST))
    model, tokenizer = load.load_for_chat(config.model, 4, "auto", run.adapter)
    chat, question = ChatSession(model, tokenizer), [{"role": "user", "content": "What is 7?"}]
    assert chat.answer(question, adapter=True, temperature=0.0) != chat.answer(question, adapter=False, temperature=0.0)


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "several shapes"])
def test_graphs_given_back_for_the_answers_change_nothing_that_is_learned(config, monkeypatch, packing):
    """The next graphs lie in another pool, and the answers after that free what the first pool held."""
    config = replace(config, packing=packing)
    _, losses = finished(config)
    release, given_back = CapturedStep.release, []
    fails(monkeypatch, Questions, "ask", lambda n, *_: n == 1)
    monkeypatch.setattr(CapturedStep, "release", lambda self: given_back.append(release(self)) or given_back[-1])
    assert finished(config)[1] == losses and given_back[0]
