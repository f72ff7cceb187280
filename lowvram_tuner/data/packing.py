"""Which examples go into which micro-batch, and the flat arrays a micro-batch becomes.

`Batches` plans an epoch: the examples are shuffled, then laid into rows of at most `max_seq_length` tokens by best fit, and
`micro_batch_size` rows make a micro-batch. The plan depends on (examples' lengths, seed, epoch) alone, so a run resumes at any
index of it. `collate` joins a micro-batch without padding: its examples lie end to end in one sequence of T tokens and are
kept apart by `cu_seqlens` and by positions that restart.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

IGNORED = -100  # the label of a position that the loss does not count
WINDOW = 8192  # examples that are fitted together: bounds the work, and keeps the order random for large data


@dataclass(frozen=True)
class Example:
    """One tokenized example.

    input_ids: [n] int32. trained: [n] bool, True where the token is a target that the loss counts.
    """

    input_ids: np.ndarray
    trained: np.ndarray

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass(frozen=True)
class MicroBatch:
    """Flat arrays of T tokens; see `collate`."""

    input_ids: np.ndarray  # [T] int64
    labels: np.ndarray  # [T] int64, already shifted
    position_ids: np.ndarray  # [T] int64
    cu_seqlens: np.ndarray  # [n + 1] int32
    targets: int
    max_len: int
    tokens: int  # of the examples, without padding


class Plan(Sequence):
    """The micro-batches of one epoch, kept as three integer arrays and built on demand.

    plan[i] is a list of rows, each a list of example indices; plan[i:] is what is left from micro-batch i.
    """

    def __init__(self, order: np.ndarray, row_starts: np.ndarray, micro_batch_size: int) -> None:
        self.order, self.row_starts, self.size = order, row_starts, micro_batch_size

    def __len__(self) -> int:
        return -(-(len(self.row_starts) - 1) // self.size)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"micro-batch {index} of {len(self)}")
        first = index % len(self) * self.size
        bounds = self.row_starts[first : first + self.size + 1]
        return [self.order[a:b].tolist() for a, b in pairwise(bounds)]


class Batches:
    """The plans of a run's epochs. `examples` needs `len()` and, for speed, may have `.lengths` (int array)."""

    def __init__(self, examples: Sequence, micro_batch_size: int, max_seq_length: int, seed: int, packing: bool) -> None:
        lengths = getattr(examples, "lengths", None)
        self.lengths = np.asarray([len(e.input_ids) for e in examples] if lengths is None else lengths, dtype=np.int64)
        if len(self.lengths) and self.lengths.max() > max_seq_length:
            longest = int(self.lengths.argmax())
            raise ValueError(
                f"example {longest} has {self.lengths[longest]} tokens, more than max_seq_length={max_seq_length}; "
                "prepare the data for this length first."
            )
        self.micro_batch_size, self.max_seq_length = micro_batch_size, max_seq_length
        self.seed, self.packing = seed, packing

    def epoch(self, n: int) -> Plan:
        """The plan of epoch n (0 is the first): every example exactly once."""
        rng = np.random.default_rng([self.seed, n])
        order = rng.permutation(len(self.lengths))
        if not self.packing:
            return Plan(order, np.arange(len(order) + 1), self.micro_batch_size)
        rows: list[list[int]] = []
        for start in range(0, len(order), WINDOW):
            rows += best_fit(order[start : start + WINDOW], self.lengths, self.max_seq_length)
        rows = [rows[i] for i in rng.permutation(len(rows))]
        starts = np.cumsum([0, *map(len, rows)])
        flat = np.fromiter((i for row in rows for i in row), dtype=np.int64, count=len(order))
        return Plan(flat, starts, self.micro_batch_size)

    def steps_per_epoch(self, gradient_accumulation_steps: int) -> int:
        """Optimizer steps of epoch 0; with packing, other epochs may differ by a step."""
        return -(-len(self.epoch(0)) // gradient_accumulation_steps)


def best_fit(indices: Iterable[int], lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """Rows of `indices` whose lengths sum to at most `capacity`: longest first, each into the fullest row that takes it.

    Rows with the same room are found through a bit set over room (bit r: some row has r tokens left), so one placement
    costs one shift and one lowest-bit search.
    """
    rows: list[list[int]] = []
    by_room: dict[int, list[int]] = {}
    has_room = 0
    sizes = lengths[np.asarray(indices)]
    for k in np.argsort(-sizes, kind="stable"):
        size = int(sizes[k])
        fitting = has_room >> size
        if fitting:
            room = size + (fitting & -fitting).bit_length() - 1
            row = by_room[room].pop()
            if not by_room[room]:
                has_room ^= 1 << room
            rows[row].append(int(indices[k]))
        else:
            room, row = capacity, len(rows)
            rows.append([int(indices[k])])
        left = room - size
        by_room.setdefault(left, []).append(row)
        has_room |= 1 << left
    return rows


def collate(examples: Sequence, micro_batch: list[list[int]], max_seq_length: int, pad_to: int = 1) -> MicroBatch:
    """The flat arrays of a micro-batch (rows of example indices), T tokens in all.

    labels[t] is the token to predict at t: input_ids[t + 1] where that token is trained, and -100 elsewhere and at each
    example's last token. T is rounded up to a multiple of `pad_to` (1: no padding; micro_batch_size * max_seq_length: one
    shape for every batch). Padding is a sequence of its own after the examples (several of max_seq_length tokens where it is
    longer), so nothing attends to it.
    """
    parts = [examples[i] for row in micro_batch for i in row]
    lengths = [len(p.input_ids) for p in parts]
    used = sum(lengths)
    total = -(-used // pad_to) * pad_to
    padding = total - used
    pads = [max_seq_length] * (padding // max_seq_length)
    pads += [padding % max_seq_length] if padding % max_seq_length else []

    input_ids = np.zeros(total, dtype=np.int64)
    labels = np.full(total, IGNORED, dtype=np.int64)
    position_ids = np.empty(total, dtype=np.int64)
    cu_seqlens = np.zeros(len(lengths) + len(pads) + 1, dtype=np.int32)
    np.cumsum(lengths + pads, out=cu_seqlens[1:])
    for part, start in zip(parts, cu_seqlens[:-1]):
        stop = start + len(part.input_ids)
        input_ids[start:stop] = part.input_ids
        labels[start : stop - 1] = np.where(part.trained[1:], part.input_ids[1:], IGNORED)
    for start, stop in pairwise(cu_seqlens):
        position_ids[start:stop] = np.arange(stop - start)
    return MicroBatch(
        input_ids, labels, position_ids, cu_seqlens, int((labels != IGNORED).sum()), max(lengths + pads, default=0), used
    )
