"""What became of the data: problems by line, exact counts, lengths.

Every row read is either kept or dropped, and a row that is dropped or altered leaves a `Problem`. Problems of one kind in one
file are counted together, with the first lines they stand on, so a report stays small however many rows are broken.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

LINES_KEPT = 50  # line numbers remembered per kind of problem; the count stays exact
LONGEST_COUNTED = 131072  # lengths above this share the histogram's last place
SUGGESTED_SHARE = 0.99  # rows that the suggested sequence length holds whole
BINS = 24


def plain(text: str, longest: int = 400) -> str:
    """Text of the user's as a report may hold it: one line, valid Unicode, not too long."""
    text = " ".join(text.split()).encode("utf-8", "backslashreplace").decode("utf-8")
    return text if len(text) <= longest else text[: longest - 1] + "…"


class DataError(ValueError):
    """The data cannot be used: one sentence with what was seen, what is accepted and what to do."""

    def __init__(self, text: str) -> None:
        super().__init__(plain(text))


class RowError(Exception):
    """One row cannot be used. `kind` names the problem for grouping; the text says it with the values seen."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind, self.reason = kind, plain(reason)


@dataclass
class Problem:
    """`count` rows of a file with the same problem; `line` and `reason` are the first one's (line 0: the whole file)."""

    line: int
    reason: str
    count: int = 1
    kind: str = ""
    dropped: bool = True  # False: the rows were kept, and this says what is special about them
    file: str = ""
    lines: list[int] = field(default_factory=list)


@dataclass
class DataReport:
    """Counts of source rows (rows = kept + dropped) and of the examples and tokens made of them."""

    format: str = ""
    rows: int = 0
    kept: int = 0
    dropped: int = 0
    truncated: int = 0
    split: int = 0  # rows that became several examples
    duplicates: int = 0  # rows equal to an earlier one; kept
    examples: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    problems: list[Problem] = field(default_factory=list)
    columns: dict[str, dict[str, str]] = field(default_factory=dict)  # per file: role -> column
    histogram: dict[str, list[int]] = field(default_factory=dict)  # edges (n + 1) and counts (n) of whole rows' tokens
    longest: int = 0
    suggested_max_seq_length: int = 0  # holds 99 % of the rows whole; 0: none, texts are split at any length

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> DataReport:
        """The inverse of `to_json`."""
        return cls(**{**values, "problems": [Problem(**p) for p in values["problems"]]})


def problem_words(problem: dict[str, Any]) -> str:
    """A problem of `to_json` as a line: where it stands first, what it is, how often, and whether the rows were kept."""
    where = " ".join(filter(None, [problem.get("file", ""), f"line {problem['line']:,}" if problem.get("line") else ""]))
    often = f" ({problem['count']:,} times)" if problem.get("count", 1) > 1 else ""
    fate = "" if problem.get("dropped", True) else ". Kept."
    return f"{where}: {problem['reason'].rstrip('.')}{often}{fate}".lstrip(": ")


class Problems:
    """Collects problems, grouped by file and kind, in order of their first line."""

    def __init__(self) -> None:
        self._groups: dict[tuple[str, str], Problem] = {}

    def add(self, file: str, line: int, kind: str, reason: str, dropped: bool, count: int = 1) -> None:
        """Counts one more row (or `count`) with this problem."""
        group = self._groups.get((file, kind))
        if group is None:
            group = self._groups[file, kind] = Problem(line, plain(reason), 0, kind, dropped, plain(file))
        group.count += count
        if len(group.lines) < LINES_KEPT:
            group.lines.append(line)

    def repeated(self, file: str, lines: np.ndarray) -> None:
        """Counts rows that repeat earlier ones; may come in several parts and in any order."""
        kind = "duplicate"
        self.add(file, int(lines.min()), kind, "the row repeats an earlier one, token for token", dropped=False, count=len(lines))
        group = self._groups[file, kind]
        group.lines = sorted({*group.lines, *np.sort(lines)[:LINES_KEPT].tolist()})[:LINES_KEPT]
        group.line = group.lines[0]

    def list(self) -> list[Problem]:
        """The dropped ones first, each part by file and line."""
        return sorted(self._groups.values(), key=lambda p: (not p.dropped, p.file, p.line))


class Lengths:
    """Counts rows by their length in tokens, in memory that does not grow."""

    def __init__(self) -> None:
        self.counts = np.zeros(LONGEST_COUNTED + 1, dtype=np.int64)
        self.longest = 0

    def add(self, length: int) -> None:
        self.counts[min(length, LONGEST_COUNTED)] += 1
        self.longest = max(self.longest, length)

    def histogram(self) -> dict[str, list[int]]:
        """Up to 24 equal bins from 0 to the longest row: `edges` in tokens and `counts` of rows."""
        if not self.longest:
            return {"edges": [], "counts": []}
        top = min(self.longest, LONGEST_COUNTED) + 1
        width = max(1, -(-top // BINS))
        edges = list(range(0, top + width, width))
        return {"edges": edges, "counts": [int(self.counts[a : a + width].sum()) for a in edges[:-1]]}

    def suggestion(self) -> int:
        """The smallest multiple of 64 tokens that holds 99 % of the rows whole; 0 when there are none."""
        total = int(self.counts.sum())
        if not total:
            return 0
        enough = int(np.searchsorted(np.cumsum(self.counts), SUGGESTED_SHARE * total))
        return max(64, -(-enough // 64) * 64)
