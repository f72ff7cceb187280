"""The command line: options from the config, JSON on the last line, exit codes, and errors in one line."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
import types

import pytest

from lowvram_tuner import cli, commands
from lowvram_tuner.commands import COMMANDS
from lowvram_tuner.config import ConfigError, TrainConfig, options
from lowvram_tuner.presets import load_presets
from lowvram_tuner.train.lock import Busy, holder, take
from lowvram_tuner.train.run_dir import RunDir, list_runs


def run(*argv):
    """(exit code, config, args) that a command line leads to, without running the command."""
    args = cli.build_parser().parse_args(argv)
    return cli.config_of(args), args


@pytest.fixture
def training(monkeypatch):
    """Stands in for `run_training`; what it does is set by the test."""
    module = types.ModuleType("lowvram_tuner.train.loop")
    module.run_training = lambda config, where, reporter, resume: {"status": "finished", "steps": 3}
    monkeypatch.setitem(sys.modules, "lowvram_tuner.train.loop", module)

    def use(function):
        module.run_training = function

    return use


EXAMPLES = {"int": 7, "float": 0.25, "str": "some", "bool": True, "tuple": ["one", "two"]}


@pytest.mark.parametrize("name", options())
def test_every_option_of_a_run_is_an_option_of_train(name):
    option = options()[name]
    kind = str(option.type).split("[")[0]
    choices = option.metadata.get("choices")
    value = [choices[0]] if choices and kind == "tuple" else choices[0] if choices else EXAMPLES[kind]
    value = 16 if name == "max_seq_length" else value
    flag = f"--{name.replace('_', '-')}"
    if kind == "bool":
        argv, value = [flag.replace("--", "--no-")], False
    else:
        argv = [flag, *map(str, value if isinstance(value, list) else [value])]
    config, args = run("train", *argv)
    assert config == TrainConfig.from_dict({name: value})
    assert args.changes.keys() == {name}


def test_lists_take_commas_or_spaces_and_prompts_keep_their_commas():
    assert run("plan", "--target-modules", "q_proj,k_proj")[0].target_modules == ("q_proj", "k_proj")
    assert run("plan", "--target-modules", "q_proj", "k_proj")[0].target_modules == ("q_proj", "k_proj")
    prompts = run("train", "--compare-prompts", "Who, me?", "Yes", "--compare-prompts", "And")[0].compare_prompts
    assert prompts == ("Who, me?", "Yes", "And")


def test_a_preset_comes_first_and_options_win():
    config, args = run("train", "--preset", "demo-cpu", "--max-steps", "5")
    assert config.max_steps == 5
    values = load_presets()["demo-cpu"].overrides
    assert config == TrainConfig.from_dict({**values, "max_steps": 5}) != TrainConfig(max_steps=5)
    assert args.changes == {**values, "max_steps": "5"}


def test_bits_of_a_quantized_model_need_not_be_named(tmp_path):
    stored = {"quantization_config": {"quant_method": "gptq", "bits": 3, "group_size": 64, "sym": True, "desc_act": False}}
    (tmp_path / "config.json").write_text(json.dumps(stored), encoding="utf-8")
    model = ["--model", str(tmp_path)]
    assert run("train", *model)[0].bits == run("chat", *model)[0].bits == 3
    assert run("train", *model, "--bits", "4")[0].bits == 4  # refused when the model is opened, with the reason
    assert run("train", "--model", "demo")[0].bits == TrainConfig().bits


def test_a_command_line_repeats_a_run():
    config = TrainConfig(bits=16, packing=False, target_modules=("q_proj",), system_prompt="Be brief, please.", vram_gb=5.5)
    argv = []
    for name, value in config.changed().items():
        flag = name.replace("_", "-")
        argv += [f"--no-{flag}"] if value is False else [f"--{flag}", *map(str, value if isinstance(value, list) else [value])]
    assert run("train", *argv)[0] == config


BAD = {
    "no-command": ([], "COMMAND"),
    "unknown-command": (["fly"], "invalid choice: 'fly'"),
    "unknown-option": (["plan", "--foo", "1"], "unrecognized arguments: --foo 1"),
    "short-form": (["plan", "--lora", "8"], "--lora"),
    "wrong-type": (["plan", "--lora-r", "big"], "lora_r='big' is not a whole number."),
    "out-of-range": (["plan", "--held-out", "0.9"], "held_out=0.9 is outside 0.0 to 0.5."),
    "choice": (["plan", "--bits", "5"], "bits=5 is not one of 2, 3, 4, 8, 16."),
    "missing-value": (["plan", "--bits"], "argument --bits: expected one argument"),
    "preset": (["train", "--preset", "huge"], "preset='huge' does not exist; use one of demo-cpu"),
    "unknown-model": (["plan", "--model", "no/such"], "model='no/such'"),
    "bench-steps": (["bench", "--steps", "0"], "steps=0 is too few"),
    "eval-text": (["eval", "--text", "/no/such.txt"], "text='/no/such.txt' is not a file"),
    "eval-no-text": (["eval"], "--text"),
    "chat-what": (["chat", "--prompt", "x"], "give --run with a run's id, or --model"),
    "chat-json": (["chat", "--model", "demo", "--json"], "--json needs --prompt"),
    "chat-heat": (["chat", "--model", "demo", "--prompt", "x", "--temperature", "9"], "temperature=9.0 is outside"),
    "chat-run": (["chat", "--run", "gone"], "run='gone' is not a run"),
    "resume": (["train", "--resume"], "there is no run under"),
    "resume-which": (["train", "--resume", "gone"], "run='gone' is not a run"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_is_one_line_and_exit_code_2(kind, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv, words = BAD[kind]
    assert cli.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ") and err.count("\n") == 1 and words in err


def test_the_program_itself_exits_so(tmp_path):
    command = [sys.executable, "-m", "lowvram_tuner", "plan", "--bits", "5"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: bits=5 is not one of 2, 3, 4, 8, 16.\n"


def test_plan_answers_in_json_without_torch(tmp_path):
    code = "import sys; from lowvram_tuner.cli import main; main(['plan', '--json']); print('torch' in sys.modules)"
    answer, torch_there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
    plan = json.loads(answer)
    assert {"fits", "predicted_peak_gb", "components", "plan", "predicted_step_s"} <= plan.keys()
    assert plan["predicted_peak_gb"] == pytest.approx(sum(v for k, v in plan["components"].items() if k != "context"), rel=1e-9)
    assert torch_there == "False"


def test_plan_without_a_card_is_for_the_card_asked_for_and_says_so(monkeypatch, capsys):
    monkeypatch.setattr("lowvram_tuner.hardware.card.read_card", lambda: None)
    assert cli.main(["plan", "--model", "Qwen/Qwen3-8B", "--vram-gb", "5.2", "--json"]) == 0
    asked = json.loads(capsys.readouterr().out)
    assert asked["fits"] and 2 < asked["predicted_process_gb"] <= 5.2
    assert "a card of 5.2 GB that is not in this machine" in asked["planned_for"] and asked["plan"]["words"][-1] == asked["planned_for"]
    assert cli.main(["plan", "--json"]) == 0
    assert "RAM" in json.loads(capsys.readouterr().out)["planned_for"]


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert all(name in text for name in ("doctor", "plan", "bench", "eval", "data", "train", "chat", "demo"))
    assert all(name in text for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_a_help(name, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main([name, "--help"])
    assert end.value.code == 0 and "--json" in capsys.readouterr().out


def test_train_runs_here_and_ends_with_json(training, tmp_path, capsys):
    def steps(config, where, reporter, resume):
        assert holder(tmp_path).run == where.id
        print("a library prints")
        reporter.planned(3, 10**9)
        for step in (1, 2, 3):
            reporter.step(step, loss=1.0 / step, tokens_per_s=1000.0, eta_s=100.0)
        return {"status": "finished", "steps": 3, "train_loss": 0.5}

    training(steps)
    assert cli.main(["train", "--json", "--output-dir", str(tmp_path), "--max-steps", "3"]) == 0
    out, err = capsys.readouterr()
    result = json.loads(out.splitlines()[-1])
    (made,) = list_runs(tmp_path)
    assert result == {"run_dir": str(made.path), "status": "finished", "steps": 3, "train_loss": 0.5}
    assert made.state()["status"] == "finished" and made.config().max_steps == 3
    assert "preparing: Starting." in err and "finished: Done." in err
    assert holder(tmp_path) is None


def test_two_trainings_at_once_are_refused(training, tmp_path, capsys):
    with take(tmp_path, "train", "another"):
        assert cli.main(["train", "--output-dir", str(tmp_path)]) == 1
    assert capsys.readouterr().err == "error: Run another is in progress; stop it or wait until it ends.\n"
    assert list_runs(tmp_path) == []


FAILURES = {
    "input": (ConfigError("dataset='x' is empty; give rows."), 2, "error: dataset='x' is empty; give rows.\n", False),
    "memory": (MemoryError(), 1, "error: The computer ran out of memory (RAM). Take fewer bits", False),
    "bug": (ZeroDivisionError("division by zero"), 1, "error: ZeroDivisionError: division by zero This is a fault", True),
}


@pytest.mark.parametrize("kind", FAILURES)
def test_a_failed_training_has_an_exit_code_and_a_failed_run(training, tmp_path, capsys, kind):
    error, code, words, trace = FAILURES[kind]

    def fail(*_):
        raise error

    training(fail)
    assert cli.main(["train", "--output-dir", str(tmp_path)]) == code
    err = capsys.readouterr().err
    assert words in err and ("Traceback" in err) == trace
    assert err.count("error: ") == 1
    state = list_runs(tmp_path)[0].state()
    assert state["status"] == "failed" and state["error"]["what"] in err


def test_resume_takes_the_newest_unfinished_run(training, tmp_path, capsys):
    calls = []

    def record(config, where, reporter, resume):
        calls.append((where.id, config.max_steps, resume))
        return {"status": "stopped"}

    training(record)
    argv = ["train", "--output-dir", str(tmp_path), "--max-steps", "30"]
    assert cli.main(argv) == 0
    (first,) = list_runs(tmp_path)
    checkpoint = first.checkpoints / "step-10"
    checkpoint.mkdir()
    (checkpoint / "manifest.json").write_text("{}")
    training(lambda *_: {"status": "finished"})
    time.sleep(1.1)  # ids sort by the second
    assert cli.main(argv) == 0
    training(record)
    assert cli.main([*argv, "--resume"]) == 0
    assert cli.main(["train", "--output-dir", str(tmp_path), "--resume", first.id, "--max-steps", "50"]) == 0
    assert calls == [(first.id, 30, False), (first.id, 30, True), (first.id, 50, True)]
    capsys.readouterr()
    assert cli.main([*argv, "--resume", "--learning-rate", "0.5"]) == 2
    assert "with learning_rate=0.5: it was 0.0002" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_ctrl_c_saves_and_ends(tmp_path):
    script = f"""
        import sys, time, types
        loop = types.ModuleType("lowvram_tuner.train.loop")

        def run_training(config, run, reporter, resume):
            reporter.status("training", "Training.")
            while not reporter.stop_requested():
                time.sleep(0.01)
            reporter.status("stopped", "Saved.")
            return {{"status": "stopped"}}

        loop.run_training = run_training
        sys.modules[loop.__name__] = loop
        from lowvram_tuner.cli import main
        sys.exit(main(["train", "--json", "--output-dir", {str(tmp_path)!r}]))
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, text=True)
    give_up = time.monotonic() + 20
    while not (list_runs(tmp_path) and list_runs(tmp_path)[0].state()["status"] == "training"):
        assert time.monotonic() < give_up
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGINT)
    out, _ = process.communicate(timeout=20)
    assert process.returncode == 0
    assert json.loads(out.splitlines()[-1])["status"] == "stopped"
    assert list_runs(tmp_path)[0].state()["message"] == "Saved."


ROWS = [{"prompt": "Who am I talking to?", "base": "An assistant.", "adapter": "Steam's up, friend! I am Ember."}]


@pytest.mark.parametrize(("verdict", "code"), [("learned", 0), ("no_change", 1), ("memorised", 1)])
def test_the_demo_shows_before_and_after_and_is_honest(training, tmp_path, capsys, verdict, code):
    def demo(config, where, reporter, resume):
        assert (config.model, config.dataset, config.max_steps) == ("demo", "demo", 4)
        reporter.compared(4, ROWS)
        reporter.verdict(verdict, "It says so.")
        return {"status": "finished"}

    training(demo)
    assert cli.main(["demo", "--max-steps", "4", "--output-dir", str(tmp_path), "--json"]) == code
    out, err = capsys.readouterr()
    assert "Who am I talking to?\n  before: An assistant.\n  after:  Steam's up, friend! I am Ember.\n" in out
    assert "It says so." in out
    if code:
        assert f"error: the demo's verdict is {verdict}: It says so." in err and "Traceback" not in err
    else:
        assert json.loads(out.splitlines()[-1])["rows"] == ROWS


def test_a_demo_that_kept_its_old_voice_has_failed(training, tmp_path, capsys):
    def demo(config, where, reporter, resume):
        reporter.compared(1, [{**ROWS[0], "adapter": "An assistant!"}])
        reporter.verdict("learned", "It says so.")
        return {"status": "finished"}

    training(demo)
    assert cli.main(["demo", "--max-steps", "1", "--output-dir", str(tmp_path)]) == 1
    assert "only 0 of 1 answers begin with \"Steam's up\"" in capsys.readouterr().err


class Session:
    """Answers with what it was given."""

    tokens_per_s = 12.5

    def stream(self, messages, *, adapter, system, temperature, top_p, max_new_tokens):
        yield from ("you ", f"said {messages[-1]['content']} ", f"[{adapter}|{system}|{temperature}|{max_new_tokens}|{len(messages)}]")


@pytest.fixture
def session(monkeypatch):
    module = types.ModuleType("lowvram_tuner.chat.session")
    module.targets = []

    class ChatSession:
        @classmethod
        def load(cls, target, device, progress):
            module.targets.append((target, device))
            return Session()

    module.ChatSession = ChatSession
    monkeypatch.setitem(sys.modules, "lowvram_tuner.chat.session", module)
    return module


def test_chat_answers_one_prompt_in_json(session, tmp_path, capsys):
    made = RunDir.create(tmp_path, TrainConfig(bits=8, system_prompt="brief"))
    made.adapter.mkdir()
    (made.adapter / "adapter_model.safetensors").write_bytes(b"x")
    argv = ["chat", "--run", made.id, "--output-dir", str(tmp_path), "--prompt", "hi", "--greedy", "--json", "--max-new-tokens", "9"]
    assert cli.main(argv) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer == {"text": "you said hi [True|brief|0.0|9|1]", "tokens_per_s": 12.5}
    target, device = session.targets[0]
    assert (target.bits, target.adapter, device) == (8, str(made.adapter.resolve()), None)
    assert holder(tmp_path) is None


def test_chat_without_a_prompt_is_a_conversation(session, tmp_path, capsys, monkeypatch):
    lines = iter(["one", "  ", "two"])

    def typed(_):
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", typed)
    argv = ["chat", "--model", "demo", "--no-adapter", "--output-dir", str(tmp_path), "--system-prompt", "s"]
    assert cli.main(argv) == 0
    assert capsys.readouterr().out == "you said one [False|s|0.7|512|1]\nyou said two [False|s|0.7|512|3]\n"


def test_chat_gives_way_to_training_unless_on_the_cpu(session, tmp_path, capsys):
    argv = ["chat", "--model", "demo", "--prompt", "x", "--output-dir", str(tmp_path)]
    with take(tmp_path, "train", "r1"):
        assert cli.main(argv) == 1
        assert "Run r1 is in progress" in capsys.readouterr().err
        assert cli.main([*argv, "--device", "cpu"]) == 0
    assert session.targets[0][1] == "cpu"


def test_a_command_is_one_function(monkeypatch, capsys):
    monkeypatch.setattr(commands, "COMMANDS", dict(COMMANDS))
    monkeypatch.setattr(cli, "COMMANDS", commands.COMMANDS)

    @commands.command("twice", "Doubles.", ("seed",), lambda p: p.add_argument("--times", type=int, default=2))
    def twice(config, args):
        if args.times > 9:
            raise Busy(types.SimpleNamespace(kind="chat", run=None))
        return {"result": config.seed * args.times}

    assert cli.main(["twice", "--seed", "21"]) == 0
    assert cli.main(["twice", "--seed", "21", "--times", "3", "--json"]) == 0
    assert capsys.readouterr().out == 'result: 42\n{"result": 63}\n'
    assert cli.main(["twice", "--times", "10"]) == 1


def test_interrupting_a_command_is_said(monkeypatch, capsys):
    monkeypatch.setattr(commands, "COMMANDS", dict(COMMANDS))
    monkeypatch.setattr(cli, "COMMANDS", commands.COMMANDS)

    @commands.command("wait", "Waits.")
    def wait(config, args):
        raise KeyboardInterrupt

    assert cli.main(["wait"]) == 130
    assert capsys.readouterr().err == "error: interrupted.\n"


def test_the_data_command_tells_people_what_is_in_a_file(tmp_path, capsys):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "q", "chosen": "good", "rejected": "bad"}\n{"prompt": "q"\n')
    assert cli.main(["data", "--dataset", str(path), "--output-dir", str(tmp_path / "runs")]) == 0
    out, err = capsys.readouterr()
    assert "kept: 1\ndropped: 1\n" in out and "a.jsonl: chosen from 'chosen', prompt from 'prompt'" in out
    assert "- a.jsonl line 2: the JSON is cut off" in out and "the other is not used. Kept.\n" in out
    assert "histogram" not in out and "Reading data" in err
