"""Presets: every shipped one is valid, fits the card it is named after, and a broken file is named in the error."""

from __future__ import annotations

import json

import pytest

from lowvram_tuner.config import ConfigError, options
from lowvram_tuner.memory.plan import GB, Budget, plan_run
from lowvram_tuner.models.catalogue import shape_of
from lowvram_tuner.presets import FOLDER, load_presets, preset

PRESETS = load_presets()


def write(folder, name="mine", **values):
    (folder / f"{name}.json").write_text(json.dumps({"label": "Mine", "help": "For me."} | values), encoding="utf-8")


def test_the_shipped_presets_are_there_in_order():
    assert next(iter(PRESETS)) == "demo-cpu" and "6gb-laptop" in PRESETS
    assert len(PRESETS) == len(list(FOLDER.glob("*.json"))) >= 4
    assert [p.order for p in PRESETS.values()] == sorted(p.order for p in PRESETS.values())
    assert len({p.label for p in PRESETS.values()}) == len(PRESETS)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_flat_and_changes_only_options(name):
    found = PRESETS[name]
    assert found.label and found.help.endswith(".") and set(found.overrides) <= set(options())
    assert not any(isinstance(v, dict) for v in found.overrides.values())
    config = found.config()
    for key, value in found.overrides.items():
        assert getattr(config, key) == (tuple(value) if isinstance(value, list) else value)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_fits_its_card(name):
    """The budget it names, or for one without a budget a small laptop's RAM."""
    config = PRESETS[name].config()
    limit = int(config.vram_gb * GB) or 4 * GB
    plan = plan_run(config, shape_of(config.model), Budget(limit, 0, limit, "vram" if config.vram_gb else "ram"))
    assert plan.fits, plan.words


def test_changes_stand_above_the_preset():
    assert preset("6gb-laptop").config(bits=3).bits == 3
    assert PRESETS["6gb-laptop"].config().bits == 4  # the preset itself is as it was


def test_an_unknown_preset_lists_the_known_ones():
    with pytest.raises(ConfigError, match=r"'7gb' does not exist; use one of demo-cpu, 6gb-laptop"):
        preset("7gb")


def test_ones_own_presets(tmp_path):
    write(tmp_path, "b", order=2, bits=8)
    write(tmp_path, "a", order=2)
    write(tmp_path, "z", order=1, target_modules=["q_proj"])
    found = load_presets(tmp_path)
    assert list(found) == ["z", "a", "b"] and found["z"].config().target_modules == ("q_proj",)


@pytest.mark.parametrize("values", [{"bits": 5}, {"learning_rte": 1}, {"packing": "yes"}])
def test_a_wrong_preset_names_its_file(tmp_path, values):
    write(tmp_path, **values)
    with pytest.raises(ConfigError, match=r"^preset file mine\.json is not usable: .*" + next(iter(values))):
        load_presets(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", '{"label": "no help"}', ""])
def test_a_file_that_is_no_preset_names_itself(tmp_path, text):
    (tmp_path / "odd.json").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"odd\.json"):
        load_presets(tmp_path)
