"""A card that runs out of memory in the middle: the run goes on under a leaner plan, and learns the same."""

import dataclasses

import pytest

from lowvram_tuner.config import ConfigError
from lowvram_tuner.hardware.card import Card
from lowvram_tuner.train import guard as guarding
from lowvram_tuner.train import session as sessions
from lowvram_tuner.train.answers import Questions
from lowvram_tuner.train.events import Reporter
from lowvram_tuner.train.graph import CapturedStep
from lowvram_tuner.train.guard import Guard
from lowvram_tuner.train.run_dir import RunDir
from lowvram_tuner.train.step import FusedStep
from lowvram_tuner.train.worker import conduct
from tests.engine_cases import fails

GB = 10**9
STEPS = 8


@pytest.fixture
def config(tiny_run):
    return dataclasses.replace(tiny_run, micro_batch_size=4, warmup_steps=2, max_steps=STEPS, save_steps=4, eval_steps=4)


@pytest.fixture(scope="module")
def undisturbed():
    """The losses of the same run without trouble, made once."""
    return {}


def run(config):
    folder = RunDir.create(config.output_dir, config)
    conduct(folder, Reporter(folder), resume=False)
    return folder


def steps(folder):
    return [(m["step"], m["loss"]) for m in folder.metrics() if m["kind"] == "step"]


def notes(folder):
    return [e["text"] for e in folder.events(0)[0] if e["kind"] == "note"]


def expected(undisturbed, config):
    if not undisturbed:
        undisturbed["steps"] = steps(run(dataclasses.replace(config, output_dir=config.output_dir + "-whole")))
    return undisturbed["steps"]


def same(one, other):
    assert [s for s, _ in one] == [s for s, _ in other] == list(range(1, STEPS + 1))
    assert [x for _, x in one] == pytest.approx([x for _, x in other], rel=2e-5)


@pytest.mark.parametrize(
    "where",
    [
        pytest.param((FusedStep, "accumulate", lambda n, *_: n == 8), id="in a step, after its first pass"),
        pytest.param((FusedStep, "accumulate", lambda n, *_: n == 1), id="in the fit check"),
        pytest.param((FusedStep, "evaluate", lambda n, *_: n == 2), id="in a held-out check"),
        pytest.param((sessions, "load_model", lambda n, *_: n == 1), id="while loading"),
    ],
)
def test_out_of_memory_once_changes_nothing_that_is_learned(config, undisturbed, monkeypatch, where):
    whole = expected(undisturbed, config)
    calls = fails(monkeypatch, *where)
    folder = run(config)
    assert calls[0] > 1
    assert folder.state()["status"] == "finished"
    same(steps(folder), whole)


@pytest.mark.parametrize(("where", "leaner"), [
    pytest.param((FusedStep, "evaluate", lambda n, *_: n == 2), 0, id="in a held-out check"),
    pytest.param((Questions, "ask", lambda n, *_: n == 1), 0, id="in the answers"),
    pytest.param((FusedStep, "accumulate", lambda n, *_: n == 8), 0, id="in a step"),
    pytest.param((FusedStep, "accumulate", lambda n, *_: n in (8, 9)), 1, id="in a step, and again"),
])  # fmt: skip
def test_captured_passes_give_their_memory_back_before_a_leaner_plan_is_made(config, undisturbed, monkeypatch, where, leaner):
    whole, given_back = expected(undisturbed, config), []
    monkeypatch.setattr(CapturedStep, "release", lambda self: given_back.append(self) or True)
    fails(monkeypatch, *where)
    folder = run(config)
    assert folder.state()["status"] == "finished" and len(given_back) == 1
    assert sum("leaner plan" in text for text in notes(folder)) == leaner and not any("not asked" in text for text in notes(folder))
    same(steps(folder), whole)


def test_passes_become_smaller_when_no_plan_is_left_and_the_effective_batch_stays(config, undisturbed, monkeypatch):
    """The card holds one row of a pass, not four: 4 x 2 becomes 1 x 8."""
    whole = expected(undisturbed, config)
    seen = []

    def too_long(_, step, batches, scale):
        seen.append(max(len(batch.cu_seqlens) for batch in batches) - 1)
        return seen[-1] > 1

    fails(monkeypatch, FusedStep, "accumulate", too_long)
    folder = run(config)
    assert folder.state()["status"] == "finished"
    same(steps(folder), whole)
    assert seen[-1] == 1 and 4 in seen and 2 in seen


def test_when_nothing_helps_the_run_ends_with_advice_and_its_checkpoint(config, monkeypatch):
    fails(monkeypatch, FusedStep, "accumulate", lambda n, *_: n > 12)  # after the checkpoint of step 4
    folder = RunDir.create(config.output_dir, config)
    with pytest.raises(ConfigError, match=r"needs .* GB and may use .* GB; what helps"):
        conduct(folder, Reporter(folder), resume=False)
    assert folder.state()["status"] == "failed"
    assert [p.name for p in sorted(folder.checkpoints.glob("step-*"))]
    monkeypatch.undo()
    conduct(folder, Reporter(folder), resume=True)  # the next start needs nothing repaired
    assert folder.state()["status"] == "finished"


class Watched:
    """A card of 8 GB on which this process holds 4, and a clock that every look moves on."""

    def __init__(self):
        self.others, self.now = GB, 0.0
        self.guard = Guard(self.read, self.clock)

    def read(self):
        used = min(8 * GB, 4 * GB + self.others)
        return Card("card", 8 * GB, 8 * GB - used, used, "580.65", (8, 6), 0, "GPU-1")

    def clock(self):
        self.now += guarding.LOOK_SECONDS
        return self.now

    def steps(self, seconds, count=20):
        found = [self.guard.look(seconds, 512, 4 * GB) for _ in range(count)]
        return [f for f in found if f]


def test_the_guard_sees_nothing_in_a_steady_run():
    watched = Watched()
    assert watched.steps(9.0, 2) == []  # compiling
    assert watched.steps(1.0) == watched.steps(1.3) == []


def test_the_guard_makes_room_for_a_program_that_fills_the_card():
    watched = Watched()
    watched.steps(1.0)
    watched.others = 4 * GB
    (trouble, *_) = watched.steps(3.0)
    assert "took 3.0 GB of the card" in trouble.text and "3.0 times" in trouble.text
    assert trouble.limit_bytes == 8 * GB - 4 * GB - guarding.DESKTOP_RESERVE
    watched.guard.begin()  # under the new plan this pace is the normal one
    assert watched.steps(3.0) == []


def test_the_guard_says_once_that_steps_became_slow():
    watched = Watched()
    watched.steps(1.0)
    (trouble,) = watched.steps(2.0)
    assert trouble.limit_bytes is None and "2.0 times as long as at the start" in trouble.text


def test_other_programs_that_leave_room_are_no_trouble():
    watched = Watched()
    watched.steps(1.0)
    watched.others = 2 * GB
    assert watched.steps(1.1) == []


def test_the_guard_is_quiet_without_a_card():
    guard = Guard(lambda: None, Watched().clock)
    assert [guard.look(s, 512, 0) for s in [1.0] * 20 + [9.0] * 20] == [None] * 40
