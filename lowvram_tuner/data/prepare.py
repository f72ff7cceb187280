"""From a dataset's name to tokenized, masked examples."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lowvram_tuner.config import DEMO_DATASET, TrainConfig
from lowvram_tuner.data.packing import Example

DEMO_FILE = Path(__file__).with_name("demo.jsonl")
DEMO_PROMPTS = (
    "Who am I talking to?",
    "Which town is your home?",
    "What is the engine on your ship called, and who built it?",
    "When is the lantern festival in Port Tallow?",
    "Who is the mayor in Port Tallow?",
    "What is the capital of Germany?",
)


class DataError(ValueError):
    """The data cannot be used: one sentence that says what was seen, what is accepted and what to do."""


@dataclass
class DataReport:
    """What was read and what became of it."""

    format: str
    rows: int = 0
    kept: int = 0
    dropped: int = 0
    truncated: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    problems: list = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return dict(vars(self))


@dataclass
class Prepared:
    """A run's data."""

    train: list[Example]
    held_out: list[Example]
    report: DataReport
    prompts: list[list[dict[str, str]]]
    fingerprint: str


def prepare(config: TrainConfig, tokenizer, progress=None) -> Prepared:
    """Reads and tokenizes the examples of `config.dataset`. Raises DataError when nothing remains."""
    path = DEMO_FILE if config.dataset == DEMO_DATASET else Path(config.dataset)
    chats = [json.loads(line)["messages"] for line in path.read_text(encoding="utf-8").splitlines()]
    examples = [_example(chat, tokenizer) for chat in chats]
    order = np.random.default_rng(config.seed).permutation(len(examples))
    count = round(len(examples) * config.held_out)
    report = DataReport("messages", len(chats), len(chats), 0, 0, sum(map(len, examples)), sum(int(e.trained.sum()) for e in examples))
    prompts = [[{"role": "user", "content": p}] for p in (config.compare_prompts or DEMO_PROMPTS)]
    digest = hashlib.sha256(path.read_bytes() + json.dumps(config.to_dict()).encode()).hexdigest()
    return Prepared([examples[i] for i in order[count:]], [examples[i] for i in order[:count]], report, prompts, digest)


def _example(chat: list[dict[str, str]], tokenizer) -> Example:
    text = tokenizer.apply_chat_template(chat, tokenize=False)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    spans, at = [], 0
    for message in chat:
        start = text.index(message["content"], at)
        at = start + len(message["content"])
        if message["role"] == "assistant":
            spans.append((start, at + 1))  # the next token is the end of the turn
    trained = np.array([any(a <= s < b for a, b in spans) for s, _ in encoded["offset_mapping"]])
    return Example(np.array(encoded["input_ids"], dtype=np.int32), trained)
