"""A GGUF's shape from its header alone: as transformers reads it, without the vocabulary, and one sentence for what is damaged."""

from __future__ import annotations

import dataclasses
import sys

import pytest

from lowvram_tuner.config import ConfigError
from lowvram_tuner.models import gguf_header
from lowvram_tuner.models.catalogue import shape_of
from lowvram_tuner.models.gguf_header import Array, read_header

HEADERS = {  # architecture, and what it says beside the usual
    "llama": {}, "qwen2": {}, "qwen3": {"attention.key_length": 32}, "gemma2": {"attention.key_length": 256},
}  # fmt: skip


def write(path, arch, head=True, more=None, words=300):
    """A GGUF without weights worth the name."""
    import numpy
    from gguf import GGUFWriter

    writer = GGUFWriter(path, arch)
    writer.add_array("tokenizer.ggml.tokens", [f"word {i}" for i in range(words)])
    writer.add_array("tokenizer.ggml.scores", [0.5] * words)
    writer.add_context_length(2048)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(128)
    writer.add_block_count(2)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    for key, value in (more or HEADERS.get(arch, {})).items():
        writer.add_uint32(f"{arch}.{key}", value)
    for name in ("token_embd.weight", *(["output.weight"] if head else [])):
        writer.add_tensor(name, numpy.zeros((4, 64), dtype=numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_the_demos_is_what_its_own_config_says(demo_gguf):
    shape = shape_of(str(demo_gguf))
    assert dataclasses.replace(shape, name="") == dataclasses.replace(shape_of("demo"), name="")
    assert shape.name == demo_gguf.stem


def test_values_are_those_of_the_librarys_reader(demo_gguf):
    from gguf import GGUFReader

    theirs = GGUFReader(demo_gguf)
    values, tensors = read_header(demo_gguf)
    assert tensors == {t.name for t in theirs.tensors}
    fields = {name: field for name, field in theirs.fields.items() if not name.startswith("GGUF.")}
    assert values.keys() == fields.keys()
    for name, field in fields.items():
        value = values[name]
        assert value == (Array(len(field.data)) if isinstance(value, Array) else field.contents()), name


def test_it_needs_no_library(demo_gguf, monkeypatch):
    """The page's process has neither time nor room for gguf's own reader."""
    monkeypatch.setitem(sys.modules, "gguf", None)
    gguf_header._read.cache_clear()
    assert shape_of(str(demo_gguf)).num_hidden_layers == 30


@pytest.mark.parametrize("arch", HEADERS)
@pytest.mark.parametrize("head", [True, False])
def test_families(arch, head, tmp_path):
    write(tmp_path / "a.gguf", arch, head)
    for name in (tmp_path, tmp_path / "a.gguf"):
        shape = shape_of(str(name))
        assert (shape.family, shape.hidden_size, shape.intermediate_size, shape.num_hidden_layers) == (arch, 64, 128, 2)
        assert (shape.num_attention_heads, shape.num_key_value_heads, shape.vocab_size) == (4, 2, 300)
        assert shape.head_dim == HEADERS[arch].get("attention.key_length", 16) and shape.tie_word_embeddings is not head
        assert shape.attention_bias == (arch == "qwen2") and shape.max_position_embeddings == 2048


def test_experts_are_refused(tmp_path):
    write(tmp_path / "a.gguf", "llama", more={"expert_count": 8})
    with pytest.raises(ConfigError, match=r"a is a mixture of experts \(num_experts=8\); take a dense model"):
        shape_of(str(tmp_path / "a.gguf"))


def test_a_value_by_layer_is_no_plain_one(tmp_path):
    """Some families give each layer another width: no shape that can be planned."""
    from gguf import GGUFWriter

    writer = GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_array("llama.feed_forward_length", [128, 256])
    for key in ("embedding_length", "block_count", "attention.head_count", "vocab_size"):
        writer.add_uint32(f"llama.{key}", 2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(ConfigError, match="a lacks what a decoder-only model's config has"):
        shape_of(str(tmp_path / "a.gguf"))


def test_damage_is_one_sentence(tmp_path):
    whole = write(tmp_path / "whole.gguf", "llama").read_bytes()
    header = whole.index(b"output.weight") + 30
    wrong = {"magic": b"GGML" + whole[4:], "version": whole[:4] + b"\x01" + whole[5:], "counts": whole[:8] + b"\xff" * 8 + whole[16:], "empty": b""}
    at = whole.index(b"llama.block_count") + len(b"llama.block_count")
    wrong["type"] = whole[:at] + b"\x63" + whole[at + 1 :]
    wrong |= {f"cut at {at}": whole[:at] for at in (*range(1, header, 97), header)}
    for name, data in wrong.items():
        file = tmp_path / f"{name}.gguf"
        file.write_bytes(data)
        with pytest.raises(ConfigError, match=r"is no whole GGUF file of version 2 or 3 \(.+\); download it again\.$"):
            shape_of(str(file))
