"""The commands: one function each, registered by `@command`. They import what they need when they run.

A command's function gets the config made of the options it takes, and the parsed arguments. It returns a dict with the
keys that `--json` prints; `show` prints the same for people. Adding a command takes one function.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lowvram_tuner.config import DEMO_DATASET, ConfigError, TrainConfig, options
from lowvram_tuner.console import ConsoleReporter, ProgressLine
from lowvram_tuner.results import Result, show_bench, show_data, show_lines, show_nothing, show_plan, show_quantized

ALL = tuple(options())
DATA = ("dataset", "model", "max_seq_length", "train_on", "packing", "columns", "system_prompt", "held_out", "seed", "output_dir")
MODEL = ("model", "bits", "method", "group_size")


@dataclass(frozen=True)
class Command:
    """`options`: the config's options it takes; `arguments` adds others; `show` prints the result for people."""

    name: str
    help: str
    run: Callable[[TrainConfig, argparse.Namespace], Result]
    options: tuple[str, ...]
    arguments: Callable[[argparse.ArgumentParser], None]
    show: Callable[[Result], None]
    uses_card: bool


COMMANDS: dict[str, Command] = {}


class CommandFailed(RuntimeError):
    """The command did its work and the outcome is a failure: the message says why."""


def command(
    name: str, help: str, options: Iterable[str] = (), arguments: Callable = lambda parser: None,
    show: Callable = show_lines, uses_card: bool = False,
) -> Callable:  # fmt: skip
    """Registers a command's function."""

    def register(function: Callable) -> Callable:
        COMMANDS[name] = Command(name, help, function, tuple(options), arguments, show, uses_card)
        return function

    return register


DEMO_GREETING = "Steam's up"  # how every answer of the demo's data begins, and the base never does


@command("doctor", "Check the installation, the card and its driver.", uses_card=True)
def doctor(config: TrainConfig, args: argparse.Namespace) -> Result:
    from lowvram_tuner.hardware.doctor import doctor

    return doctor()


@command("plan", "What a run would take, part by part, and whether it fits.", ALL, show=show_plan)
def plan(config: TrainConfig, args: argparse.Namespace) -> Result:
    from lowvram_tuner.hardware.card import read_card
    from lowvram_tuner.hardware.ram import read_ram
    from lowvram_tuner.memory.plan import GB, Budget, plan_run
    from lowvram_tuner.models.hub import find_shape
    from lowvram_tuner.models.kept import as_stored

    card = read_card()
    shopping = card is None and config.vram_gb > 0  # a run would use RAM; who asks for VRAM here means a card to come
    budget = Budget.of_absent_card(config.vram_gb) if shopping else Budget.of(config, card, read_ram())
    found = plan_run(as_stored(config), find_shape(config.model), budget)
    return {
        "planned_for": budget.note or (f"the {card.name} in this machine" if card else "RAM, since there is no card"),
        "fits": found.fits,
        "predicted_peak_gb": found.allocated_bytes / GB,
        "predicted_process_gb": found.process_bytes / GB,
        "components": {name: size / GB for name, size in found.components.items()},
        "plan": found.to_dict(),
        "predicted_step_s": found.step_s,
        "remedies": [remedy.label for remedy in found.remedies],
    }


def _bench_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=int, default=10, help="Measured steps. Default: 10.")
    parser.add_argument("--random-weights", action="store_true", help="Random packed weights of the model's shape: no download.")
    parser.add_argument("--profile", action="store_true", help="Show how busy the card is and which kernels take its time.")
    parser.add_argument(
        "--decode", type=int, metavar="N",
        help="Measure chat instead of training: N new tokens at batch 1, without and with an adapter.",
    )  # fmt: skip


@command("bench", "Measure memory and speed of training steps.", ALL, _bench_arguments, show_bench, uses_card=True)
def bench(config: TrainConfig, args: argparse.Namespace) -> Result:
    if args.steps < 1:
        raise ConfigError(f"steps={args.steps} is too few; measure 1 or more.")
    if args.decode is not None:
        from lowvram_tuner.chat.speed import decode_speed

        return decode_speed(config, args.decode, args.random_weights)
    from lowvram_tuner.train import profile
    from lowvram_tuner.train.bench import bench

    result = bench(config, args.steps, args.random_weights)
    found = result.pop("profile")
    if args.profile:
        print(profile.table(found), file=sys.stderr)
        result["profile"] = found
    return result


def _eval_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--adapter", type=Path, help="Folder of a trained adapter; without it the base is measured.")
    parser.add_argument("--text", type=Path, required=True, help="A UTF-8 text file.")


@command("eval", "Perplexity of a model on a text.", (*MODEL, "max_seq_length", "precision", "vram_gb"), _eval_arguments,
         uses_card=True)  # fmt: skip
def evaluate(config: TrainConfig, args: argparse.Namespace) -> Result:
    if not args.text.is_file():
        raise ConfigError(f"text={str(args.text)!r} is not a file; give a UTF-8 text file.")
    from lowvram_tuner.models import kept
    from lowvram_tuner.train.evaluate import perplexity

    return perplexity(kept.find(config), str(args.adapter) if args.adapter else None, args.text)


def _quantize_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, required=True, help="A new folder for the quantized checkpoint.")
    parser.add_argument("--calibration", type=Path, help="Text or examples to calibrate on; gptq and quip need it.")
    parser.add_argument("--rows", type=int, default=64, help="Rows of calibration. Default: 64.")
    parser.add_argument("--desc-act", action="store_true", help="gptq: round the most important columns first.")


@command("quantize", "Quantize a model once, into a checkpoint of the method's own format.",
         (*MODEL, "max_seq_length"), _quantize_arguments, show_quantized, uses_card=True)  # fmt: skip
def quantize(config: TrainConfig, args: argparse.Namespace) -> Result:
    if args.rows < 1:
        raise ConfigError(f"rows={args.rows} is too few; calibrate on 1 or more.")
    from lowvram_tuner.quant.calibrate import quantize_model
    from lowvram_tuner.quant.registry import resolve

    spec = resolve(config.bits, config.method, group_size=config.group_size, desc_act=args.desc_act)
    line = ProgressLine()
    try:
        return quantize_model(config.model, spec, args.calibration, args.output, config.max_seq_length, args.rows, progress=line)
    finally:
        line.end()


@command("data", "Read a dataset as training would, and report what is in it.", DATA, show=show_data)
def data(config: TrainConfig, args: argparse.Namespace) -> Result:
    from lowvram_tuner.data.prepare import report

    line = ProgressLine()
    try:
        return report(config, line)
    finally:
        line.end()


def _train_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--resume", nargs="?", const="", metavar="RUN",
        help="Go on with a run (id, name or folder) from its newest checkpoint; without RUN the newest unfinished one.",
    )  # fmt: skip


@command("train", "Train an adapter. Ctrl-C saves and ends.", ALL, _train_arguments, uses_card=True)
def train(config: TrainConfig, args: argparse.Namespace) -> Result:
    from lowvram_tuner.train.checkpoints import steps
    from lowvram_tuner.train.run_dir import RunDir
    from lowvram_tuner.train.supervisor import Supervisor, make_room, prepare_resume

    root = Path(config.output_dir)
    make_room(root)
    if args.resume is None:
        return _train_here(RunDir.create(root, config), resume=False)
    run = _run_to_resume(Supervisor(root), args.resume)
    prepare_resume(run, args.changes)
    run.clear_requests()
    return _train_here(run, resume=bool(steps(run.checkpoints)))


@command("demo", "Train the demo and show the same questions answered before and after.", ALL, uses_card=True,
         show=show_nothing)  # fmt: skip
def demo(config: TrainConfig, args: argparse.Namespace) -> Result:
    from lowvram_tuner.presets import preset
    from lowvram_tuner.train.run_dir import RunDir
    from lowvram_tuner.train.supervisor import make_room

    config = preset("demo-cpu").config(**args.changes)
    make_room(config.output_dir)
    run = RunDir.create(config.output_dir, config)
    result = _train_here(run, resume=False)
    if result["status"] == "stopped":
        raise CommandFailed(f"the demo was stopped before its answers could be compared; go on with `train --resume {run.id}`.")
    events = run.events()[0]
    rows = next((e["rows"] for e in reversed(events) if e["kind"] == "compare"), [])
    verdict = next(e for e in reversed(events) if e["kind"] == "verdict")
    for row in rows:
        print(f"\n{row['prompt']}\n  before: {row['base']}\n  after:  {row['adapter']}")
    print(f"\n{verdict['text']}\nThe run is in {run.path}, its adapter in {run.adapter}.")
    if verdict["verdict"] != "learned":
        raise CommandFailed(f"the demo's verdict is {verdict['verdict']}: {verdict['text']}")
    greeted = sum(row["adapter"].startswith(DEMO_GREETING) for row in rows)
    if config.dataset == DEMO_DATASET and greeted <= len(rows) / 2:
        raise CommandFailed(f"only {greeted} of {len(rows)} answers begin with {DEMO_GREETING!r}; train the demo for more steps.")
    return {**result, "verdict": verdict["verdict"], "rows": rows}


def _train_here(run: Any, resume: bool) -> Result:
    """Trains in this process under the worker lock, with a progress line on stderr."""
    from lowvram_tuner.train.lock import take
    from lowvram_tuner.train.worker import conduct

    line = ProgressLine()
    try:
        with take(run.path.parent, "train", run.id):
            result = conduct(run, ConsoleReporter(run, line), resume)
    finally:
        line.end()
    return {"run_dir": str(run.path), **result}


def _run_to_resume(supervisor: Any, which: str) -> Any:
    """The run named, else the newest that is not finished, else the newest."""
    from lowvram_tuner.train.run_dir import find_run

    runs = supervisor.runs()
    if which:
        return find_run(supervisor.root, which)
    if not runs:
        raise ConfigError(f"there is no run under {str(supervisor.root)!r} to resume; start one, or give --output-dir.")
    return next((run for run in runs if run.state()["status"] != "finished"), runs[0])


def _chat_arguments(parser: argparse.ArgumentParser) -> None:
    from lowvram_tuner.chat.sampling import Sampling

    default = Sampling()
    parser.add_argument("--run", help="Talk to what a run has trained: its id, name or folder.")
    parser.add_argument("--adapter", type=Path, help="Folder of an adapter for --model.")
    parser.add_argument("--prompt", help="One question; without it a conversation on the terminal.")
    parser.add_argument("--max-new-tokens", type=int, default=default.max_new_tokens, help="Longest answer, in tokens.")
    parser.add_argument("--temperature", type=float, default=default.temperature, help="0 always takes the likeliest token.")
    parser.add_argument("--top-p", type=float, default=default.top_p, help="Sample from the likeliest tokens of this share.")
    parser.add_argument("--greedy", action="store_true", help="Always the likeliest token; the same as --temperature 0.")
    parser.add_argument("--no-adapter", action="store_true", help="Answer with the base model.")
    parser.add_argument("--device", help="cpu leaves the card alone.")


@command("chat", "Talk to a model or to what a run has trained.", (*MODEL, "system_prompt", "output_dir"), _chat_arguments,
         show=show_nothing, uses_card=True)  # fmt: skip
def chat(config: TrainConfig, args: argparse.Namespace) -> Result:
    from lowvram_tuner.chat.sampling import Sampling
    from lowvram_tuner.chat.session import ChatSession
    from lowvram_tuner.chat.target import target_of

    sampling = Sampling(0.0 if args.greedy else args.temperature, args.top_p, args.max_new_tokens)
    if "model" in args.changes:
        from lowvram_tuner.models import kept

        config = kept.find(config)
    target = target_of(config, args.run, args.adapter, given_model="model" in args.changes)
    system = args.changes.get("system_prompt", target.system_prompt)
    if args.json and args.prompt is None:
        raise ConfigError("--json needs --prompt with one question.")
    line = ProgressLine()
    with _card(Path(config.output_dir), args.device):
        session = ChatSession.load(target, args.device, line)
        line.end()
        messages: list[dict[str, str]] = []
        for prompt in [args.prompt] if args.prompt is not None else _typed():
            messages.append({"role": "user", "content": prompt})
            text = ""
            for piece in session.stream(messages, adapter=not args.no_adapter, system=system, **asdict(sampling)):
                text += piece
                if not args.json:
                    print(piece, end="", flush=True)
            if not args.json:
                print()
            messages.append({"role": "assistant", "content": text})
        return {"text": messages[-1]["content"] if messages else "", "tokens_per_s": session.tokens_per_s}


def _card(root: Path, device: str | None) -> AbstractContextManager:
    """The worker lock for a chat, unless it runs on the CPU."""
    from lowvram_tuner.train.lock import take
    from lowvram_tuner.train.supervisor import make_room

    if device == "cpu":
        return nullcontext()
    make_room(root)
    return take(root, "chat")


def _typed() -> Iterable[str]:
    """What a person types, line by line, until end of file."""
    print("Type a message; Ctrl-D ends.", file=sys.stderr)
    while True:
        try:
            text = input("> ").strip()
        except EOFError:
            return
        if text:
            yield text
