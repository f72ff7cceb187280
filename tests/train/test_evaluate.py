"""`eval`: the perplexity of a text under a base model, and under the same model with a saved adapter."""

import math

import pytest
import torch
from tiny_model import make_data, make_model

from lowvram_tuner.config import ConfigError, TrainConfig
from lowvram_tuner.lora.adapter import save_adapter
from lowvram_tuner.models.source import load_tokenizer
from lowvram_tuner.train.evaluate import perplexity
from lowvram_tuner.train.session import build, make_plan

WINDOW = 64


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    rows = make_data(folder / "rows.jsonl")
    text = folder / "text.txt"
    text.write_text(rows.read_text(encoding="utf-8")[:2000], encoding="utf-8")
    return make_model(folder / "model"), text


@pytest.fixture
def trained(files, tmp_path):
    """A folder with an adapter whose B is away from zero, and the model it sits on."""
    config = TrainConfig(model=str(files[0]), bits=16, precision="fp32", max_seq_length=WINDOW, lora_r=4)
    session = build(config, make_plan(config))
    generator = torch.Generator().manual_seed(1)
    session.adapter.parameters.copy_(torch.randn(session.adapter.parameters.shape, generator=generator) * 0.15)
    save_adapter(session.adapter, tmp_path / "adapter", "some/base")
    return config, tmp_path / "adapter", session.adapter.model.eval()


@torch.no_grad()
def by_transformers(model, config, text):
    ids = torch.tensor(load_tokenizer(config.model)(text.read_text(encoding="utf-8"), add_special_tokens=False).input_ids)
    total = tokens = 0
    for window in ids.split(WINDOW):
        if len(window) > 1:
            logits = model(input_ids=window[None], use_cache=False).logits[0, :-1]
            total += float(torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum"))
            tokens += len(window) - 1
    return math.exp(total / tokens), tokens


@pytest.mark.parametrize("written", [True, False], ids=["hand-written layers", "transformers' layers"])
def test_perplexity_with_and_without_an_adapter(files, trained, written, monkeypatch):
    config, adapter, model = trained
    if not written:
        monkeypatch.setattr("lowvram_tuner.train.session.supports", lambda *_: False)
    found = perplexity(config, str(adapter), files[1])
    want, tokens = by_transformers(model, config, files[1])
    assert found["tokens"] == tokens > 100 and found["perplexity"] == pytest.approx(want, rel=1e-5)
    with model.disable_adapter():
        base, _ = by_transformers(model, config, files[1])
    assert perplexity(config, None, files[1])["perplexity"] == pytest.approx(base, rel=1e-5)
    assert abs(base - want) > 0.01 * base


def test_a_folder_without_an_adapter_is_refused_in_a_sentence(files, tmp_path):
    config = TrainConfig(model=str(files[0]), bits=16, precision="fp32", max_seq_length=WINDOW)
    with pytest.raises(ConfigError, match="holds no adapter_model"):
        perplexity(config, str(tmp_path), files[1])
