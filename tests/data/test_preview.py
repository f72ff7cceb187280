"""The preview: what is shown is what is trained on, and only what is shown is read."""

from __future__ import annotations

import json

import numpy as np
import pytest

from lowvram_tuner.config import TrainConfig
from lowvram_tuner.data.packing import Example
from lowvram_tuner.data.preview import Preview, pieces, preview
from lowvram_tuner.data.rows import RowIndex
from lowvram_tuner.data.sources import resolve
from lowvram_tuner.data.templates import Template

ROWS = [{"prompt": f"q{i}", "completion": f"answer {i}"} for i in range(1500)]


@pytest.fixture
def look(tmp_path, tokenizer):
    def opened(dataset: str, **options) -> Preview:
        return Preview(TrainConfig(dataset=dataset, output_dir=str(tmp_path / "runs"), **options), tokenizer)

    return opened


def text_of(row: dict, trained: bool | None = None) -> str:
    return "".join(text for part in row["parts"] for text, flag, _ in part if trained in (None, flag))


def test_rows_show_what_prepare_trains_on(write, look, prepared, tokenizer):
    path = write("a.jsonl", ROWS[:20])
    examples = prepared(path).train
    rows = look(path).rows(1, 20)
    for row, example in zip(rows, examples, strict=True):
        assert text_of(row) == tokenizer.decode(example.input_ids)
        assert text_of(row, True) == tokenizer.decode(example.input_ids[example.trained])
        assert (row["length"], row["trained"]) == (len(example), int(example.trained.sum()))
    assert rows[7]["row"] == rows[7]["line"] == 8
    special = [text for part in rows[0]["parts"] for text, _, is_special in part if is_special]
    assert special[:2] == ["<|im_start|>", "<|im_end|>"]
    assert json.loads(json.dumps(rows)) == [json.loads(json.dumps(r)) for r in rows]


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet", "utf-16", "dataset"])
def test_any_row_is_reached_by_its_number(kind, write, look, tmp_path):
    if kind == "parquet":
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "a.parquet", row_group_size=100)
        path = str(tmp_path / "a.parquet")
    elif kind == "dataset":
        datasets = pytest.importorskip("datasets")
        datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "saved"))
        path = str(tmp_path / "saved")
    elif kind == "csv":
        path = write("a.csv", "prompt,completion\n" + "".join(f'"{r["prompt"]}","{r["completion"]}"\n\n' for r in ROWS))
    elif kind == "json":
        path = write("a.json", json.dumps([{**r, "filler": "x" * 3000} for r in ROWS], indent=1))
    else:
        text = "".join(json.dumps(r) + "\n" for r in ROWS)
        path = write("a.jsonl", text if kind == "jsonl" else text.encode("utf-16"))
    opened = look(path)
    for number in (1, 1400, 257, 256, 700, 1500, 2):
        rows = opened.rows(number, 3)
        assert [r["row"] for r in rows] == list(range(number, min(number + 3, 1501)))
        assert text_of(rows[0], True) == f"answer {number - 1}<|im_end|>"
    assert opened.rows(1501, 3) == []


def test_a_row_index_walks_no_further_than_asked(write, monkeypatch):
    source = resolve(write("a.jsonl", ROWS))[0]
    index = RowIndex(source)
    walked = []
    original = type(source).starts

    def starts(self, offset=0, line=1):
        for place in original(self, offset, line):
            walked.append(place)
            yield place

    monkeypatch.setattr(type(source), "starts", starts)
    assert index.records(600, 1)[0].value == ROWS[599]
    assert len(walked) == 600 and index.total is None
    assert index.records(700, 1)[0].value == ROWS[699]
    assert len(walked) == 600  # row 513's place is known and near enough
    assert index.count() == 1500


def test_the_rows_of_a_damaged_list_are_numbered_as_they_are_read(write, look):
    """Walking to a row reads no element, and still counts as reading does: broken elements are rows."""
    texts = [json.dumps(r) for r in ROWS]
    texts[3], texts[400], texts[700] = '{"prompt": 1,,}', '{"prompt": "a", "prompt": "b"}', "7"
    path = write("a.json", "[\n" + ",\n".join(texts[:1200]) + ' {"prompt": "no comma", "completion": "x"},')
    source = resolve(path)[0]
    read = [(r.offset, r.line) for r in source.records() if r.value is not None or r.error]
    walked = list(source.starts())
    assert [line for _, line in walked] == [line for _, line in read] and len(walked) == 1201
    rows = look(path).rows(401, 1) + look(path).rows(1001, 1) + look(path).rows(1201, 2)
    assert rows[0]["problem"].startswith("the key 'prompt' stands twice")
    assert text_of(rows[1], True) == "answer 1000<|im_end|>" and text_of(rows[2], True) == "x<|im_end|>" and len(rows) == 3


def test_rows_go_on_in_the_next_file(write, look):
    a, b = write("a.jsonl", ROWS[:5]), write("b.jsonl", ROWS[5:12])
    opened = look(f"{a},{b}")
    rows = opened.rows(4, 4)
    assert [(r["row"], r["file"], r["line"]) for r in rows] == [(4, "a.jsonl", 4), (5, "a.jsonl", 5), (6, "b.jsonl", 1), (7, "b.jsonl", 2)]
    assert text_of(opened.rows(12, 5)[0], True) == "answer 11<|im_end|>"
    assert opened.rows(13, 5) == []


def test_a_broken_row_shows_its_reason_and_its_raw_text(write, look):
    path = write("a.jsonl", b'{"prompt": "q", "completion": "a"}\n{"prompt": "<b>\xff\n{"prompt": "q", "completion": 3}\n')
    rows = look(path).rows(1, 3)
    assert rows[0]["problem"] is None
    assert rows[1]["problem"].startswith("byte 0xff") and rows[1]["raw"] == '{"prompt": "<b>\\xff'
    assert rows[2]["problem"] == "completion is '3' (int); text is expected" and "'completion': 3" in rows[2]["raw"]


def test_the_summary_of_a_small_file_is_complete_and_equals_prepares_report(write, look, prepared):
    path = write("a.jsonl", [*ROWS[:50], *ROWS[:5], {"prompt": ""}])
    opened = look(path, held_out=0.1)
    summary = opened.summary(seconds=60)
    result = prepared(path, held_out=0.1)
    assert summary["complete"] and summary["error"] is None
    assert summary["report"] == result.report.to_json()
    rows = opened.rows(1, 55)
    assert summary["held_out"] == sum(r["held_out"] for r in rows) == len(result.held_out)


def test_the_summary_of_a_large_file_stops_in_time(write, look):
    summary = look(write("a.jsonl", ROWS * 4)).summary(seconds=0)
    assert not summary["complete"]
    assert summary["report"]["rows"] == 256  # one batch
    assert summary["held_out"] is None


def test_columns_are_shown_for_mapping_when_nothing_fits(write, tokenizer, tmp_path):
    path = write("a.csv", "a,b\none,two\n")
    answer = preview(TrainConfig(dataset=path, output_dir=str(tmp_path)), tokenizer)
    assert "fit no known layout" in answer["error"]
    assert answer["files"][0]["columns"] == ["a", "b"] and answer["rows"] == []
    mapped = preview(TrainConfig(dataset=path, columns=("prompt=a", "completion=b"), output_dir=str(tmp_path)), tokenizer)
    assert mapped["error"] is None and text_of(mapped["rows"][0], True) == "two<|im_end|>"
    assert mapped["files"][0] == {
        "name": "a.csv", "weight": 1.0, "columns": ["a", "b"], "roles": {"prompt": "a", "completion": "b"}, "layout": "prompt and completion", "error": None,
    }  # fmt: skip


def test_a_file_without_a_layout_does_not_hide_the_others(write, look):
    opened = look(f"{write('a.jsonl', ROWS[:2])},{write('b.csv', 'a,b' + chr(10) + '1,2' + chr(10))}")
    assert "fit no known layout" in opened.summary()["error"]
    rows = opened.rows(1, 5)
    assert [r["problem"] is None for r in rows] == [True, True, False]
    assert "fit no known layout" in rows[2]["problem"]


def test_text_split_into_examples_is_shown_in_parts(write, look):
    row = look(write("a.jsonl", [{"text": "A sentence of words. " * 60}]), max_seq_length=64).rows(1, 1)[0]
    assert len(row["parts"]) > 3
    assert text_of(row) == "A sentence of words. " * 60 + "<|im_end|>"


def test_a_long_row_is_shown_in_part(write, look):
    row = look(write("a.jsonl", [{"prompt": "q", "completion": "word " * 5000}]), max_seq_length=8192).rows(1, 1)[0]
    assert row["length"] > 5000 and row["shown"] == 1500


def test_pieces_join_tokens_that_only_together_make_a_character(tokenizer):
    template = Template(tokenizer)
    ids = np.array(tokenizer("a 🙂 日本 é")["input_ids"], dtype=np.int32)
    found = pieces(template, Example(ids, np.ones(len(ids), dtype=bool)), 100)
    assert "".join(text for text, _, _ in found) == "a 🙂 日本 é"
    assert not any("\ufffd" in text for text, _, _ in found)


def test_text_is_handed_on_as_it_is(write, look):
    """The page escapes; here nothing may be altered."""
    script = "<script>alert('x')</script> & <img onerror=x>"
    assert text_of(look(write("a.jsonl", [{"prompt": "q", "completion": script}])).rows(1, 1)[0], True) == script + "<|im_end|>"
