"""`bench --decode`: its keys, what it refuses, and that the numbers are of the tokens asked for."""

from __future__ import annotations

import json

import pytest

from lowvram_tuner.chat.speed import decode_speed
from lowvram_tuner.cli import main
from lowvram_tuner.config import ConfigError, TrainConfig
from tests.tiny_model import make_model

KEYS = {
    "decode_tokens_per_s", "decode_peak_allocated_gb", "decode_adapter_tokens_per_s", "decode_captured", "decode_prompt_s",
    "decode_cache_gb", "decode_tokens", "load_s",
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("tiny"))


def test_the_commands_keys(folder, capsys):
    assert main(["bench", "--model", str(folder), "--decode", "6", "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(result) == KEYS and result["decode_tokens"] == 6
    assert result["decode_tokens_per_s"] > 0 and result["decode_adapter_tokens_per_s"] > 0
    assert result["decode_cache_gb"] == 512 * 2 * 2 * 2 * 16 * 4 / 1e9


def test_what_cannot_be_measured_is_refused(folder, capsys):
    assert main(["bench", "--model", str(folder), "--decode", "2"]) == 2
    assert "decode=2 is too few to measure a speed; generate 4 tokens or more." in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"decode=600 is more than the 512 tokens that this model reads"):
        decode_speed(TrainConfig(model=str(folder)), 600)


@pytest.mark.gpu
def test_a_card_captures_its_steps():
    found = decode_speed(TrainConfig(model="HuggingFaceTB/SmolLM2-135M-Instruct"), 64, random_weights=True)
    assert found["decode_captured"] and found["decode_tokens_per_s"] > 100 and found["decode_peak_allocated_gb"] > 0
