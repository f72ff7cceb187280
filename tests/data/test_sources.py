"""What a dataset's name means: files, folders, saved datasets, mixes."""

from __future__ import annotations

import json
import os

import pytest

from lowvram_tuner.data import names
from lowvram_tuner.data.report import DataError
from lowvram_tuner.data.sources import resolve

ROWS = [{"prompt": f"q{i}", "completion": f"answer {i}"} for i in range(40)]


def test_files_of_every_kind_give_the_same_examples(write, prepared, tmp_path):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "a.parquet", row_group_size=7)
    paths = [
        write("a.jsonl", ROWS),
        write("a.json", json.dumps(ROWS)),
        write("indented.json", json.dumps(ROWS, indent=4)),
        write("inside.json", json.dumps({"version": 1, "about": {"x": [1]}, "data": ROWS})),
        write("lines.json", "".join(json.dumps(r) + "\n" for r in ROWS)),
        write("list.jsonl", json.dumps(ROWS)),
        write("a.csv", "prompt,completion\n" + "".join(f"{r['prompt']},{r['completion']}\n" for r in ROWS)),
        write("b.csv", "prompt|completion\r\n" + "".join(f'"{r["prompt"]}"|{r["completion"]}\r\n' for r in ROWS)),
        write("a.tsv", "prompt\tcompletion\n" + "".join(f"{r['prompt']}\t{r['completion']}\n" for r in ROWS)),
        str(tmp_path / "a.parquet"),
    ]
    results = [prepared(path) for path in paths]
    wanted = [e.input_ids.tolist() for e in results[0].train]
    assert len(wanted) == 40
    for path, result in zip(paths, results, strict=True):
        assert [e.input_ids.tolist() for e in result.train] == wanted, path
        assert result.report.format == "prompt_completion"


def test_a_single_conversation_is_a_row_and_not_a_list_of_rows(write, prepared):
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    for text in (json.dumps({"messages": turns}), json.dumps({"messages": turns}, indent=2)):
        assert prepared(write("one.json", text)).report.rows == 1


def test_a_folder_takes_its_data_files_and_leaves_tests_and_readmes(write, prepared, tmp_path):
    folder = tmp_path / "set"
    (folder / "data").mkdir(parents=True)
    (folder / ".git").mkdir()
    for name in ("data/train-1.jsonl", "data/train-2.jsonl", "data/test.jsonl", ".git/x.jsonl"):
        (folder / name).write_text("".join(json.dumps(r) + "\n" for r in ROWS[:5]))
    (folder / "README.md").write_text("# About")
    (folder / "notes.txt").write_text("notes")
    assert [s.name for s in resolve(str(folder))] == ["data/train-1.jsonl", "data/train-2.jsonl"]
    report = prepared(str(folder)).report
    assert report.rows == 10
    left = next(p for p in report.problems if p.kind == "left_out")
    assert "2 files of the folder are not trained on: data/test.jsonl, notes.txt" in left.reason


def test_a_folder_of_texts_is_read(tmp_path, prepared):
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text("One.\n\nTwo.\n")
    (folder / "b.md").write_text("# Three\n")
    assert prepared(str(folder)).report.format == "text"


def test_a_saved_dataset_is_read_from_disk(tmp_path, prepared):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS[:7]), "test": datasets.Dataset.from_list(ROWS)}).save_to_disk(
        str(tmp_path / "split")
    )
    assert prepared(str(tmp_path / "one")).report.rows == 40
    assert prepared(str(tmp_path / "split")).report.rows == 7


def test_hub_ids_are_loaded_through_datasets(monkeypatch, prepared):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(path, name=None, **kwargs):
        asked.append((path, name, kwargs))
        return datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert prepared("someone/some-data@english").report.rows == 40
    assert asked == [("someone/some-data", "english", {})]
    assert not any("trust" in key for key in asked[0][2])


def test_a_hub_id_that_cannot_be_had_is_one_sentence(monkeypatch):
    datasets = pytest.importorskip("datasets")

    def load_dataset(*args, **kwargs):
        raise ConnectionError("no network\nmore")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError, match=r"^'someone/data' is no file here, and the hub does not give it as a dataset: no network$"):
        resolve("someone/data")


def test_a_mix_sees_rows_as_often_as_their_weight_says(write, prepared):
    a = write("a.jsonl", [{"text": f"first {i}"} for i in range(200)])
    b = write("b, c.csv", "prompt,completion\n" + "".join(f"q{i},a{i}\n" for i in range(100)))
    c = write("c.jsonl", [{"text": f"third {i}"} for i in range(400)])
    once = prepared(f"{a}, {c}")
    assert len(once.train) == 600
    mixed = prepared(f"{a}:2, {c}:0.5")
    counts = {}
    for example in mixed.train:
        key = tuple(example.input_ids.tolist())
        counts[key] = counts.get(key, 0) + 1
    assert sorted(set(counts.values())) == [1, 2]
    assert sum(v == 2 for v in counts.values()) == 200
    assert 150 < sum(v == 1 for v in counts.values()) < 250
    assert mixed.report.rows == 600  # the report counts rows once
    assert len(prepared(b).train) == 100  # a comma in a file's own name
    both = prepared(f"{a}:1.5,{c}").report
    assert both.format == "text"


def test_a_mix_of_layouts_is_named(write, prepared):
    a, b = write("a.jsonl", [{"text": "one two"}]), write("b.jsonl", [{"prompt": "q", "completion": "a"}])
    report = prepared(f"{a},{b}").report
    assert report.format == "text + prompt_completion"
    assert report.columns == {"a.jsonl": {"text": "text"}, "b.jsonl": {"prompt": "prompt", "completion": "completion"}}


def test_a_mapping_fits_the_files_that_have_its_columns(write, prepared):
    a, b = write("a.jsonl", [{"q": "one", "r": "two"}]), write("b.jsonl", [{"prompt": "q", "completion": "a"}])
    report = prepared(f"{a},{b}", columns=("prompt=q", "completion=r")).report
    assert report.columns == {"a.jsonl": {"prompt": "q", "completion": "r"}, "b.jsonl": {"prompt": "prompt", "completion": "completion"}}
    with pytest.raises(DataError, match="no file has a column 'nowhere' for system"):
        prepared(f"{a},{b}", columns=("prompt=q", "completion=r", "system=nowhere"))


def test_a_folder_leaves_out_what_fits_no_layout_and_counts_it(write, prepared, tmp_path):
    folder = tmp_path / "mixed"
    folder.mkdir()
    for name in ("a.jsonl", "settings.json", "table.csv"):
        write(f"mixed/{name}", {"a.jsonl": ROWS[:5], "settings.json": '{"x": 1, "y": 2}', "table.csv": "a,b\n1,2\n3,4\n"}[name])
    report = prepared(str(folder)).report
    assert (report.rows, report.kept, report.dropped) == (8, 5, 3)
    assert [(p.kind, p.file, p.count, p.dropped) for p in report.problems] == [
        ("no_layout", "settings.json", 1, True), ("no_layout", "table.csv", 2, True)
    ]  # fmt: skip
    assert "left out: table.csv has the columns a, b" in report.problems[1].reason
    with pytest.raises(DataError, match=r"table\.csv has the columns a, b"):  # named by the user: not left out
        prepared(f"{folder / 'a.jsonl'}, {folder / 'table.csv'}")


def test_the_arrow_files_of_a_local_copy_are_read(tmp_path, prepared, monkeypatch):
    """As the hub's cache keeps a dataset: Arrow files by split beside a description."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    source = tmp_path / "data.jsonl"
    source.write_text("".join(json.dumps(r) + "\n" for r in ROWS))
    made = datasets.load_dataset("json", data_files={"train": str(source), "test": str(source)}, cache_dir=str(tmp_path / "cache"))
    file = made["train"].cache_files[0]["filename"]
    assert file.endswith(".arrow")
    report = prepared(str(tmp_path / "cache")).report
    assert report.rows == 40 and [p.kind for p in report.problems] == ["left_out"]
    assert prepared(file).report.rows == 40
    (tmp_path / "torn.arrow").write_bytes(b"ARROW1 nonsense")
    with pytest.raises(DataError, match=r"torn\.arrow cannot be read as Arrow"):
        prepared(str(tmp_path / "torn.arrow"))


def test_a_comma_in_a_files_own_name_separates_nothing(tmp_path):
    a, b = tmp_path / "one, two.jsonl", tmp_path / "x.csv"
    a.touch()
    b.touch()
    parts = names.split(f"{a}:2 , {b},demo:0.5")
    assert parts == [names.Part(str(a), 2.0, a), names.Part(str(b), 1.0, b), names.Part("demo", 0.5)]
    assert names.split(names.joined(parts)) == parts
    assert names.split(" ") == [] and names.split(str(a)) == [names.Part(str(a), 1.0, a)]
    assert [names.Part(n).may_be_on_hub for n in ("o/n", "o/n@v1.0", "o/n.jsonl", "/o/n", "demo")] == [True, True, False, False, False]


def test_preference_pairs_train_the_chosen_side_and_say_so(write, prepared, tokenizer):
    result = prepared(write("a.jsonl", [{"prompt": "q", "chosen": "good", "rejected": "bad"}]))
    assert [p.kind for p in result.report.problems] == ["preference"]
    assert "the preferred answer is trained on, the other is not used" in result.report.problems[0].reason
    text = tokenizer.decode(result.train[0].input_ids)
    assert "good" in text and "bad" not in text


@pytest.mark.parametrize(
    "name, words",
    [
        ("", "no data is chosen"),
        ("nothing.jsonl", r"'nothing.jsonl' does not exist; give a file \(.json"),
        ("a\0b", "does not exist"),
        ("x" * 5000, "does not exist"),
        ("demo:0", "the weight 0 of 'demo' is outside"),
        ("demo:1000", "the weight 1000 of 'demo' is outside"),
    ],
)
def test_names_that_mean_nothing_are_refused(name, words):
    with pytest.raises(DataError, match=words):
        resolve(name)


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"holds no file that ends in \.json"):
        resolve(str(tmp_path))


@pytest.mark.skipif(os.name == "nt", reason="a colon cannot be in a file name there")
def test_windows_paths_keep_their_colon(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "C:a.jsonl").write_text('{"text": "a b"}\n')  # as near as another system comes
    sources = resolve("C:a.jsonl:2")
    assert (sources[0].name, sources[0].weight) == ("C:a.jsonl", 2.0)
