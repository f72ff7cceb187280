"""Conversations as they are found, in the one form chat templates take: dicts with `role` and `content`.

Read are OpenAI's messages (content as text or as a list of parts, tool calls, weights) and ShareGPT's from/value turns. Other
keys of a message (name, tool_call_id, reasoning_content ...) are handed to the template as they are.
"""

from __future__ import annotations

import json
from typing import Any

from lowvram_tuner.data.report import RowError

ROLE_NAMES = {
    "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant",
    "system": "system", "developer": "system",
    "tool": "tool", "function": "tool", "observation": "tool", "function_response": "tool", "ipython": "tool",
    "function_call": "assistant", "tool_call": "assistant",
}  # fmt: skip
_TAKEN = {"role", "from", "content", "value", "text", "weight", "tool_calls"}
Notes = list[tuple[str, str]]


def read_chat(value: Any, column: str, notes: Notes) -> tuple[list[dict[str, Any]], list[bool]]:
    """Messages and, for each, whether it is trained where it is an answer. Adds to `notes`. Raises RowError."""
    if isinstance(value, str):
        value = _from_text(value, column)
    if not isinstance(value, list):
        raise RowError("wrong_type", f"{column} is {str(value)[:40]!r} ({type(value).__name__}); a list of messages is expected")
    if not value:
        raise RowError("empty", f"{column} is empty")
    messages, weights = [], []
    for number, item in enumerate(value, 1):
        message, weight = _message(item, number, notes)
        messages.append(message)
        weights.append(weight)
    return messages, weights


def _from_text(value: str, column: str) -> Any:
    """A list that stands in a text column as JSON, as CSV and Parquet files have it."""
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise RowError("broken_json", f"{column} is not a JSON list of messages: {error}") from None


def _message(item: Any, number: int, notes: Notes) -> tuple[dict[str, Any], bool]:
    if not isinstance(item, dict):
        raise RowError("wrong_type", f"message {number} is {str(item)[:40]!r} ({type(item).__name__}); an object is expected")
    said = item.get("role") or item.get("from")
    role = ROLE_NAMES.get(said.strip().lower()) if isinstance(said, str) else None
    if role is None:
        what = "has no role" if said is None else f"has the role {str(said)[:40]!r}"
        raise RowError("role", f"message {number} {what}; system, user, assistant and tool are known")
    message = {"role": role, **{k: v for k, v in item.items() if k not in _TAKEN and v is not None}}
    calls = _tool_calls(item.get("tool_calls"), number, notes)
    content = next((item[k] for k in ("content", "value", "text") if item.get(k) is not None), None)
    if said.strip().lower() in ("function_call", "tool_call"):
        calls, content = _tool_calls([_from_text(_content(content, number), f"message {number}")], number, notes), None
    if content is not None:
        message["content"] = _content(content, number)
    elif role == "assistant" and calls:
        message["content"] = ""
    else:
        raise RowError("empty", f"message {number} ({role}) has no content")
    if role in ("user", "assistant") and not calls and not message["content"].strip():
        raise RowError("empty", f"message {number} ({role}) is empty")
    if calls:
        message["tool_calls"] = calls
    return message, _weight(item.get("weight"), number, notes)


def _content(content: Any, number: int) -> str:
    """Text, or the texts of a list of parts joined."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RowError("wrong_type", f"message {number} has the content {str(content)[:40]!r}; text or a list of parts is expected")
    texts = []
    for part in content:
        kind = part.get("type", "text") if isinstance(part, dict) else type(part).__name__
        text = part if isinstance(part, str) else part.get("text") if isinstance(part, dict) and kind == "text" else None
        if not isinstance(text, str):
            raise RowError("part", f"message {number} has a part of type {kind!r}; only text can be trained on")
        texts.append(text)
    return "".join(texts)


def _tool_calls(calls: Any, number: int, notes: Notes) -> list[dict[str, Any]]:
    """Tool calls with their arguments as objects, which is what chat templates expect."""
    if calls is None or calls == []:
        return []
    if isinstance(calls, str):
        calls = _from_text(calls, f"the tool calls of message {number}")
    if not isinstance(calls, list):
        raise RowError("wrong_type", f"message {number} has the tool calls {str(calls)[:40]!r}; a list is expected")
    read = []
    for call in calls:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RowError("wrong_type", f"message {number} has the tool call {str(call)[:40]!r}; an object with a name is expected")
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            arguments = _from_text(arguments or "{}", f"the arguments of {function['name']}")
            notes.append(("tool_json", "tool call arguments written as JSON text are read as objects, as templates expect"))
        outer = {k: v for k, v in call.items() if k in ("id", "type") and v is not None}
        read.append({"type": "function", **outer, "function": {"name": function["name"], "arguments": arguments}})
    return read


def _weight(weight: Any, number: int, notes: Notes) -> bool:
    """Whether an answer is trained: weight 0 leaves it out."""
    if weight is None or isinstance(weight, bool):
        return weight is not False
    if not isinstance(weight, (int, float)) or not 0 <= weight < float("inf"):
        raise RowError("wrong_type", f"message {number} has the weight {str(weight)[:40]!r}; a number from 0 is expected")
    if weight not in (0, 1):
        notes.append(("weight", f"the weight {weight:g} counts as 1: an answer is trained or (weight 0) left out"))
    return weight > 0


def read_tools(value: Any, column: str) -> tuple[list[dict[str, Any]] | None, Notes]:
    """The tools offered in a conversation, a list of JSON schemas or its JSON text; None without any."""
    if isinstance(value, str) and value.strip():
        value = _from_text(value, column)
    if value in (None, "", [], {}):
        return None, []
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise RowError("wrong_type", f"{column} is {str(value)[:40]!r}; a list of tool descriptions is expected")
    return value, []
