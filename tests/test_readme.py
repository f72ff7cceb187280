"""The README says what is so: its tables, flags, files and error messages are those of the program.

`python -m tests.test_readme` writes the table of options anew after an option changed.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from lowvram_tuner.bootstrap import parse
from lowvram_tuner.commands import COMMANDS
from lowvram_tuner.config import options


@pytest.fixture(scope="module")
def readme(root) -> str:
    return (root / "README.md").read_text(encoding="utf-8")


def section(readme: str, title: str) -> str:
    return readme.split(f"\n## {title}\n")[1].split("\n## ")[0]


def shown(default: object) -> str:
    """A default value as a reader would say it."""
    if isinstance(default, bool):
        return "on" if default else "off"
    if isinstance(default, tuple):
        return ",".join(default) or "none"
    return f"{default:g}" if isinstance(default, float) else str(default) or "none"


def table_of_options() -> str:
    """The table as the config's fields give it."""
    rows = ["| option | default | what it is |", "|---|---|---|"]
    for name, option in options().items():
        rows.append(f"| `--{name.replace('_', '-')}` | {shown(option.default)} | {option.metadata['help']} |")
    return "\n".join(rows)


def with_table(readme: str) -> str:
    """The README with the table of options as it should be."""
    before, rest = readme.split("<!-- options -->\n")
    return f"{before}<!-- options -->\n{table_of_options()}\n<!-- /options -->{rest.split('<!-- /options -->')[1]}"


def test_the_table_of_options_is_the_configs(readme):
    assert readme == with_table(readme), "run 'python -m tests.test_readme' to write the table anew"


def test_every_flag_of_the_launcher_is_explained_and_exists(readme, capsys):
    with pytest.raises(SystemExit):
        parse(["--help"])
    offered = set(re.findall(r"--[a-z][a-z-]*", capsys.readouterr().out)) - {"--help"}
    written = set(re.findall(r"--[a-z][a-z-]*", section(readme, "The two commands")))
    assert written == offered


def test_presets_are_those_in_the_folder(readme, root):
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section(readme, "Presets").splitlines() if line[:3] == "| `"]
    written = {name.strip("`"): (bits, shape, budget) for name, _, bits, shape, budget in rows}
    expected = {}
    for path in (root / "presets").glob("*.json"):
        p = json.loads(path.read_text(encoding="utf-8"))
        budget = f"{p['vram_gb']:g} GB" if p.get("vram_gb") else "what is there"
        expected[path.stem] = (str(p["bits"]), f"{p['micro_batch_size']} x {p['max_seq_length']}", budget)
    assert written == expected


def test_commands_exist(readme):
    named = re.search(r"COMMAND is one of (.*?);", section(readme, "Options"), re.S)[1]
    assert set(re.findall(r"`(\w+)`", named)) <= set(COMMANDS)


def test_error_texts_are_the_programs(readme, root):
    source = " ".join(
        re.sub(r'"\s*\n?\s*f?"', "", path.read_text(encoding="utf-8"))
        for path in [root / "launch.sh", root / "launch.bat", *(root / "lowvram_tuner").rglob("*.py")]
    )
    headings = re.findall(r"\*\*`(.*?)`\*\*", section(readme, "When something goes wrong"))
    assert len(headings) >= 10
    assert [text for text in headings if text not in source] == []


def test_the_size_of_the_demo_data_is_right(readme, root):
    rows = len((root / "lowvram_tuner/data/demo.jsonl").read_text(encoding="utf-8").splitlines())
    assert f"{rows} chats" in readme


if __name__ == "__main__":
    file = Path(__file__).parent.parent / "README.md"
    file.write_text(with_table(file.read_text(encoding="utf-8")), encoding="utf-8")
