"""Masks: what is trained is the answers with their end-of-turn, exactly, for every family of templates."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from chat_families import ANSWER, END, chat_strategy
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from lowvram_tuner.config import TrainConfig
from lowvram_tuner.data.examples import Encoder
from lowvram_tuner.data.formats import Sample
from lowvram_tuner.data.masking import locate, marked, mask
from lowvram_tuner.data.report import RowError
from lowvram_tuner.data.templates import Template

FAMILY_NAMES = ("demo", "chatml", "llama3", "qwen", "mistral", "gemma", "phi")
CALL = {"type": "function", "id": "call00001", "function": {"name": "weather", "arguments": {"town": "Port Tallow", "days": 2}}}
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "Weather.", "parameters": {"type": "object"}}}]


@pytest.fixture(scope="module")
def encoders(families):
    config = TrainConfig(max_seq_length=131072)
    return {name: Encoder(Template(t), config) for name, t in families.items()}


def encoded(encoder: Encoder, messages: list, tools: list | None = None, weights: list[bool] | None = None):
    row = encoder.encode([Sample(messages, tuple(weights or [True] * len(messages)), tools)])[0]
    if row.error:
        raise row.error
    return row


def trained_text(encoder: Encoder, row) -> str:
    return encoder.template.decode(row.ids[row.trained])


@pytest.mark.parametrize("family", FAMILY_NAMES)
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_trained_tokens_are_the_answers_and_their_end_always(encoders, family, data):
    messages = data.draw(chat_strategy(family))
    encoder = encoders[family]
    row = encoded(encoder, messages)
    assume("lost" not in dict(row.notes))  # the demo's tokenizer lacks the bytes of some unused planes, and says so
    answers = [m["content"] for m in messages if m["role"] == "assistant"]
    wanted = "".join(ANSWER[family](a, i == len(answers) - 1) + END[family] for i, a in enumerate(answers))
    assert trained_text(encoder, row) == wanted
    rendered = encoder.template.render(encoder.template.fit(messages))
    assert encoder.template.decode(row.ids) == rendered
    if "resplit" not in dict(row.notes):
        fitted = encoder.template.fit(messages)
        assert row.ids.tolist() == encoder.template.tokenizer.apply_chat_template(fitted)["input_ids"]


def test_character_that_the_tokenizer_lacks_is_told(encoders):
    row = encoded(encoders["demo"], [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b \U00040000"}])
    assert dict(row.notes)["lost"] == "the model's tokenizer has no token for U+40000; it is lost"
    assert "lost" not in dict(encoded(encoders["demo"], [{"role": "user", "content": "é🙂"}, {"role": "assistant", "content": "日"}]).notes)


CHATS = {
    "single": [("user", "Who are you?"), ("assistant", "Ember, the engineer.")],
    "multi": [("user", "Hi"), ("assistant", "Hello!"), ("user", "Füße & 日本 🙂"), ("assistant", "ça va 🙂"), ("user", "bye"), ("assistant", "Bye.")],
    "system": [("system", "Be brief."), ("user", "2+2?"), ("assistant", "4")],
    "spaces": [("user", "  x "), ("assistant", "code:\n    indented\n\nend"), ("user", "\n"+"y"), ("assistant", "z")],
    "open": [("user", "a"), ("assistant", "b"), ("user", "and?")],
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILY_NAMES)
@pytest.mark.parametrize("chat", CHATS)
def test_tokens_equal_apply_chat_template(encoders, family, chat):
    encoder = encoders[family]
    messages = encoder.template.fit([{"role": r, "content": c} for r, c in CHATS[chat]])
    row = encoded(encoder, messages)
    assert row.ids.tolist() == encoder.template.tokenizer.apply_chat_template(messages)["input_ids"]


def test_answer_that_joins_the_prompt_is_tokenized_as_in_chat(encoders):
    """'assistant\\n' and an answer of empty lines share a token; the prompt must stay what generation starts from."""
    encoder = encoders["chatml"]
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "\n\n\nlate"}]
    row = encoded(encoder, messages)
    prompt = encoder.template.tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True)["input_ids"]
    assert row.ids[: len(prompt)].tolist() == prompt
    assert not row.trained[: len(prompt)].any()
    assert trained_text(encoder, row) == "\n\n\nlate<|im_end|>"
    assert "resplit" in dict(row.notes)


@pytest.mark.parametrize("family", ("llama3", "qwen", "mistral"))
def test_tool_calls_are_trained_and_tool_results_are_not(encoders, family):
    encoder = encoders[family]
    messages = [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "42 sunny", "tool_call_id": "call00001"},
        {"role": "assistant", "content": "It is sunny."},
    ]
    row = encoded(encoder, messages, TOOLS if family == "qwen" else None)
    text = trained_text(encoder, row)
    call = {
        "llama3": '{"name": "weather", "parameters": {"town": "Port Tallow", "days": 2}}',
        "qwen": '<tool_call>\n{"name": "weather", "arguments": {"town": "Port Tallow", "days": 2}}\n</tool_call>',
        "mistral": '[TOOL_CALLS] [{"name": "weather", "arguments": {"town": "Port Tallow", "days": 2}}]',
    }[family]
    answer = {"llama3": "It is sunny.", "qwen": "<think>\n\n</think>\n\nIt is sunny.", "mistral": " It is sunny."}[family]
    assert text == call + END[family] + answer + END[family]


def test_reasoning_is_trained_where_the_template_shows_it(encoders):
    encoder = encoders["qwen"]
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "<think>\nold\n</think>\n\nb"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d", "reasoning_content": "new"},
    ]
    assert trained_text(encoder, encoded(encoder, messages)) == "b<|im_end|><think>\nnew\n</think>\n\nd<|im_end|>"


def test_answer_that_quotes_the_template_is_found_exactly(encoders):
    encoder = encoders["chatml"]
    trick = "<|im_end|>\n<|im_start|>user\nno<|im_end|>\n<|im_start|>assistant\nyes"
    messages = [{"role": "user", "content": trick}, {"role": "assistant", "content": trick}, {"role": "user", "content": "b"},
                {"role": "assistant", "content": "yes"}]  # fmt: skip
    row = encoded(encoder, messages)
    assert trained_text(encoder, row) == trick + "<|im_end|>yes<|im_end|>"
    assert "control" in dict(row.notes)


def test_weight_zero_leaves_an_answer_out(encoders):
    encoder = encoders["demo"]
    messages = [{"role": r, "content": c} for r, c in CHATS["multi"]]
    row = encoded(encoder, messages, weights=[True, False, True, True, True, False])
    assert trained_text(encoder, row) == "ça va 🙂<|im_end|>"


def test_everything_trains_all_but_the_first_token_and_weight_zero(families):
    encoder = Encoder(Template(families["demo"]), TrainConfig(train_on="everything", max_seq_length=1024))
    messages = [{"role": r, "content": c} for r, c in CHATS["multi"]]
    row = encoded(encoder, messages)
    assert not row.trained[0] and row.trained[1:].all()
    without = encoded(encoder, messages, weights=[True, True, True, False, True, True])
    missing = encoder.template.decode(without.ids[~without.trained])
    assert missing == "<|im_start|>ça va 🙂<|im_end|>"


def test_pad_equal_to_eos_keeps_the_end_of_turn_trained(encoders):
    tokenizer = encoders["demo"].template.tokenizer
    assert tokenizer.pad_token_id == tokenizer.eos_token_id  # the case in question
    row = encoded(encoders["demo"], [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    last = np.flatnonzero(row.trained)[-1]
    assert row.ids[last] == tokenizer.eos_token_id


@pytest.mark.parametrize("family", ("llama3", "mistral", "gemma"))
def test_bos_stands_once(encoders, family):
    encoder = encoders[family]
    row = encoded(encoder, [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    assert row.ids.tolist().count(encoder.template.tokenizer.bos_token_id) == 1


def test_system_prompt_opens_the_question_where_the_template_takes_none(encoders):
    encoder = encoders["gemma"]
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    row = encoded(encoder, messages)
    assert encoder.template.decode(row.ids).startswith("<bos><start_of_turn>user\nBe brief.\n\na<end_of_turn>\n")
    assert trained_text(encoder, row) == "b<end_of_turn>"
    assert "system" in dict(row.notes)


def test_what_a_template_cannot_write_is_an_error_of_the_row(encoders):
    two = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}, {"role": "assistant", "content": "c"}]
    with pytest.raises(RowError, match="roles must alternate"):
        encoded(encoders["gemma"], two)
    with pytest.raises(RowError, match="no place for tool calls"):
        encoded(encoders["phi"], [{"role": "user", "content": "a"}, {"role": "assistant", "content": "", "tool_calls": [CALL]}])
    with pytest.raises(RowError, match=r"leaves out or alters message 2 \(tool\)"):
        encoded(encoders["phi"], [{"role": "user", "content": "a"}, {"role": "tool", "content": "lost"}, {"role": "assistant", "content": "c"}])


def test_one_refused_conversation_does_not_harm_its_batch(encoders):
    good = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    bad = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}, {"role": "assistant", "content": "c"}]
    rows = encoders["gemma"].encode([Sample(m, (True,) * len(m)) for m in (good, bad, good)])
    assert [row.error is None for row in rows] == [True, False, True]
    assert rows[0].ids.tolist() == rows[2].ids.tolist()


def test_a_template_without_end_of_turn_is_told(load_family):
    tokenizer = load_family("demo")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    encoder = Encoder(Template(tokenizer), TrainConfig())
    row = encoded(encoder, [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    assert trained_text(encoder, row) == "b"
    assert "no_end" in dict(row.notes)


TRL = ("llama3", "qwen2_5", "qwen3", "qwen3_instruct_2507", "gemma", "gemma3", "phi3", "phi3_5", "lfm2")


@pytest.mark.parametrize("name", TRL)
def test_masks_equal_trls_up_to_what_nobody_generates(load_family, name):
    """TRL's patched templates mark all the template writes behind an answer (for Qwen 2.5 also the prompt's last line feed).
    Generation starts after that line feed and stops at the end-of-turn, so here these are not trained; all else is equal."""
    trl = pytest.importorskip("trl")
    from trl.chat_template_utils import get_training_chat_template

    base = {"llama3": "llama3", "gemma": "gemma", "gemma3": "gemma", "phi3": "phi", "phi3_5": "phi"}.get(name, "demo")
    tokenizer = load_family(base)
    tokenizer.chat_template = (Path(trl.__file__).parent / f"chat_templates/{name}.jinja").read_text(encoding="utf-8")
    patched = get_training_chat_template(tokenizer)
    encoder = Encoder(Template(tokenizer), TrainConfig(max_seq_length=4096))
    for chat in ("single", "multi", "spaces"):
        messages = [{"role": r, "content": c} for r, c in CHATS[chat]]
        theirs = tokenizer.apply_chat_template(
            messages, chat_template=patched, return_assistant_tokens_mask=True, return_dict=True
        )
        row = encoded(encoder, messages)
        if theirs["input_ids"] != row.ids.tolist():
            assert name == "qwen3"  # TRL's form shows reasoning in earlier turns too
            continue
        marks = np.array(theirs["assistant_masks"], dtype=bool)
        assert not (row.trained & ~marks).any()
        extra = encoder.template.decode(row.ids[marks & ~row.trained]).replace(tokenizer.eos_token, "")
        assert extra.strip() == ""
        for at in np.flatnonzero(marks & ~row.trained):
            assert row.trained[at + 1 : at + 2].any() or encoder.template.end_id in row.ids[max(0, at - 2) : at]


def test_a_template_that_rewrites_history_is_found_by_prefixes(load_family):
    """Frames fail where a template counts what is in an answer; the prefix still is one."""
    tokenizer = load_family("demo")
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ '<|im_start|>user\\n' + m['content'] + '<|im_end|>\\n' }}"
        "{% else %}{{ '<|im_start|>assistant\\n' + m['content'] | upper + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    encoder = Encoder(Template(tokenizer), TrainConfig())
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "loud"}, {"role": "user", "content": "b"},
                {"role": "assistant", "content": "er"}]  # fmt: skip
    assert trained_text(encoder, encoded(encoder, messages)) == "LOUD<|im_end|>ER<|im_end|>"


def test_locate_uses_prefixes_when_marks_are_refused(encoders):
    template = encoders["demo"].template
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    text = template.render(messages)
    spans = locate(template, messages, None, text, RowError("template", "refused"))
    assert [text[s.start : s.stop] for s in spans] == ["b<|im_end|>"]
    masked = mask(template, text, template.encode([text])[0], spans, [True], everything=False)
    assert template.decode(masked.ids[masked.trained]) == "b<|im_end|>" and masked.ends
    assert marked(messages)[1]["content"] != "b"
