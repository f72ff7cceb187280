"""The LoRA adapter: PEFT's structure and file format over one flat parameter buffer.

PEFT wraps the model's `QuantLinear`s (registered as a custom layer type), so that a saved adapter is an ordinary PEFT
adapter. All its parameters are then moved into one contiguous tensor, and so are their gradients: the optimizer is a few
kernels over flat memory, and neighbours like A of q, k and v can be used as one matrix.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import nn

from lowvram_tuner.config import ConfigError, TrainConfig
from lowvram_tuner.quant.linear import QuantLinear, quant_linear

NAME = "default"  # PEFT's name for the only adapter
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}  # as Phi-3 builds them
GROUPS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))


class LoraQuantLinear(nn.Module, LoraLayer):
    """PEFT's LoRA layer over a `QuantLinear`; the adapter's products happen inside the frozen layer's autograd Function."""

    def __init__(self, base_layer: QuantLinear, adapter_name: str, config: LoraConfig, r: int = 0, lora_alpha: float = 1, **kwargs: Any) -> None:
        super().__init__()
        LoraLayer.__init__(self, base_layer)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.disable_adapters or not self.active_adapters:
            return self.base_layer(x)
        name = self.active_adapters[0]
        dropout = self.lora_dropout[name]
        dropped = dropout(x) if isinstance(dropout, nn.Dropout) and self.training else None
        a, b = self.lora_A[name].weight, self.lora_B[name].weight
        return quant_linear(x, self.base_layer, a, b, self.scaling[name], dropped)


@dataclass
class Adapter:
    """A PEFT model and its trainable parameters as one flat buffer.

    parameters, gradients: [P], the adapter's dtype. `slices` says where each named parameter lies: (offset, shape).
    """

    model: PeftModel
    parameters: torch.Tensor
    gradients: torch.Tensor
    slices: dict[str, tuple[int, torch.Size]]

    def state(self) -> dict[str, torch.Tensor]:
        """Copies of the adapter's tensors on the CPU under PEFT's names, ready for its file format. The card may have no room left."""
        return {k: v.detach().to("cpu", copy=True) for k, v in _tensors(self.model).items()}


def attach(model: nn.Module, config: TrainConfig, device: torch.device, dtype: torch.dtype) -> Adapter:
    """Wraps a model in a fresh adapter. The same seed gives the same A on every device; B starts at zero."""
    wanted = [*config.target_modules, *(f for f, parts in FUSED.items() if set(parts) & set(config.target_modules))]
    targets = [t for t in wanted if any(n.endswith(f".{t}") for n, _ in model.named_modules())]
    if not targets:
        raise ConfigError(f"target_modules={','.join(config.target_modules)} matches no layer of this model.")
    lora = LoraConfig(
        r=config.lora_r, lora_alpha=config.lora_alpha, lora_dropout=config.lora_dropout, target_modules=targets,
        task_type="CAUSAL_LM",
    )  # fmt: skip
    lora._register_custom_module({QuantLinear: LoraQuantLinear})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        peft_model = get_peft_model(model, lora, autocast_adapter_dtype=False)
    return _flatten(peft_model, device, dtype)


def load_adapter(model: nn.Module, folder: Path) -> Adapter:
    """A saved PEFT adapter on top of a model, for chat and evaluation: nothing of it requires a gradient."""
    from safetensors.torch import load_file

    if not (folder / "adapter_model.safetensors").is_file():
        raise ConfigError(f"{folder} holds no adapter_model.safetensors; give an adapter's folder.")
    lora = LoraConfig.from_pretrained(folder)
    lora._register_custom_module({QuantLinear: LoraQuantLinear})
    lora.inference_mode = True
    first = next(m for m in model.modules() if isinstance(m, QuantLinear))
    device, dtype = next(iter(first.packed.values())).device, model.dtype  # of the base: PEFT's own are fp32
    peft_model = get_peft_model(model, lora, autocast_adapter_dtype=False)
    adapter = _flatten(peft_model, device, dtype)
    load_state(adapter, load_file(folder / "adapter_model.safetensors"))
    peft_model.eval()
    return adapter


def load_state(adapter: Adapter, state: dict[str, torch.Tensor]) -> None:
    """Copies saved tensors into the adapter. A missing, unexpected or misshapen one is a ConfigError."""
    own = _tensors(adapter.model)
    if own.keys() != state.keys():
        odd = sorted(own.keys() ^ state.keys())[0]
        raise ConfigError(f"the adapter does not belong to this model: tensor {odd!r} is on one side only.")
    for name, tensor in own.items():
        if tensor.shape != state[name].shape:
            raise ConfigError(f"the adapter's {name!r} is {tuple(state[name].shape)}, the model needs {tuple(tensor.shape)}.")
        tensor.data.copy_(state[name])


def save_adapter(adapter: Adapter, folder: Path, public_id: str) -> None:
    """Writes adapter_config.json and adapter_model.safetensors, naming the full-precision base by its public id."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    config = adapter.model.peft_config[NAME].to_dict()
    config |= {"base_model_name_or_path": public_id, "inference_mode": True}
    plain = {k: sorted(v) if isinstance(v, set) else v for k, v in config.items()}
    (folder / "adapter_config.json").write_text(json.dumps(plain, indent=2, default=str), encoding="utf-8")
    save_file(adapter.state(), folder / "adapter_model.safetensors", metadata={"format": "pt"})


def _flatten(model: PeftModel, device: torch.device, dtype: torch.dtype) -> Adapter:
    """Moves every LoRA parameter into one buffer: per layer and group all A, then all B, so that a group's A is one matrix."""
    named = {n: p for n, p in model.named_parameters() if "lora_" in n}
    order = sorted(named, key=_position)
    total = sum(named[n].numel() for n in order)
    flat = torch.empty(total, device=device, dtype=dtype)
    gradients = torch.zeros(total, device=device, dtype=dtype)
    slices, offset = {}, 0
    for name in order:
        parameter, size = named[name], named[name].numel()
        flat[offset : offset + size].copy_(parameter.detach().reshape(-1))
        parameter.data = flat[offset : offset + size].view(parameter.shape)
        if parameter.requires_grad:
            parameter.grad = gradients[offset : offset + size].view(parameter.shape)
        slices[name] = (offset, parameter.shape)
        offset += size
    return Adapter(model, flat, gradients, slices)


def _tensors(model: PeftModel) -> dict[str, torch.Tensor]:
    """The adapter's tensors under PEFT's names. Left to itself PEFT would ask the hub for the base's vocabulary, by its name."""
    return get_peft_model_state_dict(model, save_embedding_layers=False)


def _position(name: str) -> tuple[int, int, int, int, str]:
    """Sort key: layer, group, A before B, place in the group."""
    parts = name.split(".")
    layer = next((int(p) for p in parts if p.isdigit()), 0)
    linear = next((p for p in parts if p.endswith("_proj")), "")
    group = next((g for g, members in enumerate(GROUPS) if linear in members), len(GROUPS))
    place = GROUPS[group].index(linear) if group < len(GROUPS) else 0
    return layer, group, int("lora_B" in name), place, name
