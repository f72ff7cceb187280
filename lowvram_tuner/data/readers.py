"""Files as records: JSON, JSONL, CSV, TSV, Parquet, Arrow and text, each read as a stream.

A reader yields a `Record` for every row it meets, good or broken, and goes on after a broken one. Nothing is repaired: what
a reader skips on its way (a byte order mark, Windows line ends) is told as a note.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from lowvram_tuner.data.lines import MAX_ROW_BYTES, Encoding, Line, read_lines
from lowvram_tuner.data.report import DataError

GOES_ON = "\0goes on"  # key of a text passage that is not its file's last
PASSAGE_BYTES = 16_000  # a text file's rows: whole paragraphs, about so many bytes together
BATCH_ROWS = 256
CRLF = ("crlf", "the line ends with CRLF, as Windows writes it; the end is not part of the text")
_BOM = b"\xef\xbb\xbf"
_KEY = re.compile(r'"\s*:')


class Record(NamedTuple):
    """One row: a dict of columns, or `error` = (kind, reason). `notes` are (kind, reason) of what was skipped on the way.

    With neither value nor error it is no row and carries only notes.
    """

    line: int  # where it starts; the row number for Parquet and Arrow
    value: dict[str, Any] | None
    error: tuple[str, str] | None = None
    notes: tuple[tuple[str, str], ...] = ()
    offset: int = -1  # byte at which reading can start again, -1: cannot


def too_long(size: int) -> tuple[str, str]:
    """The error of a row beyond MAX_ROW_BYTES."""
    return "too_long_line", f"the row is {size / 1e6:.1f} MB; at most {MAX_ROW_BYTES / 1e6:.0f} MB are read, split it"


def undecodable(error: UnicodeDecodeError) -> tuple[str, str]:
    """The error of bytes that are not UTF-8."""
    return "bad_utf8", f"byte 0x{error.object[error.start]:02x} at position {error.start + 1} is not UTF-8; save the file as UTF-8"


def parse_json(raw: str) -> tuple[Any, tuple[str, str] | None]:
    """A JSON value and no error, or None and (kind, reason)."""
    try:
        value = json.loads(raw)
    except json.JSONDecodeError as error:
        return None, _json_error(error)
    except RecursionError:
        return None, ("broken_json", "the JSON is nested too deeply")
    except ValueError as error:  # a number with thousands of digits
        return None, ("broken_json", f"the JSON cannot be read: {error}")
    error = doubled_key(raw, value)
    return (None, error) if error else (value, None)


def _json_error(error: json.JSONDecodeError) -> tuple[str, str]:
    text, at = error.doc, error.pos
    if "control character" in error.msg and text[at : at + 1] == "\0":
        return "nul", f"there is a NUL byte at position {at + 1}"
    if error.msg.startswith("Unterminated string") or at >= len(text.rstrip()):
        return "cut_off", f"the JSON is cut off: {error.msg} (position {at + 1})"
    return "broken_json", f"this is not JSON: {error.msg} (position {at + 1})"


def doubled_key(raw: str, value: Any) -> tuple[str, str] | None:
    """The error of a key that stands twice in one object of `raw`, whose parsed form is `value`.

    Every key is followed by `" :`, so there are at least as many such places as keys written; when there are no more of
    them than keys that survived parsing, none was written twice. Only the others are parsed again, slowly.
    """
    if len(_KEY.findall(raw)) == _count_keys(value):
        return None
    found: list[str] = []

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(items)
        if len(result) != len(items):
            names = [name for name, _ in items]
            found.extend(name for name in result if names.count(name) > 1)
        return result

    json.loads(raw, object_pairs_hook=pairs)
    if not found:
        return None
    return "duplicate_key", f"the key {found[0]!r} stands twice in one object; which value is meant is unclear"


def _count_keys(value: Any) -> int:
    if isinstance(value, dict):
        return len(value) + sum(_count_keys(v) for v in value.values() if isinstance(v, (dict, list)))
    if isinstance(value, list):
        return sum(_count_keys(v) for v in value if isinstance(v, (dict, list)))
    return 0


def as_row(value: Any) -> tuple[dict[str, Any] | None, tuple[str, str] | None]:
    """A parsed value as a row: it must be an object."""
    if isinstance(value, dict):
        return value, None
    kind = {list: "a list", str: "text", bool: "true or false", type(None): "null"}.get(type(value), "a number")
    return None, ("not_object", f"the row is {kind}; a row is an object with named fields")


def read_jsonl(path: Path, encoding: Encoding, offset: int = 0, number: int = 1) -> Iterator[Record]:
    """One JSON object a line; empty lines are no rows."""
    for line in read_lines(path, encoding, offset, number):
        if line.data is None:
            yield Record(line.number, None, too_long(line.size), (), line.offset)
            continue
        raw, notes = line.data, (CRLF,) if line.crlf else ()
        if raw.startswith(_BOM):
            raw, notes = raw[3:], (*notes, ("bom", "the line starts with a byte order mark; it is skipped"))
        if raw.strip():
            yield Record(line.number, *_json_row(raw), notes, line.offset)


def _json_row(raw: bytes) -> tuple[dict[str, Any] | None, tuple[str, str] | None]:
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        return None, undecodable(error)
    value, error = parse_json(text)
    return (None, error) if error else as_row(value)


def read_text(path: Path, encoding: Encoding, offset: int = 0, number: int = 1) -> Iterator[Record]:
    """Plain text or Markdown as rows {"text": passage}, with GOES_ON but in the last: whole paragraphs of about PASSAGE_BYTES together.

    The passages joined are the file's text with LF line ends; a passage keeps the empty lines that follow it.
    """
    held: Record | None = None
    for record in _passages(read_lines(path, encoding, offset, number)):
        if held is not None:
            yield held
        held = record
    if held is not None:
        if held.value:
            held.value.pop(GOES_ON)
        yield held


def _passages(lines: Iterator[Line]) -> Iterator[Record]:
    """Paragraphs gathered into passages; a line that cannot be read ends the passage before it and is a row of its own."""
    part: list[str] = []
    start, offset, size, notes, gap = 0, -1, 0, (), False
    for line in lines:
        text, error = _text_of(line)
        full = size >= PASSAGE_BYTES and (gap or size >= 4 * PASSAGE_BYTES)
        if part and (error or (full and text and text.strip())):
            yield Record(start, {"text": "".join(part), GOES_ON: True}, None, notes, offset)
            part, size = [], 0
        if error:
            yield Record(line.number, None, error, (), line.offset)
            continue
        if not part:
            if not text.strip():
                continue  # empty lines before the first paragraph
            start, offset, notes = line.number, line.offset, ()
        if line.crlf and not notes:
            notes = (CRLF,)
        part.append(text + "\n")
        size += line.size
        gap = not text.strip()
    if part:
        yield Record(start, {"text": "".join(part), GOES_ON: True}, None, notes, offset)


def _text_of(line: Line) -> tuple[str, tuple[str, str] | None]:
    if line.data is None:
        return "", too_long(line.size)
    try:
        return line.data.decode("utf-8"), None
    except UnicodeDecodeError as error:
        return "", undecodable(error)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A Parquet file; what is broken in it becomes a DataError."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path, pre_buffer=False) as file:
            yield file
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path.name} cannot be read as Parquet ({str(error).splitlines()[0]}); is it whole?") from None


def parquet_rows(path: Path) -> int:
    """The number of rows of a Parquet file."""
    with _opened(path) as file:
        return file.metadata.num_rows


def read_parquet(path: Path, first: int = 1) -> Iterator[Record]:
    """A Parquet file's rows from number `first`, a batch at a time; the line is the row's number."""
    with _opened(path) as file:
        number, groups = 1, []
        for group in range(file.num_row_groups):
            count = file.metadata.row_group(group).num_rows
            if groups or number + count > first:
                groups.append(group)
            else:
                number += count
        for batch in file.iter_batches(BATCH_ROWS, row_groups=groups, use_threads=False):
            for value in batch.to_pylist():
                if number >= first:
                    yield Record(number, value)
                number += 1


def read_dataset(dataset: Any, first: int = 1) -> Iterator[Record]:
    """The rows of a `datasets.Dataset` from number `first`; they stay on disk, memory-mapped."""
    for start in range(first - 1, len(dataset), BATCH_ROWS):
        columns = dataset[start : start + BATCH_ROWS]
        for k, values in enumerate(zip(*columns.values())):
            yield Record(start + k + 1, dict(zip(columns, values)))
