"""Checkpoints on disk: what each format stores is read without changing a weight, written as others read it, and anything
wrong is named in one line."""

import json
from copy import copy

import pytest
import torch
from safetensors.torch import load_file, save_file

from kernels import packing
from lowvram_tuner.quant.checkpoint import QuantizedWeight, open_checkpoint, writer_for
from lowvram_tuner.quant.checkpoints.files import TensorFiles, write_shards
from lowvram_tuner.quant.checkpoints.gptq import GPTQWriter
from lowvram_tuner.quant.registry import quant_format
from lowvram_tuner.quant.spec import QuantError, QuantSpec

MODULE = "model.layers.0.mlp.up_proj"
ROWS, COLS = 64, 96
BITS = (2, 3, 4, 8)


def folder(path, tensors, config, name="config.json"):
    path.mkdir(exist_ok=True)
    save_file({k: t.contiguous() for k, t in tensors.items()}, path / "model.safetensors")
    body = {"quantization_config": config} if name == "config.json" else config
    (path / name).write_text(json.dumps(body))
    return path


def weight():
    return torch.randn(ROWS, COLS, generator=torch.Generator().manual_seed(0)).mul_(0.05)


def dequantized(found: QuantizedWeight):
    return quant_format(found.spec).dequantize(found.packed, torch.empty(found.out_features, found.in_features))


SPECS = [
    *(QuantSpec("gptq", bits, size, sym=sym) for bits in BITS for size, sym in ((32, True), (-1, False))),
    QuantSpec("gptq", 4, 32, desc_act=True, sym=False),
    *(QuantSpec("hqq", bits, 32, axis=axis) for bits in BITS for axis in (0, 1)),
    QuantSpec("hqq", 3, -1),
    QuantSpec("nf4", 4),
    QuantSpec("nf4", 4, double_quant=False),
    QuantSpec("int8", 8),
]


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"{s.method}-{s.bits}-{s.group_size}-{s.axis}{s.sym}{s.desc_act}{s.double_quant}")
def test_written_and_read_again(tmp_path, spec):
    fmt, writer = quant_format(spec), writer_for(spec)
    inputs = torch.randn(200, COLS)
    packed, _ = fmt.round(weight(), inputs.t() @ inputs / 200)
    before = QuantizedWeight(spec, ROWS, COLS, packed)
    reader = open_checkpoint(folder(tmp_path, writer.tensors(MODULE, before), writer.config(["lm_head"])))
    assert reader.holds(MODULE)
    after = reader.load(MODULE)
    assert (after.out_features, after.in_features) == (ROWS, COLS)
    assert torch.equal(dequantized(after), dequantized(before))
    layout = quant_format(after.spec).layout(ROWS, COLS)
    assert {k: (tuple(t.shape), str(t.dtype)[6:]) for k, t in after.packed.items()} == {k: (t.shape, t.dtype) for k, t in layout.items()}
    assert reader.spec.method == spec.method and reader.spec.bits == spec.bits


# ---- GPTQ, from the definition on the format's page -------------------------------------------------------------------


def stored_gptq(bits, layout="gptq", zeros=None, g_idx=None, size=32, drop=()):
    """(tensors on disk, W as the page defines it), packed here bit by bit."""
    g = torch.Generator().manual_seed(bits)
    q = torch.randint(0, 2**bits, (COLS, ROWS), generator=g)
    q[0] = 2**bits - 1
    groups = -(-COLS // size)
    z = torch.randint(0, 2**bits, (groups, ROWS), generator=g) if zeros is None else torch.full((groups, ROWS), zeros)
    s = torch.rand(groups, ROWS, generator=g).mul_(0.01).half()
    index = torch.arange(COLS) // size if g_idx is None else g_idx
    w = (s.float()[index] * (q - z[index])).t()
    fields = (z - 1) % 2**bits if layout == "gptq" else z
    pack = bits == 3 and layout == "gptq_p"
    rows = [packing.pack_planar(t) if pack else _stream(t, bits) for t in (q.t(), fields)]
    tensors = {"qweight": rows[0].t(), "qzeros": rows[1], "scales": s, "g_idx": index.to(torch.int32)}
    return {f"{MODULE}.{k}": t.contiguous() for k, t in tensors.items() if k not in drop}, w


def _stream(codes, bits):
    """Packs along the last dimension by Python integers."""
    out = []
    for row in codes.tolist():
        whole = sum(code << bits * j for j, code in enumerate(row))
        out.append([(whole >> 32 * k) & 0xFFFFFFFF for k in range(len(row) * bits // 32)])
    return torch.tensor(out).to(torch.int32)


def config(bits, **more):
    return {"quant_method": "gptq", "bits": bits, "group_size": 32, "desc_act": False, "sym": False, **more}


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("layout", ["gptq", "gptq_v2", "gptq_p"])
@pytest.mark.parametrize("name", ["config.json", "quantize_config.json", "quant_config.json"])
def test_gptq_layouts(tmp_path, bits, layout, name):
    tensors, w = stored_gptq(bits, layout)
    found = open_checkpoint(folder(tmp_path, tensors, config(bits, checkpoint_format=layout), name)).load(MODULE)
    assert torch.equal(dequantized(found), w)
    assert found.spec == QuantSpec("gptq", bits, 32, sym=False)


def test_v1_zeros_wrap_around_and_do_not_carry(tmp_path):
    """A zero of 0 is stored as 15 beside other fields: adding 1 to the packed word would carry into the next."""
    tensors, w = stored_gptq(4, "gptq", zeros=0)
    assert (tensors[f"{MODULE}.qzeros"] == -1).all()
    assert torch.equal(dequantized(open_checkpoint(folder(tmp_path, tensors, config(4))).load(MODULE)), w)


def test_unsorted_groups_and_symmetry_are_found_in_the_tensors(tmp_path):
    shuffled = torch.arange(COLS).div(32, rounding_mode="floor")[torch.randperm(COLS, generator=torch.Generator().manual_seed(0))]
    tensors, w = stored_gptq(4, "gptq", zeros=8, g_idx=shuffled)
    found = open_checkpoint(folder(tmp_path, tensors, config(4, desc_act=True))).load(MODULE)
    assert found.spec.desc_act and found.spec.sym and set(found.packed) == {"qweight", "scales", "g_idx"}
    assert torch.equal(dequantized(found), w)


def test_sorted_groups_need_no_g_idx(tmp_path):
    tensors, w = stored_gptq(4, drop=("g_idx",))
    assert torch.equal(dequantized(open_checkpoint(folder(tmp_path, tensors, config(4))).load(MODULE)), w)


def test_a_last_group_may_be_shorter(tmp_path):
    tensors, w = stored_gptq(4, size=64)
    assert torch.equal(dequantized(open_checkpoint(folder(tmp_path, tensors, config(4, group_size=64))).load(MODULE)), w)


def test_overrides_by_module(tmp_path):
    tensors, w = stored_gptq(8)
    overrides = {"-:.*o_proj": {}, "+:.*down_proj": {"bits": 2}, r".*\.up_proj": {"bits": 8}}
    reader = open_checkpoint(folder(tmp_path, tensors, config(4, dynamic=overrides)))
    assert torch.equal(dequantized(reader.load(MODULE)), w)


def test_writer_restores_the_words_of_the_file(tmp_path):
    for layout in ("gptq", "gptq_v2"):
        for bits in BITS:
            tensors, _ = stored_gptq(bits, layout)
            found = open_checkpoint(folder(tmp_path, tensors, config(bits, checkpoint_format=layout))).load(MODULE)
            for name, tensor in GPTQWriter(found.spec, layout).tensors(MODULE, found).items():
                assert torch.equal(tensor, tensors[name]), name


def test_modules_without_quantization_are_plain(tmp_path):
    tensors, _ = stored_gptq(4)
    reader = open_checkpoint(folder(tmp_path, {**tensors, "lm_head.weight": torch.ones(2, 2)}, config(4)))
    assert reader.holds(MODULE) and not reader.holds("lm_head")
    with pytest.raises(QuantError, match=r"tensor model.norm.qweight is missing, and so is model.norm.weight"):
        reader.holds("model.norm")


def broken(change):
    tensors, _ = stored_gptq(4)
    return change({k.rpartition(".")[2]: t for k, t in tensors.items()})


BROKEN = {
    "missing scales": (lambda t: {k: v for k, v in t.items() if k != "scales"}, "tensor .*scales is missing"),
    "missing qzeros": (lambda t: {k: v for k, v in t.items() if k != "qzeros"}, "tensor .*qzeros is missing"),
    "g_idx too large": (lambda t: t | {"g_idx": t["g_idx"] + 1}, "g_idx holds the group 3; 0 to 2 are accepted"),
    "g_idx negative": (lambda t: t | {"g_idx": t["g_idx"] - 1}, "g_idx holds the group -1; 0 to 2 are accepted"),
    "g_idx short": (lambda t: t | {"g_idx": t["g_idx"][:-1]}, "qweight has 12 rows of words; 11.875 are accepted for 95 inputs at 4 bits"),
    "scales shape": (lambda t: t | {"scales": t["scales"][:, 1:]}, r"scales has the shape \[3, 63\]; \[any, 64\] is accepted"),
    "scales groups": (lambda t: t | {"scales": t["scales"][1:]}, "scales has 2 groups; 3 are accepted with group_size=32"),
    "scales type": (lambda t: t | {"scales": t["scales"].to(torch.int32)}, "scales is int32; float16 or bfloat16 or float32 is accepted"),
    "scales not finite": (lambda t: t | {"scales": t["scales"] * torch.inf}, "scales holds inf or nan; finite numbers are accepted"),
    "qweight type": (lambda t: t | {"qweight": t["qweight"].float()}, "qweight is float32; int32 is accepted"),
    "qzeros shape": (lambda t: t | {"qzeros": t["qzeros"][:, 1:]}, r"qzeros has the shape \[3, 7\]; \[3, 8\] is accepted"),
}


@pytest.mark.parametrize("case", BROKEN, ids=str)
def test_damaged_gptq_is_named(tmp_path, case):
    change, message = BROKEN[case]
    tensors = {f"{MODULE}.{k}": v for k, v in broken(change).items()}
    with pytest.raises(QuantError, match=message) as caught:
        open_checkpoint(folder(tmp_path, tensors, config(4))).load(MODULE)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"bits": 5}, "bits=5 cannot be read; accepted: 2, 3, 4, 8"),
        ({"bits": "4"}, "bits='4' cannot be read"),
        ({"checkpoint_format": "marlin"}, "checkpoint_format='marlin' cannot be read; accepted: gptq, gptq_v2, gptq_p"),
        ({"format": "exl2"}, "format='exl2' cannot be read"),
        ({"group_size": 0}, "group_size=0 cannot be read"),
        ({"pack_dtype": "int8"}, "pack_dtype='int8' cannot be read; accepted: int32"),
        ({"quant_method": "awq"}, "quant_method='awq' cannot be read; accepted: bitsandbytes, gptq, hqq, quip"),
        ({"dynamic": {".*": {"bits": 7}}}, "dynamic '.*' has bits=7"),
    ],
)
def test_unknown_configurations_are_refused(tmp_path, values, message):
    path = folder(tmp_path, stored_gptq(4)[0], config(4) | values)
    with pytest.raises(QuantError) as caught:
        open_checkpoint(path).load(MODULE)
    assert message in str(caught.value) and "config.json" in str(caught.value)


def test_desc_act_without_g_idx_is_refused(tmp_path):
    with pytest.raises(QuantError, match="g_idx is missing, and desc_act=True needs it"):
        open_checkpoint(folder(tmp_path, stored_gptq(4, drop=("g_idx",))[0], config(4, desc_act=True))).load(MODULE)


# ---- files ------------------------------------------------------------------------------------------------------------


def test_no_quantization_is_no_reader(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert open_checkpoint(tmp_path) is None


def test_pickles_are_refused_with_the_reason(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(QuantError, match=r"pytorch_model.bin is a pickle, which can run any code when opened"):
        TensorFiles(tmp_path)


def test_a_truncated_file_is_named(tmp_path):
    path = folder(tmp_path, stored_gptq(4)[0], config(4)) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(QuantError, match=r"model.safetensors: it is not a whole safetensors file"):
        open_checkpoint(tmp_path).load(MODULE)


def test_a_missing_shard_is_named(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}}))
    with pytest.raises(QuantError, match=r"lists the file 'model-00001-of-00002.safetensors', which is not in"):
        TensorFiles(tmp_path)


def test_an_index_cannot_point_out_of_the_folder(tmp_path):
    (tmp_path / "outside.safetensors").write_bytes(b"")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../outside.safetensors"}}))
    with pytest.raises(QuantError, match=r"lists the file '../outside.safetensors'"):
        TensorFiles(tmp_path / "in")


def test_shards_hold_every_tensor_once(tmp_path):
    tensors = {f"t{n}": torch.full((100,), float(n)) for n in range(7)}
    paths = write_shards(tmp_path, tensors.items(), shard_bytes=900)
    assert [p.name for p in paths] == [f"model-0000{n}-of-00004.safetensors" for n in range(1, 5)]
    files = TensorFiles(tmp_path)
    assert sorted(files.where) == sorted(tensors)
    assert all(torch.equal(files.get(n), t) for n, t in tensors.items())
    assert not list(tmp_path.glob("*.tmp"))


# ---- bitsandbytes and HQQ ---------------------------------------------------------------------------------------------


def test_bitsandbytes_4bit_state_is_the_one_it_writes_itself(tmp_path):
    functional = pytest.importorskip("bitsandbytes.functional")
    w = weight().half()
    data, state = functional.quantize_4bit(w, blocksize=64, quant_type="nf4", compress_statistics=True)
    theirs = {f"{MODULE}.weight.{k}": t for k, t in state.as_dict(packed=True).items()} | {f"{MODULE}.weight": data}
    reader = open_checkpoint(
        folder(tmp_path, theirs, {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"})
    )
    found = reader.load(MODULE)
    by_block = copy(state)  # 64x96 comes out wrong of 0.50.2 on processors with AVX-512
    by_block.shape = torch.Size((w.numel() // 64, 64))
    expected = functional.dequantize_4bit(data, by_block).float().view(w.shape)
    assert (dequantized(found) - expected).abs().max() <= expected.abs().max() * 2**-11  # theirs is rounded to fp16
    ours = writer_for(found.spec).tensors(MODULE, found)
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        if "quant_state" in name:
            assert json.loads(bytes(ours[name].tolist())) == json.loads(bytes(tensor.tolist()))
        else:
            assert ours[name].dtype == tensor.dtype and torch.equal(ours[name], tensor), name
    as_bf16 = {k: t.view(1, -1).view(torch.bfloat16) if k == f"{MODULE}.weight" else t for k, t in theirs.items()}
    again = open_checkpoint(folder(tmp_path, as_bf16, {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}))
    assert torch.equal(dequantized(again.load(MODULE)), dequantized(found))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("weight.absmax", lambda t: t[:-1], r"absmax has the shape \[95\]; \[96\] is accepted"),
        ("weight.quant_map", lambda t: t[:8], r"quant_map has the shape \[8\]; \[16\] is accepted"),
        ("weight.nested_absmax", lambda t: t * torch.nan, "absmax holds inf or nan; finite numbers are accepted"),
        ("weight.quant_map", lambda t: t / 0, "quant_map holds inf or nan; finite numbers are accepted"),
        ("weight", lambda t: t[:-1], "holds 3071 bytes; 3072 are accepted for 64x96"),
        ("weight.quant_state.bitsandbytes__nf4", lambda t: t[:-3], "is no quantization state"),
        (
            "weight.quant_state.bitsandbytes__nf4",
            lambda t: _json(shape=[ROWS, COLS], nested_offset=float("nan")),
            "has nested_offset=nan; a finite number is needed",
        ),
        ("weight.quant_state.bitsandbytes__nf4", lambda t: _json(blocksize=128, shape=[ROWS, COLS]), "has blocksize=128; 64 is accepted"),
    ],
)
def test_damaged_4bit_is_named(tmp_path, name, change, message):
    spec = QuantSpec("nf4", 4)
    packed = quant_format(spec).quantize(weight())
    tensors = writer_for(spec).tensors(MODULE, QuantizedWeight(spec, ROWS, COLS, packed))
    tensors[f"{MODULE}.{name}"] = change(tensors[f"{MODULE}.{name}"])
    with pytest.raises(QuantError, match=message):
        open_checkpoint(folder(tmp_path, tensors, writer_for(spec).config([]))).load(MODULE)


def _json(**values):
    return torch.tensor(list(json.dumps(values).encode()), dtype=torch.uint8)


def test_8bit_of_another_memory_layout_is_refused(tmp_path):
    spec = QuantSpec("int8", 8)
    tensors = writer_for(spec).tensors(MODULE, QuantizedWeight(spec, ROWS, COLS, quant_format(spec).quantize(weight())))
    tensors[f"{MODULE}.weight_format"] = torch.tensor(2, dtype=torch.uint8)  # 0: row-major
    with pytest.raises(QuantError, match="weight_format is 2; 0 is accepted"):
        open_checkpoint(folder(tmp_path, tensors, writer_for(spec).config([]))).load(MODULE)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("bits", BITS)
def test_hqq_by_its_definition(tmp_path, bits, axis):
    """W = ((unpack(W_q) - zero) * scale).reshape(shape), with W_q seen as a float type, as HQQ may store it."""
    size = 32
    shape = (ROWS * COLS // size, size) if axis == 1 else (size, ROWS * COLS // size)
    g = torch.Generator().manual_seed(bits)
    q = torch.randint(0, 2**bits, shape, generator=g, dtype=torch.uint8)
    column = (shape[0], 1) if axis == 1 else (1, shape[1])
    scale, zero = torch.rand(column, generator=g).half(), torch.randn(column, generator=g).half()
    stored = packing.pack_chunks(q, bits)
    number = lambda n: torch.tensor(n, dtype=torch.int32)  # noqa: E731
    tensors = {
        "W_q": stored.view(torch.float32 if bits == 3 else torch.float16), "scale": scale, "zero": zero, "nbits": number(bits),
        "group_size": number(size), "axis": number(axis), "shape": torch.tensor([ROWS, COLS]), "view_as_float": number(1),
        "packing": torch.tensor(list({8: b"8bit_u8", 4: b"4bit_u8", 3: b"3bit_32", 2: b"2bit_u8"}[bits]), dtype=torch.uint8),
    }  # fmt: skip
    path = folder(tmp_path, {f"{MODULE}.{k}": t for k, t in tensors.items()}, {"quant_method": "hqq", "quant_config": {"nbits": bits}})
    found = open_checkpoint(path).load(MODULE)
    assert torch.equal(dequantized(found), ((q.float() - zero.float()) * scale.float()).reshape(ROWS, COLS))


def test_damaged_hqq_is_named(tmp_path):
    spec = QuantSpec("hqq", 4, 32)
    whole = writer_for(spec).tensors(MODULE, QuantizedWeight(spec, ROWS, COLS, quant_format(spec).quantize(weight())))
    for name, value, message in (
        ("nbits", torch.tensor(5), "nbits is 5; 2, 3, 4, 8 are accepted"),
        ("packing", _json(), "packing is '{}'; '4bit_u8' is accepted"),
        ("W_q", whole[f"{MODULE}.W_q"][1:], "W_q holds 3040 words; 3072 are accepted for 192x32 codes of 4 bits"),
        ("zero", whole[f"{MODULE}.zero"].float(), "zero is float32; float16 is accepted"),
        ("zero", whole[f"{MODULE}.zero"][1:], "zero has 191 groups; 192 are accepted, as "),
        ("zero", whole[f"{MODULE}.zero"] * torch.nan, "zero holds inf or nan; finite numbers are accepted"),
        ("scale", whole[f"{MODULE}.scale"] / 0, "scale holds inf or nan; finite numbers are accepted"),
    ):
        with pytest.raises(QuantError) as caught:
            open_checkpoint(folder(tmp_path, whole | {f"{MODULE}.{name}": value}, writer_for(spec).config([]))).load(MODULE)
        assert message in str(caught.value)


def test_stored_names_are_plain(tmp_path):
    spec = QuantSpec("gptq", 4, 32)
    packed = quant_format(spec).quantize(weight())
    path = folder(tmp_path, writer_for(spec).tensors(MODULE, QuantizedWeight(spec, ROWS, COLS, packed)), {})
    names = {name.removeprefix(MODULE + ".") for name in load_file(path / "model.safetensors")}
    assert names == {"qweight", "qzeros", "scales", "g_idx"}
