"""Quantized checkpoints on disk: which format a folder holds, and reading and writing it module by module.

One file per format in `checkpoints/` and one line here. A reader turns a module's stored tensors into a format's packed
tensors without changing a single weight; a writer does the reverse.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lowvram_tuner.config import DEMO_MODEL
from lowvram_tuner.quant.spec import QuantError, QuantSpec

if TYPE_CHECKING:
    import torch

_READERS = {
    "gptq": "lowvram_tuner.quant.checkpoints.gptq:GPTQReader",
    "bitsandbytes": "lowvram_tuner.quant.checkpoints.bnb:BitsandbytesReader",
    "hqq": "lowvram_tuner.quant.checkpoints.hqq:HQQReader",
    "quip": "lowvram_tuner.quant.checkpoints.quip:QuipReader",
}
_WRITERS = {
    "gptq": "lowvram_tuner.quant.checkpoints.gptq:GPTQWriter",
    "nf4": "lowvram_tuner.quant.checkpoints.bnb:NF4Writer",
    "int8": "lowvram_tuner.quant.checkpoints.bnb:Int8Writer",
    "hqq": "lowvram_tuner.quant.checkpoints.hqq:HQQWriter",
    "quip": "lowvram_tuner.quant.checkpoints.quip:QuipWriter",
}


class QuantizedWeight(NamedTuple):
    """One module's weight as a checkpoint holds it. `spec` is exact for this module, `packed` is as its layout says."""

    spec: QuantSpec
    out_features: int
    in_features: int
    packed: dict[str, torch.Tensor]


class Reader(ABC):
    """A checkpoint folder of one format. Making one reads the configuration only, and needs no torch.

    spec: how the modules are held as far as the configuration tells; a module's own spec may differ (see `load`).
    """

    def __init__(self, folder: Path, config: dict[str, Any], config_path: Path) -> None:
        self.folder, self.config, self.config_path = folder, config, config_path
        self._files = None
        self.spec = self.read_spec()

    @property
    def files(self):
        """The folder's tensors, opened when first asked for."""
        if self._files is None:
            from lowvram_tuner.quant.checkpoints.files import TensorFiles

            self._files = TensorFiles(self.folder)
        return self._files

    @abstractmethod
    def read_spec(self) -> QuantSpec:
        """The spec in the configuration, or QuantError for values this project cannot read."""

    @abstractmethod
    def holds(self, module: str) -> bool:
        """Whether the module ("model.layers.0.self_attn.q_proj") is stored quantized; else its .weight is a plain tensor."""

    @abstractmethod
    def load(self, module: str) -> QuantizedWeight:
        """The module's packed tensors on the CPU, with the spec they need.

        Raises QuantError, naming file, tensor and value, for anything missing, of a wrong shape or type, or out of range.
        """

    def value(self, name: str, accepted: tuple, default: Any = None) -> Any:
        """A configuration value, or QuantError unless it is one of `accepted`."""
        seen = self.config.get(name)
        seen = default if seen is None else seen
        if seen not in accepted or isinstance(seen, bool) != isinstance(accepted[0], bool):
            offer = ", ".join(map(str, accepted))
            raise QuantError(f"{self.config_path}: {name}={seen!r} cannot be read; accepted: {offer}.")
        return seen

    def positive(self, name: str, default: int) -> int:
        """A whole number above 0, or -1, from the configuration."""
        seen = self.config.get(name, default)
        if isinstance(seen, bool) or not isinstance(seen, int) or (seen < 1 and seen != -1):
            raise QuantError(f"{self.config_path}: {name}={seen!r} cannot be read; a positive whole number or -1 is accepted.")
        return seen


class Writer(ABC):
    """Turns packed weights into the tensors and configuration of a checkpoint format."""

    def __init__(self, spec: QuantSpec) -> None:
        self.spec = spec

    @abstractmethod
    def tensors(self, module: str, weight: QuantizedWeight) -> dict[str, torch.Tensor]:
        """The module's tensors by the names they have on disk. Raises QuantError when the format cannot store the weight."""

    @abstractmethod
    def config(self, skipped: list[str]) -> dict[str, Any]:
        """config.json's `quantization_config`; `skipped` are the names of linears left in 16 bit."""

    def extra_files(self, skipped: list[str]) -> dict[str, dict[str, Any]]:
        """JSON files to put beside config.json, by name."""
        return {}


def open_checkpoint(folder: Path) -> Reader | None:
    """The reader for a folder of quantized weights; None when its config names no quantization.

    Raises QuantError for a quantization that cannot be read.
    """
    found = _configuration(folder)
    if found is None:
        return None
    config, path = found
    method = config.get("quant_method") or config.get("method") or _guess(config)
    if method not in _READERS:
        offer = ", ".join(sorted(_READERS))
        raise QuantError(f"{path}: quant_method={method!r} cannot be read; accepted: {offer}, or the unquantized model.")
    return _imported(_READERS[method])(folder, config, path)


def stored_spec(model: str) -> QuantSpec | None:
    """How a local folder holds its weights if it is quantized already; None for every other model. QuantError as above."""
    folder = Path(model).expanduser()
    named = model not in ("", DEMO_MODEL)  # "" would be the folder where the program was started
    reader = open_checkpoint(folder) if named and folder.is_dir() else None
    return reader.spec if reader else None


def writer_for(spec: QuantSpec) -> Writer:
    """The writer of a method's checkpoint format."""
    if spec.method not in _WRITERS:
        raise QuantError(f"method={spec.method!r} has no checkpoint format; use {', '.join(sorted(_WRITERS))}.")
    return _imported(_WRITERS[spec.method])(spec)


def _configuration(folder: Path) -> tuple[dict[str, Any], Path] | None:
    from lowvram_tuner.quant.checkpoints.files import read_json

    main = folder / "config.json"
    if main.is_file():
        config = read_json(main)
        asked = config.get("quantization_config")
        if asked is not None and not isinstance(asked, dict):
            raise QuantError(f"{main}: quantization_config={asked!r} cannot be read; an object of names and values is accepted.")
        if asked is not None:
            return asked, main
        if isinstance(config.get("quip_params"), dict):
            return config["quip_params"] | {"quant_method": "quip"}, main
    for name in ("quantize_config.json", "quant_config.json"):
        if (folder / name).is_file():
            return read_json(folder / name), folder / name
    return None


def _guess(config: dict[str, Any]) -> str | None:
    if config.get("load_in_4bit") or config.get("load_in_8bit"):
        return "bitsandbytes"
    return "gptq" if "bits" in config and "group_size" in config else None


def _imported(target: str) -> Any:
    module, name = target.split(":")
    return getattr(import_module(module), name)
