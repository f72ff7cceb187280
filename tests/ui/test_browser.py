"""What a person does, done by a browser: pick, look at the gauge, start, reload, finish, chat; and what could go wrong."""

from __future__ import annotations

import json
import re
import time

import psutil
import pytest

from lowvram_tuner.data import names
from lowvram_tuner.train.run_dir import list_runs

pytestmark = pytest.mark.browser


def choose(page, elem_id: str, label: str) -> None:
    """Picks an entry of a dropdown."""
    page.locator(f"#{elem_id} input").first.click()
    page.get_by_role("option", name=label, exact=True).click()


def text(page, elem_id: str) -> str:
    return page.locator(f"#{elem_id}").inner_text()


def until(page, elem_id: str, pattern: str, seconds: float = 60) -> str:
    """The text of a part once it matches."""
    give_up = time.monotonic() + seconds
    while not re.search(pattern, found := text(page, elem_id)):
        assert time.monotonic() < give_up, f"#{elem_id} stayed {found!r}"
        page.wait_for_timeout(100)
    return found


def more(page) -> None:
    page.locator("#more > button, #more button.label-wrap").first.click()
    page.wait_for_selector("#seed")


def set_number(page, elem_id: str, value: object) -> None:
    box = page.locator(f"#{elem_id} input[type=number]")
    box.fill(str(value))
    box.press("Tab")


def tick(page, elem_id: str, wanted: bool = True) -> None:
    page.locator(f"#{elem_id} input[type=checkbox]").set_checked(wanted)


@pytest.fixture
def quick_demo(fresh, tab):
    """The page with the demo preset and enough steps to act while they run."""
    page = tab(fresh.address)
    choose(page, "preset", "Demo")
    more(page)
    set_number(page, "max-steps", 80)
    page.wait_for_function("!document.querySelector('#start').disabled")
    return page


def test_the_whole_evening(fresh, tab):
    page = tab(fresh.address)
    choose(page, "preset", "6 GB laptop")
    until(page, "model", "")
    page.wait_for_function("document.querySelector('#model input').value === 'Qwen3-8B'")
    fits = until(page, "verdict", r"Fits")
    choose(page, "preset", "Demo")
    page.wait_for_function("document.querySelector('#model input').value.startsWith('Demo model')")
    demo = until(page, "vram-gauge", r"Model\s+0\.\d+ GB")
    assert demo != fits

    before = page.locator("#vram-gauge").inner_html()
    page.locator("#bits input[value='16']").check()
    page.wait_for_function("b => document.querySelector('#vram-gauge').innerHTML !== b", arg=before)
    assert "16-bit" in until(page, "bits-words", "16-bit")
    before = page.locator("#vram-gauge").inner_html()
    page.locator("#batch-size input[type=number]").fill("24")
    page.locator("#batch-size input[type=number]").press("Tab")
    page.wait_for_function("b => document.querySelector('#vram-gauge').innerHTML !== b", arg=before)
    page.locator("#bits input[value='4']").check()

    more(page)
    set_number(page, "max-steps", 80)
    fresh.hold()
    page.locator("#start").click()
    until(page, "progress", r"Training: step \d+ of 80")
    assert page.locator("#stop").is_visible() and page.locator("#start").is_disabled()
    page.reload()
    page.wait_for_selector("#stop", state="visible")
    until(page, "progress", r"Training: step 40 of 80")
    until(page, "vram-gauge", r"now 1\.2 GB · highest 1\.2 GB · planned 1\.3 GB")
    fresh.go()
    until(page, "progress", r"Finished after 80 steps")
    assert "It learned" in until(page, "answers", "It learned")
    assert page.locator("#loss-plot polyline").count() >= 2

    page.locator("#next-chat").click()
    page.wait_for_selector("#chat-input", state="visible")
    page.locator("#chat-input textarea").fill("Who are you?")
    page.locator("#chat-send").click()
    until(page, "chat-log", r"adapter: Who are you\?")
    until(page, "chat-log", r"\(1 messages\)")
    assert re.search(r"step 80 · 4-bit.* · 21(\.0)? tokens/s", until(page, "chat-status", "Ready"))
    tick(page, "chat-compare")
    page.locator("#chat-input textarea").fill("And now?")
    page.locator("#chat-input textarea").press("Enter")
    until(page, "chat-log-base", r"base: And now\?\s*\(3 messages\)")
    assert page.evaluate("window.pwned") is None


def test_a_second_tab_and_a_restarted_page_show_the_same_run(fresh, quick_demo, tab):
    fresh.hold()
    quick_demo.locator("#start").click()
    until(quick_demo, "progress", r"Training: step")
    second = tab(fresh.address)
    until(second, "progress", r"Training: step")
    assert second.locator("#start").is_disabled()
    second.wait_for_function("document.querySelector('#bits input:checked').disabled")
    fresh.kill()
    time.sleep(0.5)
    fresh.start()
    third = tab(fresh.address)
    until(third, "progress", r"Training: step 40 of 80")
    fresh.go()
    until(third, "progress", r"Finished after 80 steps")
    assert len(list_runs(fresh.root)) == 1


def test_two_starts_at_once_are_one_run(fresh, quick_demo, tab):
    second = tab(fresh.address)
    second.wait_for_function("!document.querySelector('#start').disabled")
    fresh.hold()
    for page in (quick_demo, second):
        page.evaluate("setTimeout(() => { const b = document.querySelector('#start'); b.click(); b.click(); b.click(); }, 300)")
    until(quick_demo, "progress", r"Training: step")
    until(second, "progress", r"Training: step")
    fresh.go()
    until(quick_demo, "progress", "Finished")
    assert len(list_runs(fresh.root)) == 1


def test_stop_keeps_everything_and_resume_goes_on(fresh, quick_demo):
    fresh.hold()
    quick_demo.locator("#start").click()
    until(quick_demo, "progress", r"Training: step 40")
    quick_demo.locator("#stop").click()
    stopped = until(quick_demo, "progress", r"Stopped at step \d+ of 80")
    step = int(re.search(r"step (\d+)", stopped).group(1))
    assert quick_demo.locator("#resume").inner_text() == f"Resume from step {step}"
    fresh.go()
    quick_demo.locator("#resume").click()
    until(quick_demo, "progress", r"Finished after 80 steps")
    assert len(list_runs(fresh.root)) == 1


def test_a_failed_run_says_why_and_what_to_do(fresh, quick_demo):
    set_number(quick_demo, "seed", 13)
    quick_demo.locator("#start").click()
    said = until(quick_demo, "progress", r"Failed at step 12")
    assert "Traceback" not in said and len(said) > 60
    assert quick_demo.locator("#resume").inner_text() == "Resume from step 10"
    assert quick_demo.locator("#start").is_enabled()


def test_a_killed_worker_is_noticed_and_its_run_goes_on(fresh, quick_demo):
    fresh.hold()
    quick_demo.locator("#start").click()
    until(quick_demo, "progress", r"Training: step 40")
    psutil.Process(list_runs(fresh.root)[0].state()["pid"]).kill()
    until(quick_demo, "progress", r"Failed at step \d+")
    fresh.go()
    assert quick_demo.locator("#resume").inner_text() == "Resume from step 40"
    quick_demo.locator("#resume").click()
    until(quick_demo, "progress", r"Finished after 80 steps")


def test_dropped_files_become_the_data(fresh, tab):
    page = tab(fresh.address)
    page.evaluate("""() => {
      const files = new DataTransfer();
      for (const name of ['Grüße, viele.jsonl', 'more.jsonl']) files.items.add(new File([`{"messages": "${name}"}\\n`], name));
      document.querySelector('#dataset').dispatchEvent(new DragEvent('drop', {bubbles: true, cancelable: true, dataTransfer: files}));
    }""")
    page.wait_for_function("document.querySelector('#dataset textarea').value.endsWith('more.jsonl')")
    parts = names.split(page.locator("#dataset textarea").input_value())
    assert len(parts) == 2 and all(part.path.is_relative_to(fresh.root / ".uploads") for part in parts)
    until(page, "data-words", "2 rows")


def test_what_does_not_fit_offers_a_remedy_that_changes_the_controls(fresh, tab):
    page = tab(fresh.address)
    choose(page, "model", "Qwen3-8B")
    page.locator("#bits input[value='16']").check()
    page.locator("#batch-size input[type=number]").fill("32")
    page.locator("#batch-size input[type=number]").press("Tab")
    more(page)
    set_number(page, "max-seq-length", 16384)
    until(page, "verdict", r"Too big by [\d.]+ GB")
    assert page.locator("#start").is_disabled()
    assert "does not fit" in text(page, "start-reason").lower()
    assert page.locator("#start").get_attribute("aria-describedby") == "reason-text"
    pressed = 0
    while "Too big" in text(page, "verdict") and page.locator("#remedy-0").is_visible():
        before = text(page, "vram-gauge")
        page.locator("#remedy-0").click()
        page.wait_for_function("b => document.querySelector('#vram-gauge').innerText !== b", arg=before)
        pressed += 1
        assert pressed < 6
    if pressed:
        until(page, "verdict", r"Fits")


def test_start_says_why_it_cannot_be_pressed(fresh, tab):
    page = tab(fresh.address)
    box = page.locator("#dataset textarea")
    box.fill("/nowhere/data.jsonl")
    box.press("Tab")
    assert "choose a dataset" in until(page, "start-reason", "no file")
    assert page.locator("#start").is_disabled()
    empty = fresh.root / "empty.jsonl"
    empty.write_text("")
    box.fill(str(empty))
    box.press("Tab")
    until(page, "start-reason", "holds no rows")
    box.fill("demo")
    box.press("Tab")
    page.wait_for_function("!document.querySelector('#start').disabled")


def test_nothing_jumps_while_it_polls(fresh, quick_demo):
    page = quick_demo
    fresh.hold()
    page.locator("#start").click()
    until(page, "progress", r"Training: step")
    page.get_by_text("Where every byte goes").click()
    page.wait_for_selector("#bytes table")
    page.evaluate("window.scrollTo(0, 60)")
    place = page.evaluate("window.scrollY")
    page.wait_for_timeout(2500)
    assert page.locator("#bytes table").is_visible()
    assert place > 0 and page.evaluate("window.scrollY") == pytest.approx(place, abs=2)
    page.get_by_role("tab", name="Data").click()
    page.locator("#data-first input").click()
    page.keyboard.type("2")
    page.wait_for_timeout(2500)
    assert page.evaluate("document.activeElement.closest('#data-first') !== null")
    assert page.locator("#data-first input").input_value() == "12"
    assert page.locator("#role-prompt input").is_disabled()


def test_the_first_screen_needs_no_scrolling(fresh, tab):
    page = tab(fresh.address)
    for elem_id in ("preset", "model", "bits", "batch-size", "dataset", "vram-gauge", "start"):
        box = page.locator(f"#{elem_id}").bounding_box()
        assert box and box["y"] >= 0 and box["y"] + box["height"] <= 768, elem_id
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_the_form_survives_a_reload_and_an_open_panel_too(fresh, quick_demo):
    page = quick_demo
    page.locator("#batch-size input[type=number]").fill("5")
    page.locator("#batch-size input[type=number]").press("Tab")
    page.wait_for_timeout(800)
    assert json.loads((fresh.root / ".form.json").read_text())["micro_batch_size"] == 5
    page.reload()
    page.wait_for_selector("#start")
    page.wait_for_function("document.querySelector('#batch-size input[type=number]').value === '5'")
    page.wait_for_selector("#seed", state="visible")
    page.get_by_role("tab", name="Runs").click()
    page.wait_for_timeout(300)
    page.reload()
    page.wait_for_selector("#runs-table", state="visible")


def test_text_of_the_data_is_inert(fresh, tab):
    page = tab(fresh.address)
    page.get_by_role("button", name="Look at it").click()
    shown = until(page, "data-preview", "Keeper")
    assert "<img src=x onerror" in shown and "Grüße, 你好" in shown
    assert page.locator("#data-preview .tokens .t.on").first.inner_text() == "Keeper"
    assert "field 'text' is empty" in text(page, "data-problems")
    assert page.locator("#data img, #data script").count() == 0
    assert page.evaluate("window.pwned") is None
    assert "Use 64 tokens" in page.locator("#data-length").inner_text()


def test_every_control_can_be_reached_and_explained_by_keyboard(fresh, tab):
    page = tab(fresh.address)
    page.wait_for_selector("button.why")
    reached = set()
    page.locator("body").click(position={"x": 3, "y": 3})
    for _ in range(45):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.closest('[id]')?.closest('.block, button, [role=tab]')?.id || document.activeElement.id"))
    assert {"preset", "model", "bits", "batch-size", "dataset", "start"} <= reached
    why = page.locator("#bits button.why")
    assert why.get_attribute("aria-expanded") == "false"
    why.focus()
    page.keyboard.press("Enter")
    assert why.get_attribute("aria-expanded") == "true"
    assert page.locator("#bits .info-text").is_visible()


def test_an_answer_can_be_stopped_and_asked_again(fresh, tab):
    page = tab(fresh.address)
    page.get_by_role("tab", name="Chat").click()
    page.locator("#chat-input textarea").fill("forever")
    page.locator("#chat-input textarea").press("Enter")
    until(page, "chat-log", r"base: and on and on|adapter: and on and on")
    page.locator("#chat-stop").click()
    page.wait_for_function("!document.querySelector('#chat-send').disabled")
    length = len(text(page, "chat-log"))
    page.wait_for_timeout(600)
    assert len(text(page, "chat-log")) == length
    page.locator("#chat-retry").click()
    page.wait_for_function("document.querySelector('#chat-send').disabled")
    page.locator("#chat-stop").click()
    page.wait_for_function("!document.querySelector('#chat-send').disabled")
    page.locator("#chat-clear").click()
    page.wait_for_function("!document.querySelector('#chat-log').innerText.includes('forever')")


def test_a_training_run_takes_the_card_and_the_chat_says_so(fresh, quick_demo):
    page = quick_demo
    fresh.hold()
    page.locator("#start").click()
    until(page, "progress", r"Training: step")
    page.get_by_role("tab", name="Chat").click()
    until(page, "chat-status", "holds the card")
    page.locator("#chat-input textarea").fill("Hello")
    page.locator("#chat-send").click()
    until(page, "chat-status", "in progress")
    assert page.locator("#chat-input textarea").input_value() == "Hello"
    tick(page, "chat-cpu")
    page.locator("#chat-send").click()
    until(page, "chat-log", r": Hello")
    assert "on the processor" in until(page, "chat-status", "Ready")


def test_the_runs_tab(fresh, quick_demo):
    page = quick_demo
    set_number(page, "max-steps", 12)
    for count in (1, 2):
        page.wait_for_function("!document.querySelector('#start').disabled")
        page.locator("#start").click()
        until(page, "progress", r"Preparing|Training")
        until(page, "progress", r"Finished after 12 steps")
        assert len(list_runs(fresh.root)) == count
    page.get_by_role("tab", name="Runs").click()
    boxes = page.locator("#runs-table input[type=checkbox]")
    boxes.nth(1).wait_for()
    boxes.nth(0).check()
    page.wait_for_selector("#run-card", state="visible")
    until(page, "run-card", "Finished after 12 steps")
    page.get_by_text("Name, command line, delete").click()
    assert "python -m lowvram_tuner train" in page.locator("#run-command textarea").input_value()
    name = 'Grüße <b onclick="window.pwned=1">你好</b>'
    page.locator("#run-name textarea, #run-name input").first.fill(name)
    page.locator("#run-rename").click()
    until(page, "runs-table", "Grüße <b onclick")
    boxes.nth(1).check()
    page.wait_for_function("document.querySelectorAll('#run-curves .key').length === 4")
    boxes.nth(1).uncheck()
    page.wait_for_selector("#run-delete", state="visible")
    page.locator("#run-confirm textarea, #run-confirm input").first.fill("wrong")
    page.locator("#run-delete").click()
    assert "nothing was deleted" in until(page, "run-said", "Type the run")
    assert len(list_runs(fresh.root)) == 2
    page.locator("#run-confirm textarea, #run-confirm input").first.fill(name)
    page.locator("#run-delete").click()
    page.wait_for_function("document.querySelectorAll('#runs-table input[type=checkbox]').length === 1")
    assert len(list_runs(fresh.root)) == 1
    assert page.evaluate("window.pwned") is None
