"""The same walk with nothing pretended: the real page, worker, demo model and chat. Minutes on two cores."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from served_page import Served
from test_browser import choose, more, set_number, text, until

from lowvram_tuner.train.run_dir import list_runs

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 900  # seconds for each wait; a busy machine is ten times slower than an idle one

pytestmark = [pytest.mark.browser, pytest.mark.slow, pytest.mark.timeout(1800)]


class Real(Served):
    """`python app.py` itself."""

    def command(self) -> list[str]:
        return [sys.executable, str(ROOT / "app.py"), "--no-browser", "--port", str(self.port), "--runs", str(self.root)]


@pytest.fixture
def real(tmp_path, demo_gguf):
    page = Real(tmp_path / "runs")
    yield page
    page.close()


def test_demo_from_start_to_a_streamed_answer(real, tab):
    page = tab(real.address)
    choose(page, "preset", "Demo")
    until(page, "data-words", r"267 rows|\d+ rows", PATIENCE)
    before = page.locator("#vram-gauge").inner_html()
    page.locator("#bits input[value='16']").check()
    page.wait_for_function("b => document.querySelector('#vram-gauge').innerHTML !== b", arg=before)
    page.locator("#bits input[value='4']").check()
    more(page)
    set_number(page, "max-steps", 4)
    set_number(page, "max-seq-length", 64)
    set_number(page, "held-out", 0.02)
    page.locator("#compare-prompts textarea").fill("Which town is your home?\nWho is the mayor in Port Tallow?")
    page.locator("#compare-prompts textarea").press("Tab")
    page.locator("#batch-size input[type=number]").fill("2")
    page.locator("#batch-size input[type=number]").press("Tab")
    page.locator("#start").click()
    until(page, "progress", r"Preparing|Checking|Training", PATIENCE)
    page.reload()
    page.wait_for_selector("#stop", state="visible")
    assert "Finished after 4 steps" in until(page, "progress", r"Finished|Failed|Stopped", PATIENCE)
    assert page.locator("#answers tbody tr").count() == 2
    assert page.locator("#loss-plot polyline").count() >= 1
    assert len(list_runs(real.root)) == 1

    page.locator("#next-chat").click()
    page.wait_for_selector("#chat-input", state="visible")
    page.locator("#chat-input textarea").fill("Which town is your home?")
    page.locator("#chat-send").click()
    until(page, "chat-status", r"step 4 · 4-bit", PATIENCE)
    until(page, "chat-status", r"Answering|Ready", PATIENCE)
    page.wait_for_function("!document.querySelector('#chat-send').disabled", timeout=PATIENCE * 1000)
    assert len(text(page, "chat-log").split("Which town is your home?")[1].strip()) > 5
    assert "tokens/s" in until(page, "chat-status", "Ready.*tokens/s", PATIENCE)
