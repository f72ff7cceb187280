"""Weights of a model on disk, one tensor at a time: safetensors by memory map, GGUF dequantized tensor by tensor.

Names are transformers' parameter names. Nothing is read before it is asked for, so loading never holds more than the tensor
at hand.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

from lowvram_tuner.config import ConfigError
from lowvram_tuner.models.source import Source
from lowvram_tuner.quant.checkpoints.files import FLOATS, TensorFiles

if TYPE_CHECKING:
    import torch
    from torch import nn

ACCEPTED = (*FLOATS, "float64")


class Weights(ABC):
    """What a loader needs of a checkpoint."""

    @abstractmethod
    def names(self) -> set[str]:
        """Every tensor's name."""

    @abstractmethod
    def stored(self, name: str) -> torch.Tensor:
        """One tensor on the CPU, in its stored dtype (GGUF: fp32). Raises ConfigError or QuantError when it is missing or unreadable."""

    def read(
        self, name: str, shape: tuple[int, ...], device: torch.device | str = "cpu", narrow: torch.dtype | None = None
    ) -> torch.Tensor:
        """`stored`, on `device`, fp32 narrowed to `narrow` on the way, which halves what crosses.

        ConfigError also for another shape, for what is no ordinary float (packed codes read as weights would be a wrong answer
        without a word), and for inf or nan, of which one can make every answer nan; they are looked for where the tensor is put,
        in two passes and without a copy.
        """
        import torch

        tensor = self.stored(name)
        dtype = str(tensor.dtype).removeprefix("torch.")
        if dtype not in ACCEPTED:
            raise ConfigError(f"tensor {name!r} is {dtype}; {' or '.join(ACCEPTED)} is accepted: get the model in 16 bit.")
        if tuple(tensor.shape) != tuple(shape):
            raise ConfigError(f"tensor {name!r} has shape {tuple(tensor.shape)}, but the model's config asks for {tuple(shape)}.")
        tensor = tensor.to(device=device, dtype=narrow if narrow and tensor.dtype == torch.float32 else tensor.dtype)
        if not all(bool(t.isfinite()) for t in (tensor.amax(), tensor.amin())):  # nan is the largest and the smallest
            bad = int((~tensor.isfinite()).sum())
            raise ConfigError(f"tensor {name!r} is inf or nan in {bad} of its {tensor.numel()} values; get the model again.")
        return tensor


def open_weights(source: Source, model: nn.Module) -> Weights:
    """The weights of a source. `model` (on the meta device) gives transformers' names for a GGUF's tensors."""
    return GgufWeights(source, model) if source.gguf else SafetensorsWeights(source.folder)


class SafetensorsWeights(Weights):
    """A folder of *.safetensors, with or without an index file."""

    def __init__(self, folder: Path) -> None:
        self._files = TensorFiles(folder)

    def names(self) -> set[str]:
        return set(self._files.where)

    def stored(self, name: str) -> torch.Tensor:
        return self._files.get(name)


class GgufWeights(Weights):
    """A GGUF file through transformers' own name map and per-family tensor fixes (llama.cpp permutes q and k)."""

    def __init__(self, source: Source, model: nn.Module) -> None:
        from gguf import GGUFReader
        from transformers import modeling_gguf_pytorch_utils as hf

        self.path = source.folder / source.gguf
        reader = GGUFReader(self.path)
        architecture = hf.read_field(reader, "general.architecture")[0]
        self._processor = hf.TENSOR_PROCESSORS.get(architecture, hf.TensorProcessor)(config=model.config.to_dict())
        # The names of the whole model say all. Asked of a module with children, transformers walks every one of them and builds
        # gguf's table of names anew for each: 6 s at 30 layers.
        whole = SimpleNamespace(config=model.config, state_dict=model.state_dict, named_children=list)
        hf_names = hf.get_gguf_hf_weights_map(whole, self._processor)
        self._tensors = {hf_names[t.name]: t for t in reader.tensors if t.name in hf_names}

    def names(self) -> set[str]:
        return set(self._tensors)

    def stored(self, name: str) -> torch.Tensor:
        import numpy as np
        import torch
        from gguf import dequantize

        if name not in self._tensors:
            raise ConfigError(f"{self.path.name} has no tensor {name!r}; it is not a complete checkpoint of this model.")
        tensor = self._tensors[name]
        values = dequantize(tensor.data, tensor.tensor_type)
        result = self._processor.process(weights=values, name=tensor.name, tensor_key_mapping={}, parsed_parameters={"tensors": {}})
        return torch.from_numpy(np.array(result.weights))
