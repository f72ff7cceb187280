"""What is behind a dataset's name: files, folders of files, datasets of the Hugging Face hub, each as a `Source` of rows."""

from __future__ import annotations

import hashlib
import re
from codecs import BOM_UTF8
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from lowvram_tuner.config import DEMO_DATASET
from lowvram_tuner.data.jsonfile import has_lines, read_json
from lowvram_tuner.data.lines import BLOCK, Encoding, encoding_of, read_lines
from lowvram_tuner.data.names import ACCEPTED, KINDS, Part, split
from lowvram_tuner.data.readers import Record, parquet_rows, read_dataset, read_parquet, read_text
from lowvram_tuner.data.report import DataError, plain
from lowvram_tuner.data.tables import read_table

DEMO_FILE = Path(__file__).with_name("demo.jsonl")
_EVALUATION = {"test", "tests", "validation", "valid", "val", "dev", "eval", "evaluation"}
_NO_DATA = {"readme", "license", "licence", "notice", "changelog", "dataset_info", "dataset_infos", "dataset_dict", "state"}


@dataclass
class Source:
    """One file or dataset to read, and how often its rows are seen in an epoch."""

    name: str
    kind: str  # json, csv, tsv, parquet, text, dataset
    weight: float = 1.0
    path: Path | None = None
    dataset: Any = None  # datasets.Dataset
    notes: list[tuple[str, str]] = field(default_factory=list)  # (kind, reason)
    found: bool = False  # in a folder, not named by the user: left out when its columns fit no layout

    @cached_property
    def encoding(self) -> Encoding | None:
        """How the bytes of a text-like file are read."""
        return encoding_of(self.path) if self.kind in ("json", "csv", "tsv", "text") else None

    def records(self, offset: int = 0, line: int = 1) -> Iterator[Record]:
        """The rows, from the one on line `line` that starts at byte `offset` (Parquet, datasets: from row `line`)."""
        if self.kind == "dataset":
            return read_dataset(self.dataset, line)
        if self.kind == "parquet":
            return read_parquet(self.path, line)
        if self.kind in ("csv", "tsv"):
            return read_table(self.path, self.encoding, offset, line, "\t" if self.kind == "tsv" else None)
        return (read_json if self.kind == "json" else read_text)(self.path, self.encoding, offset, line)

    def starts(self, offset: int = 0, line: int = 1) -> Iterator[tuple[int, int]]:
        """(byte, line) of each row from there on, without parsing it where the file allows that; byte -1: unknown."""
        if self.kind == "json" and has_lines(self.path, self.encoding):
            for row in read_lines(self.path, self.encoding, offset, line):
                if row.data is None or row.data.removeprefix(BOM_UTF8).strip():
                    yield row.offset, row.number
        else:
            records = read_json(self.path, self.encoding, offset, line, unread=True) if self.kind == "json" else self.records(offset, line)
            for record in records:
                if record.value is not None or record.error:
                    yield record.offset, record.line

    def can_be_entered(self) -> bool:
        """Whether reading can start at a row in the middle."""
        return self.encoding is None or self.encoding.codec == "utf-8"

    def rows(self) -> int | None:
        """The number of rows where that is known without reading them."""
        if self.kind == "dataset":
            return len(self.dataset)
        return parquet_rows(self.path) if self.kind == "parquet" else None

    def nbytes(self) -> int:
        """Size on disk, 0 when unknown: the measure of progress."""
        return self.path.stat().st_size if self.path else 0

    def digest(self) -> str:
        """sha256 of the bytes that hold the rows."""
        paths = [self.path] if self.path else [Path(f["filename"]) for f in self.dataset.cache_files]
        digest = hashlib.sha256(b"" if paths else str(getattr(self.dataset, "_fingerprint", "")).encode())
        for path in paths:
            with path.open("rb") as file:
                while block := file.read(BLOCK):
                    digest.update(block)
        return digest.hexdigest()


def resolve(spec: str) -> list[Source]:
    """The sources that a dataset's name means. Raises DataError for what does not exist or cannot be read."""
    if not spec.strip():
        raise DataError(f"no data is chosen; give a file ({ACCEPTED}), a folder, or a hub id like owner/name.")
    sources: list[Source] = []
    for part in split(spec):
        if not 0 < part.weight <= 100:
            raise DataError(f"the weight {part.weight:g} of {part.name!r} is outside 0 to 100; 1 takes every row once per epoch.")
        for source in _sources(part):
            source.weight = part.weight
            sources.append(source)
    return sources


def _sources(part: Part) -> list[Source]:
    name, path = part.name, part.path
    if path is None and name == DEMO_DATASET:
        return [Source("demo", "json", path=DEMO_FILE)]
    if part.may_be_on_hub:
        return [_from_hub(name)]
    if path is None:
        raise DataError(f"{plain(name, 100)!r} does not exist; give a file ({ACCEPTED}), a folder, or a hub id like owner/name.")
    if path.is_dir():
        return _folder(path)
    if path.suffix.lower() not in KINDS:
        raise DataError(f"{path.name} has the ending {path.suffix!r}; files that can be read end in {ACCEPTED}.")
    if path.stat().st_size == 0:
        raise DataError(f"{path.name} is empty.")
    return [_file(path, path.name)]


def _file(path: Path, name: str, found: bool = False) -> Source:
    kind = KINDS[path.suffix.lower()]
    if kind != "arrow":
        return Source(name, kind, path=path, found=found)
    import datasets

    try:
        return Source(name, "dataset", dataset=datasets.Dataset.from_file(str(path)), found=found)
    except (OSError, ValueError) as error:  # pyarrow's errors are ValueErrors
        raise DataError(f"{name} cannot be read as Arrow ({str(error).splitlines()[0]}); is it whole?") from None


def _folder(folder: Path) -> list[Source]:
    """A saved dataset, or all data files below a folder; text files only where there is no other data."""
    if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
        return [_from_disk(folder)]
    files = [
        p for p in sorted(folder.rglob("*"))
        if p.is_file() and p.suffix.lower() in KINDS and p.stat().st_size
        and not any(part.startswith(".") for part in p.relative_to(folder).parts) and p.stem.lower() not in _NO_DATA
    ]  # fmt: skip
    tables = [p for p in files if KINDS[p.suffix.lower()] != "text"]
    chosen = tables or files
    training = [p for p in chosen if not _EVALUATION & set(re.split(r"[^a-z0-9]+", str(p.relative_to(folder)).lower()))]
    chosen = training or chosen
    if not chosen:
        raise DataError(f"the folder {folder} holds no file that ends in {ACCEPTED}.")
    sources = [_file(p, p.relative_to(folder).as_posix(), found=len(chosen) > 1) for p in chosen]
    left = [p.relative_to(folder).as_posix() for p in files if p not in chosen]
    if left:
        shown = ", ".join(left[:3]) + (" and more" if len(left) > 3 else "")
        sources[0].notes.append(("left_out", f"{len(left)} files of the folder are not trained on: {shown}"))
    return sources


def _from_disk(folder: Path) -> Source:
    import datasets

    try:
        loaded = datasets.load_from_disk(str(folder))
    except (OSError, ValueError) as error:
        raise DataError(f"{folder} looks like a saved dataset but cannot be read: {str(error).splitlines()[0]}") from None
    return Source(folder.name, "dataset", dataset=_train_split(loaded, folder.name))


def _from_hub(name: str) -> Source:
    import datasets

    path, _, subset = name.partition("@")
    try:
        loaded = datasets.load_dataset(path, subset or None)
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"{name!r} is no file here, and the hub does not give it as a dataset: {reason}") from None
    return Source(name, "dataset", dataset=_train_split(loaded, name))


def _train_split(loaded: Any, name: str) -> Any:
    """The training part of a DatasetDict, or the dataset itself."""
    if not isinstance(loaded, dict):
        return loaded
    if "train" in loaded:
        return loaded["train"]
    if len(loaded) == 1:
        return next(iter(loaded.values()))
    raise DataError(f"{name} has the parts {', '.join(loaded)} and none is called train; save the one to use on its own.")
