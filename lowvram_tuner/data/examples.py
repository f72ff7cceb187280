"""Samples become examples: rendered, tokenized, masked, and cut to the sequence length.

Preparing a run and showing a row in the preview go through the same `Encoder`, so what is shown is what is trained on.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from lowvram_tuner.config import TrainConfig
from lowvram_tuner.data.formats import Sample, check_text
from lowvram_tuner.data.masking import locate, marked, mask
from lowvram_tuner.data.packing import Example
from lowvram_tuner.data.report import RowError
from lowvram_tuner.data.templates import Messages, Template

_BREAKS = ("\n\n", "\n", ". ", " ")  # where a long text is best cut: paragraph, line, sentence, word
_EARLIEST = 0.5  # a break counts from this share of a full piece on, so that pieces do not become small


@dataclass
class Encoded:
    """One row: its examples and what is to be said about it, or the error that makes it unusable.

    ids, trained: the whole row, before it is cut. Their length is the row's.
    """

    examples: list[Example] = field(default_factory=list)
    ids: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int32))
    trained: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=bool))
    truncated: bool = False
    notes: list[tuple[str, str]] = field(default_factory=list)
    error: RowError | None = None


@dataclass
class Batch:
    """Samples on their way: rendered, and being tokenized."""

    samples: Sequence[Sample]
    rows: list[Encoded]
    chats: list[tuple[int, Messages, str | RowError]]  # sample, its messages as the template takes them, its skeleton
    texts: dict[int, str]  # by sample
    encodings: Future


class Encoder:
    """Turns samples into examples of at most `config.max_seq_length` tokens, a batch at a time.

    Tokenizing runs in a thread of its own, in Rust and without Python's lock, so that one batch is tokenized while the next is
    rendered: `start` a batch, `start` the next, `finish` the first.
    """

    def __init__(self, template: Template, config: TrainConfig) -> None:
        self.template = template
        self.limit = config.max_seq_length
        self.everything = config.train_on == "everything"
        self._thread = ThreadPoolExecutor(1)

    def encode(self, samples: Sequence[Sample]) -> list[Encoded]:
        """One `Encoded` per sample, in order."""
        return self.finish(self.start(samples))

    def start(self, samples: Sequence[Sample]) -> Batch:
        """Renders samples and hands them to the tokenizer."""
        rows = [Encoded(notes=list(sample.notes)) for sample in samples]
        chats: list[tuple[int, Messages]] = []
        for k, sample in enumerate(samples):
            if sample.messages is None:
                continue
            try:
                chats.append((k, self._fitted(sample, rows[k])))
            except RowError as error:
                rows[k].error = error
        rendered = self.template.render_all([(messages, samples[k].tools) for k, messages in chats])
        skeletons = self._skeletons([(messages, samples[k]) for k, messages in chats])
        texts = {k: s.text for k, s in enumerate(samples) if s.messages is None}
        for (k, messages), text in zip(chats, rendered):
            try:
                texts[k] = self._checked(messages, text)
            except RowError as error:
                rows[k].error = error
        encodings = self._thread.submit(self.template.encode, list(texts.values()))
        return Batch(samples, rows, [(k, m, s) for (k, m), s in zip(chats, skeletons)], texts, encodings)

    def finish(self, batch: Batch) -> list[Encoded]:
        """Waits for the tokens of a batch, masks and cuts them."""
        encodings = dict(zip(batch.texts, batch.encodings.result()))
        for k, messages, skeleton in batch.chats:
            if batch.rows[k].error is None:
                self._chat(batch.rows[k], batch.samples[k], messages, batch.texts[k], encodings[k], skeleton)
        for k, sample in enumerate(batch.samples):
            if sample.messages is None:
                self._text(batch.rows[k], sample, encodings[k])
        return batch.rows

    def close(self) -> None:
        """Ends the tokenizer's thread."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _fitted(self, sample: Sample, row: Encoded) -> Messages:
        """The messages as the template takes them. Raises RowError where it would leave something out."""
        messages = self.template.fit(sample.messages)
        if len(messages) != len(sample.messages):
            row.notes.append(("system", "the chat template takes no system prompt; it opens the first question instead"))
        if any("tool_calls" in m for m in messages) and not self.template.takes_tool_calls:
            raise RowError("template", "the model's chat template has no place for tool calls")
        return messages

    def _skeletons(self, chats: list[tuple[Messages, Sample]]) -> list[str | RowError]:
        """Renderings with marks for answers, where masks are needed."""
        if self.everything and all(all(sample.weights) for _, sample in chats):
            return [""] * len(chats)
        return self.template.render_all([(marked(messages), sample.tools) for messages, sample in chats])

    def _checked(self, messages: Messages, text: str | RowError) -> str:
        """The rendered text. RowError where it is none, cannot be tokenized, or lacks a message (a tool's answer, say)."""
        if isinstance(text, RowError):
            raise text
        for number, message in enumerate(messages, 1):
            if message["role"] != "assistant" and message["content"].strip() not in text:
                raise RowError("template", f"the model's chat template leaves out or alters message {number} ({message['role']})")
        return check_text(text, "the conversation")

    def _chat(self, row: Encoded, sample: Sample, messages: Messages, text: str, encoding, skeleton) -> None:
        weights = [w for w, m in zip(sample.weights[len(sample.weights) - len(messages) :], messages) if m["role"] == "assistant"]
        try:
            spans = [] if self.everything and all(weights) else locate(self.template, messages, sample.tools, text, skeleton)
        except RowError as error:
            row.error = error
            return
        masked = mask(self.template, text, encoding, spans, weights, self.everything)
        row.ids, row.trained = masked.ids, masked.trained
        row.trained[:1] = False  # nothing comes before the first token, so it is never a target
        if not masked.ends:
            row.notes.append(("no_end", "an answer has no end-of-turn token behind it; the model may not learn to stop"))
        if masked.resplit:
            row.notes.append(("resplit", "an answer begins with white space that would join the prompt's last token; kept apart"))
        self._look(row, "".join(m["content"] for m in messages))
        self._cut_chat(row)

    def _look(self, row: Encoded, text: str) -> None:
        """Notes what the model will not read as it stands."""
        if token := self.template.control_token(text):
            row.notes.append(("control", f"the text spells the control token {token}; the model reads it as one"))
        if lost := self.template.lost_character(text):
            row.notes.append(("lost", f"the model's tokenizer has no token for U+{ord(lost):04X}; it is lost"))

    def _cut_chat(self, row: Encoded) -> None:
        ids, trained = row.ids, row.trained
        if not trained.any():
            row.error = RowError("no_answer", "no answer of this row is trained: all have weight 0")
            return
        if len(ids) > self.limit:
            kept = np.flatnonzero(trained[: self.limit])
            if not len(kept):
                row.error = RowError(
                    "too_long", f"the first answer begins after {int(trained.argmax())} tokens, beyond max_seq_length={self.limit}"
                )
                return
            row.truncated = True
            row.notes.append(("truncated", f"the row has {len(ids)} tokens, more than max_seq_length={self.limit}; its end is cut off"))
            ids, trained = ids[: kept[-1] + 1], trained[: kept[-1] + 1]
        row.examples = [Example(ids, trained)]

    def _text(self, row: Encoded, sample: Sample, encoding) -> None:
        """Plain text: every token is trained; a long text is cut into pieces, each with the BOS token where there is one."""
        tokenizer = self.template.tokenizer
        ids = np.array(encoding.ids, dtype=np.int32)
        bos = [tokenizer.bos_token_id] if self.template.adds_bos and not (len(ids) and ids[0] == tokenizer.bos_token_id) else []
        end = [tokenizer.eos_token_id] if sample.ends and tokenizer.eos_token_id is not None else []
        row.ids = np.array([*bos, *ids, *end], dtype=np.int32)
        row.trained = np.ones(len(row.ids), dtype=bool)
        row.trained[:1] = False
        cuts = cut_text(sample.text, encoding, self.limit - len(bos) - len(end))
        for number, (a, b) in enumerate(cuts, 1):
            piece = np.array([*bos, *ids[a:b], *(end if number == len(cuts) else ())], dtype=np.int32)
            trained = np.ones(len(piece), dtype=bool)
            trained[:1] = False
            if trained.any():
                row.examples.append(Example(piece, trained))
        if not row.examples:
            row.error = RowError("too_short", "the text is a single token, from which nothing can be learned")
        elif len(cuts) > 1:
            row.notes.append(("split", f"the text has {len(row.ids)} tokens; it is split into {len(cuts)} examples"))
        self._look(row, sample.text)


def cut_text(text: str, encoding, limit: int) -> list[tuple[int, int]]:
    """Token ranges of at most `limit` tokens that cover a text in order, cut at paragraphs, lines, sentences or words."""
    count, start, ranges = len(encoding), 0, []
    while count - start > limit:
        stop = start + limit
        first = encoding.token_to_chars(start)[0]
        last = encoding.token_to_chars(stop)[0]
        for mark in _BREAKS:
            found = text.rfind(mark, first + int(_EARLIEST * (last - first)), last)
            if found >= 0:
                token = encoding.char_to_token(min(found + len(mark), last) - (mark == " "))  # a word keeps its space
                stop = token if token is not None and start < token <= stop else stop
                break
        ranges.append((start, stop))
        start = stop
    return [*ranges, (start, count)]
