"""The gauge: sizes that add up, words for every part, and nothing of a name or label that a browser would run."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest

from lowvram_tuner.config import TrainConfig
from lowvram_tuner.memory.plan import COMPONENT_LABELS, Budget, plan_run
from lowvram_tuner.models.catalogue import shape_of
from lowvram_tuner.ui.desk import Desk
from lowvram_tuner.ui.gauge import Live, gauge_html, groups, spare_bytes, table_html, verdict, words_html

SIX_GB = Budget(total_bytes=6_441_000_000, others_bytes=700_000_000, limit_bytes=5_441_000_000, kind="vram")


@pytest.fixture
def plan():
    return plan_run(TrainConfig(), shape_of("demo"), SIX_GB)


def widths(html: str, bar: str = "planned") -> dict[str, float]:
    """The widths in per cent of one bar's parts, by part."""
    inside = html.split(f'data-bar="{bar}"')[1].split("</div>")[0]
    return {k: float(w) for k, w in re.findall(r'class="part (\w+)" style="width:([\d.]+)%"', inside)}


def test_the_parts_of_the_bar_hold_every_byte_of_the_plan(plan):
    assert sum(p.nbytes for p in groups(plan.components)) == plan.process_bytes


def test_a_component_nobody_knows_is_counted_as_working_memory(plan):
    before = {p.key: p.nbytes for p in groups(plan.components)}
    after = {p.key: p.nbytes for p in groups({**plan.components, "something_new": 123_000_000})}
    assert after["work"] == before["work"] + 123_000_000


def test_the_bar_is_the_cards_true_size(plan):
    parts = widths(gauge_html(SIX_GB, plan))
    assert sum(parts.values()) == pytest.approx(100, abs=0.05)
    assert parts["others"] == pytest.approx(100 * 0.7 / 6.441, abs=0.01)


def test_a_plan_larger_than_the_card_shows_where_the_card_ends(plan):
    big = replace(plan, components={**plan.components, "weights": 9_000_000_000}, fits=False)
    html = gauge_html(SIX_GB, big)
    assert sum(widths(html).values()) == pytest.approx(100, abs=0.05)
    assert "free" not in widths(html)
    assert "The memory ends here" in html
    assert 'data-fits="false"' in html


def test_every_part_is_named_with_its_size_and_not_by_colour_alone(plan):
    html = gauge_html(SIX_GB, plan)
    legend = html.split('class="legend"')[1]
    for name, size in (("Other programs", "0.7 GB"), ("Model", "0.1 GB"), ("Free", "4.")):
        assert re.search(rf"{name} <b>{re.escape(size)}", legend), legend
    spoken = re.search(r'aria-label="([^"]+)"', html).group(1)
    assert "VRAM 6.4 GB" in spoken and "Other programs 0.7 GB" in spoken


def test_without_a_card_it_is_a_gauge_of_ram(plan):
    ram = Budget(16_000_000_000, 4_000_000_000, 11_700_000_000, "ram")
    html = gauge_html(ram, plan_run(TrainConfig(), shape_of("demo"), ram))
    assert "RAM 16.0 GB" in html and "VRAM" not in html and "CUDA" not in html


def test_a_running_run_is_shown_against_its_plan(plan):
    html = gauge_html(SIX_GB, plan, Live(1_200_000_000, 1_400_000_000, 1_300_000_000))
    assert widths(html, "actual")["actual"] == pytest.approx(100 * 1.2 / 6.441, abs=0.01)
    assert "now 1.2 GB · highest 1.4 GB · planned 1.3 GB" in html
    assert "not measured yet" in gauge_html(SIX_GB, plan, Live(None, None, 1_300_000_000))


def test_verdicts_are_sentences_with_figures(plan):
    assert verdict(plan, 7800) == f"Fits: {spare_bytes(plan) / 1e9:.1f} GB to spare. About 2 h 10 min."
    assert re.fullmatch(r"Fits: [\d.]+ GB to spare\. About [\d.]+ s per step\.", verdict(plan))
    tight = replace(plan, fits=False, budget=replace(SIX_GB, limit_bytes=plan.process_bytes - 800_000_000))
    assert verdict(tight) == "Too big by 0.8 GB."


def test_the_table_adds_up(plan):
    cells = re.findall(r"<td>([\d.]+) (GB|MB)</td>", table_html(plan, COMPONENT_LABELS))
    values = [float(v) * (1e9 if unit == "GB" else 1e6) for v, unit in cells]
    assert values[-1] == pytest.approx(plan.process_bytes, abs=5e6)
    assert sum(values[:-1]) == pytest.approx(values[-1], abs=5e6 * len(values))


def test_words_and_labels_are_inert(plan):
    evil = '<img src=x onerror="alert(1)">'
    html = words_html(replace(plan, words=(evil,))) + table_html(plan, {"weights": evil})
    assert "<img" not in html and "&lt;img" in html


def test_the_gauge_takes_a_quantized_model_as_it_is_stored(tmp_path):
    """Its own bits, method and groups are planned; others are refused before Start, with what to choose."""
    stored = {"quantization_config": {"quant_method": "gptq", "bits": 3, "group_size": 32, "sym": True, "desc_act": False}}
    shape = {"model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
             "num_key_value_heads": 8, "vocab_size": 128256, "head_dim": 64, "tie_word_embeddings": True}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(shape | stored), encoding="utf-8")
    desk = Desk(tmp_path / "runs")
    config = TrainConfig(model=str(tmp_path), bits=3)
    found = desk.answer(config)
    assert found.plan.components == desk.answer(replace(config, method="gptq", group_size=32)).plan.components
    assert "3-bit gptq" in found.plan.words
    refused = desk.answer(replace(config, bits=4))
    assert refused.plan is None and "quantized already: gptq at 3 bits; choose bits=3" in refused.problem
