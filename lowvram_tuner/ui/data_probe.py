"""Reads a dataset for the page, in a process of its own: `python -m lowvram_tuner.ui.data_probe`.

The page's process must stay small and never imports torch, which the tokenizer of a GGUF model needs. Takes a JSON line
{"config": {...}, "first": 0, "count": 8} on stdin and answers with one JSON line: the report, and examples as pieces of text
with what is trained on. Every failure is an answer too: {"error": "..."}.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from lowvram_tuner.config import TrainConfig

LONGEST = 1500  # tokens of one example that are shown
BINS = 24


def main() -> int:
    asked = json.loads(sys.stdin.readline())
    try:
        answer = probe(TrainConfig.from_dict(asked["config"]), int(asked["first"]), int(asked["count"]))
    except (ValueError, OSError) as error:  # ConfigError and DataError are ValueErrors: sentences for the user
        answer = {"error": str(error)}
    sys.stdout.buffer.write(json.dumps(answer).encode("utf-8") + b"\n")
    return 0


def probe(config: TrainConfig, first: int, count: int) -> dict[str, Any]:
    """The data's report, a histogram of lengths, and `count` examples from `first` on."""
    from lowvram_tuner.data.prepare import prepare
    from lowvram_tuner.models.source import load_tokenizer

    tokenizer = load_tokenizer(config.model)
    prepared = prepare(config, tokenizer)
    examples = [*prepared.train, *prepared.held_out]
    first = max(0, min(first, len(examples) - 1))
    shown = [
        {"number": i + 1, "held_out": i >= len(prepared.train), "length": len(e.input_ids), "pieces": pieces(e, tokenizer)}
        for i, e in enumerate(examples[first : first + count], start=first)
    ]
    lengths = [len(e.input_ids) for e in examples]
    return {
        "report": prepared.report.to_json(),
        "examples": len(examples),
        "held_out": len(prepared.held_out),
        "lengths": histogram(lengths),
        "rows": shown,
    }


def pieces(example: Any, tokenizer: Any) -> list[tuple[str, bool, bool]]:
    """(text, trained, special) of an example's tokens. Tokens that only together make a character are one piece."""
    special, found, held = set(tokenizer.all_special_ids), [], []
    ids, trained = example.input_ids.tolist()[:LONGEST], example.trained.tolist()
    for at, token in enumerate(ids):
        held.append(token)
        text = tokenizer.decode(held, clean_up_tokenization_spaces=False)
        last = at + 1 == len(ids) or trained[at + 1] != trained[at] or len(held) >= 8
        if "\ufffd" in text and not last:
            continue
        found.append((text, bool(trained[at]), token in special))
        held = []
    return found


def histogram(lengths: list[int]) -> list[tuple[int, int]]:
    """(upper end, count) of up to `BINS` equal ranges of length."""
    if not lengths:
        return []
    width = max(1, -(-max(lengths) // BINS))
    counts = [0] * (-(-max(lengths) // width) or 1)
    for n in lengths:
        counts[max(0, n - 1) // width] += 1
    return [((i + 1) * width, c) for i, c in enumerate(counts)]


if __name__ == "__main__":
    sys.exit(main())
