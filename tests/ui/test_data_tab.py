"""The Data tab in a browser over real files: mixed, broken, hostile, with columns that could mean two things."""

from __future__ import annotations

import json

import pytest
from served_page import Served
from test_browser import text, until

pytestmark = pytest.mark.browser
EVIL = '<img src=x onerror="window.pwned=1"><script>window.pwned=1</script>'


@pytest.fixture
def page(tmp_path, tab):
    served = Served(tmp_path / "runs", FAKE_CARD="1", REAL_DATA="1")
    try:
        yield tab(served.address)
    finally:
        served.close()


def tokens(page) -> list[str]:
    return page.locator("#data-preview .tokens").all_inner_texts()


def test_a_mix_is_looked_at_row_by_row_and_its_columns_are_mapped(page, tmp_path):
    rows = [{"question": f"Frage {i} 你好", "answer": f"Das ist {i}.", "response": f"It is {i}." * (1 + i % 50), EVIL: "n"} for i in range(120)]
    rows[2]["response"] = EVIL
    lines = [json.dumps(row) for row in rows]
    lines[5] = '{"question": "cut off'
    first, second = tmp_path / "a, b.jsonl", tmp_path / "pairs.jsonl"
    first.write_text("\n".join(lines) + "\n")
    second.write_text("".join(json.dumps({"prompt": f"q{i}", "chosen": f"good {i}", "rejected": f"bad {i}"}) + "\n" for i in range(20)))
    page.locator("#dataset textarea").fill(f"{first}:2, {second}:0.5")
    assert "139 rows" in until(page, "data-words", r"1 row dropped")
    page.get_by_role("button", name="Look at it").click()
    until(page, "data-preview", "Row 6")

    facts, problems = text(page, "data-facts"), text(page, "data-problems")
    assert "2 times an epoch" in facts and "0.5 times an epoch" in facts and "preference pairs (the chosen side is used)" in facts
    assert "a, b.jsonl line 6: the JSON is cut off" in problems
    assert "response, answer could each be the completion; response is used. Kept." in problems
    shown = tokens(page)
    assert EVIL in shown[2] and shown[5] == '{"question": "cut off'
    assert page.locator("#data img, #data script, .options img").count() == 0 and page.evaluate("window.pwned") is None

    page.locator("#role-completion input").click()
    assert EVIL in page.get_by_role("option").all_inner_texts()
    page.get_by_role("option", name="answer", exact=True).click()
    page.wait_for_function("document.querySelector('#data-preview .tokens')?.innerText.includes('Das ist 0.')")
    assert "answer from “answer”" in text(page, "data-facts")
    page.locator("#role-completion input").click()
    page.get_by_role("option", name="automatic", exact=True).click()
    page.wait_for_function("document.querySelector('#data-preview .tokens')?.innerText.includes('It is 0.')")

    page.locator("#data-first input").fill("119")
    page.locator("#data-first input").press("Tab")
    until(page, "data-preview", r"Row 121 · pairs\.jsonl · line 1")
    assert "good 0" in tokens(page)[2] and not any("bad" in shown for shown in tokens(page))

    length = page.locator("#data-length").inner_text()
    assert "tokens, which suit this data (" in length and "GB more memory)" in length
    page.locator("#data-length").click()
    page.wait_for_function("!document.querySelector('#data-lengths').innerText.includes('Striped')")
    assert page.evaluate("window.pwned") is None
