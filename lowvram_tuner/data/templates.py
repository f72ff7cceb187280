"""A tokenizer's chat template: what it writes around an answer, what it cannot write, and how its text becomes tokens.

The model's own template is used. A base model without one gets `simple_template`, set on its tokenizer so that training,
chat and export render the same text:

    {system}

    ### User:
    {question}

    ### Assistant:
    {answer}<eos>

A few probe conversations show what the template does: which text follows an answer up to the end-of-turn token, which text it
writes between the generation prompt and an answer, whether it takes a system prompt and tool calls. Text is always tokenized
as `apply_chat_template` does it, with no special tokens added, so a beginning-of-sequence token stands once where the
template writes one.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

from lowvram_tuner.data.report import DataError, RowError

Messages = list[dict[str, Any]]
_USER, _ANSWER, _SYSTEM = "\ue0a01\ue0a1", "\ue0a02\ue0a1", "\ue0a03\ue0a1"  # private use characters: in nobody's text


def shared_length(a: str, b: str) -> int:
    """How many characters two texts have in common at their beginning."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[low:middle] == b[low:middle] else (low, middle - 1)
    return low


def simple_template(tokenizer: Any) -> str:
    """The documented template for base models, as Jinja. It writes BOS where the tokenizer itself would."""
    bos = "{{ bos_token }}" if adds_bos(tokenizer) else ""
    return (
        bos + "{% for message in messages %}"
        "{% if message['role'] == 'system' %}{{ message['content'] + '\\n\\n' }}"
        "{% elif message['role'] == 'user' %}{{ '### User:\\n' + message['content'] + '\\n\\n' }}"
        "{% elif message['role'] == 'assistant' %}{{ '### Assistant:\\n' + message['content'] + eos_token + '\\n\\n' }}"
        "{% else %}{{ raise_exception('this template has no place for the role ' + message['role']) }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ '### Assistant:\\n' }}{% endif %}"
    )


def adds_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer puts its BOS token before plain text."""
    ids = tokenizer("a")["input_ids"]
    return tokenizer.bos_token_id is not None and len(ids) > 1 and ids[0] == tokenizer.bos_token_id


def ensure_template(tokenizer: Any) -> bool:
    """Gives a tokenizer without a chat template the simple one. True when it had its own."""
    if tokenizer.chat_template:
        return True
    if not tokenizer.eos_token:
        raise DataError("the tokenizer has neither a chat template nor an end token; use a model that has one of them.")
    tokenizer.chat_template = simple_template(tokenizer)
    return False


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """A pattern of any of these texts, the longest first; white space (Gemma has tokens of it) is left out."""
    words = sorted((t for t in texts if t.strip(" \n\t\u2581")), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, words)) or r"(?!)")


class Template:
    """A tokenizer with its chat template, probed once.

    own: the template is the model's. end: the text that ends an answer, up to and including the end-of-turn token.
    end_id: that token, None where the template writes none. lead: what the template puts between generation prompt and answer.
    """

    def __init__(self, tokenizer: Any) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise DataError(f"the tokenizer {type(tokenizer).__name__} has no fast form (tokenizer.json), which training needs.")
        self.tokenizer = tokenizer
        self.own = ensure_template(tokenizer)
        self.adds_bos = adds_bos(tokenizer)
        added = {str(t.content): t.special for t in tokenizer.added_tokens_decoder.values()}
        special = {text for text, is_special in added.items() if is_special} | set(tokenizer.all_special_tokens)
        self._added = _any_of(added.keys() | special)
        self._special, self._special_starts = _any_of(special), {text[0] for text in special if text}
        self._seen: set[str] = set()  # characters that were tried, and those of them that the tokenizer loses
        self._lost: set[str] = set()
        self._probe()

    @cached_property
    def identity(self) -> tuple[str, str]:
        """What decides which tokens a conversation becomes, for fingerprints."""
        return str(self.tokenizer.chat_template), hashlib.sha256(self._backend.to_str().encode()).hexdigest()

    def _probe(self) -> None:
        user, answer = {"role": "user", "content": _USER}, {"role": "assistant", "content": _ANSWER}
        try:
            prompt = self.render([user], generation_prompt=True)
            whole = self.render([user, answer])
            before, after = whole.split(_ANSWER)
            asked = prompt.split(_USER)[1]
            between = before.split(_USER)[1]
        except (RowError, ValueError, IndexError) as error:
            raise DataError(f"the model's chat template cannot write a question and an answer ({error}).") from None
        self.lead = between[shared_length(asked, between) :]
        found = self._added.search(after)
        self.end = after[: found.end()] if found else ""
        ids = self.encode([self.end])[0].ids if self.end else []
        self.end_id: int | None = ids[-1] if ids else None

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The tokens at which generation ends: end-of-turn and end-of-text."""
        return tuple(dict.fromkeys(i for i in (self.end_id, self.tokenizer.eos_token_id) if i is not None))

    @cached_property
    def takes_system(self) -> bool:
        """Whether the template writes a system message."""
        try:
            return _SYSTEM in self.render([{"role": "system", "content": _SYSTEM}, {"role": "user", "content": _USER}])
        except RowError:
            return False

    @cached_property
    def takes_tool_calls(self) -> bool:
        """Whether the template writes an answer's tool calls."""
        call = {"type": "function", "id": "call00001", "function": {"name": "probe_name", "arguments": {"a": 1}}}
        turn = {"role": "assistant", "content": "", "tool_calls": [call]}
        try:
            return "probe_name" in self.render([{"role": "user", "content": _USER}, turn])
        except RowError:
            return False

    def fit(self, messages: Messages) -> Messages:
        """Messages as the template can write them: without a place for it, the system prompt opens the first question.

        Chat uses the same rule, so that what is asked later looks like what was trained on.
        """
        if not messages or messages[0]["role"] != "system" or self.takes_system:
            return messages
        system, *rest = messages
        if not rest or rest[0]["role"] != "user":
            raise RowError("template", "the model's chat template takes no system prompt, and no question follows to hold it")
        return [{**rest[0], "content": f"{system['content']}\n\n{rest[0]['content']}"}, *rest[1:]]

    def render(self, messages: Messages, tools: list | None = None, generation_prompt: bool = False) -> str:
        """One conversation as text. Raises RowError with the template's own words where it refuses."""
        try:
            return self.tokenizer.apply_chat_template(
                messages, tools=tools, tokenize=False, add_generation_prompt=generation_prompt
            )
        except Exception as error:  # a template is a program: Jinja's errors, and any its expressions raise
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise RowError("template", f"the model's chat template refuses the conversation: {reason}") from None

    def render_all(self, chats: Sequence[tuple[Messages, list | None]]) -> list[str | RowError]:
        """Many conversations at once; a refused one is its RowError."""
        plain = [messages for messages, tools in chats if tools is None]
        if len(plain) == len(chats) and chats:
            try:
                return self.tokenizer.apply_chat_template(plain, tokenize=False)
            except Exception:  # one of them is refused: find out which, below
                plain = []
        rendered: list[str | RowError] = []
        for messages, tools in chats:
            try:
                rendered.append(self.render(messages, tools))
            except RowError as error:
                rendered.append(error)
        return rendered

    def control_token(self, text: str) -> str | None:
        """A control token that a text spells out, which the model will read as one."""
        found = self._special.search(text) if any(c in text for c in self._special_starts) else None
        return found.group() if found else None

    def lost_character(self, text: str) -> str | None:
        """A character of the text that the tokenizer loses: it has neither a token nor all of the bytes for it."""
        characters = set(text)
        if not characters <= self._seen:
            self._try(list(characters - self._seen))
        return min(characters & self._lost) if self._lost and characters & self._lost else None

    def _try(self, characters: list[str]) -> None:
        self._seen.update(characters)
        for character, encoding in zip(characters, self.encode(characters)):
            if not encoding.ids or ("\ufffd" in self.decode(encoding.ids) and character != "\ufffd"):
                self._lost.add(character)

    @cached_property
    def _backend(self) -> Any:
        """A private copy of the Rust tokenizer: no padding, no truncation, offsets that include a token's leading space."""
        from tokenizers import Tokenizer, processors

        backend = Tokenizer.from_str(self.tokenizer.backend_tokenizer.to_str())
        backend.no_padding()
        backend.no_truncation()
        backend.post_processor = processors.ByteLevel(trim_offsets=False)
        return backend

    def encode(self, texts: Sequence[str]) -> list[Any]:
        """`tokenizers.Encoding`s of texts, exactly the ids of tokenizer(text, add_special_tokens=False)."""
        return self._backend.encode_batch(list(texts), add_special_tokens=False)

    @cached_property
    def splits_cleanly(self) -> bool:
        """Whether text tokenized in two parts decodes to the whole (false where a tokenizer puts a space before each part)."""
        ids = [i for part in self.encode(["ab", "cd"]) for i in part.ids]
        return self.decode(ids) == "abcd"

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens, specials included, nothing tidied up."""
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
