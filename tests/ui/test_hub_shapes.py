"""The gauge of a model that the catalogue does not list: the hub is asked beside the page, and asked again after a failure."""

from __future__ import annotations

import threading
import time

import pytest
from test_controls import form

from lowvram_tuner.config import ConfigError, TrainConfig
from lowvram_tuner.models.catalogue import shape_of
from lowvram_tuner.ui import hub_shapes
from lowvram_tuner.ui.desk import Desk
from lowvram_tuner.ui.hub_shapes import HubShapes
from lowvram_tuner.ui.train_view import gauge_for

MODEL = "someone/new-model"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A desk whose hub answers `answer` once `open` is set; `asked` counts."""

    class Hub:
        answer, asked, open = "The network is gone.", 0, threading.Event()
        desk = Desk(tmp_path / "runs")

        def find(self, model):
            assert model == MODEL and self.open.wait(10)
            self.asked += 1
            if isinstance(self.answer, Exception):
                raise self.answer
            if isinstance(self.answer, str):
                raise ConfigError(self.answer)
            return self.answer

        def look(self):
            return gauge_for(self.desk, form(TrainConfig(model=MODEL)), None)

        def until(self, word):
            """What is said once `word` is in it."""
            end = time.monotonic() + 10
            while word not in (found := self.look())[0].verdict:
                assert time.monotonic() < end, found[0].verdict
                time.sleep(0.01)
            return found

    one = Hub()
    one.desk.hub = HubShapes(one.find)
    return one


def test_it_is_asked_once_and_then_planned(hub):
    hub.answer = shape_of("demo")
    gauge, starting = hub.look()
    assert "Asking the Hugging Face hub" in gauge.verdict and not starting.enabled and starting.reason.startswith("Asking")
    hub.open.set()
    assert hub.until("Fits")[1].enabled
    assert hub.look()[1].enabled and hub.asked == 1


def test_a_failure_is_said_and_tried_again_later(hub, monkeypatch):
    hub.open.set()
    assert hub.until("network is gone")[1].reason == hub.answer
    assert not hub.look()[1].enabled and hub.asked == 1, "not again at once"
    hub.answer = shape_of("demo")
    monkeypatch.setattr(hub_shapes, "AGAIN_S", 0.0)
    assert hub.until("Fits")[1].enabled


def test_what_nobody_foresaw_is_a_failure_too(hub, monkeypatch):
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    hub.answer = ZeroDivisionError()
    hub.open.set()
    assert not hub.until("could not be asked")[1].enabled


def test_a_path_is_no_question_to_the_hub(hub):
    hub.desk.hub = None
    values = form(TrainConfig(model="/nowhere/model"))
    assert "neither" in gauge_for(hub.desk, values, None)[1].reason
