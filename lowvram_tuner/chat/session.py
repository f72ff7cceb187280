"""One resident model that answers, with its adapter or as the base.

A `ChatSession` renders the conversation with the model's own template, drops the oldest turns when it grows longer than
the model can read, and yields text as tokens come. How tokens are made is `generate_ids` alone.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList
from transformers.generation import BaseStreamer

from lowvram_tuner.chat.decode import Decoder, decoder_for
from lowvram_tuner.chat.sampling import Sampling
from lowvram_tuner.chat.target import Target
from lowvram_tuner.config import ConfigError
from lowvram_tuner.data.report import RowError
from lowvram_tuner.data.templates import Template

Message = dict[str, str]
NO_ROOM = "the card has no room for a conversation this long; clear it, or close other programs and ask again."
UNFINISHED = "\ufffd"  # what an incomplete UTF-8 sequence decodes to: its other bytes are in the next token


class ChatSession:
    """Answers conversations on one model, one at a time."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        """`model`: a transformers model, wrapped by PEFT when it has an adapter. `tokenizer`: the model's own."""
        self.model, self.template = model, Template(tokenizer)
        self.decoder = decoder_for(model)
        self.tokens_per_s = 0.0  # of the last answer, from its first token on
        self.tokens = 0  # in the last answer
        self.stopped_early = False  # the last answer was ended by `stop`
        self.dropped = 0  # oldest messages of the last conversation that no longer fitted
        self._stop = threading.Event()

    @classmethod
    def load(cls, target: Target, device: str | None = None, progress: Callable[..., None] | None = None) -> ChatSession:
        """The session of a target, loaded on `device` (default: the card, else the CPU)."""
        from lowvram_tuner.models.load import load_for_chat

        adapter = Path(target.adapter) if target.adapter else None
        return cls(*load_for_chat(target.model, target.bits, target.method, adapter, device, progress, target.group_size))

    def stream(
        self, messages: list[Message], *, adapter: bool = True, system: str = "", stop: threading.Event | None = None,
        **sampling: Any,
    ) -> Iterator[str]:  # fmt: skip
        """Yields the answer to `messages` (role, content; the last one from the user) piece by piece.

        adapter: False answers as the base. sampling: temperature, top_p, max_new_tokens (see `Sampling`).
        ConfigError when the last message alone is longer than the model can read.
        """
        choice = Sampling(**sampling)
        self._stop = stop or threading.Event()
        self.tokens, self.tokens_per_s, self.stopped_early = 0, 0.0, False
        prompt, room = self._prompt(messages, system, choice.max_new_tokens)
        off = nullcontext() if adapter or not hasattr(self.model, "disable_adapter") else self.model.disable_adapter()
        with off:
            ids = generate_ids(self.model, prompt, min(room, choice.max_new_tokens), choice, self._ends(), self._stop, self.decoder)
            try:
                yield from self._text(ids)
            except torch.OutOfMemoryError:
                raise ConfigError(NO_ROOM) from None
        self.stopped_early = self._stop.is_set()

    def answer(self, messages: list[Message], **options: Any) -> str:
        """The whole answer at once; `options` as for `stream`."""
        return "".join(self.stream(messages, **options))

    def stop(self) -> None:
        """Ends the answer under way after its current token."""
        self._stop.set()

    @property
    def context_length(self) -> int:
        """The most tokens, question and answer together, that the model can read."""
        return int(getattr(self.model.config, "max_position_embeddings", 0) or 4096)

    def _prompt(self, messages: list[Message], system: str, wanted: int) -> tuple[torch.Tensor, int]:
        """(token ids [1, T], room left for the answer): the newest turns that leave a quarter of the context, or `wanted`."""
        reserve = min(wanted, self.context_length // 4)
        head = [{"role": "system", "content": system}] if system.strip() else []
        for start in _turns(messages):
            ids = self._render(head + messages[start:])
            if len(ids) + reserve <= self.context_length:
                self.dropped = start
                return torch.tensor([ids]), self.context_length - len(ids)
        raise ConfigError(
            f"the message has {len(ids)} tokens; this model reads {self.context_length} with its answer. Shorten the message."
        )

    def _render(self, messages: list[Message]) -> list[int]:
        """Token ids of a conversation up to where the answer begins, exactly as training writes it."""
        try:
            text = self.template.render(self.template.fit(messages), generation_prompt=True)
        except RowError as error:
            raise ConfigError(f"{error}.") from None
        return self.template.encode([text])[0].ids

    def _ends(self) -> list[int]:
        """Tokens that end an answer: what the model's generation config names, and the template's end of turn."""
        named = getattr(self.model.generation_config, "eos_token_id", None)
        named = named if isinstance(named, (list, tuple)) else [named]
        return sorted({i for i in (*named, *self.template.stop_ids) if i is not None})

    def _text(self, ids: Iterator[int]) -> Iterator[str]:
        """Text of ids as it becomes certain: a piece that ends inside a character waits for the next token.

        Only the tokens since the last piece's start are decoded again, so a long answer costs no more per token.
        """
        pending: list[int] = []
        context: list[int] = []  # tokens already told that the next ones' spacing depends on
        started = None
        for token in ids:
            self.tokens += 1
            now = time.perf_counter()
            started = started or now
            if self.tokens > 1:
                self.tokens_per_s = (self.tokens - 1) / (now - started)
            pending.append(token)
            piece = self._decode(context + pending)[len(self._decode(context)) :]
            if piece and not piece.endswith(UNFINISHED):
                yield piece
                context, pending = pending, []
        piece = self._decode(context + pending)[len(self._decode(context)) :]
        if piece:
            yield piece

    def _decode(self, ids: list[int]) -> str:
        return self.template.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def generate_ids(
    model: Any, prompt: torch.Tensor, most: int, sampling: Sampling, ends: list[int], stop: threading.Event,
    decoder: Decoder | None = None,
) -> Iterator[int]:  # fmt: skip
    """Yields up to `most` new token ids after `prompt` [1, T], int64, on any device; an ending one is not yielded.

    `decoder`: the model's own fast one, where `decoder_for` knows the model; else transformers' generate. Either runs in a
    thread of its own and hands tokens over: on a processor that is busy, threads of a second pool wait for each other
    without spinning, which is ten times as fast. Leaving the iteration ends it.
    """
    tokens, left = _Tokens(), threading.Event()

    def work() -> None:
        try:
            if decoder is not None:
                for token in decoder.generate(prompt[0].tolist(), most, sampling, ends, stop):
                    tokens.give(token)
                    if left.is_set():
                        break
            else:
                _by_transformers(model, prompt.to(model.device), most, sampling, ends, [stop, left], tokens)
            tokens.finish(None)
        except Exception as error:
            tokens.finish(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        for token in tokens:
            if token in ends or stop.is_set():
                break
            yield token
    finally:
        left.set()
        thread.join()


def _by_transformers(
    model: Any, prompt: torch.Tensor, most: int, sampling: Sampling, ends: list[int], stops: list[threading.Event], tokens: _Tokens
) -> None:
    config = GenerationConfig(
        max_new_tokens=most, eos_token_id=ends, pad_token_id=ends[0] if ends else 0, **_choice(sampling)
    )
    model.generate(
        input_ids=prompt, attention_mask=torch.ones_like(prompt), generation_config=config, streamer=tokens,
        stopping_criteria=StoppingCriteriaList([_Stopped(*stops)]),
    )  # fmt: skip


def _choice(sampling: Sampling) -> dict[str, Any]:
    if sampling.temperature == 0:
        return {"do_sample": False}
    return {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}


def _turns(messages: list[Message]) -> list[int]:
    """Where a conversation may start: at each of the user's messages, the oldest first."""
    starts = [n for n, message in enumerate(messages) if message["role"] == "user"]
    if not starts or messages[-1]["role"] != "user":
        raise ConfigError("the conversation's last message is not the user's; ask something.")
    return starts


class _Tokens(BaseStreamer):
    """A streamer that can be iterated over from another thread."""

    def __init__(self) -> None:
        self._queue: queue.Queue = queue.Queue()
        self._prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        if not self._prompt_seen:  # generate hands over the prompt first
            self._prompt_seen = True
            return
        for token in value.reshape(-1).tolist():
            self.give(token)

    def give(self, token: int) -> None:
        """Hands one token over."""
        self._queue.put(token)

    def end(self) -> None:
        """Called by generate; `finish` comes right after it."""

    def finish(self, error: Exception | None) -> None:
        self._queue.put(error or StopIteration())

    def __iter__(self) -> Iterator[int]:
        while isinstance(item := self._queue.get(), int):
            yield item
        if not isinstance(item, StopIteration):
            raise item


class _Stopped(StoppingCriteria):
    """Ends generate once any of the events is set."""

    def __init__(self, *events: threading.Event) -> None:
        self._events = events

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        ended = any(event.is_set() for event in self._events)
        return torch.full((input_ids.shape[0],), ended, device=input_ids.device, dtype=torch.bool)
