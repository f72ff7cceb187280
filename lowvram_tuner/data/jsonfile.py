"""A .json file of any size as records: a list of objects, an object that holds such a list, or lines of objects.

A list is read element by element from a sliding window of text. An element that does not parse is delimited by its brackets,
reported, and skipped; where its brackets do not match either, reading goes on at the next line that is indented like the
first element.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from lowvram_tuner.data.lines import MAX_ROW_BYTES, Encoding, open_utf8, read_lines
from lowvram_tuner.data.readers import Record, as_row, doubled_key, parse_json, read_jsonl, too_long

WINDOW = 1 << 20  # characters read at a time
LONGEST_ELEMENT = 1 << 24  # characters after which an element without an end is given up
CHAT_COLUMNS = ("messages", "conversations", "conversation", "dialogue", "dialog", "chat", "turns")
_SPACE = re.compile(r"[ \t\r\n\ufeff]*")
_STRUCTURE = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|"|[\[\]{}]', re.DOTALL)
_BARE_END = re.compile(r"[,\]}\s]")
_BAD_BYTE = re.compile("[\udc80-\udcff]")  # what is not UTF-8, as the window's decoder hands it on
_NO_COMMA = ("missing_comma", "there is no comma between this element and the one before it")
_OPENING = {"}": "{", "]": "["}
_JSON = json.JSONDecoder()


def read_json(path: Path, encoding: Encoding, offset: int = 0, number: int = 1, unread: bool = False) -> Iterator[Record]:
    """The rows of a .json or .jsonl file; what it holds is decided by its first line, not by its name.

    unread: of a list, only where its rows start; their records are empty.
    """
    if has_lines(path, encoding):
        yield from read_jsonl(path, encoding, offset, number)
        return
    stream = _Stream(path, encoding, offset, number, unread)
    with stream.file:
        if offset or stream.peek() == "[":
            stream.pos += 0 if offset else 1
            yield from stream.elements()
        elif stream.peek() == "{":
            yield from _object(stream)


def has_lines(path: Path, encoding: Encoding) -> bool:
    """Whether every line of the file is a row of its own (JSONL), by its first two lines that are not empty."""
    first, second = _first_lines(path, encoding)
    if first is None or first[:1] == b"{":
        if second[:1] == b"{":
            return True
        if first is None:
            return False
    try:
        error = parse_json(first.decode("utf-8"))[1]
    except UnicodeDecodeError:
        return True
    if error is None:
        return bool(second)
    if first[:1] == b"{":  # an indented object breaks its lines between values, never inside a string
        return error[0] != "cut_off" or "string" in error[1]
    return first[:1] != b"["


def _first_lines(path: Path, encoding: Encoding) -> tuple[bytes | None, bytes]:
    """The first two lines that are not empty; b'' beyond the end. One too long to hold is None, and b'?' as the second."""
    found: list[bytes | None] = []
    for line in read_lines(path, encoding):
        data = None if line.data is None else line.data.removeprefix(codecs.BOM_UTF8).strip()
        if data != b"":
            found.append(data)
        if len(found) == 2:
            break
    return (found[0] if found else b""), (found[1] or b"?" if len(found) == 2 else b"")


def _object(stream: _Stream) -> Iterator[Record]:
    """The list of objects inside a top-level object, or the object itself as the only row."""
    line = stream.line
    start = stream.pos
    stream.pos += 1
    while stream.peek() == '"':
        key = stream.element()
        if key is None or stream.peek() != ":":
            break
        stream.pos += 1
        if stream.peek() == "[" and key.value not in CHAT_COLUMNS and stream.opens_list_of_objects():
            stream.pos += 1
            yield from stream.elements()
            return
        if stream.peek() and stream.element() is None:
            break
        if stream.peek() == ",":
            stream.pos += 1
    stream.pos = start
    found = stream.element()
    yield found.record(line, -1) if found else Record(line, None, ("cut_off", "the JSON object is cut off or not closed"))


class _Element(NamedTuple):
    """The text of a JSON value, and the value where it parsed."""

    raw: str
    value: Any
    parsed: bool

    def checked(self) -> tuple[Any, tuple[str, str] | None]:
        """The value and no error, or None and (kind, reason)."""
        if len(self.raw) > MAX_ROW_BYTES:
            return None, too_long(len(self.raw))
        if not self.raw.isascii() and (bad := _BAD_BYTE.search(self.raw)):
            return None, ("bad_utf8", f"byte 0x{ord(bad.group()) - 0xDC00:02x} is not UTF-8; save the file as UTF-8")
        if not self.parsed:
            return parse_json(self.raw)
        error = doubled_key(self.raw, self.value)
        return (None, error) if error else (self.value, None)

    def record(self, line: int, offset: int, notes: tuple[tuple[str, str], ...] = ()) -> Record:
        """The element as a row."""
        value, error = self.checked()
        return Record(line, *((None, error) if error else as_row(value)), notes, offset)


class _Stream:
    """A sliding window of a file's text: `text[pos:]` is what comes next, `line` the line number at `pos`."""

    def __init__(self, path: Path, encoding: Encoding, offset: int, number: int, unread: bool) -> None:
        self._unread = unread
        self.file = open_utf8(path, encoding, offset)
        self._decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")  # bad bytes become lone surrogates
        self._offset = offset or encoding.mark  # byte at which `text` starts
        self._seekable = encoding.codec == "utf-8"
        self._counted = 0  # text[:_counted] is in `_line` already
        self._line = number
        self.text, self.pos, self.ended = "", 0, False

    @property
    def line(self) -> int:
        """The line number at `pos`."""
        self._line += self.text.count("\n", self._counted, self.pos)
        self._counted = self.pos
        return self._line

    def more(self) -> bool:
        """Reads on; False at the end of the file."""
        if self.ended:
            return False
        data = self.file.read(max(WINDOW, len(self.text) - self.pos))  # doubling: a long element is scanned O(log n) times
        self.ended = not data
        self.text += self._decoder.decode(data, final=self.ended)
        return not self.ended

    def trim(self) -> None:
        """Forgets what lies before `pos`."""
        if self.pos >= WINDOW:
            self._line = self.line
            self._offset += len(self.text[: self.pos].encode("utf-8", "surrogateescape"))
            self.text, self.pos, self._counted = self.text[self.pos :], 0, 0

    @property
    def offset(self) -> int:
        """The byte at `pos` where that is known for free (right after a trim), else -1."""
        return self._offset if self._seekable and self.pos == 0 else -1

    def peek(self) -> str:
        """The next character that is no white space, '' at the end; `pos` moves to it."""
        while True:
            self.pos = _SPACE.match(self.text, self.pos).end()
            if self.pos < len(self.text) or not self.more():
                return self.text[self.pos : self.pos + 1]

    def opens_list_of_objects(self) -> bool:
        """Whether the list at `pos` is empty or starts with an object; `pos` stays."""
        start, line = self.pos, self.line
        self.pos += 1
        answer = self.peek() in ("{", "]")
        self.pos, self._line, self._counted = start, line, start
        return answer

    def element(self) -> _Element | None:
        """The value at `pos` (moves behind it); None where it has no end in the file."""
        while True:
            found = self._found()
            if found is not None:
                self.pos += len(found.raw)
                return found if found.raw else None
            if len(self.text) - self.pos > LONGEST_ELEMENT or not self.more():
                return None

    def _found(self) -> _Element | None:
        """The value at `pos`, None when the window does not hold its end."""
        if self.text[self.pos : self.pos + 1] not in ("{", "[", '"'):
            end = _BARE_END.search(self.text, self.pos + 1)
            if end or self.ended:
                return _Element(self.text[self.pos : end.start() if end else None], None, False)
            return None
        try:
            value, end = _JSON.scan_once(self.text, self.pos)
        except (ValueError, StopIteration, RecursionError):
            end = self._matching()
            return None if end is None else _Element(self.text[self.pos : end], None, False)
        return _Element(self.text[self.pos : end], value, True)

    def _matching(self) -> int | None:
        """The end of a value that does not parse, by its brackets: `pos` itself where they contradict each other."""
        open_brackets = []
        for found in _STRUCTURE.finditer(self.text, self.pos):
            token = found.group()
            if token == '"':
                return None  # a string without an end
            if token in "{[":
                open_brackets.append(token)
            elif token in "}]":
                if open_brackets.pop() != _OPENING[token]:
                    return self.pos
                if not open_brackets:
                    return found.end()
        return None

    def elements(self) -> Iterator[Record]:
        """The elements of the list whose first element comes next, to its closing bracket."""
        self.peek()
        column = self.pos - self.text.rfind("\n", 0, self.pos) - 1
        again = re.compile(rf"\n[ \t]{{{column}}}\{{") if self.text.rfind("\n", 0, self.pos) >= 0 else None
        comma = True
        while (token := self.peek()) != "]":
            if token == "":
                yield Record(self.line, None, None, (("open_list", "the file ends before its list is closed; is it whole?"),))
                return
            if token == ",":
                self.pos, comma = self.pos + 1, True
                continue
            self.trim()
            line, offset, start = self.line, self.offset, self.pos
            found = self.element()
            if found is not None:
                yield Record(line, {}, None, (), offset) if self._unread else found.record(line, offset, () if comma else (_NO_COMMA,))
                comma = False
                continue
            yield Record(line, None, ("cut_off", "the element that starts here is cut off or not closed"), (), offset)
            following = again.search(self.text, start) if again else None
            if following is None:
                return
            self.pos = following.end() - 1
