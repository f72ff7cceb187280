"""Presets: short flat JSON files that override the config's defaults.

Besides `label`, `help` and `order` (where it stands in the list) every key is an option of `TrainConfig`, so that a preset
can be written by looking at the options' names alone.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowvram_tuner.config import ConfigError, TrainConfig

FOLDER = Path(__file__).resolve().parent.parent / "presets"


@dataclass(frozen=True)
class Preset:
    """One preset: its file's name without ending, how the page calls it, and what it changes."""

    name: str
    label: str
    help: str
    order: int
    overrides: dict[str, Any]

    def config(self, **changes: Any) -> TrainConfig:
        """The preset's config, with `changes` on top."""
        return TrainConfig.from_dict({**self.overrides, **changes})


def load_presets(folder: Path = FOLDER) -> dict[str, Preset]:
    """All presets by name, in display order. A preset that does not validate is a ConfigError that names its file."""
    found = [_read(path) for path in sorted(folder.glob("*.json"))]
    return {p.name: p for p in sorted(found, key=lambda p: (p.order, p.name))}


def preset(name: str) -> Preset:
    """The preset of that name, or ConfigError with the names there are."""
    presets = load_presets()
    if name not in presets:
        raise ConfigError(f"preset={name!r} does not exist; use one of {', '.join(presets)}.")
    return presets[name]


def _read(path: Path) -> Preset:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        label, text, order = values.pop("label"), values.pop("help"), values.pop("order", 99)
        TrainConfig.from_dict(values)
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ConfigError(f"preset file {path.name} is not usable: {error}") from None
    return Preset(path.stem, label, text, order, values)
