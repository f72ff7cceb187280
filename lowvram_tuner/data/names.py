"""What a dataset's name says before anything is read: files, folders and hub ids, mixed with weights; and columns by role.

"a.jsonl" · "folder" · "owner/name" · "owner/name@subset" · "a.jsonl:2, b.csv:0.5". A weight is how often a row is seen in
one epoch: with 2 each row twice, with 0.5 half of the rows once. Standard library only, for the page asks at every key press.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from lowvram_tuner.config import DEMO_DATASET

KINDS = {
    ".json": "json", ".jsonl": "json", ".ndjson": "json", ".csv": "csv", ".tsv": "tsv", ".parquet": "parquet", ".arrow": "arrow",
    ".txt": "text", ".text": "text", ".md": "text", ".markdown": "text",
}  # fmt: skip
ACCEPTED = ", ".join(KINDS)
ROLES = {  # what a column can hold, as the page calls it
    "messages": "Conversation", "prompt": "Question", "input": "Added to the question", "completion": "Answer", "chosen": "Preferred answer",
    "system": "System prompt", "tools": "Tools", "text": "Plain text",
}  # fmt: skip
UNUSED = "-"  # role=-: no column holds it
_WEIGHTED = re.compile(r"^(.+?):(\d+(?:\.\d+)?)$")
_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[\w.-]+(@[\w.-]+)?$")
_NEXT_ROLE = re.compile(r"\s*[,\n]\s*(?=[a-z]+\s*=)")


class Part(NamedTuple):
    """One of the datasets that a name mixes. `path`: where it is on this disk, None when it is not."""

    name: str
    weight: float = 1.0
    path: Path | None = None

    @property
    def may_be_on_hub(self) -> bool:
        """Whether the name looks like a hub id."""
        return self.path is None and _HUB_ID.match(self.name) is not None and Path(self.name).suffix.lower() not in KINDS


def split(spec: str) -> list[Part]:
    """The datasets that a name mixes, in order. A comma in a file's own name is no separator."""
    whole = _part(spec)
    if whole.path or not spec.strip():
        return [whole] if whole.path else []
    found, pieces, at = [], spec.split(","), 0
    while at < len(pieces):
        for end in range(len(pieces), at, -1):
            part = _part(",".join(pieces[at:end]).strip())
            if part.path or end == at + 1:
                break
        if part.name:
            found.append(part)
        at = end
    return found


def joined(parts: Iterable[Part]) -> str:
    """The inverse of `split`, with paths that are on this disk made absolute."""
    texts = [str(p.path.resolve()) if p.path else p.name for p in parts]
    return ", ".join(text if p.weight == 1 else f"{text}:{p.weight:g}" for text, p in zip(texts, parts, strict=True))


def _part(text: str) -> Part:
    path = None if text == DEMO_DATASET else _existing(text)
    weighted = None if path else _WEIGHTED.match(text)
    return Part(weighted[1], float(weighted[2]), _existing(weighted[1])) if weighted else Part(text, 1.0, path)


def _existing(text: str) -> Path | None:
    """The path of that name, None where there is none."""
    try:
        path = Path(text).expanduser()
        return path if text and path.exists() else None
    except (OSError, ValueError, RuntimeError):  # a name too long, a NUL in it, an unknown home
        return None


def column_items(columns: Iterable[str]) -> list[str]:
    """A config's columns, one role=column each; one text may hold several, and a column's own name a comma."""
    return [item.strip() for text in columns for item in _NEXT_ROLE.split(text) if item.strip()]
