"""The adapter: PEFT's own files over one flat buffer, readable by plain PEFT on a plain transformers model."""

from __future__ import annotations

import itertools
import json
import warnings

import pytest
import torch

from lowvram_tuner.config import LINEARS, ConfigError, TrainConfig
from lowvram_tuner.lora.adapter import GROUPS, attach, load_adapter, load_state, save_adapter
from lowvram_tuner.models.load import HostEmbedding, load_model, random_model
from lowvram_tuner.quant.registry import resolve
from tests.engine_cases import make_case, make_plan, model_values
from tests.tiny_model import make_model

IDS = torch.arange(3, 30)[None]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.set_num_threads(1)
    return make_model(tmp_path_factory.mktemp("model"))


def on_disk_case(folder, **options):
    """The tiny model at 16 bits with an adapter away from zero."""
    loaded = load_model(str(folder), resolve(16), make_plan(), CPU, torch.float32)
    adapter = attach(loaded.model, TrainConfig(lora_r=4, lora_alpha=12, **options), CPU, torch.float32)
    adapter.parameters.copy_(torch.randn(adapter.parameters.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
    return loaded, adapter


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS, use_cache=False).logits


@pytest.mark.parametrize("targets", [LINEARS, ("q_proj", "down_proj")], ids=["all", "two"])
def test_a_saved_adapter_works_in_plain_peft(folder, tmp_path, targets):
    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    _, adapter = on_disk_case(folder, target_modules=targets)
    save_adapter(adapter, tmp_path / "adapter", "some/base")
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    before = logits(base)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing.*")
        plain = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    result = plain.load_adapter(tmp_path / "adapter", adapter_name="again")
    assert not result.unexpected_keys
    assert not [k for k in result.missing_keys if "lora" in k and "again" in k]
    assert len(stored) == 2 * 2 * len(targets)
    ours, theirs = logits(adapter.model.eval()), logits(plain)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert (theirs - before).abs().max() > 0.01  # the adapter does something

    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["base_model_name_or_path"] == "some/base" and config["peft_type"] == "LORA"
    assert (config["r"], config["lora_alpha"], sorted(config["target_modules"])) == (4, 12, sorted(targets))


def test_a_saved_adapter_comes_back(folder, tmp_path):
    _, adapter = on_disk_case(folder)
    save_adapter(adapter, tmp_path, "some/base")
    fresh = load_model(str(folder), resolve(16), make_plan(), CPU, torch.float32)
    again = load_adapter(fresh.model, tmp_path).model
    assert torch.equal(logits(again), logits(adapter.model.eval()))
    assert not again.training and not any(p.requires_grad for p in again.parameters())
    with again.disable_adapter():
        plain = logits(again)
    assert not torch.equal(plain, logits(again))


def test_parameters_and_gradients_are_views_of_two_flat_buffers():
    _, adapter = make_case(model_values("llama"))
    named = {n: p for n, p in adapter.model.named_parameters() if p.requires_grad}
    assert set(named) == set(adapter.slices) and all("lora_" in n for n in named)
    assert sum(p.numel() for p in named.values()) == adapter.parameters.numel() == adapter.gradients.numel()
    for name, (offset, shape) in adapter.slices.items():
        assert named[name].shape == shape
        assert named[name].data_ptr() == adapter.parameters.data_ptr() + 4 * offset
        assert named[name].grad.data_ptr() == adapter.gradients.data_ptr() + 4 * offset


def test_a_groups_a_lie_side_by_side():
    """A of q, k and v are used as one matrix: they must be neighbours, in that order."""
    _, adapter = make_case(model_values("llama"))
    for group in GROUPS:
        places = [next(v for n, v in adapter.slices.items() if ".layers.1." in n and f"{m}.lora_A" in n) for m in group]
        for (offset, shape), (following, _) in itertools.pairwise(places):
            assert offset + shape.numel() == following


def test_a_fresh_adapter_changes_nothing_and_depends_on_the_seed_alone():
    def adapter_of(seed, noise):
        torch.manual_seed(noise)
        model = random_model(model_values("llama"), resolve(16), make_plan(), CPU, torch.float32).model
        before = logits(model)
        state = torch.random.get_rng_state()
        adapter = attach(model, TrainConfig(lora_r=4, seed=seed), CPU, torch.float32)
        assert torch.equal(torch.random.get_rng_state(), state)  # nobody else's random numbers change
        assert torch.equal(logits(adapter.model.eval()), before)
        return adapter.parameters

    one, same, other = adapter_of(7, 1), adapter_of(7, 2), adapter_of(8, 1)
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_dropout_acts_while_training_only():
    _, adapter = make_case(model_values("llama"), lora_dropout=0.5)
    model = adapter.model.train()
    assert not torch.equal(logits(model), logits(model))
    model.eval()
    assert torch.equal(logits(model), logits(model))


def test_an_adapter_takes_the_dtype_of_its_base_wherever_the_word_table_is(tmp_path):
    values = model_values("llama", False)
    _, adapter = make_case(values)
    save_adapter(adapter, tmp_path, "some/model")
    model = random_model(values, resolve(4), make_plan(), CPU, torch.bfloat16).model
    HostEmbedding.take(model.model.embed_tokens, model.model.embed_tokens.weight.detach())
    loaded = load_adapter(model, tmp_path)
    assert loaded.parameters.dtype == torch.bfloat16 and torch.equal(loaded.parameters, adapter.parameters.bfloat16())
    assert logits(loaded.model).dtype == torch.bfloat16


def test_an_adapter_of_another_model_is_refused_in_a_sentence(folder, tmp_path):
    _, small = make_case(model_values("llama"))
    save_adapter(small, tmp_path, "other/model")
    loaded = load_model(str(folder), resolve(16), make_plan(), CPU, torch.float32)
    with pytest.raises(ConfigError) as error:
        load_adapter(loaded.model, tmp_path)
    assert "\n" not in str(error.value) and str(error.value).endswith(".") and "layers.2" in str(error.value)


def test_an_adapter_of_another_rank_or_shape_is_refused():
    _, adapter = make_case(model_values("llama"))
    state = adapter.state()
    name = next(iter(state))
    before = adapter.parameters.clone()
    with pytest.raises(ConfigError, match=r"is \(5, 64\), the model needs \(4, 64\)"):
        load_state(adapter, {**state, name: torch.zeros(5, 64)})
    with pytest.raises(ConfigError, match="on one side only"):
        load_state(adapter, {k: v for k, v in state.items() if k != name})
    assert torch.equal(adapter.parameters, before)


def test_a_folder_without_an_adapter_is_refused(folder, tmp_path):
    loaded = load_model(str(folder), resolve(16), make_plan(), CPU, torch.float32)
    with pytest.raises(ConfigError, match=r"holds no adapter_model\.safetensors"):
        load_adapter(loaded.model, tmp_path)


def test_targets_reach_fused_linears():
    values = model_values("phi3", pad_token_id=0)  # q, k and v are one linear there
    model = random_model(values, resolve(16), make_plan(), CPU, torch.float32).model
    adapter = attach(model, TrainConfig(target_modules=("q_proj", "v_proj")), CPU, torch.float32)
    assert {n.split(".lora_")[0].split(".")[-1] for n in adapter.state()} == {"qkv_proj"}

