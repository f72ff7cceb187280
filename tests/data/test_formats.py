"""Layouts: detected by name and value, mapped by the user, and turned into conversations."""

from __future__ import annotations

import json

import pytest

from lowvram_tuner.data.formats import detect, mapping, to_sample
from lowvram_tuner.data.report import DataError, RowError

U, A, S = "user", "assistant", "system"
TURNS = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
# name: (row, layout, [(role, content)], weights of the answers)
LAYOUTS = {
    "alpaca": ({"instruction": "q", "input": "more", "output": "a"}, "alpaca", [(U, "q\n\nmore"), (A, "a")]),
    "alpaca without input": ({"instruction": "q", "input": "", "output": "a"}, "alpaca", [(U, "q"), (A, "a")]),
    "alpaca, null input": ({"instruction": "q", "input": None, "output": "a"}, "alpaca", [(U, "q"), (A, "a")]),
    "alpaca with system and text": ({"instruction": "q", "output": "a", "system": "s", "text": "all"}, "alpaca", [(S, "s"), (U, "q"), (A, "a")]),
    "messages": ({"messages": TURNS}, "messages", [(U, "q"), (A, "a")]),
    "messages as JSON text": ({"messages": json.dumps(TURNS)}, "messages", [(U, "q"), (A, "a")]),
    "messages in parts": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "q1 "}, {"type": "text", "text": "q2"}]}, {"role": "assistant", "content": [{"type": "text", "text": "a"}]}]},
        "messages", [(U, "q1 q2"), (A, "a")],
    ),
    "ShareGPT": (
        {"conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        "sharegpt", [(S, "s"), (U, "q"), (A, "a")],
    ),
    "ShareGPT with a system column": ({"system": "s", "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, "sharegpt", [(S, "s"), (U, "q"), (A, "a")]),
    "conversations in OpenAI's form": ({"conversations": TURNS}, "messages", [(U, "q"), (A, "a")]),
    "prompt and completion": ({"prompt": "q", "completion": "a"}, "prompt_completion", [(U, "q"), (A, "a")]),
    "prompt and response, other case": ({"Prompt": "q", "Response": "a", "id": "7"}, "prompt_completion", [(U, "q"), (A, "a")]),
    "input and output": ({"input": "q", "output": "a"}, "prompt_completion", [(U, "q"), (A, "a")]),
    "question and answer": ({"question": "q", "answer": "a"}, "question_answer", [(U, "q"), (A, "a")]),
    "question, context and answers": ({"question": "q", "context": "c", "answers": ["a"]}, "question_answer", [(U, "q\n\nc"), (A, "a")]),
    "preference, texts": ({"prompt": "q", "chosen": "a", "rejected": "b"}, "preference", [(U, "q"), (A, "a")]),
    "preference, conversations": ({"prompt": "q", "chosen": TURNS, "rejected": TURNS}, "preference", [(U, "q"), (A, "a")]),
    "preference, answers as messages": ({"prompt": TURNS[:1], "chosen": TURNS[1:], "rejected": TURNS[1:]}, "preference", [(U, "q"), (A, "a")]),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_are_found_and_read(name):
    row, layout, wanted = LAYOUTS[name]
    found = detect([row], {}, "a.jsonl")
    assert found.name == layout
    sample = to_sample(row, found)
    assert [(m["role"], m["content"]) for m in sample.messages] == wanted
    assert len(sample.weights) == len(sample.messages)
    assert sample.weights[-1]


@pytest.mark.parametrize("row", [{"text": "t"}, {"content": "t", "id": 3}, {"body": "t", "title": "x"}, {"story": "t"}, {"url": "u", "story": "t"}])
def test_plain_text_is_found(row):
    layout = detect([row], {}, "a.jsonl")
    assert (layout.name, to_sample(row, layout).text) == ("text", "t")


def test_the_users_mapping_goes_first():
    row = {"title": "q", "body": "a", "text": "other"}
    layout = detect([row], mapping(("prompt=title", "completion=body")), "a.csv")
    assert layout.roles == {"prompt": "title", "completion": "body"}
    assert [m["content"] for m in to_sample(row, layout).messages] == ["q", "a"]
    assert detect([{"messages": TURNS, "note": "t"}], mapping(("text=note",)), "a").name == "text"
    partly = detect([{"question": "q", "final": "a"}], mapping(("completion=final",)), "a")
    assert partly.roles == {"prompt": "question", "completion": "final"}


def test_a_role_can_be_left_unused_and_a_column_may_have_a_comma():
    row = {"question": "q", "context": "c", "answer, long": "a", "messages": TURNS}
    given = mapping(("messages=-, completion=answer, long", "input=-"))
    assert given == {"messages": "-", "completion": "answer, long", "input": "-"}
    layout = detect([row], given, "a")
    assert layout.roles == {"prompt": "question", "completion": "answer, long"}
    assert [m["content"] for m in to_sample(row, layout).messages] == ["q", "a"]
    assert detect([row], mapping(("completion=answer, long\nprompt=question",)), "a").name == "question_answer"


@pytest.mark.parametrize(
    "columns, words",
    [
        (("prompt",), "write role=column"),
        (("answer=x",), "the role is one of messages"),
        (("prompt=",), "write role=column"),
        (("prompt=nope", "completion=b"), "a.csv has no column 'nope' for prompt; its columns are a, b"),
    ],
)
def test_a_wrong_mapping_is_refused(columns, words):
    with pytest.raises(DataError, match=words):
        detect([{"a": "1", "b": "2"}], mapping(columns), "a.csv")


def test_ambiguous_columns_are_told():
    layout = detect([{"question": "q", "answer": "a", "response": "b"}], {}, "a.csv")
    assert layout.roles["completion"] == "response"
    assert layout.doubts == ("response, answer could each be the completion; response is used",)


def test_system_prompt_override_replaces_every_systems():
    row = {"messages": [{"role": "system", "content": "old"}, *TURNS]}
    layout = detect([row], {}, "a")
    assert [m["content"] for m in to_sample(row, layout, "new").messages] == ["new", "q", "a"]
    row = {"system": "column", "instruction": "q", "output": "a"}
    assert to_sample(row, detect([row], {}, "a"), "new").messages[0] == {"role": "system", "content": "new"}
    row = {"system": "column", "messages": [{"role": "system", "content": "own"}, *TURNS]}
    assert to_sample(row, detect([row], {}, "a")).messages[0]["content"] == "own"


def test_weights_leave_answers_out():
    row = {"messages": [*TURNS, {"role": "user", "content": "q2"}, {"role": "assistant", "content": "a2", "weight": 0}]}
    assert to_sample(row, detect([row], {}, "a")).weights == (True, True, True, False)
    row["messages"][3]["weight"] = 0.5
    sample = to_sample(row, detect([row], {}, "a"))
    assert sample.weights[3] and dict(sample.notes)["weight"].startswith("the weight 0.5 counts as 1")
    row["messages"][3]["weight"] = "much"
    with pytest.raises(RowError, match="message 4 has the weight 'much'"):
        to_sample(row, detect([row], {}, "a"))


def test_only_the_completion_of_a_conversational_pair_is_trained():
    row = {"prompt": [*TURNS, {"role": "user", "content": "q2"}], "completion": [{"role": "assistant", "content": "a2"}]}
    assert to_sample(row, detect([row], {}, "a")).weights == (False, False, False, True)


def test_tool_calls_become_what_templates_take():
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    row = {
        "tools": '[{"type": "function", "function": {"name": "f"}}]',
        "messages": [
            TURNS[0],
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "1", "tool_call_id": "c1"},
            TURNS[1],
        ],
    }
    sample = to_sample(row, detect([row], {}, "a"))
    assert sample.messages[1]["tool_calls"] == [{**call, "function": {"name": "f", "arguments": {"x": 1}}}]
    assert sample.messages[2] == {"role": "tool", "content": "1", "tool_call_id": "c1"}
    assert sample.tools == [{"type": "function", "function": {"name": "f"}}]
    assert "tool_json" in dict(sample.notes)
    shared = {"conversations": [{"from": "human", "value": "q"}, {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
                                {"from": "observation", "value": "1"}, {"from": "gpt", "value": "a"}]}  # fmt: skip
    messages = to_sample(shared, detect([shared], {}, "a")).messages
    assert messages[1]["tool_calls"][0]["function"] == {"name": "f", "arguments": {"x": 1}}
    assert [m["role"] for m in messages] == ["user", "assistant", "tool", "assistant"]


@pytest.mark.parametrize(
    "calls, words",
    [("x", "not a JSON list"), (3, "a list is expected"), ([{}], "an object with a name"), ([{"name": "f", "arguments": "{"}], "arguments of f")],
)
def test_broken_tool_calls_are_errors(calls, words):
    row = {"messages": [TURNS[0], {"role": "assistant", "tool_calls": calls}]}
    with pytest.raises(RowError, match=words):
        to_sample(row, detect([row], {}, "a"))
