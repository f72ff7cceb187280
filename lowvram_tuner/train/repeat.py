"""The command line that repeats a run."""

from __future__ import annotations

import shlex
import subprocess
import sys

from lowvram_tuner.config import TrainConfig, options


def command_line(config: TrainConfig) -> str:
    """The command that repeats a run: every option that differs from its default."""
    words = ["python", "-m", "lowvram_tuner", "train"]
    for name, value in config.changed().items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            words.append(flag if value else f"--no-{flag[2:]}")
            continue
        items = [",".join(value)] if options()[name].metadata.get("choices") and isinstance(value, list) else value
        for item in items if isinstance(items, list) else [items]:
            words += [f"{flag}={item}"] if str(item).startswith("-") or item == "" else [flag, str(item)]
    return subprocess.list2cmdline(words) if sys.platform == "win32" else shlex.join(words)
