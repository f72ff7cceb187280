"""A checkpoint in the making: finished layers beside the output, then the whole folder, put in place at once."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowvram_tuner.quant.checkpoint import QuantizedWeight, Writer

if TYPE_CHECKING:
    import torch
    from torch import nn

    from lowvram_tuner.models.source import Source
    from lowvram_tuner.models.weights import Weights

Packed = dict[str, dict[str, "torch.Tensor"]]  # of one layer, by the name of the linear


class Partial:
    """Finished layers of a run that is not over: `<output>.partial/layer-N.safetensors`, written whole or not at all."""

    def __init__(self, output: Path, fingerprint: str) -> None:
        self.folder = output.parent / f"{output.name}.partial"
        mark = self.folder / "run.json"
        if mark.is_file() and mark.read_text(encoding="utf-8") != fingerprint:
            shutil.rmtree(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        mark.write_text(fingerprint, encoding="utf-8")

    def _path(self, index: int) -> Path:
        return self.folder / f"layer-{index:05d}.safetensors"

    def save(self, index: int, packed: Packed, entries: list[dict[str, Any]]) -> None:
        from safetensors.torch import save_file

        temporary = self._path(index).with_suffix(".tmp")
        flat = {f"{name}|{key}": t.contiguous().clone() for name, tensors in packed.items() for key, t in tensors.items()}
        save_file(flat, temporary, metadata={"entries": json.dumps(entries)})
        temporary.replace(self._path(index))

    def load(self, index: int) -> tuple[Packed, list[dict[str, Any]]] | None:
        """A finished layer, or None: also for one that a loss of power left damaged."""
        from safetensors import SafetensorError, safe_open

        packed: Packed = {}
        try:
            with safe_open(self._path(index), "pt") as file:
                for key in file.keys():  # noqa: SIM118 - safe_open has no iterator
                    name, _, tensor = key.partition("|")
                    packed.setdefault(name, {})[tensor] = file.get_tensor(key)
                return packed, json.loads(file.metadata()["entries"])
        except (FileNotFoundError, SafetensorError):
            return None


def write_checkpoint(
    output: Path, partial: Partial, source: Source, model: nn.Module, weights: Weights, tokenizer: Any, writer: Writer
) -> None:
    """The checkpoint folder, built beside `output` and moved there when it is whole."""
    from lowvram_tuner.quant.checkpoints.files import write_shards

    folder = partial.folder / "checkpoint"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    stored = _stored_dtype(weights.stored("model.embed_tokens.weight"))
    write_shards(folder, _tensors(partial, model, weights, writer))
    skipped = ["lm_head"]
    config = model.config.to_dict() | {
        "architectures": [type(model).__name__], "_name_or_path": source.public_id,
        "dtype": str(stored).removeprefix("torch."), "quantization_config": writer.config(skipped),
    }  # fmt: skip
    for name, value in {"config.json": config, **writer.extra_files(skipped)}.items():
        (folder / name).write_text(json.dumps(value, indent=2), encoding="utf-8")
    tokenizer.save_pretrained(folder)
    if output.exists():
        output.rmdir()  # empty, as was checked
    folder.replace(output)
    shutil.rmtree(partial.folder)


def _tensors(partial: Partial, model: nn.Module, weights: Weights, writer: Writer) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of the checkpoint by name, quantized layers first, then what stays in 16 bit. What the files hold beside the
    model (old checkpoints: rotary tables) stays behind."""
    written = set()
    for index, layer in enumerate(model.model.layers):
        packed, _ = partial.load(index)
        for name, tensors in packed.items():
            module, linear = f"model.layers.{index}.{name}", layer.get_submodule(name)
            yield from writer.tensors(module, QuantizedWeight(writer.spec, linear.out_features, linear.in_features, tensors)).items()
            written.add(f"{module}.weight")
    known = model.state_dict()
    for name in sorted((weights.names() & known.keys()) - written):
        tensor = weights.read(name, known[name].shape)
        yield name, tensor.to(_stored_dtype(tensor))


def _stored_dtype(tensor: torch.Tensor) -> torch.dtype:
    """What is not quantized keeps its type, only fp32 is stored as fp16."""
    import torch

    return torch.float16 if tensor.dtype == torch.float32 else tensor.dtype
