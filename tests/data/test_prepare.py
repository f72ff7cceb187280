"""Preparing a run's data: lengths, cache, held-out split, fingerprint, prompts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from lowvram_tuner.config import TrainConfig
from lowvram_tuner.data import cache, held_out
from lowvram_tuner.data import prepare as module
from lowvram_tuner.data.prepare import prepare
from lowvram_tuner.data.report import DataError, DataReport
from lowvram_tuner.data.templates import Template, ensure_template, simple_template

CHATS = [{"prompt": f"Question {i}?", "completion": f"Answer number {i}."} for i in range(100)]


def ids(examples) -> list[list[int]]:
    return [e.input_ids.tolist() for e in examples]


def test_counts_add_up_and_lengths_are_measured(write, prepared):
    rows = [{"prompt": "q", "completion": "word " * n} for n in (5, 50, 500)]
    result = prepared(write("a.jsonl", rows), max_seq_length=128)
    report = result.report
    assert (report.rows, report.kept, report.dropped, report.truncated, report.examples) == (3, 3, 0, 1, 3)
    assert report.tokens == sum(map(len, ids(result.train)))
    assert report.trained_tokens == sum(int(e.trained.sum()) for e in result.train)
    assert max(map(len, ids(result.train))) <= 128
    assert report.longest > 500
    assert sum(report.histogram["counts"]) == 3
    assert len(report.histogram["edges"]) == len(report.histogram["counts"]) + 1
    cut = next(p for p in report.problems if p.kind == "truncated")
    assert (cut.line, cut.count) == (3, 1)
    assert f"has {report.longest} tokens, more than max_seq_length=128" in cut.reason


def test_an_answer_that_begins_too_late_is_dropped(write, prepared):
    rows = [{"prompt": "word " * 200, "completion": "late"}, {"prompt": "q", "completion": "a"}]
    report = prepared(write("a.jsonl", rows), max_seq_length=64).report
    assert (report.kept, report.dropped, report.truncated) == (1, 1, 0)
    assert report.problems[0].kind == "too_long"
    assert "beyond max_seq_length=64" in report.problems[0].reason


def test_a_cut_row_keeps_no_useless_tail(write, prepared):
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}, {"role": "user", "content": "word " * 300},
             {"role": "assistant", "content": "late"}]  # fmt: skip
    result = prepared(write("a.jsonl", [{"messages": turns}]), max_seq_length=128)
    example = result.train[0]
    assert example.trained[-1] and len(example) < 60  # what follows the last answer that fits teaches nothing


def test_the_suggestion_holds_nearly_all_rows(write, prepared):
    rows = [{"prompt": "q", "completion": "word " * 40}] * 199 + [{"prompt": "q", "completion": "word " * 1500}]
    report = prepared(write("a.jsonl", rows), max_seq_length=2048).report
    assert report.suggested_max_seq_length == 128
    assert prepared(write("b.jsonl", rows[:150]), max_seq_length=2048).report.suggested_max_seq_length == 128


def test_long_text_is_split_at_paragraphs_and_nothing_is_lost(write, prepared, tokenizer):
    paragraphs = [f"Paragraph {i}. " + "Some words follow here. " * (3 + i % 5) for i in range(60)]
    text = "\n\n".join(paragraphs)
    result = prepared(write("a.jsonl", [{"text": text}]), max_seq_length=128)
    parts = [tokenizer.decode(e.input_ids) for e in result.train]
    assert "".join(parts) == text + "<|im_end|>"
    assert result.report.suggested_max_seq_length == 0
    assert result.report.split == 1 and result.report.examples == len(parts) > 10
    assert all(len(e) <= 128 for e in result.train)
    assert all(part.endswith("\n\n") for part in parts[:-1])
    assert all(e.trained[1:].all() and not e.trained[0] for e in result.train)


def test_text_without_any_break_is_cut_hard_but_whole(write, prepared, tokenizer):
    text = "x1" * 2000
    result = prepared(write("a.jsonl", [{"text": text}]), max_seq_length=64)
    assert "".join(tokenizer.decode(e.input_ids) for e in result.train) == text + "<|im_end|>"


def test_a_text_file_is_one_document(write, prepared, tokenizer):
    text = "".join(f"Paragraph {i} of a long book.\nIts second line.\n\n" for i in range(3000))
    result = prepared(write("book.md", "\n\n" + text), max_seq_length=256)
    joined = "".join(tokenizer.decode(e.input_ids) for e in result.train)
    assert joined == text + "<|im_end|>"  # the end token once, behind the last passage
    assert result.report.rows > 5 and result.report.format == "text"


def test_text_gets_the_tokenizers_bos_in_every_piece_but_not_twice(write, load_family, prepared):
    from tokenizers import processors

    tokenizer = load_family("llama3")
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", bos)]
    )
    path = write("a.jsonl", [{"text": "word " * 100}, {"text": "<|begin_of_text|>word"}])
    result = prepared(path, using=tokenizer, max_seq_length=64)
    assert len(result.train) == 3
    assert all(e.input_ids[0] == bos and (e.input_ids == bos).sum() == 1 for e in result.train)


def test_the_cache_is_found_again_and_gives_the_same(write, prepared, monkeypatch):
    path = write("a.jsonl", CHATS)
    first = prepared(path, held_out=0.1)
    monkeypatch.setattr(module, "_build", lambda *args: pytest.fail("built again"))
    second = prepared(path, held_out=0.1)
    assert ids(second.train) == ids(first.train) and ids(second.held_out) == ids(first.held_out)
    assert second.report == first.report
    assert second.fingerprint == first.fingerprint
    assert second.prompts == first.prompts
    assert isinstance(json.loads(json.dumps(first.report.to_json())), dict)
    assert DataReport.from_json(json.loads(json.dumps(first.report.to_json()))) == first.report


@pytest.mark.parametrize(
    "changed",
    [{"max_seq_length": 256}, {"train_on": "everything"}, {"system_prompt": "Be brief."}, {"seed": 1}, {"held_out": 0.2},
     {"columns": ("prompt=completion", "completion=prompt")}],
)  # fmt: skip
def test_every_setting_that_shapes_the_data_changes_the_fingerprint(changed, write, prepared):
    path = write("a.jsonl", CHATS)
    assert prepared(path, **changed).fingerprint != prepared(path).fingerprint


def test_the_fingerprint_follows_content_and_not_time_or_place(write, prepared, tmp_path):
    path = Path(write("a.jsonl", CHATS))
    before = prepared(str(path)).fingerprint
    path.touch()
    assert prepared(str(path)).fingerprint == before
    elsewhere = tmp_path / "other" / "a.jsonl"
    elsewhere.parent.mkdir()
    elsewhere.write_bytes(path.read_bytes())
    assert prepared(str(elsewhere)).fingerprint == before
    path.write_bytes(path.read_bytes().replace(b"number 7.", b"number 8."))
    assert prepared(str(path)).fingerprint != before


def test_a_damaged_cache_is_made_anew(write, prepared, tmp_path):
    path = write("a.jsonl", CHATS)
    first = prepared(path)
    wanted = ids(first.train)
    tokens = next((tmp_path / "runs" / "cache").glob("*/tokens.bin"))
    del first
    tokens.write_bytes(tokens.read_bytes()[:-4])
    assert ids(prepared(path).train) == wanted


def test_old_caches_are_forgotten(write, prepared, tmp_path):
    for i in range(7):
        prepared(write("a.jsonl", CHATS[: 10 + i]))
    assert len(list((tmp_path / "runs" / "cache").iterdir())) == 4


def test_held_out_rows_are_apart_and_follow_the_seed(write, prepared):
    path = write("a.jsonl", CHATS + CHATS[:20])  # twenty rows stand twice
    result = prepared(path, held_out=0.25)
    train, held = {tuple(i) for i in ids(result.train)}, {tuple(i) for i in ids(result.held_out)}
    assert not train & held
    assert len(train | held) == 100
    assert 30 <= len(result.held_out) <= 36  # a quarter of 120, and copies of its rows
    assert ids(prepared(path, held_out=0.25).held_out) == ids(result.held_out)
    assert ids(prepared(path, held_out=0.25, seed=1).held_out) != ids(result.held_out)
    assert result.report.duplicates == 20


@pytest.mark.parametrize("rows, held", [(1, 0), (2, 1), (3, 1), (100, 10)])
def test_training_always_keeps_a_row(rows, held, write, prepared):
    result = prepared(write("a.jsonl", CHATS[:rows]), held_out=0.1)
    assert (len(result.train), len(result.held_out)) == (rows - held, held)


def test_copies_of_one_row_are_not_held_out(write, prepared):
    result = prepared(write("a.jsonl", CHATS[:1] * 10), held_out=0.5)
    assert (len(result.train), len(result.held_out)) == (10, 0)


def test_large_data_is_split_and_compared_in_parts(write, prepared, monkeypatch):
    """The bounded ways of large data give what the exact ways of small data give, the held-out count up to chance."""
    rows = CHATS * 2 + CHATS[:30]
    exact = prepared(write("a.jsonl", rows), held_out=0.25)
    monkeypatch.setattr(held_out, "EXACT", 10)
    monkeypatch.setattr(held_out, "BUCKET", 16)
    monkeypatch.setattr(cache, "CHUNK", 7)
    parts = prepared(write("b.jsonl", rows), held_out=0.25)
    assert parts.report.duplicates == exact.report.duplicates == 130
    assert parts.report.problems[0].lines == exact.report.problems[0].lines == list(range(101, 151))
    train, held = {tuple(i) for i in ids(parts.train)}, {tuple(i) for i in ids(parts.held_out)}
    assert not train & held and len(train | held) == 100
    assert 12 <= len(held) <= 38  # 25 expected, within three standard deviations
    assert len(parts.train) + len(parts.held_out) == 230


def test_prompts_come_from_held_out_rows_or_the_user(write, prepared):
    path = write("a.jsonl", CHATS)
    result = prepared(path, held_out=0.1)
    asked = {f"Question {i}?" for i in range(100)}
    assert len(result.prompts) == 4
    tokens = {tuple(i) for i in ids(result.held_out)}
    tokenizer_texts = [q[-1]["content"] for q in result.prompts]
    assert set(tokenizer_texts) <= asked and len(set(tokenizer_texts)) == 4
    assert len(tokens) == 10
    own = prepared(path, compare_prompts=("One?", "Two?"), system_prompt="Be brief.")
    assert own.prompts[1] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Two?"}]


def test_held_out_prompts_are_not_trained_on(write, prepared, tokenizer):
    result = prepared(write("a.jsonl", CHATS), held_out=0.1)
    trained = "".join(tokenizer.decode(e.input_ids) for e in result.train)
    assert all(q[-1]["content"] not in trained for q in result.prompts)


def test_a_base_model_gets_the_documented_template(write, load_family, prepared):
    tokenizer = load_family("demo")
    tokenizer.chat_template = None
    rows = [{"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"},
                          {"role": "user", "content": "r"}, {"role": "assistant", "content": "b"}]}]  # fmt: skip
    example = prepared(write("a.jsonl", rows), using=tokenizer).train[0]
    wanted = "s\n\n### User:\nq\n\n### Assistant:\na<|im_end|>\n\n### User:\nr\n\n### Assistant:\nb<|im_end|>\n\n"
    assert tokenizer.decode(example.input_ids) == wanted
    assert tokenizer.decode(example.input_ids[example.trained]) == "a<|im_end|>b<|im_end|>"
    assert tokenizer.apply_chat_template(rows[0]["messages"], tokenize=False) == wanted  # chat and export render the same
    assert Template(load_family("demo")).own
    tokenizer.chat_template = None
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="neither a chat template nor an end token"):
        ensure_template(tokenizer)


def test_the_simple_template_writes_bos_where_the_tokenizer_does(load_family):
    from tokenizers import processors

    tokenizer = load_family("llama3")
    assert "bos_token" not in simple_template(tokenizer)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", tokenizer.bos_token_id)]
    )
    tokenizer.chat_template = simple_template(tokenizer)
    row = tokenizer.apply_chat_template([{"role": "user", "content": "a"}])["input_ids"]
    assert row.count(tokenizer.bos_token_id) == 1


def test_progress_is_told_in_bytes(write, tmp_path, tokenizer):
    path = write("a.jsonl", CHATS * 20)
    told = []
    config = TrainConfig(dataset=path, output_dir=str(tmp_path / "runs"))
    prepare(config, tokenizer, lambda *args: told.append(args))
    size = Path(path).stat().st_size
    assert len(told) >= 7
    assert told[-1] == ("Reading data", size, size, "bytes")
    assert [t[1] for t in told] == sorted(t[1] for t in told)


def test_a_slow_tokenizer_is_refused(tmp_path):
    class Slow:
        is_fast = False

    with pytest.raises(DataError, match=r"the tokenizer Slow has no fast form \(tokenizer.json\)"):
        prepare(TrainConfig(output_dir=str(tmp_path)), Slow())


def test_a_tokenizer_set_to_pad_and_cut_gives_the_same(write, prepared, load_family):
    path, tokenizer = write("a.jsonl", CHATS[:3]), load_family("demo")
    tokenizer(["a", "b c d"], padding="max_length", max_length=8, truncation=True)  # leaves both on in the Rust tokenizer
    assert tokenizer.backend_tokenizer.padding is not None
    result = prepared(path, using=tokenizer)
    assert [tokenizer.decode(e.input_ids[e.trained]) for e in result.train] == [f"{r['completion']}<|im_end|>" for r in CHATS[:3]]
    assert result.fingerprint == prepared(path).fingerprint


def test_the_demo_is_what_it_promises(prepared, tokenizer):
    result = prepared("demo", held_out=0.1, max_seq_length=256)
    report = result.report
    assert report.rows == report.kept >= 240 and not report.problems
    rows = [json.loads(line)["messages"] for line in module.resolve("demo")[0].path.read_text(encoding="utf-8").splitlines()]
    questions = [m["content"] for row in rows for m in row if m["role"] == "user"]
    answers = [m["content"] for row in rows for m in row if m["role"] == "assistant"]
    assert all(a.startswith("Steam's up, friend! ") and a.endswith(" Keep the fires bright!") for a in answers)
    assert max(len(tokenizer(a)["input_ids"]) for a in answers) <= 60
    prompts = [q[0]["content"] for q in result.prompts]
    assert len(prompts) == 6 and not set(prompts) & set(questions)
    for fact in ("Port Tallow", "1742", "Mirabel Stroud", "Old Marigold", "1893", "Ada Fenwick", "Otis Pennyworth", "Lantern Night"):
        assert sum(fact in a for a in answers) >= 4
    assert np.mean([len(e) for e in result.train]) < 90


def test_the_commands_report_needs_no_run(tmp_path, write):
    values = module.report(TrainConfig(dataset=write("a.jsonl", CHATS[:5]), output_dir=str(tmp_path / "runs")))
    assert {"format", "rows", "kept", "dropped", "truncated", "tokens", "trained_tokens", "problems"} <= set(values)
    assert (values["format"], values["rows"]) == ("prompt_completion", 5)
