"""Which tokens of a conversation are trained: the answers with their end-of-turn, or everything.

An answer is what the model itself must write after the generation prompt: from there to the end-of-turn token. Where that
is in the rendered text is found for any template, with or without generation markers, and proved before it is used:

1. Frames. Render again with a mark in place of every answer; the text between the marks is what the template writes around
   answers. If frames and answers joined are the rendered text, character by character, the answers' places are exact. Some
   templates trim answers; the trimmed forms are tried too. Two renderings do for any number of turns.
2. One answer at a time, for answers that a template rewrites (tool calls, reasoning): with a mark in place of this one only,
   the rendering's parts before and behind it must be the beginning and the end of the text.
3. Prefixes: the conversation before the answer with a generation prompt must be the beginning of the text.

An answer that none of these finds makes its row unusable, with the reason. Places become tokens through the tokenizer's own
character offsets; the tokens stay those of `apply_chat_template`. Only where a token would join the prompt's end with the
answer's beginning (an answer that starts with an empty line) is the text tokenized in two parts, as it is in chat, where the
prompt is complete before the answer begins.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from lowvram_tuner.data.report import RowError
from lowvram_tuner.data.templates import Messages, Template, shared_length

_MARK = "\ue0b0{}\ue0b1"
_MARKS = re.compile("\ue0b0(\\d+)\ue0b1")
_SHAPES: tuple[Callable[[str], str], ...] = (  # what templates do to an answer
    lambda text: text, str.strip, str.rstrip, str.lstrip, lambda text: text.lstrip("\n"), lambda text: text.strip("\n"),
)  # fmt: skip


@dataclass(frozen=True)
class Span:
    """An answer's place in the rendered text, in characters, end-of-turn included. ends: it has an end-of-turn."""

    start: int
    stop: int
    ends: bool


def locate(template: Template, messages: Messages, tools: list | None, text: str, skeleton: str | RowError) -> list[Span]:
    """The answers' spans in `text`, in order. `skeleton` is the rendering of `marked(messages)`. Raises RowError."""
    answers = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    spans = _by_frames(template, [messages[i] for i in answers], text, skeleton)
    if spans is None:
        spans = [
            _by_one(template, messages, tools, text, i) or _by_prefix(template, messages, tools, text, i) for i in answers
        ]
    for number, span in enumerate(spans):
        if span is None or (number and spans[number - 1] and span.start < spans[number - 1].stop):
            raise RowError("template", f"the model's chat template writes answer {number + 1} so that it cannot be found again")
    return spans


def marked(messages: Messages, only: int | None = None) -> Messages:
    """The conversation with a mark as the content of every answer (or of the message `only`)."""
    return [
        {"role": "assistant", "content": _MARK.format(i)} if m["role"] == "assistant" and only in (None, i) else m
        for i, m in enumerate(messages)
    ]


def _by_frames(template: Template, answers: Messages, text: str, skeleton: str | RowError) -> list[Span] | None:
    if isinstance(skeleton, RowError):
        return None
    frames = _MARKS.split(skeleton)[::2]
    if len(frames) != len(answers) + 1:
        return None
    contents = [m.get("content", "") for m in answers]
    for shape in _SHAPES:
        parts = [shape(content) for content in contents]
        if sum(map(len, parts)) + sum(map(len, frames)) != len(text):
            continue
        at, spans = 0, []
        for frame, part, behind in zip(frames, parts, frames[1:]):
            start = at + len(frame)
            at = start + len(part)
            lead = len(template.lead) if template.lead and frame.endswith(template.lead) else 0
            ends = bool(template.end) and behind.startswith(template.end)
            spans.append(Span(start - lead, at + len(template.end) * ends, ends))
        if "".join(x for pair in zip(frames, parts) for x in pair) + frames[-1] == text:
            return spans
    return None


def _by_one(template: Template, messages: Messages, tools: list | None, text: str, index: int) -> Span | None:
    try:
        parts = _MARKS.split(template.render(marked(messages, index), tools))
    except RowError:
        return None
    if len(parts) != 3:
        return None
    before, behind = parts[0].removesuffix(template.lead), parts[2]
    if not (text.startswith(before) and text.endswith(behind) and len(before) + len(behind) < len(text)):
        return None
    ends = bool(template.end) and behind.startswith(template.end)
    return Span(len(before), len(text) - len(behind) + len(template.end) * ends, ends)


def _by_prefix(template: Template, messages: Messages, tools: list | None, text: str, index: int) -> Span | None:
    try:
        before = template.render(messages[:index], tools, generation_prompt=True) if index else ""
        upto = template.render(messages[: index + 1], tools)
    except RowError:
        return None
    if not text.startswith(before):
        return None
    common = shared_length(upto, text)
    at = text.rfind(template.end, len(before), common) if template.end else -1
    stop = at + len(template.end) if at >= 0 else common
    return Span(len(before), stop, at >= 0) if stop > len(before) else None


@dataclass(frozen=True)
class Masked:
    """Tokens of a conversation. ids: [n] int32; trained: [n] bool; ends: every trained answer ends with end-of-turn."""

    ids: np.ndarray
    trained: np.ndarray
    ends: bool
    resplit: bool  # tokenized in parts at an answer's start


def mask(template: Template, text: str, encoding: Any, spans: Sequence[Span], weights: Sequence[bool], everything: bool) -> Masked:
    """Ids and trained flags of a rendered conversation.

    weights: for each span whether it is trained. everything: all other text is trained too.
    """
    starts = [span.start for span, weight in zip(spans, weights) if weight]
    resplit = any(_straddled(encoding, at) for at in starts) and template.splits_cleanly
    if resplit:
        ids, first = _in_parts(template, text, starts)
    else:
        ids, first = np.array(encoding.ids, dtype=np.int32), _Places(encoding, len(text))
    trained = np.full(len(ids), everything)
    ends = True
    for span, weight in zip(spans, weights):
        a, b = first(span.start), first(span.stop)
        trained[a:b] = weight
        if weight and b > a:
            ends &= span.ends and ids[b - 1] == template.end_id
    return Masked(ids, trained, ends, resplit)


def _straddled(encoding: Any, at: int) -> bool:
    """Whether a token covers both the character before `at` and the one at it."""
    token = encoding.char_to_token(at)
    return token is not None and encoding.token_to_chars(token)[0] < at


class _Places:
    """From a character to the first token that starts there or later."""

    def __init__(self, encoding: Any, length: int) -> None:
        self.encoding, self.length = encoding, length

    def __call__(self, at: int) -> int:
        if at >= self.length:
            return len(self.encoding)
        token = self.encoding.char_to_token(at)
        if token is None:  # a character that the tokenizer's normalizer removed
            return int(np.searchsorted([start for start, _ in self.encoding.offsets], at))
        return token if self.encoding.token_to_chars(token)[0] >= at else token + 1


def _in_parts(template: Template, text: str, starts: Sequence[int]) -> tuple[np.ndarray, Callable[[int], int]]:
    """Ids of the text tokenized in parts that begin at `starts`, and the function from a character to a token."""
    cuts = [0, *starts, len(text)]
    parts = template.encode([text[a:b] for a, b in pairwise(cuts)])
    sizes = np.cumsum([0] + [len(part) for part in parts])

    def first(at: int) -> int:
        k = bisect_right(cuts, at, hi=len(parts)) - 1
        return int(sizes[k]) + _Places(parts[k], cuts[k + 1] - cuts[k])(at - cuts[k])

    return np.array([i for part in parts for i in part.ids], dtype=np.int32), first
