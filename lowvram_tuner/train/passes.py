"""One optimizer step in more and smaller passes, for a card that is too full for a micro-batch at once.

Every token of a step counts the same whichever pass it lies in, so how a micro-batch is cut changes memory, not the result.
"""

from __future__ import annotations

from dataclasses import replace

from lowvram_tuner.config import TrainConfig, options


def in_passes(config: TrainConfig, split: int) -> TrainConfig:
    """The config with each micro-batch in `split` passes: what a plan must hold, the effective batch size unchanged."""
    if split == 1:
        return config
    passes = min(config.gradient_accumulation_steps * split, options()["gradient_accumulation_steps"].metadata["max"])
    return replace(config, micro_batch_size=-(-config.micro_batch_size // split), gradient_accumulation_steps=passes)


def splits(config: TrainConfig, split: int) -> dict[int, TrainConfig]:
    """The config in `split` passes, in twice as many, .., one example each."""
    found = {}
    while True:
        found[split] = in_passes(config, split)
        if found[split].micro_batch_size == 1:
            return found
        split *= 2


def parts(rows: list[list[int]], split: int) -> list[list[list[int]]]:
    """A micro-batch's rows cut into up to `split` passes of equal size."""
    size = -(-len(rows) // split)
    return [rows[i : i + size] for i in range(0, len(rows), size)]
