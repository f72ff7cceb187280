"""What the page says: states, answers, runs and data as sentences, with every foreign text inert."""

from __future__ import annotations

import json
import shlex

import pytest
from test_controls import form

from lowvram_tuner.chat.client import ChatStatus
from lowvram_tuner.chat.target import Target
from lowvram_tuner.cli import build_parser, config_of
from lowvram_tuner.config import ConfigError, TrainConfig
from lowvram_tuner.data.names import ROLES
from lowvram_tuner.train.events import Reporter
from lowvram_tuner.train.repeat import command_line
from lowvram_tuner.train.run_dir import EMPTY_STATE, RunDir
from lowvram_tuner.ui import words
from lowvram_tuner.ui.chat_tab import Turn, messages, shown, status_html
from lowvram_tuner.ui.controls import to_config
from lowvram_tuner.ui.data_panel import DataPanel, _role_choices
from lowvram_tuner.ui.data_view import facts_html, lengths_html, problems_html, report_of, rows_html, words_html
from lowvram_tuner.ui.desk import Desk
from lowvram_tuner.ui.run_view import answers_html, done_share, notes_html, progress_html
from lowvram_tuner.ui.runs_view import compare_html, table_html
from lowvram_tuner.ui.train_view import gauge_for, missing_data, steps_of
from lowvram_tuner.ui.watch import Stories

EVIL = '"><img src=x onerror=alert(1)><script>alert(1)</script>'


def state(**changes):
    return {**EMPTY_STATE, "name": "a run", **changes}


@pytest.fixture
def desk(tmp_path):
    return Desk(tmp_path / "runs")


@pytest.fixture
def run(desk):
    return RunDir.create(desk.root, TrainConfig())


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.2, "1 s"), (59, "59 s"), (89, "89 s"), (91, "2 min"), (7170, "2 h"), (7800, "2 h 10 min"), (259_200, "3 days"), (None, ""), (float("nan"), ""), (-1, "")],
)  # fmt: skip
def test_durations(seconds, said):
    assert words.duration(seconds) == said


@pytest.mark.parametrize(("nbytes", "said"), [(0, "0.0 GB"), (3_649_000_000, "3.6 GB"), (80_000_000, "0.08 GB"), (96_000_000, "0.1 GB")])
def test_sizes(nbytes, said):
    assert words.gb(nbytes) == said


def test_times():
    now = 1_000_000.0
    assert words.ago(now - 5, now) == "just now"
    assert words.ago(now - 600, now) == "10 min ago"
    assert words.ago(now - 7300, now) == "2 h ago"
    assert words.ago(None) == ""


@pytest.mark.parametrize("status", ["preparing", "checking", "training", "saving", "stopped", "finished", "failed"])
def test_every_state_says_what_happens_and_what_can_be_done(status):
    said = words.situation(state(status=status, step=140, total_steps=600, error={"what": "the card ran out of memory", "fix": "choose a smaller batch"}))
    assert len(said) > 30 and said.endswith(".") and said[0].isupper()
    hint = {"preparing": "stop", "training": "Stop saves", "stopped": "Resume", "finished": "chat", "failed": "Choose a smaller batch."}
    assert hint.get(status, "") in said
    html = progress_html(state(status=status, step=140, total_steps=600))
    assert html.count('role="status"') == 1


def test_no_run_is_a_state_too():
    assert "Start" in progress_html(None) and "bar-done" not in progress_html(None)


def test_progress_is_of_the_work_at_hand():
    assert done_share(state(status="preparing", progress={"done": 9, "total": 36, "unit": "layers"})) == 0.25
    assert done_share(state(status="training", step=300, total_steps=600)) == 0.5
    assert done_share(state(status="preparing")) is None
    assert "2.1 GB of 4.7 GB" in progress_html(state(status="preparing", progress={"done": 2.1e9, "total": 4.7e9, "unit": "bytes"}))


def test_texts_of_runs_are_inert(run):
    Reporter(run).note(EVIL)
    rows = [{"prompt": EVIL, "base": EVIL, "adapter": EVIL}]
    html = (
        answers_html(rows, {"verdict": EVIL, "text": EVIL}, 7)
        + notes_html([EVIL])
        + progress_html(state(status="failed", message=EVIL, error={"what": EVIL, "fix": EVIL}))
        + table_html([{"id": EVIL, "state": state(name=EVIL, status=EVIL), "config": TrainConfig(model=EVIL, dataset=EVIL)}])
        + compare_html([(EVIL, Stories().of(run)), (EVIL, Stories().of(run))])
    )
    assert "<img" not in html and "<script" not in html and html.count("&lt;img") >= 10


def test_a_table_of_no_run_one_run_and_a_broken_one():
    assert "No runs yet" in table_html([])
    html = table_html([{"id": "x", "state": state(step=5, total_steps=10, loss=1.234, status="training"), "config": None}])
    assert html.count("<tr>") == 2 and "5 / 10" in html and "1.23" in html and "training 50 %" in html


def test_a_story_is_read_once_and_stays_small(run):
    reporter = Reporter(run)
    stories = Stories()
    for step in range(1, 1201):
        reporter.step(step, loss=2.0 / step)
        if step == 700:
            assert stories.of(run).loss.all()[-1][0] == 700
    reporter.evaluated(1200, 0.5)
    reporter.compared(1200, [{"prompt": "p", "base": "b", "adapter": "a"}])
    reporter.verdict("no_change", "Nothing changed.")
    story = stories.of(run)
    assert story.loss.all()[-1][0] == 1200 and len(story.loss.all()) <= 600
    assert story.held_out.all() == [(1200, 0.5)]
    assert story.rows_step == 1200 and story.verdict["verdict"] == "no_change"
    assert [s.label for s in story.series()] == ["training loss", "held-out loss"]


@pytest.mark.parametrize(
    "config",
    [
        TrainConfig(),
        TrainConfig(bits=16, packing=False, target_modules=("q_proj", "v_proj"), learning_rate=1e-3, max_steps=90),
        TrainConfig(system_prompt="--be 'kind', \"please\"", dataset="/tmp/my data/x.jsonl", compare_prompts=("Who, me?", "-x"), columns=("prompt=a b",)),
    ],
    ids=["defaults", "numbers", "texts"],
)
def test_the_command_line_repeats_the_run(config):
    words = shlex.split(command_line(config))
    assert words[:4] == ["python", "-m", "lowvram_tuner", "train"]
    assert config_of(build_parser().parse_args(words[3:])) == config


@pytest.mark.parametrize("run_id", ["..", "../x", "/etc", "", ".", None, 7, ["x"], {"a": 1}, "20200101-000000-abcd", "x\x00y"])
def test_only_a_run_of_the_list_can_be_meant(desk, run, run_id):
    with pytest.raises(ConfigError, match="does not exist"):
        desk.run(run_id)
    with pytest.raises(ConfigError, match="does not exist"):
        desk.delete(run_id, str(run_id))
    assert desk.run(run.id).path == run.path


def test_deleting_takes_the_name(desk, run):
    run.rename("keep me")
    with pytest.raises(ConfigError, match="nothing was deleted"):
        desk.delete(run.id, run.id)
    assert desk.delete(run.id, "keep me") == "keep me"
    assert desk.runs() == []


def test_start_has_its_reasons(desk, tmp_path, demo_gguf):
    values = form(TrainConfig(model="demo"))
    assert gauge_for(desk, values, None)[1].enabled
    assert gauge_for(desk, {**values, "model": str(demo_gguf)}, None)[1].enabled
    for change, reason in (
        ({"dataset": ""}, "Choose a dataset"),
        ({"dataset": str(tmp_path / "none.jsonl")}, "no file or folder"),
        ({"model": "/nowhere/model"}, "neither"),
        ({"micro_batch_size": None}, "Batch is empty"),
        ({"model": "huggyllama/llama-65b", "bits": 16}, "does not fit"),
    ):
        starting = gauge_for(desk, {**values, **change}, None)[1]
        assert not starting.enabled and reason in starting.reason, change
    assert "nothing" in gauge_for(desk, values, {"kept": 0})[1].reason.lower()


def test_missing_data():
    assert missing_data("demo") == missing_data("owner/dataset") == ""
    for wrong in ("/no/such", "no.jsonl", "a/b.csv", "x" * 5000, "\x00", "~nobody/x", "demo:2, no.csv"):
        assert "no file or folder" in missing_data(wrong)


def test_a_mix_is_there_when_each_part_is(tmp_path):
    a, b = tmp_path / "a, b.jsonl", tmp_path / "c.csv"
    a.touch()
    b.touch()
    assert missing_data(f"{a}:2, {b}:0.5, demo, owner/data@v1.0") == ""
    assert "'d.csv'" in missing_data(f"{a}, d.csv:3")
    assert words.short_data(f"{tmp_path}/x.jsonl:2, {b}") == "x.jsonl:2 + c.csv"


def test_steps_of_a_run():
    data = {"kept": 1000, "tokens": 50_000}
    assert steps_of(TrainConfig(max_steps=7), None) == 7
    assert steps_of(TrainConfig(), None) is None
    assert steps_of(TrainConfig(packing=False, micro_batch_size=4, gradient_accumulation_steps=8, held_out=0.1, num_epochs=2), data) == 57
    assert steps_of(TrainConfig(packing=True, max_seq_length=512, held_out=0.0), data) == 14


def preview(**changes):
    report = {"format": "chat", "rows": 10, "kept": 9, "dropped": 1, "truncated": 0, "split": 2, "duplicates": 0, "tokens": 900, "trained_tokens": 300, "longest": 64,
              "histogram": {"edges": [0, 32, 64], "counts": [4, 6]}, "suggested_max_seq_length": 64,
              "problems": [{"line": 3, "reason": EVIL, "count": 1, "dropped": True, "file": EVIL}]}  # fmt: skip
    row = {"row": 1, "line": 1, "file": "f", "problem": None, "raw": "", "notes": [EVIL], "length": 40, "trained": 20, "truncated": False, "held_out": True,
           "parts": [[[EVIL, False, False], ["Grüße 你好", True, False]]], "shown": 30}  # fmt: skip
    bad = {**row, "problem": EVIL, "raw": EVIL, "parts": []}
    files = [{"name": EVIL, "columns": [], "roles": {EVIL: EVIL}, "layout": EVIL, "error": None}, {"name": EVIL, "error": EVIL}]
    return {"complete": True, "report": report, "error": None, "held_out": 1, "files": files, "rows": [row, bad], **changes}


def test_the_data_is_shown_inert_with_what_is_learned():
    html = facts_html(preview()) + lengths_html(preview(), 48) + problems_html(preview()) + rows_html(preview()) + words_html(EVIL, EVIL, None) + words_html("x", "", preview(error=EVIL))
    assert "<img" not in html and "<script" not in html
    assert '<span class="t on">Grüße 你好</span>' in html
    assert "and 10 tokens more" in html


def test_the_counts_and_lengths_of_the_data():
    html = facts_html(preview())
    for name, figure in (("kept", "9"), ("dropped", "1"), ("cut to the length", "0"), ("split into several", "2"), ("held out to measure", "1 example")):
        assert f"<dt>{name}</dt><dd>{figure}</dd>" in html
    html = lengths_html(preview(), 32)
    assert html.count("<i class=over") == 1 and "Striped: longer than 32." in html
    assert "class=over" not in lengths_html(preview(), 64)
    assert "10 so far, there are more" in facts_html(preview(complete=False))
    problem = problems_html(preview(complete=False))
    assert "line 3" in problem and "Kept" not in problem
    kept = preview()["report"]["problems"][0] | {"dropped": False, "count": 1200, "reason": "odd."}
    assert "line 3: odd (1,200 times). Kept." in problems_html({"report": {"problems": [kept]}})
    assert facts_html({"error": EVIL}).count("&lt;img") == 1


def test_the_line_under_the_data():
    assert "9 rows · chat · 900 tokens · 1 row dropped · 2 rows split" in words_html("x", "", preview())
    assert "at least 9 rows" in words_html("x", "", preview(complete=False))
    assert "Reading" in words_html("x", "", None) and "Reading" not in words_html("x", "", None, busy=True)
    assert report_of(preview(complete=False)) is None and report_of(None) is None
    assert report_of(preview(error="Nothing.")) == {"error": "Nothing."}


def test_a_role_offers_every_column_and_what_was_found():
    answer = {"files": [{"columns": ["q", "a, b"], "roles": {"prompt": "q"}}, {"columns": ["q", "z"], "roles": {"prompt": "z"}}]}
    columns = (("q", "q"), ("a, b", "a, b"), ("z", "z"))
    assert _role_choices("prompt", "", answer) == ("", (("automatic, by file", ""), ("not used", "-"), *columns))
    answer["files"][1]["roles"] = {}
    assert _role_choices("prompt", "", answer)[1][0] == ("found: q", "")
    assert _role_choices("system", None, None) == ("", (("automatic", ""), ("not used", "-")))
    panel = DataPanel(None, None)
    written = panel.mapped(*("a, b" if role == "completion" else "-" if role == "input" else "" for role in ROLES))
    assert written == "input=-, completion=a, b"
    assert _role_choices("completion", written, answer)[0] == "a, b"
    assert _role_choices("input", written, answer)[0] == "-"
    assert to_config({"columns": written}).columns == ("input=-", "completion=a, b")
    assert _role_choices("text", "text=gone", answer)[1][-1] == ("gone", "gone")


def test_answers_at_every_checkpoint_are_listed():
    first, second = ([{"prompt": "Who?", "base": "b", "adapter": f"a{step} {EVIL}"}] for step in (10, 20))
    assert "<details" not in answers_html(second, None, 20, {20: second})
    html = answers_html(second, None, 20, {10: first, 20: second})
    assert "After step 20" in html and html.index("step 10") < html.rindex("step 20") and "a10" in html
    assert "<img" not in html


def test_a_conversation_as_each_side_saw_it():
    turns = [Turn("one?", "a1", "b1"), Turn("two?", "a2"), Turn("three?")]
    assert [m["content"] for m in messages(turns, of_base=False)] == ["one?", "a1", "two?", "a2", "three?"]
    assert [m["content"] for m in messages(turns, of_base=True)] == ["one?", "b1", "two?", "a2", "three?"]
    assert [m["content"] for m in shown(turns, of_base=True)] == ["one?", "b1"]
    assert shown([Turn("q")])[-1]["content"] == "…"


def test_the_chats_status_names_who_answers():
    ready = ChatStatus("ready", "Ready.", Target("demo", label=f"{EVIL}, step 90"), "cpu")
    html = status_html(ready, "", 12.34)
    assert "step 90" in html and "on the processor" in html and "12.3 tokens/s" in html and "<img" not in html
    assert "67 %" in status_html(ChatStatus("loading", "loading layers", progress=(2, 3)), "", 0)
    assert "holds the card" in status_html(ChatStatus("closed"), "my run", 0)
    assert 'role="alert"' in status_html(ready, "", 0, problem=EVIL)


def test_the_form_is_remembered(desk):
    assert desk.saved_form() == {}
    desk.save_form({"bits": 3, "system_prompt": "Grüße 你好"})
    assert Desk(desk.root).saved_form() == {"bits": 3, "system_prompt": "Grüße 你好"}
    (desk.root / ".form.json").write_text("[1")
    assert desk.saved_form() == {}
    assert json.loads(json.dumps(desk.table())) == []
