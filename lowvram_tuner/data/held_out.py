"""What is kept aside to see whether a run learned: held-out examples, and the questions asked before and after.

Held-out examples are chosen by a hash of their tokens, so the choice depends on the seed and the data alone, however the rows
are ordered, and equal rows stay on one side.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from lowvram_tuner.config import DEMO_DATASET, TrainConfig
from lowvram_tuner.data.formats import Sample
from lowvram_tuner.data.report import DataError
from lowvram_tuner.data.templates import Messages

Chunks = Callable[[], Iterator[np.ndarray]]
PROMPTS = 4  # before/after questions taken from held-out rows
EXACT = 1 << 17  # examples among which the held-out ones are counted out
BUCKET = 1 << 16  # rows that are compared with each other at once
CANDIDATES = 256  # rows remembered as such questions, spread over the data by their hash
DEMO_PROMPTS = (
    "Who am I talking to?",
    "Which town is your home?",
    "What is the engine on your ship called, and who built it?",
    "When is the lantern festival in Port Tallow?",
    "Who is the mayor in Port Tallow?",
    "What is the capital of Germany?",
)


def row_hash(ids: np.ndarray) -> int:
    """A 64-bit hash of a row's tokens (int32)."""
    return int.from_bytes(hashlib.blake2b(ids.tobytes(), digest_size=8).digest(), "little")


def _keyed(index: np.ndarray, salt: int) -> np.ndarray:
    """A pseudo-random uint64 for each example from its hash, its piece and a salt (the finalizer of splitmix64)."""
    with np.errstate(over="ignore"):
        z = index["hash"] + np.uint64(0x9E3779B97F4A7C15) * (index["piece"].astype(np.uint64) + np.uint64(salt + 1))
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def split(chunks: Chunks, config: TrainConfig, weights: list[float]) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the training examples (as often as their source's weight says) and of the held-out ones, int32.

    chunks: a function that gives the index records in order, some at a time. Up to EXACT examples the share held out is exact to
    one example, above that to what chance leaves.
    """
    threshold = _threshold(chunks, config)
    train, held = _parted(chunks, config.seed, threshold, weights)
    if not len(train) and len(held):  # one row, or only copies of it
        train, held = _parted(chunks, config.seed, -1, weights)
    if not len(train):
        raise DataError(f"the weights {weights} leave no example to train on; give larger weights or more rows.")
    return train, held


def _threshold(chunks: Chunks, config: TrainConfig) -> int:
    """The largest key of a held-out example, -1 for none."""
    total = sum(map(len, chunks()))
    count = min(max(1, round(total * config.held_out)), total - 1) if config.held_out else 0
    if count < 1:
        return -1
    if total > EXACT:
        return int(config.held_out * 2**64)
    keys = np.concatenate([_keyed(records, config.seed) for records in chunks()])
    return int(np.partition(keys, count - 1)[count - 1])


def _parted(chunks: Chunks, seed: int, threshold: int, weights: list[float]) -> tuple[np.ndarray, np.ndarray]:
    train, held_out, start = [], [], 0
    for records in chunks():
        held = _keyed(records, seed) <= np.uint64(threshold) if threshold >= 0 else np.zeros(len(records), dtype=bool)
        weight = np.array(weights)[records["source"]]
        part = _keyed(records, seed + 1) / 2.0**64  # in [0, 1): whether the weight's fraction counts once more
        times = np.where(held, 0, np.floor(weight) + (part < weight % 1)).astype(np.int64)
        train.append(np.repeat(np.arange(start, start + len(records), dtype=np.int32), times))
        held_out.append(np.flatnonzero(held).astype(np.int32) + np.int32(start))
        start += len(records)
    return np.concatenate(train), np.concatenate(held_out)


def among(chunks: Chunks, numbers: np.ndarray, digests: np.ndarray) -> np.ndarray:
    """For each of some hashes (uint64) whether one of the examples `numbers` (ascending) has it."""
    found, start = np.zeros(len(digests), dtype=bool), 0
    for records in chunks():
        first, last = np.searchsorted(numbers, [start, start + len(records)])
        found |= np.isin(digests, records["hash"][numbers[first:last] - start])
        start += len(records)
    return found


def repeats(chunks: Chunks, examples: int) -> Iterator[np.ndarray]:
    """Index records of rows whose tokens equal an earlier row's, each once, in no order over the whole.

    The records are gone through once for each share of about BUCKET of them, told apart by their hash.
    """
    buckets = -(-examples // BUCKET)
    for bucket in range(buckets):
        parts = [r[(r["piece"] == 0) & (r["hash"] % np.uint64(buckets) == bucket)] for r in chunks()]
        records = np.concatenate(parts)
        order = np.argsort(records["hash"], kind="stable")
        same = records["hash"][order[1:]] == records["hash"][order[:-1]]
        yield records[np.sort(order[1:][same])]


class Candidates:
    """Questions that may be asked before and after: those of the rows with the smallest hashes, a fair draw from all rows."""

    def __init__(self) -> None:
        self._heap: list[tuple[int, int, Messages]] = []
        self._seen = 0

    def add(self, digest: int, sample: Sample) -> None:
        """Offers a row with its hash."""
        if len(self._heap) >= CANDIDATES and digest >= -self._heap[0][0]:
            return
        question = _question(sample)
        if question:
            self._seen += 1  # tells equal hashes apart, so that questions are never compared
            push = heapq.heappush if len(self._heap) < CANDIDATES else heapq.heappushpop
            push(self._heap, (-digest, self._seen, question))

    def list(self) -> list[list[Any]]:
        """[hash, messages] of each, the smallest hash first."""
        return [[-digest, question] for digest, _, question in sorted(self._heap, reverse=True)]


def _question(sample: Sample) -> Messages | None:
    """What stands before a conversation's last answer, or the first words of a text; None where it is no good question."""
    if sample.messages is None:
        words = " ".join(sample.text.split()[:12])
        return [{"role": "user", "content": words}] if words else None
    last = max(i for i, m in enumerate(sample.messages) if m["role"] == "assistant")
    before = sample.messages[:last]
    if not before or before[-1]["role"] != "user" or sample.tools or sum(len(m["content"]) for m in before) > 2000:
        return None
    return [{"role": m["role"], "content": m["content"]} for m in before]


def choose_prompts(config: TrainConfig, candidates: list[Messages], apart: np.ndarray) -> list[Messages]:
    """The before/after questions: the user's, the demo's, or some of the candidates that are held out (`apart`, bool of each).

    Without a held-out one among them, questions that are trained on have to do.
    """
    chosen = config.compare_prompts or (DEMO_PROMPTS if config.dataset == DEMO_DATASET else ())
    if chosen:
        system = [{"role": "system", "content": config.system_prompt}] if config.system_prompt else []
        return [[*system, {"role": "user", "content": text}] for text in chosen]
    ranked = [q for q, held in zip(candidates, apart) if held] or candidates
    return [q for i, q in enumerate(ranked) if q not in ranked[:i]][:PROMPTS]
