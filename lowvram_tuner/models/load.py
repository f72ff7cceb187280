"""Streaming load: from files to slabs, one weight at a time.

The model is built on the meta device, its decoder layers' linears become `QuantLinear`s, and each weight is read, moved to
the card, quantized there and copied into its layer's slab before the next one is read. The peak is therefore the slabs so
far plus one weight, and host memory holds one tensor plus the streamed slabs. On the CPU, where unpacking costs more than
memory does, a plan may have the quantized weights unpacked once, here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kernels.gather import gather_rows
from lowvram_tuner.config import ConfigError, TrainConfig
from lowvram_tuner.hardware.card import read_card
from lowvram_tuner.hardware.ram import read_ram
from lowvram_tuner.memory.allocator import cap_allocator
from lowvram_tuner.memory.budget import GB, Budget
from lowvram_tuner.memory.plan import Plan
from lowvram_tuner.memory.reading import plan_chat
from lowvram_tuner.memory.slabs import Layout, Ring, Slab, make_slab, streamed_layers
from lowvram_tuner.models.catalogue import ModelShape
from lowvram_tuner.models.hub import find_shape
from lowvram_tuner.models.kept import as_stored
from lowvram_tuner.models.source import Source, load_config, locate
from lowvram_tuner.models.weights import Weights, open_weights
from lowvram_tuner.quant.checkpoint import Reader, open_checkpoint
from lowvram_tuner.quant.linear import QuantLinear
from lowvram_tuner.quant.registry import quant_format, resolve
from lowvram_tuner.quant.spec import QuantFormat, QuantSpec, Scratch

RANDOM_ROWS = 512  # of a random weight that differ
Progress = Callable[[str, float, float], None]  # what, done, total


@dataclass
class Loaded:
    """A model ready to train or chat: transformers' module tree over slabs."""

    model: nn.Module
    source: Source
    spec: QuantSpec
    device: torch.device
    dtype: torch.dtype
    scratch: Scratch
    slabs: list[Slab]
    ring: Ring | None = None
    head: QuantLinear | None = None  # None: the head is the embedding
    config: Any = None
    notes: list[str] = field(default_factory=list)

    @property
    def layers(self) -> nn.ModuleList:
        return self.model.model.layers


def load_model(
    model: str, spec: QuantSpec, plan: Plan, device: torch.device, dtype: torch.dtype, progress: Progress | None = None
) -> Loaded:
    """Loads a model as a plan says. Raises ConfigError for files that are missing, broken or of another shape."""
    source = locate(model)
    skeleton = build_skeleton(source, dtype)
    return fill(skeleton, open_weights(source, skeleton), source, spec, plan, device, dtype, progress)


def load_for_chat(
    model: str, bits: int, method: str, adapter: Path | None, device: str | None = None, progress: Progress | None = None,
    group_size: int = 128,
) -> tuple[nn.Module, Any]:  # fmt: skip
    """(model, tokenizer) for generation, resident or streamed as the free memory asks for, the adapter attached as a PEFT
    model when one is given."""
    from lowvram_tuner.lora.adapter import load_adapter
    from lowvram_tuner.models.precision import pick_device, pick_dtype
    from lowvram_tuner.models.source import load_tokenizer

    target = torch.device(device) if device else pick_device()
    tokenizer = load_tokenizer(model)
    config = TrainConfig(model=model, bits=bits, method=method, group_size=group_size)
    plan = reading_plan(config, target, plan_chat)
    cap_allocator(target, plan)
    loaded = load_model(model, spec_for(config), plan, target, pick_dtype(target), progress)
    loaded.model.eval()
    return (load_adapter(loaded.model, adapter).model if adapter else loaded.model), tokenizer


def spec_for(config: TrainConfig) -> QuantSpec:
    """How a config's model is held: as its checkpoint stores it, or quantized on load with groups that fit its shape."""
    config = as_stored(config)
    return resolve(config.bits, config.method, group_size=find_shape(config.model).group_for(config.group_size))


def build_skeleton(source: Source, dtype: torch.dtype) -> nn.Module:
    """The model on the meta device. Only architectures that transformers itself knows are built."""
    return skeleton_from_config(load_config(source), dtype)


def skeleton_from_config(config: Any, dtype: torch.dtype) -> nn.Module:
    """A decoder-only model of that config on the meta device."""
    from transformers import AutoModelForCausalLM

    config = getattr(config, "text_config", config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the packed tensors are read by this program, not by transformers
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    if not hasattr(getattr(model, "model", None), "layers"):
        raise ConfigError(f"model_type={config.model_type!r} is not a decoder-only model with layers; use a Llama-like model.")
    return model.requires_grad_(False)


def fill(
    model: nn.Module, weights: Weights | None, source: Source, spec: QuantSpec, plan: Plan,
    device: torch.device, dtype: torch.dtype, progress: Progress | None = None,
) -> Loaded:  # fmt: skip
    """Gives a meta-device model its slabs, embeddings, head and norms. `weights` None: random ones of the right shape."""
    fmt = _format(spec, dtype)
    reader = open_checkpoint(source.folder) if weights is not None and source.gguf is None else None
    loaded = Loaded(model, source, spec, device, dtype, Scratch(_scratch_bytes(model, plan, dtype), device), [], config=model.config)
    _load_tables(loaded, weights, plan)  # first: the unpacked head is the largest single tensor, and nothing else is here yet
    layers = model.model.layers
    streamed = streamed_layers(len(layers), plan.streamed)
    hosts: dict[int, torch.Tensor] = {}
    for index, layer in enumerate(layers):
        if progress:
            progress("loading layers", index, len(layers))
        slab = _fill_layer(loaded, layer, f"model.layers.{index}", fmt, weights, reader, plan, index in streamed)
        if index in streamed:
            hosts[index] = slab.buffer
        loaded.slabs.append(slab)
    loaded.ring = _make_ring(layers, hosts, device) if hosts else None
    _load_small(model, weights, device, dtype)
    if progress:
        progress("loading layers", len(layers), len(layers))
    return loaded


def _fill_layer(
    loaded: Loaded, layer: nn.Module, prefix: str, fmt: QuantFormat, weights: Weights | None, reader: Reader | None,
    plan: Plan, pinned: bool,
) -> Slab:  # fmt: skip
    """One layer's slab, filled, with its linears replaced by views of it. A quantized checkpoint's tensors are taken as they
    are; everything else is quantized here, one weight at a time."""
    device, dtype = loaded.device, loaded.dtype
    linears = {name: m for name, m in layer.named_modules() if isinstance(m, nn.Linear)}
    stored = {n: reader.load(f"{prefix}.{n}") for n in linears if reader and reader.holds(f"{prefix}.{n}")}
    formats = {n: _format(stored[n].spec, dtype) if n in stored else fmt for n in linears}
    plain = _format(QuantSpec("none", 16), dtype)
    held = {n: plain if plan.unpacked else f for n, f in formats.items()}
    layout: Layout = {n: held[n].layout(m.out_features, m.in_features) for n, m in linears.items()}
    slab = make_slab(layout, device, pinned=pinned)
    if weights is None and loaded.slabs:  # random weights: every layer is the first one again
        slab.buffer.copy_(loaded.slabs[0].buffer)
    else:
        for name, linear in linears.items():
            shape = (linear.out_features, linear.in_features)
            if name in stored:
                if (stored[name].out_features, stored[name].in_features) != shape:
                    seen = (stored[name].out_features, stored[name].in_features)
                    raise ConfigError(f"{prefix}.{name} is stored as {seen}, but the model's config asks for {shape}.")
                packed = {k: v.to(device) for k, v in stored[name].packed.items()}
            else:
                # Of random weights a few rows are quantized, which takes less than a plan may hold, and repeated as they are held.
                few = weights is None and held[name] is formats[name]
                rows = min(shape[0], RANDOM_ROWS) if few else shape[0]
                packed = formats[name].quantize(_read(weights, f"{prefix}.{name}.weight", (rows, shape[1]), device, dtype))
                if rows < shape[0]:
                    packed = {k: _repeated(packed[k], torch.empty_like(view)) for k, view in slab.views[name].items()}
            if held[name] is not formats[name]:
                packed = {"weight": formats[name].dequantize(packed, torch.empty(shape, dtype=dtype))}
            _store(packed, slab.views[name])
    for name, linear in linears.items():
        _replace_linear(layer, name, linear, held[name], slab, loaded.scratch, weights, prefix)
    return slab


def _format(spec: QuantSpec, dtype: torch.dtype) -> Any:
    fmt = quant_format(spec)
    if spec.method == "none":
        fmt.dtype = str(dtype).removeprefix("torch.")
    return fmt


def _read(
    weights: Weights | None, name: str, shape: tuple[int, ...], device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> torch.Tensor:
    """A tensor of the checkpoint, or without one a random one, whose values are the same everywhere, on `device`.

    It keeps the stored precision, which quantizing sees; only fp32 is narrowed to `dtype` first, to halve the peak.
    """
    if weights is None:
        some = torch.empty(min(shape[0], RANDOM_ROWS), *shape[1:], dtype=torch.bfloat16)
        some.normal_(0, 0.02, generator=torch.Generator().manual_seed(len(name)))
        return _repeated(some.to(device), torch.empty(shape, dtype=torch.bfloat16, device=device))
    return weights.read(name, shape, device, dtype)


def _store(packed: dict[str, torch.Tensor], views: dict[str, torch.Tensor]) -> None:
    for name, view in views.items():
        view.copy_(packed[name].view(view.shape) if packed[name].shape != view.shape else packed[name])


def _repeated(some: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Fills `out` with the values of `some` over and over: any codes and scales of a format are a weight of it."""
    flat, values = out.view(-1), some.reshape(-1)
    for start in range(0, flat.numel(), values.numel()):
        part = flat[start : start + values.numel()]
        part.copy_(values[: part.numel()])
    return out


def _replace_linear(layer, name, linear, fmt, slab, scratch, weights, prefix) -> None:
    bias = None
    if linear.bias is not None:
        bias = _read(weights, f"{prefix}.{name}.bias", (linear.out_features,)).to(scratch.buffer.device, linear.bias.dtype)
    quantized = QuantLinear(linear.in_features, linear.out_features, fmt, bias)
    quantized.bind(slab.views[name], scratch)
    parent, _, leaf = name.rpartition(".")
    setattr(layer.get_submodule(parent), leaf, quantized)


def _make_ring(layers: nn.ModuleList, hosts: dict[int, torch.Tensor], device: torch.device) -> Ring:
    """Binds the streamed layers' linears to the ring's slots, and has transformers' own forward fetch them too."""
    ring = layers.ring = Ring(hosts, device)  # whoever walks the layers themselves finds it there
    for index in hosts:
        linears = {n: m for n, m in layers[index].named_modules() if isinstance(m, QuantLinear)}
        layout = {n: m.format.layout(m.out_features, m.in_features) for n, m in linears.items()}
        slot = make_slab(layout, device, buffer=ring.slots[ring.slot_of(index)])
        for name, linear in linears.items():
            linear.bind(slot.views[name], linear.scratch)
        layers[index].register_forward_pre_hook(lambda *_, index=index: ring.fetch(index))
    return ring


class HostEmbedding(nn.Embedding):
    """The word table in host memory while the ids are on the card. Gemma scales its rows."""

    @classmethod
    def take(cls, embedding: nn.Embedding, table: torch.Tensor) -> None:
        """Makes an embedding one over `table`, which is no parameter: the first one's device is the model's to transformers."""
        embedding.__class__ = cls
        del embedding.weight
        embedding.weight = table

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        rows = gather_rows(ids.reshape(-1), self.weight).view(*ids.shape, -1)
        scale = getattr(self, "embed_scale", None)
        return rows if scale is None else rows * scale.to(rows.dtype)


def _load_tables(loaded: Loaded, weights: Weights | None, plan: Plan) -> None:
    """Embeddings, on the card or in pinned host memory, and the head at the plan's bits; a tied head is the embedding, on the card."""
    model, device, dtype = loaded.model, loaded.device, loaded.dtype
    embedding = model.model.embed_tokens
    shape = (embedding.num_embeddings, embedding.embedding_dim)
    tied = model.config.tie_word_embeddings or (weights is not None and "lm_head.weight" not in weights.names())
    on_host = plan.embeddings_on_host and not tied and device.type == "cuda"
    table = _read(weights, "model.embed_tokens.weight", shape, "cpu" if on_host else device, dtype).to(dtype)
    if on_host:
        HostEmbedding.take(embedding, table.pin_memory())
    else:
        embedding.weight = nn.Parameter(table.to(device), requires_grad=False)
    if tied:
        model.lm_head.weight = embedding.weight
        return
    fmt = _format(resolve(plan.head_bits), dtype)
    slab = make_slab({"lm_head": fmt.layout(*shape)}, device)
    fmt.quantize_into(_read(weights, "lm_head.weight", shape).to(dtype), slab.views["lm_head"])
    loaded.head = QuantLinear(shape[1], shape[0], fmt)
    loaded.head.bind(slab.views["lm_head"], loaded.scratch)
    model.lm_head = loaded.head


def _load_small(model: nn.Module, weights: Weights | None, device: torch.device, dtype: torch.dtype) -> None:
    """Everything still on the meta device: norms from the files, rotary tables from the config."""
    for name, parameter in list(model.named_parameters()):
        if parameter.device.type == "meta":
            value = torch.ones(parameter.shape) if weights is None else _read(weights, name, tuple(parameter.shape))
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, nn.Parameter(value.to(device=device, dtype=dtype), requires_grad=False))
    for name, module in list(model.named_modules()):
        if hasattr(module, "scalar_embed_scale"):  # Gemma's word table
            module.embed_scale = torch.tensor(module.scalar_embed_scale, device=device)
        elif any(b.device.type == "meta" for b in module.buffers(recurse=False)):
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, type(module)(config=model.config).to(device))


def _scratch_bytes(model: nn.Module, plan: Plan, dtype: torch.dtype) -> int:
    """The plan's scratch, or for a plan that says nothing of it the largest linear of a layer."""
    if plan.scratch_bytes or plan.components:
        return plan.scratch_bytes
    largest = max((m.in_features * m.out_features for m in model.model.layers[0].modules() if isinstance(m, nn.Linear)), default=0)
    return largest * dtype.itemsize


def reading_plan(config: TrainConfig, device: torch.device, plan: Callable[[TrainConfig, ModelShape, Budget], Plan]) -> Plan:
    """How chat and evaluation load a model on this machine as it is now; `plan` is one of `memory.reading`.

    ConfigError when the card cannot hold it even with its layers streamed.
    """
    config = as_stored(config)
    card = read_card() if device.type == "cuda" else None
    found = plan(config, find_shape(config.model), Budget.of(config, card, read_ram()))
    if not found.fits and found.budget.kind == "vram":
        need, have = found.process_bytes / GB, found.budget.limit_bytes / GB
        raise ConfigError(f"model={config.model!r} needs {need:.1f} GB and {have:.1f} GB are free; close other programs or take fewer bits.")
    return found


def random_model(config_values: dict[str, Any], spec: QuantSpec, plan: Plan, device: torch.device, dtype: torch.dtype) -> Loaded:
    """A model of that transformers config with random weights of the right layout, for measuring shapes nobody downloads."""
    from transformers import AutoConfig

    values = dict(config_values)
    model = skeleton_from_config(AutoConfig.for_model(values.pop("model_type"), **values), dtype)
    return fill(model, None, Source(Path(), None, "random"), spec, plan, device, dtype)


def config_values(config: TrainConfig) -> dict[str, Any]:
    """The transformers config of a model's shape, for `random_model`."""
    s = find_shape(config.model)
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
             "head_dim", "vocab_size", "tie_word_embeddings", "max_position_embeddings")  # fmt: skip
    return {n: getattr(s, n) for n in names} | {"model_type": s.family}
