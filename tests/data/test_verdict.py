"""The verdict from held-out losses."""

from __future__ import annotations

import math

import pytest

from lowvram_tuner.data.verdict import improved, judge

CASES = {
    "clear drop": ([2.5, 1.8, 1.4, 1.3], "learned"),
    "drop, then a small wobble": ([2.5, 1.4, 1.3, 1.32], "learned"),
    "drop, then a tenth of it lost": ([2.5, 1.5, 1.3, 1.5], "memorised"),
    "worse from the start": ([2.0, 2.3, 2.6], "memorised"),
    "a little better, then much worse": ([2.0, 1.99, 2.4], "memorised"),
    "nothing": ([2.0, 2.0, 1.999], "no_change"),
    "below one percent": ([4.0, 3.97], "no_change"),
    "below two hundredths": ([1.0, 0.985], "no_change"),
    "just above both": ([2.0, 1.975], "learned"),
    "a little worse": ([2.0, 2.01], "no_change"),
    "not a number": ([2.0, math.nan], "no_change"),
}


@pytest.mark.parametrize("name", CASES)
def test_verdicts(name):
    losses, kind = CASES[name]
    assert judge(list(enumerate(losses)))[0] == kind


def test_words_name_where_it_went_wrong_and_what_is_best():
    kind, text = judge([(0, 2.5), (1, 1.5), (2, 1.9), (3, 2.2)], unit="epoch")
    assert kind == "memorised"
    assert "got worse from epoch 2 on (from 1.500 to 2.200; the base had 2.500)" in text
    assert "The checkpoint of epoch 1 is the best." in text


def test_a_measured_spread_replaces_the_assumed_one():
    history = [(0, 2.0), (10, 1.95)]
    assert judge(history)[0] == "learned"
    assert judge(history, standard_error=0.04)[0] == "no_change"
    assert judge([(0, 1.0), (10, 0.985)], standard_error=0.002)[0] == "learned"


def test_without_held_out_rows_the_answers_decide():
    assert judge([], [True, True])[0] == "no_change"
    assert judge([(0, 2.0)], [True, False])[0] == "learned"
    assert "Nothing was held out" in judge([], [False])[1]


def test_improvement_for_early_stopping():
    assert improved(2.0, 1.99)
    assert not improved(2.0, 1.999)
    assert not improved(2.0, 2.1)
