"""The command line: options from the config, JSON on the last line, exit codes, and errors in one line."""

import json
import subprocess
import sys
import types

import pytest

from lowvram_tuner import cli, commands
from lowvram_tuner.commands import COMMANDS
from lowvram_tuner.config import TrainConfig, options
from lowvram_tuner.presets import load_presets
from lowvram_tuner.train.lock import Busy


def run(*argv):
    """(exit code, config, args) that a command line leads to, without running the command."""
    args = cli.build_parser().parse_args(argv)
    return cli.config_of(args), args


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


def test_bits_of_a_quantized_model_need_not_be_named(tmp_path, monkeypatch):
    stored = {"quantization_config": {"quant_method": "gptq", "bits": 3, "group_size": 64, "sym": True, "desc_act": False}}
    (tmp_path / "config.json").write_text(json.dumps(stored), encoding="utf-8")
    model = ["--model", str(tmp_path)]
    assert run("train", *model)[0].bits == run("chat", *model)[0].bits == 3
    assert run("train", *model, "--bits", "4")[0].bits == 4  # refused when the model is opened, with the reason
    monkeypatch.chdir(tmp_path)  # a quantized model around the program is not the one that is trained
    (tmp_path / "demo").mkdir()
    (tmp_path / "config.json").rename(tmp_path / "demo" / "config.json")
    assert run("train")[0].bits == run("train", "--model", "demo")[0].bits == TrainConfig().bits
    (tmp_path / "demo" / "config.json").rename(tmp_path / "config.json")
    assert run("train")[0].bits == run("chat")[0].bits == TrainConfig().bits
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "other"}}', encoding="utf-8")
    assert run("data", *model)[0].model == str(tmp_path)  # tokens are counted whatever holds the weights


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
    "unknown-home": (["plan", "--model", "~nobody-here/x"], "model='~nobody-here/x' cannot be looked up here: Could not determine home"),
    "long-name": (["train", "--output-dir", "a" * 400], "File name too long; give another."),
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
