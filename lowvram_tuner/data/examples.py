"""Samples become examples: rendered, tokenized, masked, and cut to the sequence length.

Preparing a run and showing a row in the preview go through the same `Encoder`, so what is shown is what is trained on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from lowvram_tuner.config import TrainConfig
from lowvram_tuner.data.formats import Sample, check_text
from lowvram_tuner.data.masking import locate, marked, mask
from lowvram_tuner.data.packing import Example
from lowvram_tuner.data.report import RowError
from lowvram_tuner.data.templates import Messages, Template

_BREAKS = ("\n\n", "\n", ". ", " ")  # where a long text is best cut: paragraph, line, sentence, word
_EARLIEST = 0.25  # a break counts from this share of a full piece on, so that pieces do not become tiny


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


class Encoder:
    """Turns samples into examples of at most `config.max_seq_length` tokens, a batch at a time."""

    def __init__(self, template: Template, config: TrainConfig) -> None:
        self.template = template
        self.limit = config.max_seq_length
        self.everything = config.train_on == "everything"

    def encode(self, samples: Sequence[Sample]) -> list[Encoded]:
        """One `Encoded` per sample, in order."""
        rows = [Encoded(notes=list(sample.notes)) for sample in samples]
        chats: list[tuple[int, Messages]] = []
        for k, sample in enumerate(samples):
            if sample.messages is None:
                continue
            try:
                chats.append((k, self._fitted(sample, rows[k])))
            except RowError as error:
                rows[k].error = error
        texts = self._rendered([(messages, samples[k].tools) for k, messages in chats])
        skeletons = self._skeletons([(messages, samples[k].tools) for k, messages in chats], [samples[k] for k, _ in chats])
        parts: dict[int, str] = {k: s.text for k, s in enumerate(samples) if s.messages is None}
        for (k, messages), text in zip(chats, texts):
            try:
                if isinstance(text, RowError):
                    raise text
                self._all_written(messages, check_text(text, "the conversation"))
                parts[k] = text
            except RowError as error:
                rows[k].error = error
        encodings = dict(zip(parts, self.template.encode(list(parts.values()))))
        for (k, messages), skeleton in zip(chats, skeletons):
            if rows[k].error is None:
                self._chat(rows[k], samples[k], messages, parts[k], encodings[k], skeleton)
        for k, sample in enumerate(samples):
            if sample.messages is None:
                self._text(rows[k], sample, encodings[k])
        return rows

    def _fitted(self, sample: Sample, row: Encoded) -> Messages:
        """The messages as the template takes them. Raises RowError where it would leave something out."""
        messages = self.template.fit(sample.messages)
        if len(messages) != len(sample.messages):
            row.notes.append(("system", "the chat template takes no system prompt; it opens the first question instead"))
        if any("tool_calls" in m for m in messages) and not self.template.takes_tool_calls:
            raise RowError("template", "the model's chat template has no place for tool calls")
        return messages

    def _rendered(self, chats: list) -> list[str | RowError]:
        return self.template.render_all(chats)

    def _skeletons(self, chats: list, samples: list[Sample]) -> list[str | RowError]:
        """Renderings with marks for answers, for the rows that need masks."""
        if self.everything and all(all(s.weights) for s in samples):
            return [""] * len(chats)
        return self.template.render_all([(marked(messages), tools) for messages, tools in chats])

    def _all_written(self, messages: Messages, text: str) -> None:
        """RowError where the template leaves a message out (a tool's answer, a second system prompt)."""
        for number, message in enumerate(messages, 1):
            if message["role"] != "assistant" and message["content"].strip() not in text:
                raise RowError("template", f"the model's chat template leaves out or alters message {number} ({message['role']})")

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
        token = self.template.control_token("".join(m["content"] for m in messages))
        if token:
            row.notes.append(("control", f"the text spells the control token {token}; the model reads it as one"))
        self._cut_chat(row)

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
        token = self.template.control_token(sample.text)
        if token:
            row.notes.append(("control", f"the text spells the control token {token}; the model reads it as one"))


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
