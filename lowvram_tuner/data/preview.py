"""A look at the data before it is trained on: rows as tokens, lengths, problems, duplicates.

Opening reads from the file's head for a moment, however large it is, and says whether that was all of it. Any row is reached by
its number through an index that grows as far as it was asked for. Everything returned is plain data (JSON); its texts come
from the file as they are and must be shown inert.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np

from lowvram_tuner.config import TrainConfig
from lowvram_tuner.data.cache import INDEX
from lowvram_tuner.data.examples import Encoded, Encoder
from lowvram_tuner.data.formats import SAMPLE_ROWS, SHOWN, Layout, columns_of, to_sample
from lowvram_tuner.data.held_out import row_hash, split
from lowvram_tuner.data.packing import Example
from lowvram_tuner.data.prepare import Builder, layout_of
from lowvram_tuner.data.readers import Record
from lowvram_tuner.data.report import DataError, RowError, plain
from lowvram_tuner.data.rows import RowIndex
from lowvram_tuner.data.sources import resolve
from lowvram_tuner.data.templates import Template

SECONDS = 1.0  # how long opening reads
TOKENS_SHOWN = 1500  # of one row
RAW_SHOWN = 600  # characters of a row that cannot be used

Piece = tuple[str, bool, bool]  # text, trained, special


class _Counted:
    """Takes the place of a cache's writer: keeps the index records and forgets the tokens."""

    def __init__(self) -> None:
        self.examples = 0
        self._records: list[tuple] = []

    def add(self, example: Example, hash: int, line: int, piece: int, source: int) -> None:
        self._records.append((0, hash, line, len(example), piece, source))
        self.examples += 1

    def chunks(self) -> Iterator[np.ndarray]:
        yield np.array(self._records, dtype=INDEX)


class Preview:
    """A dataset opened for looking. Raises DataError where the dataset or the model's template cannot be used."""

    def __init__(self, config: TrainConfig, tokenizer: Any) -> None:
        self.config = config
        self.sources = resolve(config.dataset)
        self.template = Template(tokenizer)
        self.encoder = Encoder(self.template, config)
        self._indexes = [RowIndex(source) for source in self.sources]
        self._layouts: dict[int, Layout] = {}
        self._held: set[int] | None = None  # hashes of the held-out rows, once all rows were read

    def summary(self, seconds: float = SECONDS) -> dict[str, Any]:
        """What a reading of the first `seconds` finds.

        Keys: complete (all rows were read), report (as of `prepare`, for the rows read), error (nothing usable, or None), held_out
        (examples kept aside, None unless complete), files (name, columns, roles, layout, of each).
        """
        writer = _Counted()
        builder = Builder(self.config, self.encoder, writer, self.sources)
        started, complete, error = time.monotonic(), True, None
        try:
            for number, source in enumerate(self.sources):
                for _ in builder.read(source, number):
                    if time.monotonic() - started > seconds:
                        complete = False
                        break
                if not complete:
                    break
            report = builder.finished()
        except DataError as failure:
            error, report = str(failure), builder.report
            report.problems = builder.problems.list()
        held = split(writer.chunks, self.config, [s.weight for s in self.sources])[1] if complete and not error else None
        self._held = None if held is None else set(next(writer.chunks())["hash"][held].tolist())
        return {
            "complete": complete,
            "report": report.to_json(),
            "error": error,
            "held_out": None if held is None else len(held),
            "files": [self._file(i) for i in range(len(self.sources))],
        }

    def _file(self, number: int) -> dict[str, Any]:
        source = self.sources[number]
        try:
            layout = self._layout(number)
        except DataError as error:
            head = list(islice((r.value for r in source.records() if r.value is not None), SAMPLE_ROWS))
            columns, roles, shown, problem = columns_of(head), {}, "", str(error)
        else:
            columns, roles, shown, problem = layout.columns, layout.roles, SHOWN[layout.name], None
        return {
            "name": source.name, "weight": source.weight, "columns": [*map(plain, columns)], "roles": roles, "layout": shown, "error": problem,
        }  # fmt: skip

    def _layout(self, number: int) -> Layout:
        if number not in self._layouts:
            self._layouts[number] = layout_of(self.sources[number], self.config, alone=len(self.sources) == 1)
        return self._layouts[number]

    def rows(self, first: int, count: int) -> list[dict[str, Any]]:
        """Rows by number (1 is the first; files follow each other) as they are trained on; fewer at the end.

        Keys: row, line, file, problem (why it cannot be used, or None), raw (of such a row), notes, length (tokens of the whole
        row), trained (tokens that are), truncated, held_out (None: not known), parts (for each example made of the row its pieces
        (text, trained, special)), shown (tokens in the parts).
        """
        found: list[dict[str, Any]] = []
        at = first  # the row's number within the source looked at
        for number, index in enumerate(self._indexes):
            for record in index.records(at, count - len(found)):
                found.append(self._row(first + len(found), record, number))
            if len(found) == count:
                break
            at = max(1, at - index.count()) if not found else 1
        return found

    def _row(self, row: int, record: Record, number: int) -> dict[str, Any]:
        shown: dict[str, Any] = {
            "row": row, "line": record.line, "file": self.sources[number].name, "problem": None, "raw": "", "length": 0, "trained": 0,
            "notes": [reason for _, reason in record.notes], "truncated": False, "parts": [], "shown": 0,
            "held_out": None,
        }  # fmt: skip
        try:
            if record.error:
                raise RowError(*record.error)
            encoded = self.encoder.encode([to_sample(record.value, self._layout(number), self.config.system_prompt)])[0]
            if encoded.error:
                raise encoded.error
        except (RowError, DataError) as error:  # DataError: no layout fits the row's file
            return {**shown, "problem": plain(str(error)), "raw": self._raw(record, number)}
        return {**shown, **self._tokens(encoded), "notes": [*shown["notes"], *(reason for _, reason in encoded.notes)]}

    def _tokens(self, encoded: Encoded) -> dict[str, Any]:
        left, parts = TOKENS_SHOWN, []
        for example in encoded.examples:
            if left > 0:
                parts.append(pieces(self.template, example, left))
                left -= min(left, len(example))
        kept = [int(np.count_nonzero(e.trained)) for e in encoded.examples]
        return {
            "length": len(encoded.ids), "trained": sum(kept), "truncated": encoded.truncated, "parts": parts, "shown": TOKENS_SHOWN - left,
            "held_out": None if self._held is None else row_hash(encoded.ids) in self._held,
        }  # fmt: skip

    def _raw(self, record: Record, number: int) -> str:
        """The beginning of a row that cannot be used, as text."""
        if record.value is not None:
            return plain(str(record.value), RAW_SHOWN)
        source = self.sources[number]
        if record.offset < 0 or source.path is None:
            return ""
        with source.path.open("rb") as file:
            file.seek(record.offset)
            return file.readline(RAW_SHOWN).decode("utf-8", "backslashreplace").rstrip("\r\n")


def pieces(template: Template, example: Example, limit: int) -> list[Piece]:
    """(text, trained, special) of an example's first `limit` tokens; tokens that only together make a character are one piece."""
    special = set(template.tokenizer.all_special_ids)
    ids, trained = example.input_ids[:limit].tolist(), example.trained[:limit].tolist()
    found: list[Piece] = []
    held: list[int] = []
    for at, token in enumerate(ids):
        held.append(token)
        text = template.decode(held)
        last = at + 1 == len(ids) or trained[at + 1] != trained[at] or len(held) >= 8
        if "\ufffd" in text and not last:
            continue
        found.append((text, bool(trained[at]), token in special))
        held = []
    return found


def preview(config: TrainConfig, tokenizer: Any, first: int = 1, count: int = 8, seconds: float = SECONDS) -> dict[str, Any]:
    """The summary of a dataset with some of its rows, in one call: the keys of `Preview.summary` and `rows`."""
    opened = Preview(config, tokenizer)
    answer = opened.summary(seconds)
    answer["rows"] = opened.rows(max(1, first), count) if not all(f["error"] for f in answer["files"]) else []
    return answer
