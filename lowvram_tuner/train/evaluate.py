"""Losses without training: of held-out examples during a run, and of a text for `eval`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from lowvram_tuner.config import ConfigError, TrainConfig
from lowvram_tuner.data.packing import Batches, collate
from lowvram_tuner.train.step import to_batch

LIMIT = 256  # held-out examples that a check looks at


def target_counts(examples: Sequence) -> np.ndarray:
    """int64 [n]: the trained tokens of each example that `held_out_losses` looks at."""
    return np.array([np.count_nonzero(example.trained[1:]) for example in _some(examples)], dtype=np.int64)


def held_out_losses(step: Any, examples: Sequence, config: TrainConfig, device: torch.device) -> np.ndarray:
    """float64 [n]: the loss of each example, summed over its trained tokens; of many, LIMIT spread evenly over all."""
    chosen = _some(examples)
    losses = np.zeros(len(chosen))
    for micro_batch in Batches(chosen, config.micro_batch_size, config.max_seq_length, 0, config.packing).epoch(0):
        flat = collate(chosen, micro_batch, config.max_seq_length)
        if flat.targets:
            numbers = np.array([i for row in micro_batch for i in row])
            found = step.evaluate(to_batch(flat, device, config.max_seq_length))[: flat.targets].double().cpu().numpy()
            owner = np.searchsorted(flat.cu_seqlens, np.flatnonzero(flat.labels >= 0), side="right") - 1
            losses[numbers] = np.bincount(owner, found, len(numbers))
    return losses


def _some(examples: Sequence) -> list:
    """Up to LIMIT examples, spread so that each file of a mix has its share."""
    count = min(LIMIT, len(examples))
    return [examples[i * len(examples) // count] for i in range(count)]


def perplexity(config: TrainConfig, adapter: str | None, text: Path) -> dict[str, float]:
    """exp(mean loss) of a text in windows of `max_seq_length` tokens, each read without the ones before.

    Returns {perplexity, tokens}. Raises ConfigError for a text that is missing or shorter than two tokens, and for a
    model whose loss is inf or nan.
    """
    from lowvram_tuner.models.source import load_tokenizer
    from lowvram_tuner.train.session import open_for_reading

    try:
        words = Path(text).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"text={str(text)!r} cannot be read as UTF-8 text: {error}") from None
    ids = np.asarray(load_tokenizer(config.model)(words, add_special_tokens=False)["input_ids"], np.int64)
    if len(ids) < 2:
        raise ConfigError(f"text={str(text)!r} holds {len(ids)} tokens; perplexity needs at least 2.")
    step, device = open_for_reading(config, Path(adapter) if adapter else None)
    total = tokens = 0
    for start in range(0, len(ids) - 1, config.max_seq_length):
        window = ids[start : start + config.max_seq_length]
        if len(window) < 2:
            break
        labels = np.append(window[1:], -100)
        edges = np.array([0, len(window)], np.int32)
        flat = SimpleNamespace(input_ids=window, labels=labels, position_ids=np.arange(len(window)), cu_seqlens=edges, tokens=len(window))
        total += float(step.evaluate(to_batch(flat, device, config.max_seq_length)).sum())
        tokens += len(window) - 1
    if not math.isfinite(total):
        raise ConfigError(f"model={config.model!r} gives no number for a loss on this text: a weight of it or of its adapter is inf or nan.")
    return {"perplexity": math.exp(min(total / tokens, 700)), "tokens": tokens}
