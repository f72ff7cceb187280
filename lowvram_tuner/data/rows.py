"""Any row of a source by its number, without reading the source twice.

The file is walked as far as the row asked for, and the place of every STRIDE-th row is remembered; the next row is reached
from the nearest place before it. Parquet files and datasets know their rows' places themselves.
"""

from __future__ import annotations

from bisect import bisect_right
from itertools import islice

from lowvram_tuner.data.readers import Record
from lowvram_tuner.data.sources import Source

STRIDE = 256


class RowIndex:
    """Rows of one source, 1 being the first. `total` is their number once it is known."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.total: int | None = source.rows()
        self._places = [(1, 0, 1)]  # row, byte, line

    def records(self, first: int, count: int) -> list[Record]:
        """Rows first to first + count - 1, fewer at the end of the source."""
        if self.total is None and self.source.can_be_entered():
            self._walk(first)
        if self.total is not None and first > self.total:
            return []
        if self.source.rows() is not None:
            return list(islice(self.source.records(line=first), count))
        row, offset, line = self._places[bisect_right(self._places, (first, float("inf"), 0)) - 1]
        rows = (r for r in self.source.records(offset, line) if r.value is not None or r.error)
        found = list(islice(rows, first - row, first - row + count))
        if found and len(found) < count:
            self.total = first - 1 + len(found)
        return found

    def count(self) -> int:
        """The number of rows; walks to the end where it is not known."""
        if self.total is None:
            self._walk(float("inf"))
        return self.total

    def _walk(self, to: float) -> None:
        """Goes on from the last place known until row `to`, or to the end."""
        row, offset, line = self._places[-1]
        if to - row < STRIDE:
            return
        for byte, number in self.source.starts(offset, line):
            if byte >= 0 and row - self._places[-1][0] >= STRIDE:
                self._places.append((row, byte, number))
            if row >= to:
                return
            row += 1
        self.total = row - 1
