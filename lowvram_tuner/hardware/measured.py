"""What was measured on a card once and is worth remembering: its rates, and what CUDA itself takes there.

The worker measures in about a second when it first meets a card; the page, which must not touch CUDA, reads the result.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[2] / ".cache"


def measured(uuid: str) -> dict[str, float]:
    """flops, copy_bytes, host_bytes (per second) and context_bytes of a card; empty until it was measured."""
    try:
        found = json.loads(_path(uuid).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {k: float(v) for k, v in found.items() if isinstance(v, (int, float)) and v > 0} if isinstance(found, dict) else {}


def remember(uuid: str, values: dict[str, float]) -> None:
    """Keeps the values for `measured`. A folder that cannot be written only means measuring again."""
    path = _path(uuid)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}")
        temporary.write_text(json.dumps(values), encoding="utf-8")
        temporary.replace(path)
    except OSError:
        return


def _path(uuid: str) -> Path:
    return FOLDER / f"card-{''.join(c for c in uuid if c.isalnum() or c == '-')}.json"
