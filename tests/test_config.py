"""The config: it validates on construction, round-trips through JSON, and its errors name the option and what is accepted."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys

import pytest

from lowvram_tuner.config import LINEARS, ConfigError, TrainConfig, options


def test_defaults_are_valid_and_empty_of_changes():
    assert TrainConfig().changed() == {}
    assert TrainConfig.from_dict({}) == TrainConfig()


def test_round_trip_through_json():
    config = TrainConfig(bits=8, target_modules=("q_proj", "v_proj"), columns=("prompt=question",), learning_rate=1e-3, packing=False)
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert config.changed() == {
        "bits": 8, "target_modules": ["q_proj", "v_proj"], "columns": ["prompt=question"], "learning_rate": 1e-3, "packing": False,
    }  # fmt: skip
    assert TrainConfig.from_dict(config.changed()) == config


def test_every_option_explains_itself_and_its_default_is_inside_its_limits():
    for name, field in options().items():
        assert field.metadata["label"] and field.metadata["help"].endswith("."), name
        low, high = field.metadata.get("min"), field.metadata.get("max")
        assert (low is None) == (high is None), name
        if low is not None:
            assert low <= field.default <= high


@pytest.mark.parametrize("name", [n for n, f in options().items() if "min" in f.metadata])
def test_limits_are_kept(name):
    field = options()[name]
    low, high = field.metadata["min"], field.metadata["max"]
    for good in (low, high):
        assert getattr(TrainConfig(**{name: good}), name) == good
    for bad in (low - 1, high + 1):
        with pytest.raises(ConfigError, match=f"^{name}=.* is outside {low} to {high}\\.$".replace("+", r"\+")):
            TrainConfig(**{name: bad})


@pytest.mark.parametrize(
    "name, value, words",
    [
        ("bits", 5, "2, 3, 4, 8, 16"), ("bits", 4.5, "whole number"), ("bits", True, "whole number"), ("bits", "four", "whole number"),
        ("bits", None, "whole number"), ("bits", math.inf, "whole number"), ("bits", math.nan, "whole number"),
        ("learning_rate", math.nan, "outside"), ("learning_rate", math.inf, "outside"), ("learning_rate", "fast", "a number"),
        ("learning_rate", True, "a number"), ("packing", 1, "true or false"), ("packing", "yes", "true or false"),
        ("target_modules", ("q_proj", "nonsense"), "nonsense"), ("target_modules", 3, "list of names"),
        ("columns", (1, 2), "list of names"), ("method", "awq", "nf4"), ("model", 7, "text"), ("precision", "fp8", "bf16"),
        ("seed", -1, "outside"), ("lora_r", [], "whole number"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_one_sentence_that_names_it(name, value, words):
    with pytest.raises(ConfigError) as error:
        TrainConfig(**{name: value})
    message = str(error.value)
    assert message.startswith(f"{name}=") and words in message and message.endswith(".") and "\n" not in message


def test_values_from_command_lines_and_pages_are_converted():
    config = TrainConfig(bits="4", micro_batch_size=2.0, learning_rate="1e-4", target_modules="q_proj, v_proj", columns=["a=b", " "])
    assert (config.bits, config.micro_batch_size, config.learning_rate) == (4, 2, 1e-4)
    assert type(config.bits) is type(config.micro_batch_size) is int
    assert config.target_modules == ("q_proj", "v_proj") and config.columns == ("a=b",)
    assert TrainConfig().target_modules == LINEARS


def test_an_unknown_option_lists_the_known_ones():
    with pytest.raises(ConfigError, match=r"unknown option 'learning_rte'.*learning_rate"):
        TrainConfig.from_dict({"learning_rte": 1})


def test_16_bits_exclude_a_quantizer():
    assert TrainConfig(bits=16, method="none").method == "none"
    with pytest.raises(ConfigError, match="method='nf4' cannot keep bits=16"):
        TrainConfig(bits=16, method="nf4")


def test_a_runs_folder_in_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert TrainConfig(output_dir="~/runs").output_dir == str(tmp_path / "runs")
    assert TrainConfig().output_dir == "runs"


def test_a_config_cannot_be_changed_afterwards():
    with pytest.raises(AttributeError):
        TrainConfig().bits = 3


def test_no_torch(root):
    code = "import sys, lowvram_tuner.config, lowvram_tuner.presets; print([m for m in ('torch', 'numpy', 'gradio') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=60, env=dict(os.environ))
    assert done.stdout.strip() == "[]", done.stderr
