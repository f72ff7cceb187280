"""Loading: safetensors and GGUF become the model transformers would have built, and broken files end in one sentence."""

from __future__ import annotations

import json
import shutil
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from lowvram_tuner.config import ConfigError
from lowvram_tuner.memory.slabs import slab_bytes
from lowvram_tuner.models.load import HostEmbedding, config_values, load_model
from lowvram_tuner.models.source import Source, load_tokenizer, locate
from lowvram_tuner.models.weights import GgufWeights
from lowvram_tuner.quant.linear import QuantLinear
from lowvram_tuner.quant.registry import resolve
from lowvram_tuner.quant.spec import QuantError
from tests.engine_cases import make_plan, model_values
from tests.tiny_model import byte_tokenizer, make_model

IDS = torch.arange(3, 30)[None]
CPU = torch.device("cpu")


def save_model(folder, family="llama", tied=True, shard="1GB", **extra):
    """A random model of transformers' own, with weights large enough to matter. Returns it in fp32."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.set_num_threads(1)
    values = model_values(family, tied, num_hidden_layers=2, initializer_range=0.1, **extra)
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for name, p in model.named_parameters():
            if "norm" in name or "bias" in name:
                p.data.normal_(1.0, 0.2)
    model.save_pretrained(folder, max_shard_size=shard)
    return model.eval()


def load(folder, bits=16, **decisions):
    return load_model(str(folder), resolve(bits), make_plan(**decisions), CPU, torch.float32)


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=IDS, use_cache=False).logits


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma2"])
def test_16_bit_is_transformers_model(family, tied, tmp_path):
    extra = {"head_dim": 16, "query_pre_attn_scalar": 16} if family == "gemma2" else {}
    theirs = save_model(tmp_path, family, tied, **extra)
    loaded = load(tmp_path)
    torch.testing.assert_close(logits(loaded.model), logits(theirs), rtol=1e-5, atol=2e-5)
    assert (loaded.head is None) == tied
    assert not [n for n, p in loaded.model.named_parameters() if p.device.type == "meta" or p.requires_grad]
    assert not [n for n, b in loaded.model.named_buffers() if b.device.type == "meta"]


def test_shards_and_one_file_are_the_same_model(tmp_path):
    theirs = save_model(tmp_path, shard="100KB", tied=False)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    torch.testing.assert_close(logits(load(tmp_path).model), logits(theirs), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_linears_hold_what_the_format_rounds_them_to(bits, tmp_path):
    save_model(tmp_path)
    loaded, weights = load(tmp_path, bits), load_file(tmp_path / "model.safetensors")
    linears = {n: m for n, m in loaded.model.named_modules() if isinstance(m, QuantLinear)}
    assert len(linears) == 14
    for name, linear in linears.items():
        packed = linear.format.quantize(weights[f"{name}.weight"])
        assert all(torch.equal(linear.packed[k], v.view(linear.packed[k].shape)) for k, v in packed.items()), name
        error = (linear.dense() - weights[f"{name}.weight"]).norm() / weights[f"{name}.weight"].norm()
        assert 0 < error < {4: 0.11, 8: 0.02}[bits]
    layout = {n: m.format.layout(m.out_features, m.in_features) for n, m in linears.items()}
    assert sum(s.buffer.numel() for s in loaded.slabs) == slab_bytes(layout)


def test_unpacked_at_load_is_the_same_arithmetic(tmp_path):
    save_model(tmp_path)
    packed, unpacked = load(tmp_path, 4), load(tmp_path, 4, unpacked=True)
    torch.testing.assert_close(logits(packed.model), logits(unpacked.model), rtol=1e-6, atol=1e-6)


def test_a_head_of_fewer_bits(tmp_path):
    save_model(tmp_path, tied=False)
    loaded = load(tmp_path, head_bits=4)
    weight = load_file(tmp_path / "model.safetensors")["lm_head.weight"]
    assert loaded.head.format.spec.bits == 4
    assert 0 < (loaded.head.dense() - weight).norm() / weight.norm() < 0.11


def test_an_untied_config_without_a_head_in_its_files_uses_the_word_table(tmp_path):
    save_model(tmp_path, tied=True)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    loaded = load(tmp_path)
    assert loaded.head is None and loaded.model.lm_head.weight is loaded.model.model.embed_tokens.weight


def test_streaming_on_the_cpu_gives_the_resident_models_output(tmp_path):
    theirs = save_model(tmp_path)
    loaded = load(tmp_path, streamed=2)
    assert loaded.ring is not None and loaded.ring.order == [0, 1]
    torch.testing.assert_close(logits(loaded.model), logits(theirs), rtol=1e-5, atol=2e-5)


def test_progress_runs_to_its_end(tmp_path):
    save_model(tmp_path)
    seen = []
    load_model(str(tmp_path), resolve(16), make_plan(), CPU, torch.float32, lambda *a: seen.append(a))
    assert [done for _, done, _ in seen] == [0, 1, 2] and {total for _, _, total in seen} == {2}


# files that cannot be used


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    torch.set_num_threads(1)
    return make_model(tmp_path_factory.mktemp("good"))


@pytest.fixture
def broken(good, tmp_path):
    """A copy to break, and a function that rewrites its tensors."""
    folder = shutil.copytree(good, tmp_path / "model")

    def rewrite(change):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return folder, rewrite


def refused(folder, *words, bits=16):
    with pytest.raises((ConfigError, QuantError)) as error:
        load(folder, bits)
    message = str(error.value)
    assert all(w in message for w in words), message
    assert "\n" not in message


def test_a_tensor_of_another_shape(broken):
    folder, rewrite = broken
    name = "model.layers.1.mlp.up_proj.weight"
    rewrite(lambda t: t.update({name: torch.zeros(100, 64)}))
    refused(folder, name, "(100, 64)", "(128, 64)")


PARTS = ["model.layers.0.self_attn.k_proj.weight", "model.norm.weight", "model.embed_tokens.weight"]


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("bits", [16, 4])
def test_a_tensor_without_values(broken, name, bits):
    folder, rewrite = broken
    rewrite(lambda t: t.update({name: t[name][:0]}))
    refused(folder, f"tensor '{name}' has shape (0", "but the model's config asks for", bits=bits)


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.bool, torch.float8_e4m3fn, torch.complex64])
@pytest.mark.parametrize("bits", [16, 4])
def test_a_tensor_that_is_no_ordinary_float(broken, name, dtype, bits):
    folder, rewrite = broken
    rewrite(lambda t: t.update({name: t[name].to(dtype)}))
    seen = str(dtype).removeprefix("torch.")
    refused(folder, f"tensor '{name}' is {seen}; float16 or bfloat16 or float32 or float64 is accepted", bits=bits)


@pytest.mark.parametrize("bits", [16, 4])
def test_fp64_weights_are_the_model(broken, bits):
    folder, rewrite = broken
    before = logits(load(folder, bits).model)
    rewrite(lambda t: t.update({name: t[name].double() for name in t}))
    assert torch.equal(logits(load(folder, bits).model), before)


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("bits", [16, 4])
def test_a_tensor_that_is_not_finite(broken, name, value, bits):
    folder, rewrite = broken
    rewrite(lambda t: t[name].view(-1)[5:7].fill_(value))
    refused(folder, f"tensor '{name}' is inf or nan in 2 of its", "get the model again", bits=bits)


@pytest.mark.parametrize("name", PARTS)
def test_a_missing_tensor(broken, name):
    folder, rewrite = broken
    rewrite(lambda t: t.pop(name))
    refused(folder, name)


def test_a_truncated_file(broken):
    folder, _ = broken
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    refused(folder, "model.safetensors", "download")


def test_an_index_that_names_a_missing_file(broken):
    folder, _ = broken
    index = {"weight_map": {"model.norm.weight": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(folder, "model-00002-of-00002.safetensors", "not in", folder.name)


@pytest.mark.parametrize("index", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"model.norm.weight": 3}}', "[" * 100_000])
def test_an_index_that_is_none(broken, index):
    folder, _ = broken
    (folder / "model.safetensors.index.json").write_text(index)
    refused(folder, "model.safetensors.index.json")


def test_an_index_cannot_lead_out_of_the_folder(broken):
    folder, _ = broken
    index = {"weight_map": {"model.norm.weight": "../../secret.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(folder, "secret.safetensors", "not in", folder.name)


def test_pickled_weights_are_refused_unopened(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (pytest.fail, ("a pickle was opened",))

    import pickle

    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    (tmp_path / "config.json").write_text("{}")
    refused(tmp_path, "pytorch_model.bin", "can run code", "safetensors")


def test_places_that_hold_no_model(tmp_path):
    refused(tmp_path, "holds no *.safetensors")
    refused(tmp_path / "absent", "is not a folder here")


def test_a_config_that_is_missing_or_of_no_known_kind(broken):
    folder, _ = broken
    (folder / "config.json").write_text(json.dumps({"model_type": "nonsense"}))
    refused(folder, "config")
    (folder / "config.json").unlink()
    refused(folder, "config")


@pytest.mark.parametrize(
    "config", ["{", "[]", '"llama"', "[" * 100_000, {"hidden_size": "64"}, {"num_attention_heads": 5}, {"quantization_config": "gptq"}]
)
def test_a_config_that_is_none(broken, config):
    folder, _ = broken
    path = folder / "config.json"
    path.write_text(config if isinstance(config, str) else json.dumps(json.loads(path.read_text()) | config))
    refused(folder, "config")


@pytest.mark.parametrize("config", ["{", "[]", {"hidden_size": "64"}, {"num_attention_heads": 5}])
def test_a_tokenizer_beside_such_a_config(broken, config):
    folder, _ = broken
    byte_tokenizer().save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(config if isinstance(config, str) else json.dumps(json.loads(path.read_text()) | config))
    with pytest.raises((ConfigError, QuantError)) as error:
        load_tokenizer(str(folder))
    assert folder.name in str(error.value) and "\n" not in str(error.value)


def test_code_that_comes_with_a_model_is_never_run(broken):
    folder, _ = broken
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text("raise SystemExit('ran')")
    refused(folder, "config")


# where models are found


def test_a_folder_in_the_hubs_cache_knows_its_public_id(good, tmp_path):
    folder = tmp_path / "models--some--base" / "snapshots" / "abc"
    shutil.copytree(good, folder)
    assert locate(str(folder)).public_id == "some/base"
    assert locate(str(good)).public_id == good.name


def test_a_hub_id_is_downloaded_once_named(good):
    asked = []
    source = locate("some/base", download=lambda *wanted: asked.append(wanted) or good)
    assert asked == [("some/base", True, None)] and (source.folder, source.public_id, source.gguf) == (good, "some/base", None)


def test_catalogue_shapes_build_transformers_configs():
    from transformers import AutoConfig

    from lowvram_tuner.config import TrainConfig

    for name in ("meta-llama/Llama-3.1-8B-Instruct", "Qwen/Qwen3-14B", "google/gemma-2-2b-it"):
        values = config_values(TrainConfig(model=name))
        config = AutoConfig.for_model(values.pop("model_type"), **values)
        assert config.num_hidden_layers == values["num_hidden_layers"] and config.head_dim == values["head_dim"]


def test_a_ggufs_config_is_read_once_and_kept_whole(demo_gguf, tmp_path, monkeypatch):
    from transformers import AutoConfig

    from lowvram_tuner.models.source import load_config

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = locate("demo")
    read = load_config(source)
    monkeypatch.setattr(AutoConfig, "from_pretrained", partial(must_not_read_gguf, AutoConfig.from_pretrained))
    kept = load_config(source)
    assert type(kept) is type(read) and kept.to_dict() == read.to_dict()
    assert kept.num_hidden_layers == 30 and kept._name_or_path == "HuggingFaceTB/SmolLM2-135M-Instruct"


@pytest.mark.parametrize("damage", [lambda f: f.write_text("{"), lambda f: f.unlink()], ids=["cut", "missing"])
def test_what_was_kept_of_a_gguf_and_is_damaged_is_made_anew(damage, demo_gguf, tmp_path, monkeypatch):
    from lowvram_tuner.models.source import load_config, load_tokenizer

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    config, words = load_config(locate("demo")), load_tokenizer("demo").get_vocab()
    files = [*tmp_path.glob("**/config.json"), *tmp_path.glob("**/tokenizer.json")]
    assert len(files) == 2
    for file in files:
        damage(file)
    assert load_config(locate("demo")).to_dict() == config.to_dict() and load_tokenizer("demo").get_vocab() == words
    assert all(len(file.read_text(encoding="utf-8")) > 100 for file in files)


def must_not_read_gguf(read, *args, **options):
    assert "gguf_file" not in options
    return read(*args, **options)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma2"])
def test_a_ggufs_names_are_those_of_transformers_own_walk(family, tmp_path, monkeypatch):
    """`GgufWeights` asks for the names of the whole model only, where transformers asks every submodule, too."""
    from transformers import modeling_gguf_pytorch_utils as hf

    model = save_model(tmp_path, family)
    walked = hf.get_gguf_hf_weights_map(model, hf.TensorProcessor(config=model.config.to_dict()))
    reader = SimpleNamespace(tensors=[SimpleNamespace(name=name) for name in walked])
    monkeypatch.setattr("gguf.GGUFReader", lambda path: reader)
    monkeypatch.setattr(hf, "read_field", lambda *_: [family])
    weights = GgufWeights(Source(tmp_path, "a.gguf", "a"), model)
    assert {hf_name: t.name for hf_name, t in weights._tensors.items()} == {hf_name: name for name, hf_name in walked.items()}


@pytest.mark.slow
def test_the_demo_gguf_knows_its_facts(demo_gguf):
    """llama.cpp stores q and k permuted: read as they lie, the model would know nothing."""
    from lowvram_tuner.models.source import load_tokenizer

    loaded = load_model("demo", resolve(16), make_plan(), CPU, torch.float32)
    tokenizer = load_tokenizer("demo")
    ids = torch.tensor([tokenizer.encode("The capital of France is")])
    with torch.no_grad():
        best = loaded.model.eval()(input_ids=ids, use_cache=False).logits[0, -1].argmax()
    assert tokenizer.decode([int(best)]).strip() == "Paris"
    assert loaded.source.public_id == "HuggingFaceTB/SmolLM2-135M-Instruct" and loaded.head is None


def test_a_word_table_in_host_memory_keeps_its_familys_scale():
    from transformers.models.gemma2.modeling_gemma2 import Gemma2TextScaledWordEmbedding

    table = Gemma2TextScaledWordEmbedding(10, 4, 0, embed_scale=3.0)
    ids = torch.tensor([[1, 9], [0, 4]])
    want = table(ids)
    HostEmbedding.take(table, table.weight.detach())
    assert torch.equal(table(ids), want) and want.abs().max() > 0


def test_a_word_table_in_host_memory_does_not_say_where_the_model_is(tmp_path):
    """transformers' generate takes the first parameter's device for the model's."""
    model = save_model(tmp_path, tied=False).to("meta")
    HostEmbedding.take(model.model.embed_tokens, torch.zeros(300, 64))
    assert model.device.type == "meta" and model.model.embed_tokens.weight.device == CPU
