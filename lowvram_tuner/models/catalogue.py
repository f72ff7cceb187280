"""Shapes of models: what the planner and the gauge need to know of one, without torch and without its weights.

A `ModelShape` comes from a model's config.json, from a GGUF's header, or from the catalogue of well-known models below,
so that the gauge answers before anything is downloaded.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path

from lowvram_tuner.config import DEMO_MODEL, ConfigError
from lowvram_tuner.models.gguf_header import shape_values


@dataclass(frozen=True)
class ModelShape:
    """The dimensions of a decoder-only transformer. `linears()` lists the frozen weights of one layer."""

    name: str
    family: str  # transformers' model_type
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    max_position_embeddings: int = 4096

    def linears(self) -> dict[str, tuple[int, int]]:
        """(out_features, in_features) of the seven linears of a layer, by name."""
        h, i = self.hidden_size, self.intermediate_size
        q, kv = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        return {
            "q_proj": (q, h), "k_proj": (kv, h), "v_proj": (kv, h), "o_proj": (h, q),
            "gate_proj": (i, h), "up_proj": (i, h), "down_proj": (h, i),
        }  # fmt: skip

    def group_for(self, group_size: int) -> int:
        """The largest group of at most `group_size` columns that divides every linear's inputs; -1, a whole row, if none."""
        inputs = {i for _, i in self.linears().values()}
        fitting = [g for g in (128, 64, 32) if g <= group_size and all(i % g == 0 for i in inputs)]
        return fitting[0] if fitting else -1

    @property
    def parameters(self) -> int:
        """Weights in linears, embeddings and head."""
        per_layer = sum(o * i for o, i in self.linears().values())
        tables = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        return per_layer * self.num_hidden_layers + tables


# id, family, hidden, intermediate, layers, heads, kv heads, head_dim, vocabulary, tied, qkv bias, positions: from each
# model's public config.json.
_KNOWN = """
HuggingFaceTB/SmolLM2-135M-Instruct llama 576 1536 30 9 3 64 49152 1 0 8192
HuggingFaceTB/SmolLM2-360M-Instruct llama 960 2560 32 15 5 64 49152 1 0 8192
HuggingFaceTB/SmolLM2-1.7B-Instruct llama 2048 8192 24 32 32 64 49152 1 0 8192
TinyLlama/TinyLlama-1.1B-Chat-v1.0 llama 2048 5632 22 32 4 64 32000 0 0 2048
meta-llama/Llama-3.2-1B-Instruct llama 2048 8192 16 32 8 64 128256 1 0 131072
meta-llama/Llama-3.2-3B-Instruct llama 3072 8192 28 24 8 128 128256 1 0 131072
meta-llama/Llama-3.1-8B-Instruct llama 4096 14336 32 32 8 128 128256 0 0 131072
meta-llama/Llama-2-7b-chat-hf llama 4096 11008 32 32 32 128 32000 0 0 4096
meta-llama/Llama-2-13b-chat-hf llama 5120 13824 40 40 40 128 32000 0 0 4096
huggyllama/llama-30b llama 6656 17920 60 52 52 128 32000 0 0 2048
huggyllama/llama-65b llama 8192 22016 80 64 64 128 32000 0 0 2048
meta-llama/Llama-2-70b-chat-hf llama 8192 28672 80 64 8 128 32000 0 0 4096
mistralai/Mistral-7B-Instruct-v0.3 mistral 4096 14336 32 32 8 128 32768 0 0 32768
Qwen/Qwen2.5-0.5B-Instruct qwen2 896 4864 24 14 2 64 151936 1 1 32768
Qwen/Qwen2.5-1.5B-Instruct qwen2 1536 8960 28 12 2 128 151936 1 1 32768
Qwen/Qwen2.5-3B-Instruct qwen2 2048 11008 36 16 2 128 151936 1 1 32768
Qwen/Qwen2.5-7B-Instruct qwen2 3584 18944 28 28 4 128 152064 0 1 32768
Qwen/Qwen3-0.6B qwen3 1024 3072 28 16 8 128 151936 1 0 40960
Qwen/Qwen3-1.7B qwen3 2048 6144 28 16 8 128 151936 1 0 40960
Qwen/Qwen3-4B qwen3 2560 9728 36 32 8 128 151936 1 0 40960
Qwen/Qwen3-8B qwen3 4096 12288 36 32 8 128 151936 0 0 40960
Qwen/Qwen3-14B qwen3 5120 17408 40 40 8 128 151936 0 0 40960
Qwen/Qwen3-32B qwen3 5120 25600 64 64 8 128 151936 0 0 40960
google/gemma-2-2b-it gemma2 2304 9216 26 8 4 256 256000 1 0 8192
google/gemma-2-9b-it gemma2 3584 14336 42 16 8 256 256000 1 0 8192
microsoft/Phi-3.5-mini-instruct phi3 3072 8192 32 32 32 96 32064 0 0 131072
"""
LARGEST = 1 << 30  # of any dimension
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_ALIASES = {DEMO_MODEL: "HuggingFaceTB/SmolLM2-135M-Instruct"}


def catalogue() -> dict[str, ModelShape]:
    """The well-known models by hub id, small to large within a family."""
    shapes = {}
    for line in _KNOWN.split("\n"):
        if line:
            name, family, *numbers = line.split()
            h, i, n, heads, kv, dim, vocab, tied, bias, positions = map(int, numbers)
            shapes[name] = ModelShape(name, family, h, i, n, heads, kv, dim, vocab, bool(tied), bool(bias), positions)
    return shapes


def shape_of(model: str) -> ModelShape:
    """The shape of the demo model, a catalogue id, a local folder with a config.json or a GGUF, or one of these files itself.

    Raises ConfigError when the model is none of these.
    """
    known = catalogue()
    if _ALIASES.get(model, model) in known:
        return known[_ALIASES.get(model, model)]
    by_tail = {name.split("/")[-1].lower(): shape for name, shape in known.items()}
    if model.lower() in by_tail:
        return by_tail[model.lower()]
    path = Path(model).expanduser()
    if path.is_dir():
        path = next((p for p in (path / "config.json", *sorted(path.glob("*.gguf"))) if p.is_file()), path)
    if path.suffix == ".json" and path.is_file():
        return shape_from_config(path)
    if path.suffix == ".gguf" and path.is_file():
        return shape_from_values(shape_values(path), path.stem)
    raise ConfigError(
        f"model={model!r} is neither 'demo', a folder with a config.json or a *.gguf, nor a model this program knows; "
        "download it first or give its folder."
    )


def shape_from_config(path: Path, name: str = "") -> ModelShape:
    """The shape that a transformers config.json describes. `name`: of the model, where the folder's says nothing."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read as JSON ({error}); give a transformers config.json.") from None
    return shape_from_values(raw, name or path.parent.name)


def shape_from_values(raw: dict, name: str) -> ModelShape:
    """The shape in the values of a transformers config; `name` stands in when they name no model."""
    if not isinstance(raw, dict) or not isinstance(raw.get("text_config") or {}, dict):
        raise ConfigError(f"the config of {name} is no JSON object of names and values; give a transformers config.json.")
    raw = {**raw, **(raw.get("text_config") or {})}
    if experts := next((key for key in _EXPERTS if raw.get(key)), ""):
        raise ConfigError(f"{name} is a mixture of experts ({experts}={raw[experts]}); take a dense model, these are not trained here.")
    try:
        heads = int(raw["num_attention_heads"])
        shape = ModelShape(
            name=raw.get("_name_or_path") or name,
            family=str(raw["model_type"]),
            hidden_size=int(raw["hidden_size"]),
            intermediate_size=int(raw["intermediate_size"]),
            num_hidden_layers=int(raw["num_hidden_layers"]),
            num_attention_heads=heads,
            num_key_value_heads=int(raw.get("num_key_value_heads") or heads),
            head_dim=int(raw.get("head_dim") or raw["hidden_size"] // heads),
            vocab_size=int(raw["vocab_size"]),
            tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
            attention_bias=bool(raw.get("attention_bias", raw["model_type"] == "qwen2")),
            max_position_embeddings=int(raw.get("max_position_embeddings", 4096)),
        )
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        raise ConfigError(f"{name} lacks what a decoder-only model's config has ({error}); it cannot be planned.") from None
    for field in fields(shape):  # a stranger wrote them
        value = getattr(shape, field.name)
        if type(value) is int and not 1 <= value <= LARGEST:
            raise ConfigError(f"{name} has {field.name}={value}; 1 to {LARGEST} is accepted.")
    return shape
