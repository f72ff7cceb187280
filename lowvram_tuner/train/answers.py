"""The before/after questions, answered by base and adapter on the model that is being trained.

Questions are answered together, as rows of one batch padded on the left: a word for all of them costs about as much as a word for
one, so that asking at every checkpoint stays cheap. Everything is greedy, so the same adapter gives the same answers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from transformers import GenerationConfig

from lowvram_tuner.data.report import RowError
from lowvram_tuner.data.templates import Messages, Template

LONGEST = 48  # tokens of an answer


class Questions:
    """A run's questions. The base is asked once, the adapter each time."""

    def __init__(self, prompts: list[Messages], tokenizer: Any) -> None:
        self.template = Template(tokenizer)
        self.asked = [(messages, ids) for messages in prompts if (ids := self._ids(messages))]
        self.left_out = len(prompts) - len(self.asked)
        self._base: list[str] | None = None

    def ask(self, model: Any, room: int) -> list[dict[str, str]]:
        """Rows of prompt, base and adapter for the questions that `model` can read.

        model: transformers' model wrapped by PEFT; set to evaluation and left so. room: tokens that one batch may hold, padding
        and answers included; a longer question is a batch of its own.
        """
        model.eval()
        longest = int(getattr(model.config, "max_position_embeddings", 0) or 4096) - LONGEST
        asked = [(messages, ids) for messages, ids in self.asked if len(ids) <= longest]
        prompts = [ids for _, ids in asked]
        if self._base is None:
            with model.disable_adapter() if hasattr(model, "disable_adapter") else nullcontext():
                self._base = self._answers(model, prompts, room)
        texts = [messages[-1]["content"] for messages, _ in asked]
        rows = zip(texts, self._base, self._answers(model, prompts, room), strict=True)
        return [{"prompt": prompt, "base": base, "adapter": adapter} for prompt, base, adapter in rows]

    def _ids(self, messages: Messages) -> list[int]:
        """A question up to where the answer begins, exactly as training writes it; [] where the template refuses it."""
        try:
            text = self.template.render(self.template.fit(messages), generation_prompt=True)
        except RowError:
            return []
        return self.template.encode([text])[0].ids

    @torch.no_grad()
    def _answers(self, model: Any, prompts: list[list[int]], room: int) -> list[str]:
        answers = [""] * len(prompts)
        for numbers in _batches([len(p) for p in prompts], room):
            found = self._generate(model, [prompts[i] for i in numbers])
            for number, ids in zip(numbers, found, strict=True):
                answers[number] = self.template.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return answers

    def _generate(self, model: Any, prompts: list[list[int]]) -> list[list[int]]:
        """The new tokens after each of some prompts, up to the one that ends the answer."""
        ends = sorted({*self.template.stop_ids, *_named_ends(model)})
        width, pad = max(map(len, prompts)), ends[0] if ends else 0
        ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=model.device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device)
        settings = GenerationConfig(max_new_tokens=LONGEST, do_sample=False, eos_token_id=ends or None, pad_token_id=pad)
        new = model.generate(input_ids=ids, attention_mask=mask, generation_config=settings)[:, width:].tolist()
        return [row[: next((i for i, token in enumerate(row) if token in ends), len(row))] for row in new]


def _batches(lengths: list[int], room: int) -> Iterator[list[int]]:
    """Numbers of prompts that are answered together, of similar length, the shortest first."""
    held: list[int] = []
    for number in sorted(range(len(lengths)), key=lengths.__getitem__):
        if held and (len(held) + 1) * (lengths[number] + LONGEST) > room:
            yield held
            held = []
        held.append(number)
    if held:
        yield held


def _named_ends(model: Any) -> list[int]:
    """The tokens that the model's own settings name as an answer's end."""
    named = getattr(model.generation_config, "eos_token_id", None)
    return [i for i in (named if isinstance(named, (list, tuple)) else [named]) if i is not None]
