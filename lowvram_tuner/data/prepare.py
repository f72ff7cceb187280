"""From a dataset's name to tokenized, masked examples, as a stream.

Rows are read, tokenized in batches and appended to a cache on disk, so memory does not grow with the data. The same data
with the same settings is found again in the cache.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from lowvram_tuner.config import TrainConfig
from lowvram_tuner.data.cache import VERSION, Examples, Writer, open_cache
from lowvram_tuner.data.examples import Batch, Encoded, Encoder
from lowvram_tuner.data.formats import SAMPLE_ROWS, Layout, Sample, columns_of, detect, mapping, missing, to_sample
from lowvram_tuner.data.held_out import Candidates, among, choose_prompts, repeats, row_hash, split
from lowvram_tuner.data.readers import Record
from lowvram_tuner.data.report import DataError, DataReport, Lengths, Problems, RowError
from lowvram_tuner.data.sources import Source, resolve
from lowvram_tuner.data.templates import Messages, Template

BATCH_ROWS, BATCH_CHARACTERS = 256, 500_000  # tokenized at once: some 20 MB of the tokenizer's own structures
Progress = Callable[[str, int, int, str], None]  # message, done, total, unit


@dataclass
class Prepared:
    """A run's data. `train` and `held_out` read their examples from the cache when asked for them."""

    train: Examples
    held_out: Examples
    report: DataReport
    prompts: list[Messages]  # before/after questions
    fingerprint: str  # sha256 of the data and of every setting that shapes it


def prepare(config: TrainConfig, tokenizer: Any, progress: Progress | None = None) -> Prepared:
    """Reads, tokenizes and splits `config.dataset`. Raises DataError when nothing can be trained on.

    progress: called with ("Reading data", bytes done, bytes in all, "bytes").
    """
    sources = resolve(config.dataset)
    template = Template(tokenizer)
    key = _key(config, template, sources)
    folder = Path(config.output_dir) / "cache" / key[:32]
    cache = open_cache(folder)
    if cache is None:
        _build(config, template, sources, folder, progress)
        cache = open_cache(folder)
        if cache is None:
            raise DataError(f"the prepared data in {folder} cannot be read back; is the disk full or failing?")
    train, held_out = split(cache.chunks, config, [s.weight for s in sources])
    fingerprint = hashlib.sha256(json.dumps([key, config.seed, config.held_out, [s.weight for s in sources]]).encode())
    report = DataReport.from_json(cache.meta["report"])
    candidates = cache.meta["candidates"]
    apart = among(cache.chunks, held_out, np.array([digest for digest, _ in candidates], dtype=np.uint64))
    prompts = choose_prompts(config, [q for _, q in candidates], apart)
    return Prepared(Examples(cache, train), Examples(cache, held_out), report, prompts, fingerprint.hexdigest())


def report(config: TrainConfig, progress: Progress | None = None) -> dict[str, Any]:
    """What the command `data` shows: the report of `config.dataset` for `config.model`, as JSON values."""
    from lowvram_tuner.models.source import load_tokenizer

    resolve(config.dataset)  # a wrong name is told before a tokenizer is loaded
    return prepare(config, load_tokenizer(config.model), progress).report.to_json()


def layout_of(source: Source, config: TrainConfig, alone: bool) -> Layout:
    """How a source's columns are used, by its first usable rows. Raises DataError where no layout fits.

    alone: it is the only source, and must have all columns that the config names; of several some may have them.
    """
    rows = list(islice((r.value for r in source.records() if r.value is not None), SAMPLE_ROWS))
    given = mapping(config.columns)
    absent = {} if alone else missing(given, columns_of(rows))
    return detect(rows, {role: column for role, column in given.items() if role not in absent}, source.name)


def _key(config: TrainConfig, template: Template, sources: list[Source]) -> str:
    """sha256 of everything that shapes the cached examples."""
    settings = [
        VERSION, config.max_seq_length, config.train_on, config.system_prompt, config.columns, template.identity,
        [(s.name, s.kind, s.digest()) for s in sources],
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()


def _build(config: TrainConfig, template: Template, sources: list[Source], folder: Path, progress: Progress | None) -> None:
    """Writes the cache. Leaves nothing behind when it fails."""
    try:
        writer = Writer(folder)
    except OSError as error:
        raise DataError(f"the prepared data cannot be written to {folder.parent}: {error.strerror}.") from None
    encoder = Encoder(template, config)
    builder = Builder(config, encoder, writer, sources)
    try:
        total = sum(s.nbytes() for s in sources)
        before = 0
        for number, source in enumerate(sources):
            for offset in builder.read(source, number):
                if progress:
                    progress("Reading data", min(before + offset, total), total, "bytes")
            before += source.nbytes()
        report = builder.finished()
        writer.finish({"report": report.to_json(), "candidates": builder.candidates.list()})
    except OSError as error:
        raise DataError(f"the data cannot be read, or its tokens not be written to {folder.parent}: {error}") from None
    finally:
        encoder.close()
        writer.discard()


@dataclass
class Builder:
    """Rows into a cache, with a report of what became of them."""

    config: TrainConfig
    encoder: Encoder
    writer: Writer
    sources: list[Source]
    report: DataReport = field(default_factory=DataReport)
    problems: Problems = field(default_factory=Problems)
    lengths: Lengths = field(default_factory=Lengths)
    candidates: Candidates = field(default_factory=Candidates)
    _formats: list[str] = field(default_factory=list)
    _layouts: list[Layout] = field(default_factory=list)  # of the sources read so far

    def read(self, source: Source, number: int) -> Iterator[int]:
        """Takes in a source; yields the byte reached, after each batch that was written."""
        for kind, reason in [*source.notes, *filter(None, [source.encoding and source.encoding.note])]:
            self.problems.add(source.name, 0, kind, reason, dropped=False)
        layout, refused, waiting = None, "", None
        for batch, reached in self._batches(source):
            if layout is None and not refused:
                layout, refused = self._learned(source)
            if refused:
                for record in batch:
                    self._drop(source, record.line, "no_layout", refused)
                yield reached
                continue
            started = self._started(batch, layout, source)
            if waiting:
                self._take(waiting, source, number)
                yield reached
            waiting = started
        if waiting:
            self._take(waiting, source, number)
            yield source.nbytes()

    def _batches(self, source: Source) -> Iterator[tuple[list[Record], int]]:
        """Good records in batches, with the byte reached; broken ones are counted on the way."""
        batch: list[Record] = []
        size = reached = 0
        for record in source.records():
            for kind, reason in record.notes:
                self.problems.add(source.name, record.line, kind, reason, dropped=False)
            reached = max(reached, record.offset)
            if record.value is None:
                if record.error:
                    self._drop(source, record.line, *record.error)
                continue
            batch.append(record)
            size += _characters(record.value)
            if len(batch) >= BATCH_ROWS or size >= BATCH_CHARACTERS:
                yield batch, reached
                batch, size = [], 0
        if batch:
            yield batch, reached

    def _learned(self, source: Source) -> tuple[Layout | None, str]:
        """The source's layout; or None and why its rows are left out. Raises DataError for a file that the user named."""
        try:
            layout = layout_of(source, self.config, alone=len(self.sources) == 1)
        except DataError as error:
            if not source.found:
                raise
            return None, f"left out: {error}"
        self._layouts.append(layout)
        self.report.columns[source.name] = layout.roles
        if layout.name not in self._formats:
            self._formats.append(layout.name)
        if layout.name == "preference":
            self.problems.add(source.name, 0, "preference", "pairs: the preferred answer is trained on, the other is not used", dropped=False)
        for doubt in layout.doubts:
            self.problems.add(source.name, 0, "ambiguous", doubt, dropped=False)
        return layout, ""

    def _drop(self, source: Source, line: int, kind: str, reason: str) -> None:
        self.report.rows += 1
        self.report.dropped += 1
        self.problems.add(source.name, line, kind, reason, dropped=True)

    def _started(self, batch: list[Record], layout: Layout, source: Source) -> tuple[list[int], Batch]:
        """The usable rows of a batch on their way through the tokenizer, with their lines."""
        samples, lines = [], []
        for record in batch:
            try:
                samples.append(to_sample(record.value, layout, self.config.system_prompt))
                lines.append(record.line)
            except RowError as error:
                self._drop(source, record.line, error.kind, error.reason)
        return lines, self.encoder.start(samples)

    def _take(self, waiting: tuple[list[int], Batch], source: Source, number: int) -> None:
        """Writes the examples of a batch."""
        lines, batch = waiting
        for sample, line, row in zip(batch.samples, lines, self.encoder.finish(batch)):
            if row.error:
                self._drop(source, line, row.error.kind, row.error.reason)
            else:
                self._keep(sample, line, row, source, number)

    def _keep(self, sample: Sample, line: int, row: Encoded, source: Source, number: int) -> None:
        report = self.report
        report.rows += 1
        report.kept += 1
        report.truncated += row.truncated
        report.split += len(row.examples) > 1
        self.lengths.add(len(row.ids))
        for kind, reason in row.notes:
            self.problems.add(source.name, line, kind, reason, dropped=False)
        digest = row_hash(row.ids)
        for piece, example in enumerate(row.examples):
            self.writer.add(example, digest, line, piece, number)
            report.tokens += len(example)
            report.trained_tokens += int(np.count_nonzero(example.trained))
        self.candidates.add(digest, sample)

    def finished(self) -> DataReport:
        """The report, complete. Raises DataError when no row is left."""
        report = self.report
        self._require_columns()
        if not report.kept:
            names = ", ".join(s.name for s in self.sources)
            worst = max(self.problems.list(), key=lambda p: (p.dropped, p.count), default=None)
            why = f"; most often: {worst.reason} (line {worst.line})" if worst and worst.dropped else ""
            raise DataError(f"{names} has no row that can be trained on: {report.rows} read, {report.dropped} dropped{why}.")
        self._duplicates()
        report.format = " + ".join(self._formats)
        report.examples = self.writer.examples
        report.problems = self.problems.list()
        report.histogram, report.longest = self.lengths.histogram(), self.lengths.longest
        if self._formats != ["text"]:  # texts are split, so any length holds them
            report.suggested_max_seq_length = self.lengths.suggestion()
        return report

    def _require_columns(self) -> None:
        """DataError where the user's mapping names a column that no file has; once all files were met."""
        if not self._layouts or len(self._layouts) < len(self.sources):
            return
        for role, column in mapping(self.config.columns).items():
            if all(missing({role: column}, layout.columns) for layout in self._layouts):
                raise DataError(f"no file has a column {column!r} for {role}; look at their columns.")

    def _duplicates(self) -> None:
        """Counts rows whose tokens equal an earlier row's."""
        for records in repeats(self.writer.chunks, self.writer.examples):
            self.report.duplicates += len(records)
            for number in np.unique(records["source"]):
                lines = records["line"][records["source"] == number]
                self.problems.repeated(self.sources[number].name, lines)


def _characters(value: dict[str, Any]) -> int:
    """Roughly how much text a row holds."""
    return sum(len(v) if isinstance(v, str) else len(str(v)) for v in value.values())
