"""Quantizing a whole model: an ordinary checkpoint comes out, better than rounding to nearest; a killed run goes on."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from lowvram_tuner.config import ConfigError
from lowvram_tuner.quant import calibrate
from lowvram_tuner.quant.checkpoint import open_checkpoint
from lowvram_tuner.quant.gptq import GPTQ
from lowvram_tuner.quant.registry import quant_format
from lowvram_tuner.quant.spec import QuantError, QuantSpec
from tests.tiny_model import make_data, make_model

LINEARS = 14  # of the tiny model's two layers
LENGTH, ROWS = 48, 8
GPTQ3 = QuantSpec("gptq", 3, 32, sym=False)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    return make_model(folder / "model"), make_data(folder / "data.jsonl")


def quantize(tiny, output, spec=GPTQ3, **more):
    return calibrate.quantize_model(str(tiny[0]), spec, tiny[1], output, max_seq_length=LENGTH, rows=ROWS, device="cpu", **more)


def with_weights_of(tiny, folder):
    """The transformers model with the checkpoint's dequantized weights in its linears."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny[0], dtype=torch.float32)
    reader = open_checkpoint(folder)
    for name, module in model.model.layers.named_modules():
        if isinstance(module, torch.nn.Linear):
            found = reader.load(f"model.layers.{name}")
            quant_format(found.spec).dequantize(found.packed, module.weight.data)
    return model


def output_error(tiny, model, ids):
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        wanted = AutoModelForCausalLM.from_pretrained(tiny[0], dtype=torch.float32).model(ids).last_hidden_state
        return float((model.model(ids).last_hidden_state - wanted).square().mean())


@pytest.fixture(scope="module")
def quantized(tiny, tmp_path_factory):
    output = tmp_path_factory.mktemp("quantized") / "gptq"
    heard = []
    return output, quantize(tiny, output, progress=lambda *what: heard.append(what)), heard


def test_a_checkpoint_others_can_load(tiny, quantized):
    output, report, _ = quantized
    config = json.loads((output / "config.json").read_text())
    expected = {"quant_method": "gptq", "bits": 3, "group_size": 32, "desc_act": False, "sym": False, "checkpoint_format": "gptq_v2"}
    assert expected.items() <= config["quantization_config"].items()
    assert config["model_type"] == "llama" and config["architectures"] == ["LlamaForCausalLM"]
    assert json.loads((output / "quantize_config.json").read_text()) == config["quantization_config"]
    assert (output / "tokenizer.json").is_file()
    reader = open_checkpoint(output)
    names = {n.rpartition(".")[0] for n in reader.files.where if n.endswith(".qweight")}
    assert len(names) == LINEARS and all(reader.load(n).spec.bits == 3 for n in names)
    assert reader.files.get("model.embed_tokens.weight").dtype == torch.float16
    assert not any(n.endswith("proj.weight") for n in reader.files.where)
    assert report["output"] == str(output) and report["seconds"] > 0 and report["peak_allocated_gb"] > 0
    assert [entry["name"] for entry in report["layers"]][:2] == ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"]
    assert len(report["layers"]) == LINEARS and all(0 < entry["error"] < 0.2 for entry in report["layers"])
    assert not output.with_name("gptq.partial").exists()


def test_progress_tells_weights_and_time_left(quantized):
    heard = quantized[2]
    counts = [done for _, done, _ in heard]
    assert counts == sorted(counts) and set(counts) == set(range(LINEARS + 1)) and {total for *_, total in heard} == {LINEARS}
    assert heard[0][0] == "quantizing weights" and "left" in heard[1][0]


def test_calibrated_outputs_are_nearer_than_rounded_ones(tiny, quantized, tmp_path):
    ids = calibrate._calibration_ids(str(tiny[0]), tiny[1], _tokenizer(tiny), 4 * ROWS, LENGTH)[ROWS:]
    assert len(ids) >= ROWS // 2  # not what was calibrated on
    calibrated = output_error(tiny, with_weights_of(tiny, quantized[0]), ids)
    model = with_weights_of(tiny, quantized[0])
    original = with_weights_of(tiny, quantized[0])
    from transformers import AutoModelForCausalLM

    original = AutoModelForCausalLM.from_pretrained(tiny[0], dtype=torch.float32)
    for (_, module), (_, source) in zip(model.model.layers.named_modules(), original.model.layers.named_modules()):
        if isinstance(module, torch.nn.Linear):
            GPTQ(GPTQ3).dequantize(GPTQ(GPTQ3).quantize(source.weight), module.weight.data)
    assert calibrated < 0.9 * output_error(tiny, model, ids)


def _tokenizer(tiny):
    from lowvram_tuner.models.source import load_tokenizer

    return load_tokenizer(str(tiny[0]))


class Killed(BaseException):
    pass


def kill_after_a_layer(what, done, total):
    if done == LINEARS // 2 + 1:
        raise Killed


def test_a_killed_run_goes_on_and_ends_the_same(tiny, quantized, tmp_path, monkeypatch):
    with pytest.raises(Killed):
        quantize(tiny, tmp_path / "out", progress=kill_after_a_layer)
    assert not (tmp_path / "out").exists()
    rounded = []
    whole = calibrate._round_layer
    monkeypatch.setattr(calibrate, "_round_layer", lambda layers, index, *rest: rounded.append(index) or whole(layers, index, *rest))
    quantize(tiny, tmp_path / "out")
    assert rounded == [1]
    first, second = open_checkpoint(quantized[0]).files, open_checkpoint(tmp_path / "out").files
    assert set(first.where) == set(second.where)
    assert all(torch.equal(first.get(n), second.get(n)) for n in first.where)


def test_layers_of_another_run_are_not_taken(tiny, tmp_path):
    with pytest.raises(Killed):
        quantize(tiny, tmp_path / "out", progress=kill_after_a_layer)
    report = quantize(tiny, tmp_path / "out", QuantSpec("gptq", 4, 32))
    assert open_checkpoint(tmp_path / "out").spec.bits == 4 and len(report["layers"]) == LINEARS


def test_layers_of_the_files_that_were_there_before_are_not_taken(tiny, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(tiny[0], model)
    with pytest.raises(Killed):
        quantize((model, tiny[1]), tmp_path / "out", progress=kill_after_a_layer)
    rewrite(model, lambda t: t["model.layers.0.mlp.up_proj.weight"].mul_(3))
    quantize((model, tiny[1]), tmp_path / "out")
    quantize((model, tiny[1]), tmp_path / "anew")
    went_on, anew = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "anew"))
    assert went_on.keys() == anew.keys() and all(torch.equal(went_on[n], anew[n]) for n in anew)


def test_a_damaged_finished_layer_is_made_again(tiny, quantized, tmp_path):
    with pytest.raises(Killed):
        quantize(tiny, tmp_path / "out", progress=kill_after_a_layer)
    layer = tmp_path / "out.partial" / "layer-00000.safetensors"
    layer.write_bytes(layer.read_bytes()[:-100])
    quantize(tiny, tmp_path / "out")
    first, second = (load_file(folder / "model.safetensors") for folder in (quantized[0], tmp_path / "out"))
    assert first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


def rewrite(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_layer_that_fails_gets_more_damping_and_is_named(tiny, tmp_path, monkeypatch):
    real = GPTQ.round

    def fails_undamped(self, weight, hessian):
        if weight.shape == (64, 128) and hessian.diagonal().min() < 0.3 * hessian.diagonal().mean():
            raise QuantError("the Hessian is not positive definite")
        return real(self, weight, hessian)

    monkeypatch.setattr(GPTQ, "round", fails_undamped)
    report = quantize(tiny, tmp_path / "out")
    damped = {entry["name"]: entry["damping"] for entry in report["layers"] if entry["damping"]}
    assert set(damped) == {f"model.layers.{n}.mlp.down_proj" for n in (0, 1)} and all(value >= 0.03 for value in damped.values())

    def always(self, weight, hessian):
        raise QuantError("the Hessian is not positive definite")

    monkeypatch.setattr(GPTQ, "round", always)
    with pytest.raises(QuantError, match=r"model.layers.0.self_attn.q_proj could not be quantized, even with damping 10: the Hessian"):
        quantize(tiny, tmp_path / "other")


@pytest.mark.parametrize("spec", [QuantSpec("nf4", 4), QuantSpec("int8", 8), QuantSpec("hqq", 3, 32)], ids=lambda s: s.method)
def test_formats_without_data_are_written_too(tiny, tmp_path, spec):
    report = calibrate.quantize_model(str(tiny[0]), spec, None, tmp_path / "out", device="cpu")
    assert len(report["layers"]) == LINEARS
    reader = open_checkpoint(tmp_path / "out")
    assert reader.spec.method == spec.method and reader.spec.bits == spec.bits
    source = open_checkpoint(tmp_path / "out").load("model.layers.1.mlp.down_proj")
    assert (source.out_features, source.in_features) == (64, 128)
    ids = torch.arange(40).unsqueeze(0)
    assert output_error(tiny, with_weights_of(tiny, tmp_path / "out"), ids) < {"nf4": 0.05, "int8": 0.001, "hqq": 0.3}[spec.method]


@pytest.mark.parametrize("spec", [QuantSpec("nf4", 4), QuantSpec("int8", 8)], ids=lambda s: s.method)
def test_transformers_loads_what_is_written_for_bitsandbytes(tiny, tmp_path, spec):
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM

    calibrate.quantize_model(str(tiny[0]), spec, None, tmp_path / "out", device="cpu")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32, device_map={"": "cpu"})
    ours = with_weights_of(tiny, tmp_path / "out")
    ids = torch.arange(40).unsqueeze(0)
    with torch.no_grad():
        a, b = theirs(ids).logits.float(), ours(ids).logits
    limit = 0.02 if spec.method == "nf4" else 0.06  # LLM.int8 also rounds the activations to 8 bits
    assert (a - b).norm() <= limit * b.norm()


def test_one_group_size_that_divides_every_input(tiny):
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tiny[0]))
    assert calibrate.fitting(QuantSpec("gptq", 4, 128), model).group_size == 64
    assert calibrate.fitting(QuantSpec("gptq", 4, -1), model).group_size == -1
    assert calibrate.fitting(QuantSpec("nf4", 4, 128), model).group_size == 128
    with pytest.raises(QuantError, match="group_size=24 does not divide in_features=64"):
        calibrate.fitting(QuantSpec("gptq", 4, 24), model)


@pytest.mark.parametrize("spec", [GPTQ3, QuantSpec("nf4", 4), QuantSpec("int8", 8)], ids=lambda s: s.method)
@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.layers.0.input_layernorm.weight", "model.embed_tokens.weight"])
def test_a_model_that_is_not_finite_is_not_written(tiny, tmp_path, spec, name):
    folder = shutil.copytree(tiny[0], tmp_path / "model")
    rewrite(folder, lambda t: t[name].view(-1)[3].fill_(torch.nan))
    with pytest.raises(ConfigError, match=f"tensor '{name}' is inf or nan in 1 of its"):
        quantize((folder, tiny[1]), tmp_path / "out", spec)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("spec", [GPTQ3, QuantSpec("nf4", 4), QuantSpec("int8", 8)], ids=lambda s: s.method)
@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.layers.0.input_layernorm.weight", "model.embed_tokens.weight"])
def test_a_tensor_of_another_kind_or_shape_is_not_written(tiny, tmp_path, spec, name):
    folder = shutil.copytree(tiny[0], tmp_path / "model")
    rewrite(folder, lambda t: t.update({name: t[name][..., :32].contiguous()}))
    with pytest.raises(ConfigError, match=rf"tensor '{name}' has shape \(.*32,?\), but the model's config asks for \("):
        quantize((folder, tiny[1]), tmp_path / "out", spec)
    rewrite(folder, lambda t: t.update({name: t[name].to(torch.int8)}))
    with pytest.raises(ConfigError, match=f"tensor '{name}' is int8; float16 or bfloat16 or float32 or float64 is accepted"):
        quantize((folder, tiny[1]), tmp_path / "out", spec)
    assert not (tmp_path / "out").exists()


def test_what_is_not_the_models_stays_behind(tiny, tmp_path):
    folder = shutil.copytree(tiny[0], tmp_path / "model")
    rewrite(folder, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8), "mask": torch.ones(2, 2, dtype=torch.bool)}))
    quantize((folder, tiny[1]), tmp_path / "out", QuantSpec("nf4", 4))
    names = set(load_file(tmp_path / "out" / "model.safetensors"))
    assert "model.norm.weight" in names and not {"mask", "model.layers.0.self_attn.rotary_emb.inv_freq"} & names


def test_what_cannot_be_done_is_said(tiny, quantized, tmp_path):
    with pytest.raises(QuantError, match="is quantized already; give the unquantized model"):
        calibrate.quantize_model(str(quantized[0]), GPTQ3, tiny[1], tmp_path / "a")
    with pytest.raises(QuantError, match="is not empty; give a new folder"):
        quantize(tiny, quantized[0])
    with pytest.raises(QuantError, match=r"data.jsonl' is a file; give a new folder"):
        quantize(tiny, tiny[1])
    with pytest.raises(QuantError, match=r"cannot be written \(Not a directory\); give a folder elsewhere"):
        quantize(tiny, tiny[1] / "a")
    with pytest.raises(QuantError, match="needs calibration text"):
        calibrate.quantize_model(str(tiny[0]), GPTQ3, None, tmp_path / "a")
    with pytest.raises(QuantError, match=r"tokens; at least 9000 \(one row\) are needed"):
        calibrate.quantize_model(str(tiny[0]), GPTQ3, tiny[1], tmp_path / "a", max_seq_length=9000)
    with pytest.raises(QuantError, match="method='none' has no checkpoint format"):
        calibrate.quantize_model(str(tiny[0]), QuantSpec("none", 16), None, tmp_path / "a")
