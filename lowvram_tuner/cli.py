"""`python -m lowvram_tuner COMMAND`: the frame around the commands of `commands.py`.

A run's options come from `config.options()`, so that a new one appears here by itself. With --json the last line of stdout
is one JSON object. Exit code 0; 2 for bad input, with one `error: ...` line on stderr; 1 for a failure while running.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
import sys
import traceback
import warnings
from typing import Any, NoReturn

from lowvram_tuner.commands import COMMANDS, Command, CommandFailed
from lowvram_tuner.config import ConfigError, TrainConfig, options
from lowvram_tuner.presets import preset
from lowvram_tuner.quant.checkpoint import stored_spec
from lowvram_tuner.train.failures import explain, is_bad_input
from lowvram_tuner.train.files import to_json
from lowvram_tuner.train.process import chosen_card

PROGRAM = "python -m lowvram_tuner"


class Parser(argparse.ArgumentParser):
    """argparse whose errors are ConfigErrors that say where the accepted options are listed."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; '{self.prog} --help' lists what is accepted.")


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    for stream in (sys.stdout, sys.stderr):  # a Windows console's own encoding cannot print every model's answer
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="replace")
    if not sys.warnoptions:  # libraries' remarks to their own callers; python -W default shows them
        warnings.filterwarnings("ignore", module=r"(torch|transformers|peft|accelerate)\b")
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # looks for a kernel of the hub on some processors, and says so
    try:
        args = build_parser().parse_args(argv)
        os.environ.update(chosen_card() if args.command.uses_card else {})
        result = args.command.run(config_of(args), args)
        if args.json:
            print(to_json(result), flush=True)
        else:
            args.command.show(result)
        return 0
    except KeyboardInterrupt:
        print("error: interrupted.", file=sys.stderr)
        return 130
    except Exception as error:
        return _report(error)


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = Parser(prog=PROGRAM, description="Fine-tune a language model on the GPU you have.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="name", metavar="COMMAND", required=True)
    for command in COMMANDS.values():
        sub = commands.add_parser(command.name, help=command.help, description=command.help, allow_abbrev=False)
        sub.set_defaults(command=command)
        sub.add_argument("--json", action="store_true", help="Print one JSON object as the last line.")
        _add_options(sub, command)
        command.arguments(sub)
    return parser


def changes_of(args: argparse.Namespace) -> dict[str, Any]:
    """The options that were given, by their config names, on top of the preset's."""
    given = {name: getattr(args, name) for name in args.command.options if getattr(args, name, None) is not None}
    return {**(preset(args.preset).overrides if getattr(args, "preset", None) else {}), **given}


def config_of(args: argparse.Namespace) -> TrainConfig:
    """The config that the command line asks for; everything not given has its default. Also sets `args.changes`.

    Bits that nobody asked for are those of a model that is quantized already.
    """
    args.changes = changes_of(args)
    config = TrainConfig.from_dict(args.changes)
    if "bits" in args.command.options and not {"bits", "method"} & args.changes.keys() and (stored := stored_spec(config.model)):
        args.changes["bits"] = stored.bits
        config = dataclasses.replace(config, bits=stored.bits)
    return config


def _add_options(parser: argparse.ArgumentParser, command: Command) -> None:
    """Adds --preset and the config's options that the command takes. Values stay text: TrainConfig checks them."""
    if not command.options:
        return
    if len(command.options) > 1:
        parser.add_argument("--preset", metavar="NAME", help="Start from a preset's values, such as demo-cpu or 6gb-laptop.")
    for name, option in options().items():
        if name in command.options:
            parser.add_argument(f"--{name.replace('_', '-')}", dest=name, default=None, **_how(option))


def _how(option: dataclasses.Field) -> dict[str, Any]:
    """argparse's keywords for one option of the config."""
    words = option.metadata["help"].replace("%", "%%")
    kind = str(option.type).split("[")[0]
    if kind == "bool":
        return {"action": argparse.BooleanOptionalAction, "help": f"{words} Default: {'on' if option.default else 'off'}."}
    if kind == "tuple":
        return {"type": _names if option.metadata.get("choices") else _text, "nargs": "+", "action": _Flat,
                "metavar": "NAME", "help": f"{words} Default: {','.join(option.default) or 'none'}."}  # fmt: skip
    if option.metadata.get("choices"):
        words += f" One of {', '.join(map(str, option.metadata['choices']))}."
    return {"metavar": option.metadata.get("unit", kind).upper(), "help": f"{words} Default: {option.default}."}


def _names(text: str) -> list[str]:
    return text.split(",")


def _text(text: str) -> list[str]:
    return [text]


class _Flat(argparse.Action):
    """Several values, each a list, as one list; given again, they are added."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, _: Any = None) -> None:
        before = getattr(namespace, self.dest) or []
        setattr(namespace, self.dest, before + [item for value in values for item in value])


def _report(error: Exception) -> int:
    """Says on stderr what went wrong, in one line, and returns the exit code. A fault of the program shows where."""
    if isinstance(error, CommandFailed):
        print(f"error: {error}", file=sys.stderr)
        return 1
    failure = explain(error)
    if failure.bug:
        traceback.print_exception(error)
    bad = is_bad_input(error)
    print(f"error: {failure.what}" if bad else f"error: {failure.what} {failure.fix}".rstrip(), file=sys.stderr)
    return 2 if bad else 1
