"""A text file as numbered lines of UTF-8 bytes, whatever its encoding, in bounded memory.

UTF-8 is read as it is. UTF-16 and UTF-32 files are found by their byte order mark, or by where their zero bytes stand, and
are transcoded while reading. Broken characters survive as bytes that are not valid UTF-8, so the line that holds them fails
to decode later and is reported with its number; nothing is replaced.
"""

from __future__ import annotations

import codecs
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

MAX_ROW_BYTES = 4_000_000  # a longer row is reported and skipped: it is damage, or data for another tool
BLOCK = 1 << 20
_MARKS = (  # UTF-32 first: its little-endian mark begins with UTF-16's
    (codecs.BOM_UTF32_LE, "utf-32-le", "UTF-32"),
    (codecs.BOM_UTF32_BE, "utf-32-be", "UTF-32"),
    (codecs.BOM_UTF16_LE, "utf-16-le", "UTF-16"),
    (codecs.BOM_UTF16_BE, "utf-16-be", "UTF-16"),
    (codecs.BOM_UTF8, "utf-8", "UTF-8"),
)


class Line(NamedTuple):
    """A physical line. `data` has its line end removed; None where the line is longer than MAX_ROW_BYTES."""

    number: int  # 1 is the first
    offset: int  # byte at which it starts, -1 where the file cannot be entered in the middle
    data: bytes | None
    size: int  # bytes, line end included
    crlf: bool


@dataclass(frozen=True)
class Encoding:
    """How a file's bytes are read: the codec's name, the mark's length, and a sentence for the report ('' if plain)."""

    codec: str
    mark: int
    note: tuple[str, str] | None


def encoding_of(path: Path) -> Encoding:
    """The encoding of a text file, from its first kilobyte."""
    with path.open("rb") as file:
        head = file.read(1024)
    for mark, codec, name in _MARKS:
        if head.startswith(mark):
            if codec == "utf-8":
                return Encoding(codec, len(mark), ("bom", "the file starts with a byte order mark; it is skipped"))
            return Encoding(codec, len(mark), ("utf16", f"the file is {name}; it is read as such"))
    half = len(head) // 2
    for first, codec in ((1, "utf-16-le"), (0, "utf-16-be")):
        if half >= 2 and head[first::2].count(0) > 0.6 * half and head[1 - first :: 2].count(0) < 0.1 * half:
            return Encoding(codec, 0, ("utf16", "the file is UTF-16 without a byte order mark; it is read as such"))
    return Encoding("utf-8", 0, None)


class _Transcoded(io.RawIOBase):
    """A UTF-16 or UTF-32 file as a stream of UTF-8 bytes."""

    def __init__(self, file: BinaryIO, codec: str) -> None:
        self._file, self._left = file, b""
        self._decoder = codecs.getincrementaldecoder(codec)("surrogatepass")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._left:
            data = self._file.read(BLOCK)
            self._left = self._decode(data)
            if not data:
                break
        count = min(len(buffer), len(self._left))
        buffer[:count], self._left = self._left[:count], self._left[count:]
        return count

    def _decode(self, data: bytes) -> bytes:
        try:
            return self._decoder.decode(data, final=not data).encode("utf-8", "surrogatepass")
        except UnicodeDecodeError:  # half a character at the end of the file, or a code point beyond Unicode
            self._decoder.reset()
            return b"\xff"

    def close(self) -> None:
        self._file.close()
        super().close()


def open_utf8(path: Path, encoding: Encoding, offset: int = 0) -> BinaryIO:
    """The file as UTF-8 bytes, from byte `offset` (0: its start, after the mark). Only UTF-8 files take an offset."""
    file = path.open("rb", buffering=BLOCK)
    file.seek(offset or encoding.mark)
    return file if encoding.codec == "utf-8" else io.BufferedReader(_Transcoded(file, encoding.codec), BLOCK)


def read_lines(path: Path, encoding: Encoding, offset: int = 0, number: int = 1) -> Iterator[Line]:
    """The lines of a file, from the line `number` that starts at byte `offset`."""
    seekable = encoding.codec == "utf-8"
    position = offset or encoding.mark
    with open_utf8(path, encoding, offset) as file:
        while data := file.readline(MAX_ROW_BYTES + 2):
            size, whole = len(data), data
            while not data.endswith(b"\n") and size > MAX_ROW_BYTES:
                data = file.readline(BLOCK)
                if not data:
                    break
                size, whole = size + len(data), None
            crlf = data.endswith(b"\r\n")
            if whole is not None:
                whole = whole[:-2] if crlf else whole.removesuffix(b"\n")
                whole = whole if len(whole) <= MAX_ROW_BYTES else None
            yield Line(number, position if seekable else -1, whole, size, crlf)
            position += size
            number += 1
