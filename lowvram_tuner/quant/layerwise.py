"""Running a model one decoder layer at a time: only that layer's weights are on the device, the activations wait on the CPU.

The model stays on the meta device. Its own forward is run once with recorders in place of the layers, which gives the first
layer's inputs and, whatever the architecture, the arguments (masks, rotary tables) that each layer is called with.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from lowvram_tuner.models.weights import Weights


class Layers:
    """The decoder layers of a meta-device model, built from its weights when asked for.

    hidden: [rows, seq, hidden] on the CPU, the inputs of layer 0. calls[i]: layer i's keyword arguments on `device`.
    """

    def __init__(self, model: nn.Module, weights: Weights, ids: torch.Tensor, device: torch.device, dtype: torch.dtype) -> None:
        """ids: int64 [rows, seq], every row full."""
        self.model, self.weights, self.device, self.dtype = model, weights, device, dtype
        self.hidden, self.calls = self._record(ids)

    def __len__(self) -> int:
        return len(self.model.model.layers)

    def build(self, index: int) -> nn.Module:
        """Layer `index` with its weights on the device."""
        layer = copy.deepcopy(self.model.model.layers[index])
        for name, parameter in list(layer.named_parameters()):
            value = self.weights.read(f"model.layers.{index}.{name}", parameter.shape, self.device, self.dtype)
            set_parameter(layer, name, value.to(self.dtype))
        return layer.eval()

    def run(self, index: int, layer: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """The layer's outputs for all rows, on the CPU."""
        out = torch.empty_like(hidden)
        for row, x in enumerate(hidden):
            out[row] = self.call(index, layer, x)[0]
        return out

    def call(self, index: int, layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """x: [seq, hidden] on the CPU. Returns [1, seq, hidden] on the device."""
        y = layer(x.unsqueeze(0).to(self.device), **self.calls[index])
        return y[0] if isinstance(y, tuple) else y

    def input_of(self, index: int, layer: nn.Module, name: str, x: torch.Tensor) -> torch.Tensor:
        """What the layer's linear `name` sees for one row, fp32 [seq, in]; the rest of the layer is not run."""

        def stop(_, inputs):
            raise _Seen(inputs[0])

        handle = layer.get_submodule(name).register_forward_pre_hook(stop)
        try:
            self.call(index, layer, x)
        except _Seen as seen:
            return seen.tensor.reshape(-1, seen.tensor.shape[-1]).float()
        finally:
            handle.remove()
        raise AssertionError(f"{name} was not called")

    def linears(self, index: int, layer: nn.Module) -> list[list[str]]:
        """The layer's linears in the order they run; those with the same input (q, k, v) stand together."""
        groups: list[tuple[int, list[str]]] = []
        keep = []  # inputs stay alive, so that equal ids mean the same tensor

        def note(name: str):
            def hook(_, inputs):
                keep.append(inputs[0])
                if groups and groups[-1][0] == id(inputs[0]):
                    groups[-1][1].append(name)
                else:
                    groups.append((id(inputs[0]), [name]))

            return hook

        handles = [m.register_forward_pre_hook(note(n)) for n, m in layer.named_modules() if isinstance(m, nn.Linear)]
        self.call(index, layer, self.hidden[0])
        for handle in handles:
            handle.remove()
        return [names for _, names in groups]

    def _record(self, ids: torch.Tensor) -> tuple[torch.Tensor, list[dict[str, Any]]]:
        inner = copy.deepcopy(self.model.model)
        table = self.weights.read("model.embed_tokens.weight", inner.embed_tokens.weight.shape)
        set_parameter(inner, "embed_tokens.weight", table.to(self.dtype))
        for name, module in list(inner.named_modules()):
            if not name.startswith("layers.") and any(b.device.type == "meta" for b in module.buffers(recurse=False)):
                parent, _, leaf = name.rpartition(".")
                setattr(inner.get_submodule(parent), leaf, type(module)(config=self.model.config))
        calls: list[dict[str, Any]] = []
        first: list[torch.Tensor] = []
        for index, layer in enumerate(inner.layers):
            layer.forward = _recorder(calls, first, is_first=index == 0)
        inner.norm.forward = lambda x: x
        hidden = []
        for row in ids:
            calls.clear()
            first.clear()
            inner(input_ids=row.unsqueeze(0), use_cache=False)
            hidden.append(first[0])
        return torch.cat(hidden), [_moved(call, self.device) for call in calls]


class _Seen(Exception):
    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


def set_parameter(module: nn.Module, name: str, value: torch.Tensor) -> None:
    """Replaces a parameter by a frozen one."""
    parent, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(parent), leaf, nn.Parameter(value, requires_grad=False))


def _recorder(calls: list, first: list, is_first: bool):
    def forward(hidden_states, **kwargs):
        if is_first:
            first.append(hidden_states)
        calls.append(kwargs)
        return hidden_states

    return forward


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, (tuple, list)):
        return type(value)(_moved(v, device) for v in value)
    return {k: _moved(v, device) for k, v in value.items()} if isinstance(value, dict) else value
