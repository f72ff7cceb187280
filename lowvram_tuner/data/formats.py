"""Layouts: which column holds what, and a row as one conversation or one text.

Detection looks at column names and at the values of a file's first rows. A user's mapping (role=column) goes before it. A row
is then turned into a `Sample`; what cannot be used raises `RowError` with the value seen.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from lowvram_tuner.data.chats import read_chat, read_tools
from lowvram_tuner.data.names import ROLES, UNUSED, column_items
from lowvram_tuner.data.readers import GOES_ON
from lowvram_tuner.data.report import DataError, RowError

# For each role the column names that mean it, the likeliest first.
NAMES = {
    "messages": ("messages", "conversations", "conversation", "dialogue", "dialog", "chat", "turns"),
    "chosen": ("chosen", "preferred", "accepted"),
    "prompt": ("instruction", "prompt", "question", "query", "user", "human"),
    "completion": ("output", "completion", "response", "answer", "reply", "assistant", "bot", "chosen", "answers"),
    "input": ("input", "context"),
    "text": ("text", "content", "document", "body", "passage"),
    "system": ("system", "system_prompt"),
    "tools": ("tools", "functions"),
}
SHOWN = {  # names of the layouts as the page and the report show them
    "messages": "messages (role/content)", "sharegpt": "ShareGPT (from/value)", "alpaca": "Alpaca (instruction/input/output)",
    "prompt_completion": "prompt and completion", "question_answer": "question and answer", "text": "plain text",
    "preference": "preference pairs (the chosen side is used)",
}  # fmt: skip
SAMPLE_ROWS = 64  # rows that detection looks at
_SURROGATE = re.compile("[\ud800-\udfff]")
_MARKUP = re.compile(r"<\s*/?\s*(script|iframe|object|embed|svg|style|img|html|body|div|span|a|p|table)\b[^>]*>", re.IGNORECASE)


@dataclass(frozen=True)
class Layout:
    """How a file's columns are used: `roles` maps a role to its column; `doubts` are sentences about ambiguous ones."""

    name: str
    roles: dict[str, str]
    columns: tuple[str, ...]
    doubts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sample:
    """One usable row: `messages` (with one `weights` flag each, True where an answer is trained) or `text`."""

    messages: list[dict[str, Any]] | None = None
    weights: tuple[bool, ...] = ()
    tools: list[dict[str, Any]] | None = None
    text: str = ""
    ends: bool = True  # the text ends here: an end token belongs behind it
    notes: tuple[tuple[str, str], ...] = ()


def mapping(columns: Iterable[str]) -> dict[str, str]:
    """A config's ("role=column", ...) as a dict. Raises DataError for an unknown role or a missing '='."""
    roles = {}
    for item in column_items(columns):
        role, equals, column = (part.strip() for part in item.partition("="))
        if not equals or not column or role not in ROLES:
            raise DataError(f"columns has {item!r}; write role=column, where the role is one of {', '.join(ROLES)}.")
        roles[role] = column
    return roles


def missing(given: dict[str, str], columns: Iterable[str]) -> dict[str, str]:
    """The part of a user's mapping that names columns a file does not have."""
    have = set(columns)
    return {role: column for role, column in given.items() if column not in have and column != UNUSED}


def columns_of(rows: list[dict[str, Any]]) -> tuple[str, ...]:
    """The names of all columns of some rows, in the order they are met."""
    return tuple(dict.fromkeys(str(name) for row in rows for name in row if name != GOES_ON))


def detect(rows: list[dict[str, Any]], given: dict[str, str], file: str) -> Layout:
    """The layout of a file from some of its first rows. Raises DataError that names the columns when none fits."""
    columns = columns_of(rows)
    for role, column in missing(given, columns).items():
        raise DataError(f"{file} has no column {column!r} for {role}; its columns are {', '.join(columns)}.")
    roles, doubts = {role: column for role, column in given.items() if column != UNUSED}, []
    for role, names in NAMES.items():
        if role not in given:
            found = [c for c in _named(columns, names) if c not in given.values()]
            if role in ("messages", "tools"):
                found = [c for c in found if any(_is_list(row.get(c)) for row in rows)]
            if found:
                roles[role] = found[0]
            if len(found) > 1 and role in ("prompt", "completion", "text"):
                doubts.append(f"{', '.join(found)} could each be the {role}; {found[0]} is used")
    return _layout(rows, roles, {r for r in given if r in roles}, columns, tuple(doubts), file)


def _layout(
    rows: list[dict[str, Any]], roles: dict[str, str], given: set[str], columns: tuple[str, ...], doubts: tuple[str, ...], file: str
) -> Layout:
    def made(name: str, *used: str) -> Layout:
        kept = {role: roles[role] for role in used if role in roles}
        return Layout(name, kept, columns, tuple(d for d in doubts if any(f"the {r};" in d for r in kept)))

    pair_given = bool(given & {"prompt", "completion"})
    if "messages" in roles and not pair_given and "text" not in given:
        value = next((row[roles["messages"]] for row in rows if _is_list(row.get(roles["messages"]))), [])
        first = value[0] if isinstance(value, list) and value and isinstance(value[0], dict) else {}
        return made("sharegpt" if "from" in first or '"from"' in str(value)[:200] else "messages", "messages", "system", "tools")
    if "chosen" in roles and not pair_given and "text" not in given:
        return made("preference", "chosen", "prompt", "system", "tools")
    if "prompt" not in roles and "completion" in roles and "input" in roles:
        roles["prompt"] = roles.pop("input")
    if "prompt" in roles and "completion" in roles and "text" not in given:
        name = {"instruction": "alpaca", "question": "question_answer"}.get(roles["prompt"].lower(), "prompt_completion")
        return made(name, "prompt", "input", "completion", "system", "tools")
    if "text" not in roles:
        texts = [c for c in columns if any(isinstance(row.get(c), str) for row in rows) and c.lower() not in ("id", "source", "url")]
        if len(texts) == 1:
            roles["text"] = texts[0]
    if "text" in roles and not pair_given:
        return made("text", "text")
    raise DataError(
        f"{file} has the columns {', '.join(columns) or 'none'}, which fit no known layout; say what they hold with columns, "
        "for example prompt=QUESTION_COLUMN, completion=ANSWER_COLUMN, or text=COLUMN."
    )


def _named(columns: tuple[str, ...], names: tuple[str, ...]) -> list[str]:
    """The columns with one of these names, in the names' order, whatever their case."""
    return [c for name in names for c in columns if c.strip().lower() == name]


def _is_list(value: Any) -> bool:
    return isinstance(value, list) or (isinstance(value, str) and value.lstrip().startswith("["))


def to_sample(row: dict[str, Any], layout: Layout, system_prompt: str = "") -> Sample:
    """A row as a sample. `system_prompt`, where not empty, replaces the row's own. Raises RowError."""
    roles = layout.roles
    if layout.name == "text":
        text = _text(row, roles["text"])
        return Sample(text=text, ends=GOES_ON not in row, notes=_notes((text,)))
    tools, notes = read_tools(row.get(roles["tools"]), roles["tools"]) if "tools" in roles else (None, [])
    if layout.name in ("messages", "sharegpt"):
        messages, weights = read_chat(_present(row, roles["messages"]), roles["messages"], notes)
    elif layout.name == "preference":
        messages, weights = _chosen(row, roles, notes)
    else:
        messages, weights = _pair(row, roles, notes)
    if "system" in roles and not system_prompt:
        system_prompt, replace = _optional(row, roles["system"]), False
    else:
        replace = True
    messages, weights = _with_system(messages, weights, system_prompt, replace)
    if not any(m["role"] == "assistant" for m in messages):
        raise RowError("no_answer", "no message is the assistant's, so there is nothing to learn")
    return Sample(messages, tuple(weights), tools, notes=(*notes, *_notes(m["content"] for m in messages)))


def _pair(row: dict[str, Any], roles: dict[str, str], notes: list) -> tuple[list[dict[str, Any]], list[bool]]:
    """Prompt and completion as a conversation. Both may be lists of messages; then only the completion's are trained."""
    prompt, completion = _present(row, roles["prompt"]), _present(row, roles["completion"])
    if isinstance(prompt, list) or (isinstance(completion, list) and completion and isinstance(completion[0], dict)):
        return _joined(prompt, completion, roles["prompt"], roles["completion"], notes)
    text = _text(row, roles["prompt"])
    extra = _optional(row, roles["input"]) if "input" in roles else ""
    if isinstance(completion, list) and len(completion) == 1:
        completion = completion[0]
    answer = _string(completion, roles["completion"])
    user = {"role": "user", "content": f"{text}\n\n{extra}" if extra.strip() else text}
    return [user, {"role": "assistant", "content": answer}], [True, True]


def _chosen(row: dict[str, Any], roles: dict[str, str], notes: list) -> tuple[list[dict[str, Any]], list[bool]]:
    """The chosen side of a preference pair: a whole conversation, or the answer to `prompt`."""
    chosen = _present(row, roles["chosen"])
    if isinstance(chosen, list):
        messages, weights = read_chat(chosen, roles["chosen"], notes)
        if any(m["role"] == "user" for m in messages):
            return messages, weights
    if "prompt" not in roles:
        raise RowError("missing", f"{roles['chosen']} holds only an answer, and there is no prompt column")
    prompt = _present(row, roles["prompt"])
    if isinstance(chosen, list) or isinstance(prompt, list):
        return _joined(prompt, chosen, roles["prompt"], roles["chosen"], notes)
    return [{"role": "user", "content": _text(row, roles["prompt"])},
            {"role": "assistant", "content": _string(chosen, roles["chosen"])}], [True, True]  # fmt: skip


def _joined(prompt: Any, answer: Any, prompt_column: str, answer_column: str, notes: list) -> tuple[list[dict[str, Any]], list[bool]]:
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if isinstance(answer, str):
        answer = [{"role": "assistant", "content": answer}]
    before, _ = read_chat(prompt, prompt_column, notes)
    after, weights = read_chat(answer, answer_column, notes)
    return before + after, [False] * len(before) + weights


def _with_system(messages: list[dict], weights: list[bool], system: str, replace: bool) -> tuple[list[dict], list[bool]]:
    """The messages with this system prompt first; one that stands there stays unless `replace`."""
    if not system.strip():
        return messages, weights
    has = bool(messages) and messages[0]["role"] == "system"
    if has and not replace:
        return messages, weights
    return [{"role": "system", "content": system}, *messages[has:]], [False, *weights[has:]]


def _present(row: dict[str, Any], column: str) -> Any:
    """The value of a column that must be there and not empty."""
    if column not in row:
        raise RowError("missing", f"the row has no {column!r}; it has {', '.join(map(str, row)) or 'nothing'}")
    value = row[column]
    if value is None:
        raise RowError("empty", f"{column} is null")
    if value in ("", []) or (isinstance(value, str) and not value.strip()):
        raise RowError("empty", f"{column} is empty")
    return value


def _string(value: Any, column: str) -> str:
    if not isinstance(value, str):
        raise RowError("wrong_type", f"{column} is {str(value)[:40]!r} ({type(value).__name__}); text is expected")
    if not value.strip():
        raise RowError("empty", f"{column} is empty")
    return check_text(value, column)


def _text(row: dict[str, Any], column: str) -> str:
    return _string(_present(row, column), column)


def _optional(row: dict[str, Any], column: str) -> str:
    """The text of a column that may be missing, null or empty."""
    value = row.get(column)
    return "" if value is None or (isinstance(value, str) and not value.strip()) else _string(value, column)


def check_text(text: str, where: str) -> str:
    """The text, or RowError where it holds what no tokenizer can read."""
    if "\0" in text:
        raise RowError("nul", f"{where} has a NUL character at position {text.index(chr(0)) + 1}")
    if not text.isascii() and (found := _SURROGATE.search(text)):
        code = f"U+{ord(found.group()):04X}"
        raise RowError("surrogate", f"{where} has half a character ({code}, a lone surrogate) at position {found.start() + 1}")
    return text


def _notes(texts: Iterable[str]) -> tuple[tuple[str, str], ...]:
    for text in texts:
        if "<" in text and (found := _MARKUP.search(text)):
            return (("markup", f"the text has HTML ({found.group()[:40]}); it is trained on as text, as it stands"),)
    return ()
