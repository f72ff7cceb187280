"""The safetensors files of a checkpoint folder, read tensor by tensor, and written in shards.

Every complaint names the file, the tensor, the value seen and what is accepted. Pickled weights are refused: opening one
can run any code it contains.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowvram_tuner.quant.spec import QuantError

if TYPE_CHECKING:
    from collections.abc import Iterable

    import torch

PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
FLOATS = ("float16", "bfloat16", "float32")
SHARD_BYTES = 2 * 10**9


class TensorFiles:
    """The tensors of a folder by name. Headers are read at once, a tensor's bytes only when asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.where: dict[str, Path] = {}  # tensor name -> its file
        for path in self._files():
            for name in _names(path):
                self.where.setdefault(name, path)

    def __contains__(self, name: str) -> bool:
        return name in self.where

    def names(self, prefix: str = "") -> list[str]:
        return [name for name in self.where if name.startswith(prefix)]

    def get(self, name: str, device: torch.device | str = "cpu") -> torch.Tensor:
        """The tensor, or QuantError when no file has it or its file is damaged."""
        from safetensors import SafetensorError, safe_open

        if name not in self.where:
            raise QuantError(f"{self.folder}: tensor {name} is missing; the download may be incomplete.")
        try:
            with safe_open(self.where[name], "pt", device=str(device)) as file:
                return file.get_tensor(name)
        except (SafetensorError, OSError, RuntimeError) as error:
            raise QuantError(f"{self.where[name]}: tensor {name} cannot be read ({error}); download the file again.") from None

    def checked(self, name: str, dtypes: tuple[str, ...], shape: tuple[int | None, ...] | None) -> torch.Tensor:
        """The tensor, or QuantError unless it has one of the dtypes and the shape (None: any size; any shape)."""
        tensor = self.get(name)
        seen = str(tensor.dtype).removeprefix("torch.")
        if seen not in dtypes:
            self.refuse(name, f"is {seen}", f"{' or '.join(dtypes)} is accepted")
        if shape is not None and (len(tensor.shape) != len(shape) or any(want not in (None, have) for want, have in zip(shape, tensor.shape))):
            wanted = ", ".join("any" if want is None else str(want) for want in shape)
            self.refuse(name, f"has the shape {list(tensor.shape)}", f"[{wanted}] is accepted")
        return tensor

    def finite(self, name: str, dtypes: tuple[str, ...], shape: tuple[int | None, ...] | None) -> torch.Tensor:
        """`checked`, and QuantError for inf or nan, of which one in a scale would make every answer of the model nan."""
        tensor = self.checked(name, dtypes, shape)
        if not bool(tensor.isfinite().all()):
            self.refuse(name, "holds inf or nan", "finite numbers are accepted")
        return tensor

    def number(self, name: str, accepted: tuple[int, ...]) -> int:
        """A tensor of one whole number, or QuantError unless it is one of `accepted`."""
        seen = self.get(name)
        if seen.numel() != 1 or float(seen) not in accepted:
            self.refuse(name, f"is {seen.tolist()}", f"{', '.join(map(str, accepted))} {'is' if len(accepted) == 1 else 'are'} accepted")
        return int(seen)

    def refuse(self, name: str, seen: str, accepted: str) -> None:
        """Raises the QuantError about one tensor."""
        raise QuantError(f"{self.where.get(name, self.folder)}: {name} {seen}; {accepted}.")

    def _files(self) -> list[Path]:
        index = self.folder / "model.safetensors.index.json"
        if index.is_file():
            listed = read_json(index).get("weight_map")
            if not isinstance(listed, dict) or not all(isinstance(name, str) for name in listed.values()):
                raise QuantError(f"{index}: its weight_map does not name a file for every tensor; download it again.")
            listed = sorted(set(listed.values()))
            for name in listed:
                if Path(name).name != name or not (self.folder / name).is_file():
                    raise QuantError(f"{index}: it lists the file {name!r}, which is not in {self.folder}; complete the download.")
            return [self.folder / name for name in listed]
        found = sorted(self.folder.glob("*.safetensors"))
        if not found:
            pickled = sorted(p.name for pattern in PICKLED for p in self.folder.glob(pattern))
            if pickled:
                raise QuantError(
                    f"{self.folder}: {pickled[0]} is a pickle, which can run any code when opened; get the *.safetensors version."
                )
            raise QuantError(f"{self.folder}: no *.safetensors file is there; give the folder of a checkpoint.")
        return found


def _names(path: Path) -> list[str]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            return list(file.keys())
    except (SafetensorError, OSError) as error:
        raise QuantError(f"{path}: it is not a whole safetensors file ({error}); download it again.") from None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, or QuantError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise QuantError(f"{path}: it cannot be read as JSON ({error}).") from None
    if not isinstance(value, dict):
        raise QuantError(f"{path}: it holds {type(value).__name__}; a JSON object is accepted.")
    return value


def write_shards(folder: Path, tensors: Iterable[tuple[str, torch.Tensor]], shard_bytes: int = SHARD_BYTES) -> list[Path]:
    """Writes model.safetensors, or numbered shards with an index when there is more than `shard_bytes`.

    `tensors` may be a generator: at most one shard is in memory at a time.
    """
    from safetensors.torch import save_file

    parts: list[tuple[Path, list[str]]] = []
    pending: dict[str, torch.Tensor] = {}
    total = 0

    def flush() -> None:
        path = folder / f"part-{len(parts):05d}.safetensors.tmp"
        save_file(pending, path, metadata={"format": "pt"})
        parts.append((path, list(pending)))
        pending.clear()

    size = 0
    for name, tensor in tensors:
        if pending and size + _nbytes(tensor) > shard_bytes:
            flush()
            size = 0
        pending[name] = tensor.contiguous().clone()  # safetensors refuses tensors that share memory, as levels and maps may
        size += _nbytes(tensor)
        total += _nbytes(tensor)
    flush()
    return _named(folder, parts, total)


def _named(folder: Path, parts: list[tuple[Path, list[str]]], total: int) -> list[Path]:
    if len(parts) == 1:
        return [parts[0][0].replace(folder / "model.safetensors")]
    weight_map, paths = {}, []
    for number, (path, names) in enumerate(parts, 1):
        final = folder / f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        paths.append(path.replace(final))
        weight_map |= dict.fromkeys(names, final.name)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
    return paths


def _nbytes(tensor: torch.Tensor) -> int:
    return math.prod(tensor.shape) * tensor.element_size()
