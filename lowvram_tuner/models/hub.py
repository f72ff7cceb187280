"""Models of the Hugging Face hub: fetched once, with progress, and what stands in the way in one sentence.

Fetched is what this program reads: config, tokenizer and safetensors of the top folder; for a plan the config alone, a few
kilobytes. A file that is whole in the hub's cache is not asked for again, so a model that was fetched before needs no network
and does not change by itself. What a broken-off download has is kept and gone on with.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lowvram_tuner.config import ConfigError
from lowvram_tuner.models.catalogue import ModelShape, shape_from_config, shape_of

Progress = Callable[[int, int], None]  # bytes that are here, bytes altogether; what it raises ends the download
WORDS = ("*.json", "*.model", "*.txt", "*.jinja")  # config, tokenizer, chat template
WEIGHTS = "*.safetensors"
NOT_READ = ("*/*", "consolidated*")  # the same weights in other forms


def is_id(model: str) -> bool:
    """Whether a model's name can be a hub id, owner/name, and is no path that exists."""
    owner, slash, name = model.partition("/")
    alike = bool(owner and slash and name) and not model.startswith((".", "~")) and not set(name) & set("/\\") and ":" not in model
    return alike and not Path(model).exists()


def find_shape(model: str) -> ModelShape:
    """`shape_of`, and for a hub id that it does not know the shape in its config, which is fetched when it is not here yet.

    ConfigError as `shape_of` and `fetch`.
    """
    try:
        return shape_of(model)
    except ConfigError:
        if not is_id(model):
            raise
        return shape_from_config(fetch_config(model), model)


def fetch_config(model: str) -> Path:
    """The config.json of a hub id. ConfigError as `fetch`."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url

    with contextlib.suppress(OSError, ValueError):
        return Path(hf_hub_download(model, "config.json", local_files_only=True))
    with _in_one_sentence(model, Exception):  # also what the HTTP library below raises, which is another one in every version
        get_hf_file_metadata(hf_hub_url(model, "config.json"))  # without a network the download itself would try for half a minute
        return Path(hf_hub_download(model, "config.json"))


def fetch(model: str, weights: bool = True, progress: Progress | None = None) -> Path:
    """The folder with the files of a hub id; without `weights` those of its config and tokenizer.

    ConfigError for an id that the hub does not know, a licence that was not accepted, no network, no room on the disk.
    """
    from huggingface_hub import snapshot_download

    wanted = {"allow_patterns": [*WORDS, WEIGHTS] if weights else list(WORDS), "ignore_patterns": list(NOT_READ)}
    try:
        here = Path(snapshot_download(model, local_files_only=True, **wanted))
        if is_whole(here, weights):
            return here
    except (OSError, ValueError, LookupError, AttributeError):
        pass  # not here yet, damaged, or no id: asking the hub tells which
    with _in_one_sentence(model):
        files = snapshot_download(model, dry_run=True, tqdm_class=_bar(), **wanted)
        total = sum(file.file_size or 0 for file in files if file.will_download)
        _room(model, total)
        return Path(snapshot_download(model, tqdm_class=_bar(progress, total) if progress else None, **wanted))


def is_whole(folder: Path, weights: bool) -> bool:
    """Whether a folder has a config and a tokenizer, and with `weights` every file that its index names."""
    if not (folder / "config.json").is_file() or not any(folder.glob("tokenizer*")):
        return False
    if not weights:
        return True
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return any(folder.glob(WEIGHTS))
    names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
    return all((folder / name).is_file() for name in set(names))


def _room(model: str, total: int) -> None:
    from huggingface_hub.constants import HF_HUB_CACHE

    place = Path(HF_HUB_CACHE)
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if total > free:
        raise ConfigError(
            f"model={model!r} takes {total / 1e9:.1f} GB of disk and {place} has {free / 1e9:.1f} GB free; "
            "free some, or set HF_HOME to a folder on another disk."
        )


def _bar(progress: Progress | None = None, total: int = 0) -> type:
    """What `snapshot_download` takes for tqdm: tells `progress` of the bytes, and shows nothing.

    The hub makes several bars, of files and of bytes as they arrive and as they are written; the one that is furthest counts.
    """
    from tqdm import tqdm

    lock, told = threading.Lock(), 0  # several files arrive at a time

    class Bar(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "disable": True})
            self.bytes, self.seen = kwargs.get("unit") == "B", 0

        def update(self, n: float | None = 1) -> None:
            nonlocal told
            with lock:
                self.seen += n or 0
                if progress and self.bytes and self.seen > told:
                    told = self.seen
                    progress(min(int(told), total), total)

    return Bar


@contextlib.contextmanager
def _in_one_sentence(model: str, *caught: type[Exception]) -> Iterator[None]:
    """What the hub raises, huggingface_hub's own errors and `caught`, as a ConfigError."""
    try:
        yield
    except ConfigError:
        raise
    except (OSError, ValueError, *caught) as error:
        raise ConfigError(_sentence(model, error)) from None


def _sentence(model: str, error: BaseException) -> str:
    from huggingface_hub import errors

    if isinstance(error, (errors.DryRunError, errors.LocalEntryNotFoundError)):  # says that it could not look, not why
        error = error.__cause__ or error
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
    if isinstance(error, errors.GatedRepoError):
        return (
            f"model={model!r} has a licence to accept: do so on https://huggingface.co/{model}, make a token at "
            "https://huggingface.co/settings/tokens and start the program with HF_TOKEN set to it."
        )
    if isinstance(error, (errors.RepositoryNotFoundError, errors.HFValidationError)):
        return f"model={model!r} is not on the hub, or not for everybody; check the name, or set HF_TOKEN if it is yours."
    if isinstance(error, errors.EntryNotFoundError) and not isinstance(error, errors.LocalEntryNotFoundError):
        return f"model={model!r} has no config.json on the hub; give one in the layout of transformers, with *.safetensors."
    if getattr(error, "errno", None) == 28:
        return f"model={model!r} could not be fetched: the disk is full; what is there is kept. Free some space and start again."
    return f"model={model!r} cannot be fetched from the hub ({reason}); check the network and start again, what is here already is kept."
