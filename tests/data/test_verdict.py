"""The verdict from held-out losses."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lowvram_tuner.data.verdict import improved, judge, standard_error

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


def test_words_name_where_it_went_wrong_and_what_is_kept():
    history = [(0, 2.5), (10, 1.5), (20, 1.9), (30, 2.2)]
    kind, text = judge(history)
    assert kind == "memorised"
    assert "got worse from step 20 on (from 1.500 to 2.200; the base had 2.500)" in text
    assert "The adapter kept is that of step 10, the best." in text
    text = judge(history, steps_per_epoch=12)[1]
    assert "got worse from epoch 2 (step 20) on" in text and "that of epoch 1 (step 10)" in text
    assert "epoch" not in judge(history, steps_per_epoch=30)[1]  # a single pass over the data


def test_a_measured_spread_replaces_the_assumed_one():
    history = [(0, 2.0), (10, 1.95)]
    assert judge(history)[0] == "learned"
    kind, text = judge(history, won_error=0.04)
    assert kind == "no_change" and "a difference below 0.080 may be chance" in text
    kind, text = judge([(0, 1.0), (10, 0.985)], won_error=0.002)
    assert kind == "learned" and "known to within 0.004" in text
    worse = [(0, 2.0), (10, 1.9), (20, 1.95)]
    assert judge(worse, lost_error=0.001)[0] == "memorised"
    assert judge(worse, lost_error=0.04)[0] == "learned"


def test_the_standard_error_is_that_of_many_draws():
    """Of example-wise differences of a known spread, drawn again and again: the formula gives what the draws show."""
    draw = np.random.default_rng(0)
    tokens = draw.integers(5, 40, 60)
    found, differences = [], []
    for _ in range(400):
        a = tokens * 2.0 + draw.normal(0, 3, 60)
        b = a - tokens * 0.1 - draw.normal(0, 1.5, 60)
        found.append(standard_error(a, b, tokens))
        differences.append((a - b).sum() / tokens.sum())
    assert np.mean(found) == pytest.approx(np.std(differences), rel=0.1)
    assert np.mean(differences) == pytest.approx(0.1, abs=0.002)
    assert standard_error(a[:4], b[:4], tokens[:4]) is None and standard_error(None, b, tokens) is None
    assert standard_error(a, a, tokens) == 0.0


def test_without_held_out_rows_the_answers_decide():
    assert judge([], [True, True])[0] == "no_change"
    assert judge([(0, 2.0)], [True, False])[0] == "learned"
    assert "Nothing was held out" in judge([], [False])[1]


def test_improvement_for_early_stopping():
    assert improved(2.0, 1.99)
    assert not improved(2.0, 1.999)
    assert not improved(2.0, 2.1)
