"""What the header of a GGUF file says of a model's shape, in a tenth of a second.

The gauge waits for it, and gguf's own reader makes arrays of every word of the vocabulary first: four seconds and much memory.
Here arrays are passed by. Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import mmap
import struct
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from lowvram_tuner.config import ConfigError

_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}  # struct's letter by type
_STRING, _ARRAY = 8, 9
VERSIONS = (2, 3)
LONGEST = 64 << 20  # bytes of a header; a vocabulary of 262,000 words with its merges takes 20 million
_HF_NAMES = {  # transformers' name of a value, by that in a header behind the architecture
    "hidden_size": "embedding_length", "intermediate_size": "feed_forward_length", "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count", "num_key_value_heads": "attention.head_count_kv", "head_dim": "attention.key_length",
    "max_position_embeddings": "context_length", "vocab_size": "vocab_size", "num_experts": "expert_count",
}  # fmt: skip


class Array(NamedTuple):
    """A value of many, which was passed by."""

    count: int


def shape_values(path: Path) -> dict[str, Any]:
    """What transformers' config would say of the shape. ConfigError for a file that is no whole GGUF of VERSIONS."""
    values, tensors = read_header(path)
    kind = values.get("general.architecture")
    found = {ours: values.get(f"{kind}.{theirs}") for ours, theirs in _HF_NAMES.items()}
    words = values.get("tokenizer.ggml.tokens")
    if found["vocab_size"] is None and isinstance(words, Array):
        found["vocab_size"] = words.count
    found |= {"model_type": kind, "tie_word_embeddings": "output.weight" not in tensors}
    return {name: value for name, value in found.items() if value is not None}


def read_header(path: Path) -> tuple[dict[str, Any], set[str]]:
    """(a header's values by key, arrays as `Array`; the names of its tensors). ConfigError as `shape_values`."""
    try:
        about = path.stat()
        found = _read(path, about.st_size, about.st_mtime_ns)
    except OSError as error:
        found = str(error)
    if isinstance(found, str):
        raise ConfigError(f"{path} is no whole GGUF file of version 2 or 3 ({found}); download it again.")
    return found


@lru_cache(maxsize=8)
def _read(path: Path, size: int, changed: int) -> tuple[dict[str, Any], set[str]] | str:
    """As `read_header`, or what is wrong: a damaged file is not read again and again either."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), min(size, LONGEST), access=mmap.ACCESS_READ) as data:
            return _Cursor(data).header()
    except ValueError as error:
        return str(error)


class _Cursor:
    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at = data, 0

    def header(self) -> tuple[dict[str, Any], set[str]]:
        if self.data[:4] != b"GGUF":
            raise ValueError(f"it starts with {self.data[:4]!r}, not b'GGUF'")
        self.at = 4
        if (version := self.number("I")) not in VERSIONS:
            raise ValueError(f"its version is {version}")
        tensors, keys = self.number("Q"), self.number("Q")
        values = {}
        for _ in range(keys):
            key = self.string()
            values[key] = self.value(self.number("I"))
        return values, {self.tensor() for _ in range(tensors)}

    def tensor(self) -> str:
        """The name; dimensions, type and place are passed by."""
        name = self.string()
        self.pass_by(8 * self.number("I") + 4 + 8)
        return name

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self.array(self.number("I"), self.number("Q"))
        return self.number(_letter(kind))

    def array(self, kind: int, count: int) -> Array:
        if kind == _STRING:
            for _ in range(count):
                self.pass_by(self.number("Q"))
        else:
            self.pass_by(count * struct.calcsize(_letter(kind)))
        return Array(count)

    def number(self, letter: str) -> Any:
        begin = self.pass_by(struct.calcsize(letter))
        return struct.unpack_from(f"<{letter}", self.data, begin)[0]

    def string(self) -> str:
        begin = self.pass_by(self.number("Q"))
        return self.data[begin : self.at].decode("utf-8")

    def pass_by(self, size: int) -> int:
        """Goes on by `size` bytes; returns where it was."""
        begin, self.at = self.at, self.at + size
        if self.at > len(self.data):
            raise ValueError(f"it ends at byte {len(self.data)}, within its header")
        return begin


def _letter(kind: int) -> str:
    if kind not in _NUMBERS:
        raise ValueError(f"it has a value of type {kind}")
    return _NUMBERS[kind]
