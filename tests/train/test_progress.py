"""Held-out checks: what is the best so far, when patience runs out, and what the verdict is given."""

from __future__ import annotations

import json

import numpy as np
import pytest

from lowvram_tuner.train.progress import Progress

TOKENS = np.array([10, 20, 30, 20, 10, 10])


def run(*losses: float) -> tuple[Progress, list[bool]]:
    """A run whose checks, ten steps apart and the first before training, have these mean losses."""
    progress = Progress()
    best = []
    for number, loss in enumerate(losses):
        progress.step = 10 * number
        best.append(progress.checked(loss * TOKENS, TOKENS))
    return progress, best


def test_the_best_is_the_best_adapter_even_where_the_base_was_better():
    progress, best = run(1.0, 1.3, 1.2, 1.4)
    assert best == [False, True, True, False]
    assert progress.best_loss == pytest.approx(1.2)
    assert progress.verdict(TOKENS, [], 100)[0] == "memorised"
    assert "worse from the start" in progress.verdict(TOKENS, [], 100)[1]


def test_patience_counts_checks_without_a_noticeable_improvement():
    progress, best = run(2.0, 1.5, 1.4999, 1.4998, 1.4997)
    assert best == [False, True, True, True, True]  # the best checkpoint is the best one, however little
    assert progress.since_best == 3
    assert run(2.0, 1.5, 1.499, 1.4975)[0].since_best == 0  # small steps add up
    assert run(2.0, 2.1, 2.2)[0].since_best == 2


def test_a_loss_that_is_no_number_is_never_the_best():
    progress, best = run(2.0, 1.5, float("nan"))
    assert best == [False, True, False] and progress.best_loss == 1.5 and progress.since_best == 1
    assert "no longer a number" in progress.verdict(TOKENS, [], 100)[1]


def test_the_spread_of_examples_decides_about_a_small_change():
    def judged(spread: float) -> tuple[str, str]:
        progress = Progress()
        progress.checked(2.0 * TOKENS, TOKENS)
        progress.step = 10
        change = 0.03 * TOKENS + spread * np.array([1, -1, 1, -1, 1, -1])
        progress.checked(2.0 * TOKENS - change, TOKENS)
        return progress.verdict(TOKENS, [False], 100)

    assert judged(0.1)[0] == "learned"
    assert judged(3.0)[0] == "no_change" and "may be chance" in judged(3.0)[1]


def test_a_checkpoint_brings_all_of_it_back():
    progress, _ = run(2.0, 1.5, 1.6)
    again = Progress(**json.loads(json.dumps(vars(progress))))
    assert again == progress
    assert again.verdict(TOKENS, [], 100) == progress.verdict(TOKENS, [], 100)
