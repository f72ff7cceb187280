"""Tokenized examples on disk: written as a stream, read through the page cache, never held in memory.

A cache is a folder of three flat files and a description that is written last:

    tokens.bin   int32, all examples end to end      trained.bin  bool, one per token
    index.bin    one INDEX record per example        meta.json    sizes and the report

It is made under a temporary name and renamed when complete. The folder's name is the fingerprint of the data and of every
setting that shapes it, so a cache is either right or not found.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lowvram_tuner.data.packing import Example

VERSION = 1
CHUNK = 1 << 16  # index records looked at together
KEPT = 4  # newest caches that stay
INDEX = np.dtype(
    [("start", "<i8"), ("hash", "<u8"), ("line", "<i8"), ("length", "<i4"), ("piece", "<i4"), ("source", "<i4")]
)
_FILES = ("tokens.bin", "trained.bin", "index.bin")


class Writer:
    """Appends examples to a new cache; `finish` makes it visible under its name, `discard` removes it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._temporary = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
        shutil.rmtree(self._temporary, ignore_errors=True)
        self._temporary.mkdir(parents=True)
        self._files = [(self._temporary / name).open("wb", buffering=1 << 20) for name in _FILES]
        self.tokens = self.examples = 0

    def add(self, example: Example, hash: int, line: int, piece: int, source: int) -> None:
        """Appends one example and where it comes from."""
        tokens, trained, index = self._files
        tokens.write(example.input_ids.astype("<i4", copy=False).tobytes())
        trained.write(example.trained.tobytes())
        index.write(np.array((self.tokens, hash, line, len(example), piece, source), dtype=INDEX).tobytes())
        self.tokens += len(example)
        self.examples += 1

    def chunks(self) -> Iterator[np.ndarray]:
        """The index records so far, some at a time."""
        self._files[2].flush()
        return _chunks(self._temporary / "index.bin")

    def finish(self, meta: dict[str, Any]) -> None:
        """Closes the files, writes `meta` last and gives the folder its name."""
        for file in self._files:
            file.flush()
            os.fsync(file.fileno())
            file.close()
        sizes = {name: (self._temporary / name).stat().st_size for name in _FILES}
        with (self._temporary / "meta.json").open("w", encoding="utf-8") as file:
            json.dump({"version": VERSION, "sizes": sizes, **meta}, file)
            file.flush()
            os.fsync(file.fileno())
        shutil.rmtree(self.folder, ignore_errors=True)
        try:
            self._temporary.replace(self.folder)
        except OSError:
            if open_cache(self.folder) is None:  # else another process made the same cache meanwhile
                raise
            self.discard()
        _forget_old(self.folder)

    def discard(self) -> None:
        """Removes what was written."""
        for file in self._files:
            file.close()
        shutil.rmtree(self._temporary, ignore_errors=True)


class Cache:
    """A finished cache: `meta`, `index`, and the examples' arrays."""

    def __init__(self, folder: Path, meta: dict[str, Any]) -> None:
        self.meta, self._folder = meta, folder
        self.index = _mapped(folder / "index.bin", INDEX)
        self._tokens = _mapped(folder / "tokens.bin", np.dtype("<i4"))
        self._trained = _mapped(folder / "trained.bin", np.dtype(bool))

    def chunks(self) -> Iterator[np.ndarray]:
        """All index records in order, some at a time."""
        return _chunks(self._folder / "index.bin")

    def example(self, i: int) -> Example:
        """Example number i; its arrays are views of the mapped files."""
        start, length = int(self.index["start"][i]), int(self.index["length"][i])
        return Example(np.asarray(self._tokens[start : start + length]), np.asarray(self._trained[start : start + length]))


class Examples(Sequence):
    """Some of a cache's examples, by number; an example that is seen twice in an epoch stands twice."""

    def __init__(self, cache: Cache, numbers: np.ndarray) -> None:
        self._cache, self.numbers = cache, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self._cache.example(int(i)) for i in self.numbers[index]]
        return self._cache.example(int(self.numbers[index]))

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each example, int64."""
        return self._cache.index["length"][self.numbers].astype(np.int64)


def open_cache(folder: Path) -> Cache | None:
    """The cache in a folder, None when there is none or it is not whole."""
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        whole = meta["version"] == VERSION and all((folder / n).stat().st_size == s for n, s in meta["sizes"].items())
        if not whole:
            return None
        os.utime(folder)  # used now: among the newest
        return Cache(folder, meta)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _chunks(path: Path) -> Iterator[np.ndarray]:
    with path.open("rb") as file:
        while len(records := np.fromfile(file, INDEX, CHUNK)):
            yield records


def _mapped(path: Path, dtype: np.dtype) -> np.ndarray:
    if path.stat().st_size == 0:
        return np.zeros(0, dtype=dtype)
    return np.memmap(path, dtype=dtype, mode="r")


def _forget_old(newest: Path) -> None:
    """Removes all but the KEPT newest caches, and leftovers of a run that was killed a day ago."""
    folders = sorted((p for p in newest.parent.iterdir() if p.is_dir()), key=lambda p: p.stat().st_mtime, reverse=True)
    finished = [p for p in folders if p.suffix != ".tmp"]
    stale = [p for p in folders if p.suffix == ".tmp" and p.stat().st_mtime < time.time() - 86400]
    for folder in [*finished[KEPT:], *stale]:
        shutil.rmtree(folder, ignore_errors=True)
