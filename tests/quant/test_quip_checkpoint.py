"""QuIP# checkpoints: what is written is read back, fused modules by their definition, and every broken file named."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from kernels import e8p
from kernels.hadamard import reference as rotated
from lowvram_tuner.quant.checkpoint import QuantizedWeight, open_checkpoint, writer_for
from lowvram_tuner.quant.registry import quant_format
from lowvram_tuner.quant.spec import QuantError, QuantSpec

MODULE = "model.layers.0.mlp.down_proj"
PARAMS = {
    "codebook": "E8P12", "codebook_version": 1, "codesz": 8, "packsz": 4, "idx_dtype": "torch.int64", "lora_rank": 0,
    "rescale_WH": False, "resid_scale_override": -1,
}  # fmt: skip
CONFIG = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 192}
BOOKS = {"E8P12": (7, 2, 1.0, 1), "E8P12RVQ4B": (17, 4, 3.45, 1), "E8P12RVQ3B": (18, 3, 2.04, 0)}


def save(folder, tensors, params=None, **changes):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | {"quip_params": (params or PARAMS) | changes}))
    save_file(tensors, folder / "model.safetensors")
    return folder


def stored(module: str, rows: int, columns: int, book: str = "E8P12", seed: int = 0) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    number, words, _, _ = BOOKS[book]
    qidxs = torch.randint(-(1 << 62), 1 << 62, (rows, columns // 64 * words), generator=g) * 2 + 1
    return {
        f"{module}.Qidxs": qidxs,
        f"{module}.SU": torch.randn(columns, generator=g).half(),
        f"{module}.SV": torch.randn(rows, generator=g).half(),
        f"{module}.Wscale": torch.tensor(0.0371),
        f"{module}.codebook_id": torch.tensor(number),
    }


def defined(tensors: dict[str, torch.Tensor], module: str, book: str = "E8P12", scale: float | None = None) -> torch.Tensor:
    """W in fp64 from the stored tensors, by FORMATS' definition."""
    t = {name.removeprefix(f"{module}."): tensor for name, tensor in tensors.items() if name.startswith(module)}
    columns = len(t["SU"])
    qidxs = t["Qidxs"]
    wq = e8p.codebook()[e8p.unpack(qidxs[:, : columns // 32]).int() & 0xFFFF].double().flatten(1)
    rest = qidxs[:, columns // 32 :].contiguous()
    scale = scale or BOOKS[book][2]
    if book == "E8P12RVQ4B":
        wq += e8p.codebook()[e8p.unpack(rest).int() & 0xFFFF].double().flatten(1) / scale
    if book == "E8P12RVQ3B":
        byte = (rest[:, :, None] >> 8 * torch.arange(8)) & 255  # eight consecutive indices a word, lowest byte first
        wq += e8p.residual_codebook()[byte.flatten(1)].double().flatten(1) / scale
    w = rotated(rotated(wq.t().contiguous()).t().contiguous())  # U_out Wq U_in^T
    w = w * (t["SV"].double() * t["Wscale"].double())[:, None] * t["SU"].double()
    return w / t["scaleWH"].double() if "scaleWH" in t else w


def read(folder, module=MODULE):
    weight = open_checkpoint(folder).load(module)
    fmt = quant_format(weight.spec)
    layout = fmt.layout(weight.out_features, weight.in_features)
    assert {n: (s.shape, s.dtype) for n, s in layout.items()} == {
        n: (tuple(t.shape), str(t.dtype).removeprefix("torch.")) for n, t in weight.packed.items()
    }
    return weight, fmt.dequantize(weight.packed, torch.empty(weight.out_features, weight.in_features))


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


@pytest.mark.parametrize("book", BOOKS)
def test_reads_each_codebook(tmp_path, book):
    tensors = stored(MODULE, 128, 192, book)
    folder = save(tmp_path / "m", tensors, codebook=book, codebook_version=BOOKS[book][3])
    weight, dense = read(folder)
    assert (weight.out_features, weight.in_features) == (128, 192)
    assert error(dense, defined(tensors, MODULE, book)) < 5e-7


def test_residual_scale_override(tmp_path):
    tensors = stored(MODULE, 128, 192, "E8P12RVQ4B")
    folder = save(tmp_path / "m", tensors, codebook="E8P12RVQ4B", resid_scale_override=2.5)
    assert error(read(folder)[1], defined(tensors, MODULE, "E8P12RVQ4B", 2.5)) < 5e-7


def test_rescaled_inputs(tmp_path):
    tensors = stored(MODULE, 128, 192) | {f"{MODULE}.scaleWH": torch.rand(192, generator=torch.Generator().manual_seed(1)) + 0.5}
    folder = save(tmp_path / "m", tensors, rescale_WH=True)
    assert error(read(folder)[1], defined(tensors, MODULE)) < 5e-7


@pytest.mark.parametrize(
    ("fused", "parent", "members"),
    [
        ("qkv_proj", "model.layers.1.self_attn", {"q_proj": 128, "k_proj": 64, "v_proj": 64}),
        ("upgate_proj", "model.layers.1.mlp", {"up_proj": 192, "gate_proj": 192}),
    ],
)
def test_reads_the_members_of_fused_modules(tmp_path, fused, parent, members):
    module, rows = f"{parent}.{fused}", sum(members.values())
    scales = torch.tensor([0.5, 1.25, 2.0][: len(members)])
    tensors = stored(module, rows, 128) | {f"{module}.fuse_scales": scales}
    reader = open_checkpoint(save(tmp_path / "m", tensors))
    want, first = defined(tensors, module), 0
    for (leaf, size), scale in zip(members.items(), scales):
        assert reader.holds(f"{parent}.{leaf}")
        weight = reader.load(f"{parent}.{leaf}")
        assert weight.spec.part == (rows, first)
        dense = quant_format(weight.spec).dequantize(weight.packed, torch.empty(size, 128))
        assert error(dense, want[first : first + size] * scale) < 5e-7, leaf
        first += size


@pytest.mark.parametrize("bits", [2, 4])
def test_written_weights_are_read_back_bit_for_bit(tmp_path, bits):
    spec = QuantSpec("quip", bits)
    fmt = quant_format(spec)
    g = torch.Generator().manual_seed(0)
    x = torch.randn(512, 192, generator=g)
    packed, dense = fmt.round(torch.randn(128, 192, generator=g) * 0.03, x.t() @ x / 512)
    writer = writer_for(spec)
    tensors = writer.tensors(MODULE, QuantizedWeight(spec, 128, 192, packed))
    assert {name.rpartition(".")[2]: str(t.dtype) for name, t in tensors.items()} == {
        "Qidxs": "torch.int64", "SU": "torch.float16", "SV": "torch.float16", "Wscale": "torch.float32", "codebook_id": "torch.int64",
    }  # fmt: skip
    assert error(dense, defined(tensors, MODULE, "E8P12" if bits == 2 else "E8P12RVQ4B")) < 5e-7
    folder = save(tmp_path / "m", tensors, writer.config([]))
    weight, again = read(folder)
    assert weight.spec == spec
    for name, tensor in packed.items():
        assert torch.equal(weight.packed[name], tensor), name
    assert torch.equal(again, dense)


def test_a_checkpoint_with_plain_signs_is_written_as_it_was(tmp_path):
    g = torch.Generator().manual_seed(0)
    tensors = stored(MODULE, 128, 192)
    tensors[f"{MODULE}.SU"] = (torch.randint(0, 2, (192,), generator=g) * 2 - 1).half()
    weight, _ = read(save(tmp_path / "m", tensors))
    again = writer_for(weight.spec).tensors(MODULE, weight)
    assert set(again) == set(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(again[name], tensor), name


def test_an_unquantized_module_is_told_apart(tmp_path):
    folder = save(tmp_path / "m", stored(MODULE, 128, 192) | {"lm_head.weight": torch.zeros(4, 4)})
    reader = open_checkpoint(folder)
    assert reader.holds(MODULE)
    assert not reader.holds("lm_head")
    with pytest.raises(QuantError, match=r"model\.layers\.9\.mlp\.down_proj\.Qidxs is missing"):
        reader.holds("model.layers.9.mlp.down_proj")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"codebook_version": 0}, "codebook_version=0 cannot be read; accepted: 1"),
        ({"codebook_version": 2}, "codebook_version=2"),
        ({"codebook": "HI4B1C"}, "codebook='HI4B1C' .* E8P12, E8P12RVQ4B"),
        ({"lora_rank": 64}, "lora_rank=64"),
        ({"codesz": 4}, "codesz=4"),
        ({"resid_scale_override": "x"}, "resid_scale_override='x'"),
        ({"resid_scale_override": float("inf")}, "resid_scale_override=inf cannot be read; a finite number is accepted"),
    ],
    ids=str,
)
def test_configurations_that_cannot_be_read(tmp_path, changes, words):
    with pytest.raises(QuantError, match=words):
        open_checkpoint(save(tmp_path / "m", stored(MODULE, 128, 192), **changes))


def test_a_missing_codebook_version_is_an_old_checkpoint(tmp_path):
    params = {name: value for name, value in PARAMS.items() if name != "codebook_version"}
    with pytest.raises(QuantError, match="codebook_version=0"):
        open_checkpoint(save(tmp_path / "m", stored(MODULE, 128, 192), params))


def broken_su(t):
    t[f"{MODULE}.SU"][3] = float("inf")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda t: t.pop(f"{MODULE}.SV"), r"down_proj\.SV is missing"),
        (lambda t: t.update({f"{MODULE}.Qidxs": torch.zeros(128, 5, dtype=torch.int64)}), r"Qidxs has the shape \[128, 5\]; \[128, 6\]"),
        (lambda t: t.update({f"{MODULE}.Qidxs": torch.zeros(128, 6, dtype=torch.int32)}), "Qidxs is int32; int64"),
        (lambda t: t.update({f"{MODULE}.codebook_id": torch.tensor(17)}), "codebook_id is 17; 7 is accepted"),
        (broken_su, "SU holds inf or nan"),
        (lambda t: t.update({f"{MODULE}.Wscale": torch.tensor(float("nan"))}), "Wscale holds inf or nan"),
    ],
    ids=["missing", "shape", "dtype", "codebook", "inf", "scale"],
)
def test_broken_tensors_are_named(tmp_path, damage, words):
    tensors = stored(MODULE, 128, 192)
    damage(tensors)
    with pytest.raises(QuantError, match=words):
        open_checkpoint(save(tmp_path / "m", tensors)).load(MODULE)


def test_a_scale_may_be_of_any_float_type(tmp_path):
    tensors = stored(MODULE, 128, 192)
    want = open_checkpoint(save(tmp_path / "a", tensors)).load(MODULE).packed["SU"]
    tensors[f"{MODULE}.Wscale"] = tensors[f"{MODULE}.Wscale"].double()
    assert torch.equal(open_checkpoint(save(tmp_path / "b", tensors)).load(MODULE).packed["SU"], want)


def test_a_rescaling_by_zero_is_refused(tmp_path):
    tensors = stored(MODULE, 128, 192) | {f"{MODULE}.scaleWH": torch.arange(192.0)}
    with pytest.raises(QuantError, match=r"scaleWH holds 0, by which"):
        open_checkpoint(save(tmp_path / "m", tensors, rescale_WH=True)).load(MODULE)


def test_fused_sizes_must_fit_the_model(tmp_path):
    module = "model.layers.0.self_attn.qkv_proj"
    with pytest.raises(QuantError, match=r"192 rows; 128 \+ 64 \+ 64"):
        open_checkpoint(save(tmp_path / "m", stored(module, 192, 128))).load("model.layers.0.self_attn.k_proj")


def test_what_cannot_be_written():
    with pytest.raises(QuantError, match="bits=3"):
        writer_for(QuantSpec("quip", 3))
    spec = QuantSpec("quip", 2, part=(256, 0))
    with pytest.raises(QuantError, match="fused"):
        writer_for(QuantSpec("quip", 2)).tensors("q_proj", QuantizedWeight(spec, 128, 128, {}))


FUSED = {
    "self_attn.qkv_proj": {"q_proj": 128, "k_proj": 64, "v_proj": 64}, "self_attn.o_proj": None,
    "mlp.upgate_proj": {"up_proj": 192, "gate_proj": 192}, "mlp.down_proj": None,
}  # fmt: skip


@torch.no_grad()
def test_a_published_model_loads_and_computes_what_its_definition_says(tmp_path):
    """Fused modules in every layer, against transformers' own model with the defined weights put in."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from lowvram_tuner.models.load import load_model
    from tests.engine_cases import make_plan

    config = LlamaConfig(**CONFIG, num_hidden_layers=2, vocab_size=64, tie_word_embeddings=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        theirs = LlamaForCausalLM(config).eval()
    tensors = {n: t.clone() for n, t in theirs.state_dict().items() if "proj" not in n and n != "lm_head.weight"}
    for index, layer in enumerate(theirs.model.layers):
        for name, members in FUSED.items():
            module = f"model.layers.{index}.{name}"
            rows, columns = (sum(members.values()), 128) if members else (128, 192 if "down" in name else 128)
            tensors |= stored(module, rows, columns, seed=index)
            tensors[f"{module}.Wscale"] = torch.tensor(0.05)
            w, first = defined(tensors, module), 0
            for leaf, size in (members or {name.partition(".")[2]: rows}).items():
                layer.get_submodule(f"{name.partition('.')[0]}.{leaf}").weight.copy_(w[first : first + size])
                first += size
    folder = save(tmp_path / "m", tensors)
    (folder / "config.json").write_text(json.dumps(config.to_dict() | {"quip_params": PARAMS}))
    loaded = load_model(str(folder), QuantSpec("quip", 2), make_plan(), torch.device("cpu"), torch.float32)
    ids = torch.arange(40)[None]
    torch.testing.assert_close(loaded.model(ids).logits, theirs(ids).logits, rtol=1e-4, atol=1e-4)
    attention = loaded.layers[0].self_attn
    assert attention.q_proj.packed["codes"].data_ptr() == attention.v_proj.packed["codes"].data_ptr()
    linears = [(256, 128), (128, 128), (384, 128), (128, 192)]
    fmt = quant_format(QuantSpec("quip", 2))
    aligned = loaded.slabs[0].buffer.numel() - sum(fmt.nbytes(*shape) for shape in linears) - 4 * 128 * 3  # an SU for each member
    assert 0 <= aligned < 18 * 512  # codes are held once, whatever is shared
