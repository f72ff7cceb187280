"""The controls are the config: every option once, and what comes back is checked by the config alone."""

from __future__ import annotations

import gradio as gr
import pytest

from lowvram_tuner.config import ConfigError, TrainConfig, options
from lowvram_tuner.presets import load_presets
from lowvram_tuner.quant.registry import methods
from lowvram_tuner.ui import controls
from lowvram_tuner.ui.form import _stored_bits, bits_words
from lowvram_tuner.ui.words import PERPLEXITY, quality


def form(config: TrainConfig) -> dict:
    return {name: controls.to_control(name, getattr(config, name)) for name in options() if name not in controls.HIDDEN}


def test_every_option_has_one_place():
    under_more = [name for names in controls.grouped().values() for name in names]
    basic = [name for name, f in options().items() if f.metadata.get("basic")]
    everywhere = [*under_more, *basic, *controls.HIDDEN, *controls.BESIDE_GAUGE]
    assert sorted(everywhere) == sorted(options())
    assert "Other" not in controls.grouped()


@pytest.mark.parametrize("name", [n for n in options() if n not in (*controls.HIDDEN, *controls.BESIDE_GAUGE)])
def test_a_control_shows_the_options_default_limits_and_help(name):
    f, made = options()[name], controls.control(name)
    assert made.value == controls.to_control(name, f.default)
    assert made.info == f.metadata["help"]
    assert made.label.startswith(f.metadata["label"])
    for side in ("min", "max"):
        if side in f.metadata and name != "micro_batch_size":
            assert getattr(made, f"{side}imum") == f.metadata[side]


@pytest.mark.parametrize("name", list(load_presets()))
def test_a_preset_passes_through_the_controls_unchanged(name):
    config = load_presets()[name].config()
    assert controls.to_config(form(config)) == config


def test_lists_pass_through_the_controls():
    config = TrainConfig(compare_prompts=("Who, are you?", "你是谁？"), columns=("prompt=q", "answer=a"), target_modules=("q_proj",), report_to=())
    assert controls.to_config(form(config)) == config


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("micro_batch_size", None, "Batch is empty"),
        ("micro_batch_size", 0, "outside 1 to 256"),
        ("learning_rate", "fast", "not a number"),
        ("max_seq_length", 1e9, "outside"),
        ("lora_r", 1.5, "whole number"),
        ("bits", 5, "not one of"),
        ("model", "  ", "Choose a model"),
        ("dataset", None, "Choose a dataset"),
        ("target_modules", ["lm_head"], "not one of"),
        ("packing", "yes", "true or false"),
        ("seed", float("nan"), "whole number"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_said_in_a_sentence(name, value, said):
    with pytest.raises(ConfigError, match=said):
        controls.to_config({**form(TrainConfig()), name: value})


def test_values_beyond_the_sliders_stretch_them():
    config = TrainConfig(micro_batch_size=100, vram_gb=30.0)
    batch, vram = controls.shown(config, ["micro_batch_size", "vram_gb"], vram_top=6.4)
    assert batch["maximum"] == 100 and vram["maximum"] == 30.0


def test_the_quantizers_offered_can_do_the_bits():
    from lowvram_tuner.quant.registry import methods

    for bits in options()["bits"].metadata["choices"]:
        assert controls.methods_for(bits) == ["auto", *methods(bits)]
        assert (bits in controls.missing_bits()) == (not methods(bits))


def test_a_quantized_model_brings_its_bits(tmp_path):
    for model in (str(tmp_path), "demo", "", None, "~nobody-here/x", "a" * 400, "\0"):
        assert _stored_bits(model) == gr.skip()
    config = tmp_path / "config.json"
    config.write_text('{"quantization_config": {"quant_method": "gptq", "bits": 3, "group_size": 64}}', encoding="utf-8")
    assert _stored_bits(str(tmp_path)) == 3
    own = bits_words(3, "auto", str(tmp_path))
    assert "how this model&#x27;s files hold it" in own and "first run" not in own
    assert "hold 3-bit weights; choose 3" in bits_words(4, "auto", str(tmp_path))
    config.write_text('{"quantization_config": {"quant_method": "other"}}', encoding="utf-8")
    assert _stored_bits(str(tmp_path)) == gr.skip()


@pytest.mark.parametrize(
    ("bits", "method", "said"),
    [
        (16, "auto", "the original weights"),
        (8, "auto", "as good as the original"),
        (4, "auto", "25 % less sure of the next word"),
        (4, "gptq", "The first run quantizes the model on your data, about 3 min for an 8B model"),
        (2, "auto", "about 37 min for an 8B model on an H100"),
        (4, "quip", "about 84 min"),
        (3, "hqq", "6.9 times less sure"),
        (2, "auto", "2.4 times less sure"),
        (3, "nf4", "The first run"),  # nf4 has 4 bits: what 3 bits take by default is told
        (None, "auto", ""),
    ],
)
def test_the_bits_say_what_was_measured_of_them(bits, method, said):
    assert said in bits_words(bits, method)
    assert bits_words(bits, method) or not said


def test_what_is_said_of_quantizers_is_of_ones_there_are():
    for method, bits in PERPLEXITY:
        assert method in methods(bits)
        assert quality(method, bits) or bits == 16
