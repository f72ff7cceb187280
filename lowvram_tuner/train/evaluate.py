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


def held_out_loss(step: Any, examples: Sequence, config: TrainConfig, device: torch.device, limit: int = 256) -> float | None:
    """Mean loss per trained token over the first `limit` held-out examples; None when there are none."""
    count = min(limit, len(examples))
    if count == 0:
        return None
    chosen = [examples[i] for i in range(count)]
    total, targets = 0.0, 0
    for micro_batch in Batches(chosen, config.micro_batch_size, config.max_seq_length, 0, config.packing).epoch(0):
        flat = collate(chosen, micro_batch, config.max_seq_length)
        if flat.targets:
            total += float(step.evaluate(to_batch(flat, device, config.max_seq_length)))
            targets += flat.targets
    return total / targets if targets else None


def perplexity(config: TrainConfig, adapter: str | None, text: Path) -> dict[str, float]:
    """exp(mean loss) of a text in windows of `max_seq_length` tokens, each read without the ones before.

    Returns {perplexity, tokens}. Raises ConfigError for a text that is missing or shorter than two tokens.
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
        flat = SimpleNamespace(input_ids=window, labels=labels, position_ids=np.arange(len(window)), cu_seqlens=edges)
        total += float(step.evaluate(to_batch(flat, device, config.max_seq_length)))
        tokens += len(window) - 1
    return {"perplexity": math.exp(min(total / tokens, 700)), "tokens": tokens}
