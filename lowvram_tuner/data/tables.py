"""CSV and TSV as records, exact about quotes.

The csv module joins everything after an unclosed quote into one field and says nothing. Here a record is parsed strictly: a
quote opens a field only at its start, is written double inside it, and must close before a delimiter or the line's end.
Where that fails, the line on which the record started is reported, and reading goes on with the next line.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator
from pathlib import Path

from lowvram_tuner.data.lines import MAX_ROW_BYTES, Encoding, Line, read_lines
from lowvram_tuner.data.readers import CRLF, Record, too_long, undecodable
from lowvram_tuner.data.report import DataError

_CLOSES = re.compile(r'(?<!")"(?:"")*(?!")')  # an odd run of quotes
DELIMITERS = (",", ";", "\t", "|")


class _BadQuote(Exception):
    """A quote that closes a field is followed by something that is no delimiter; carries the position."""


def split_fields(text: str, delimiter: str) -> list[str] | None:
    """The fields of one record, or None when a quoted field is still open at the end of `text`. Raises _BadQuote."""
    fields, at = [], 0
    while True:
        if text.startswith('"', at):
            end = text.find('"', at + 1)
            while end >= 0 and text.startswith('"', end + 1):
                end = text.find('"', end + 2)
            if end < 0:
                return None
            fields.append(text[at + 1 : end].replace('""', '"'))
            at = end + 1
            if at < len(text) and text[at] != delimiter:
                raise _BadQuote(at)
        else:
            end = text.find(delimiter, at)
            fields.append(text[at:] if end < 0 else text[at:end])
            at = len(text) if end < 0 else end
        if at >= len(text):
            return fields
        at += 1


def header_of(path: Path, encoding: Encoding, delimiter: str | None) -> tuple[list[str], str, int]:
    """The column names, the delimiter, and the number of lines up to the header. Raises DataError when there is none."""
    for line in read_lines(path, encoding):
        try:
            text = (line.data or b"").decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{path.name}, line {line.number}: {undecodable(error)[1]}.") from None
        if not text.strip():
            continue
        used = delimiter or max(DELIMITERS, key=text.count)
        try:
            names = split_fields(text, used)
        except _BadQuote:
            names = None
        if names is None:
            raise DataError(f"{path.name}, line {line.number}: the header has a quote that is not closed.")
        names = [n.strip() for n in names]
        if len(set(names)) != len(names):
            twice = next(n for n in names if names.count(n) > 1)
            raise DataError(f"{path.name}: the header names the column {twice!r} twice; give each column its own name.")
        return names, used, line.number
    raise DataError(f"{path.name} is empty; the first line must name the columns.")


def read_table(
    path: Path, encoding: Encoding, offset: int = 0, number: int = 1, delimiter: str | None = None
) -> Iterator[Record]:
    """Rows of a CSV file (`delimiter` None: the one its header uses most) as dicts of text by the header's names."""
    names, delimiter, header_line = header_of(path, encoding, delimiter)
    lines = _Pushback(read_lines(path, encoding, offset, number))
    for line in lines:
        if line.number > header_line and (line.data is None or line.data.strip()):
            yield _record(line, lines, names, delimiter)


class _Pushback:
    """An iterator of lines that takes lines back."""

    def __init__(self, lines: Iterator[Line]) -> None:
        self._lines, self._back = lines, deque()

    def __iter__(self) -> _Pushback:
        return self

    def __next__(self) -> Line:
        return self._back.popleft() if self._back else next(self._lines)

    def give_back(self, lines: list[Line]) -> None:
        self._back.extendleft(reversed(lines))


def _record(first: Line, lines: _Pushback, names: list[str], delimiter: str) -> Record:
    """The record that starts on `first`, taking further lines while a quote is open."""
    taken: list[Line] = []
    parts: list[str] = []

    def failed(kind: str, reason: str) -> Record:
        lines.give_back(taken)
        plain = parts[0].split("\t") if delimiter == "\t" and parts else []
        if len(plain) == len(names):  # most programs write TSV without quoting
            return Record(first.number, dict(zip(names, plain)), None, (_PLAIN,), first.offset)
        return Record(first.number, None, (kind, reason), (), first.offset)

    size, line = 0, first
    while True:
        if line.data is None:
            return failed(*too_long(line.size)) if line is first else failed("unclosed_quote", _UNCLOSED)
        try:
            parts.append(line.data.decode("utf-8"))
        except UnicodeDecodeError as error:
            return failed(*undecodable(error))
        size += line.size
        if line is first or _CLOSES.search(parts[-1]):  # nothing else can close the open field
            try:
                fields = split_fields("\n".join(parts), delimiter)
            except _BadQuote as error:
                if line is first:
                    return failed("bad_quote", f"a quoted field goes on after its closing quote (position {error.args[0] + 1})")
                return failed("unclosed_quote", _UNCLOSED)
            if fields is not None:
                break
        line = next(lines, None)
        if line is None or size > MAX_ROW_BYTES:
            if line is not None:
                taken.append(line)
            return failed("unclosed_quote", _UNCLOSED)
        taken.append(line)
    if len(fields) != len(names):
        kind, seen = ("unclosed_quote", f"; {_UNCLOSED}") if taken else ("field_count", "")
        return failed(kind, f"the row has {len(fields)} fields, the header has {len(names)}{seen}")
    return Record(first.number, dict(zip(names, fields)), None, (CRLF,) if first.crlf else (), first.offset)


_PLAIN = ("plain_quote", "a quote at the start of a field is not closed as CSV demands; it is taken as text")
_UNCLOSED = "a quote that opens a field on this line is not closed as CSV demands; this line is skipped"
