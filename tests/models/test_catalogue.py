"""A config that a stranger wrote: a shape, or one sentence; the page reads it before anything else of a model."""

from __future__ import annotations

import json

import pytest

from lowvram_tuner.config import ConfigError
from lowvram_tuner.models.catalogue import shape_of

CONFIG = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 300,
}  # fmt: skip


@pytest.fixture
def shape(tmp_path):
    def read(text: str):
        (tmp_path / "config.json").write_text(text)
        return shape_of(str(tmp_path))

    return read


@pytest.mark.parametrize("nested", [{}, {"text_config": None}, {"text_config": {"hidden_size": 32}}])
def test_a_config(nested, shape):
    found = shape(json.dumps(CONFIG | nested))
    assert (found.family, found.hidden_size, found.head_dim) == ("llama", 32 if nested.get("text_config") else 64, 8 if nested.get("text_config") else 16)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[]", "is no JSON object"),
        ("null", "is no JSON object"),
        ("{", "cannot be read as JSON"),
        ("[" * 100_000, "cannot be read as JSON"),
        (json.dumps(CONFIG | {"text_config": [1]}), "is no JSON object"),
        (json.dumps({**CONFIG, "hidden_size": float("inf")}), "lacks what a decoder-only model's config has"),
        (json.dumps({**CONFIG, "hidden_size": float("nan")}), "lacks what a decoder-only model's config has"),
        (json.dumps({**CONFIG, "num_attention_heads": 0}), "lacks what a decoder-only model's config has"),
        (json.dumps({**CONFIG, "num_attention_heads": 0, "head_dim": 16}), "num_attention_heads=0; 1 to"),
        (json.dumps({**CONFIG, "vocab_size": -1}), "vocab_size=-1; 1 to"),
        (json.dumps({**CONFIG, "num_hidden_layers": 10**30}), "num_hidden_layers=1"),
        (json.dumps({k: v for k, v in CONFIG.items() if k != "model_type"}), "'model_type'"),
        (json.dumps(CONFIG | {"num_experts": 8}), "is a mixture of experts"),
    ],
)
def test_what_is_no_config_is_one_sentence(text, sentence, shape):
    with pytest.raises(ConfigError, match=sentence) as refused:
        shape(text)
    assert "\n" not in str(refused.value)
