"""Epoch plans and flat micro-batches."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowvram_tuner.data.packing import IGNORED, Batches, Example, best_fit, collate


def example(*ids: int, trained: str = "") -> Example:
    flags = [c == "1" for c in trained] if trained else [True] * len(ids)
    return Example(np.array(ids, dtype=np.int32), np.array(flags))


def plain(lengths: list[int]) -> list[Example]:
    return [Example(np.full(n, i + 1, dtype=np.int32), np.ones(n, dtype=bool)) for i, n in enumerate(lengths)]


def test_collate_shifts_labels_and_keeps_examples_apart():
    examples = [example(10, 11, 12, 13, trained="0011"), example(20, 21, trained="01"), example(30)]
    flat = collate(examples, [[1, 0], [2]], 8)
    assert flat.input_ids.tolist() == [20, 21, 10, 11, 12, 13, 30]
    assert flat.labels.tolist() == [21, IGNORED, IGNORED, 12, 13, IGNORED, IGNORED]
    assert flat.position_ids.tolist() == [0, 1, 0, 1, 2, 3, 0]
    assert flat.cu_seqlens.tolist() == [0, 2, 6, 7]
    assert (flat.targets, flat.max_len) == (3, 4)
    assert [a.dtype for a in (flat.input_ids, flat.labels, flat.position_ids, flat.cu_seqlens)] == [np.int64] * 3 + [np.int32]


def test_the_first_token_is_never_a_label():
    flat = collate([example(1, 2), example(3, 4)], [[0, 1]], 4)
    assert flat.labels.tolist() == [2, IGNORED, 4, IGNORED]


@pytest.mark.parametrize("pad_to, total, cuts", [(1, 5, [0, 5]), (4, 8, [0, 5, 8]), (16, 16, [0, 5, 13, 16])])
def test_padding_is_a_sequence_of_its_own(pad_to, total, cuts):
    flat = collate([example(1, 2, 3, 4, 5)], [[0]], 8, pad_to)
    assert len(flat.input_ids) == total and flat.tokens == 5
    assert flat.cu_seqlens.tolist() == cuts
    assert (flat.labels[4:] == IGNORED).all()
    assert flat.position_ids.tolist() == [i for a, b in pairwise(cuts) for i in range(b - a)]
    assert flat.max_len == max(b - a for a, b in pairwise(cuts))


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 64), min_size=1, max_size=80), seed=st.integers(0, 5), packing=st.booleans(), size=st.integers(1, 5)
)
def test_a_plan_holds_every_example_once_within_the_limit(lengths, seed, packing, size):
    plan = Batches(plain(lengths), size, 64, seed, packing).epoch(3)
    rows = [row for micro_batch in plan for row in micro_batch]
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= 64 for row in rows)
    assert all(len(micro_batch) == size for micro_batch in list(plan)[:-1])
    if not packing:
        assert all(len(row) == 1 for row in rows)
        assert len(plan) == -(-len(lengths) // size)


def test_plans_repeat_by_seed_and_epoch_and_resume_by_index():
    examples = plain(list(np.random.default_rng(0).integers(4, 200, 500)))
    batches, again = Batches(examples, 2, 256, 7, True), Batches(examples, 2, 256, 7, True)
    assert list(batches.epoch(1)) == list(again.epoch(1))
    assert list(batches.epoch(1)) != list(batches.epoch(2))
    assert list(batches.epoch(1)) != list(Batches(examples, 2, 256, 8, True).epoch(1))
    whole = list(batches.epoch(0))
    assert batches.epoch(0)[5:] == whole[5:]
    assert batches.epoch(0)[-1] == whole[-1]
    with pytest.raises(IndexError):
        batches.epoch(0)[len(whole)]


def test_best_fit_beats_filling_in_order_and_comes_close_to_full():
    lengths = np.random.default_rng(1).integers(10, 300, 4000)
    rows = best_fit(range(4000), lengths, 512)
    filled = lengths.sum() / (len(rows) * 512)
    assert filled > 0.995
    assert best_fit([0, 1, 2, 3], np.array([6, 5, 4, 5]), 10) == [[0, 2], [1, 3]]


def test_best_fit_takes_the_fullest_row_that_has_room():
    # 7 and 8 open rows with 3 and 2 left; 2 belongs into the row with exactly 2 left
    assert best_fit([0, 1, 2], np.array([7, 8, 2]), 10) == [[1, 2], [0]]


def test_an_example_beyond_the_limit_is_refused():
    with pytest.raises(ValueError, match=r"example 1 has 9 tokens, more than max_seq_length=8"):
        Batches(plain([3, 9]), 1, 8, 0, True)


def test_a_large_plan_is_small():
    class Many:
        lengths = np.random.default_rng(2).integers(20, 400, 200_000)

    plan = Batches(Many(), 4, 1024, 0, True).epoch(0)
    assert len(plan.order) == 200_000
    assert plan.order.nbytes + plan.row_starts.nbytes < 4_000_000
