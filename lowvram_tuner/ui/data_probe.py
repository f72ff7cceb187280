"""Reads datasets for the page, in a process of its own: `python -m lowvram_tuner.ui.data_probe`.

The page's process must stay small and never imports torch, which the tokenizer of a GGUF model needs. One JSON line in,
{"config": {...}, "first": 1, "count": 8}, one JSON line out: what `data.preview` finds, or {"error": "..."}. The tokenizer
and the opened dataset are kept for the next question; after a while without one the process ends and gives its memory back.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from typing import Any

from lowvram_tuner.config import TrainConfig

IDLE_S = 120.0


def main() -> int:
    """Answers until stdin ends or nobody has asked for `IDLE_S`."""
    opened: dict[str, Any] = {}
    while True:
        idle = threading.Timer(IDLE_S, lambda: os._exit(0))
        idle.daemon = True
        idle.start()
        line = sys.stdin.readline()
        idle.cancel()
        if not line:
            return 0
        asked = json.loads(line)
        try:
            answer = look(opened, TrainConfig.from_dict(asked["config"]), int(asked["first"]), int(asked["count"]))
        except (ValueError, OSError) as error:  # ConfigError and DataError are ValueErrors: sentences for the user
            answer = {"error": str(error)}
        sys.stdout.buffer.write(json.dumps(answer).encode("ascii") + b"\n")
        sys.stdout.buffer.flush()


def look(opened: dict[str, Any], config: TrainConfig, first: int, count: int) -> dict[str, Any]:
    """The summary of a dataset and `count` rows from `first` on. `opened` remembers the last model and dataset."""
    from lowvram_tuner.data.preview import Preview
    from lowvram_tuner.models.source import load_tokenizer

    if opened.get("model") != config.model:
        opened.clear()
        opened.update(model=config.model, tokenizer=load_tokenizer(config.model))
    if opened.get("config") != config:
        preview = Preview(config, opened["tokenizer"])
        opened.update(preview=preview, summary=preview.summary(), config=config)
    summary = opened["summary"]
    if all(f["error"] for f in summary["files"]):
        return {**summary, "rows": []}
    return {**summary, "rows": opened["preview"].rows(max(1, first), count)}


if __name__ == "__main__":
    sys.exit(main())
