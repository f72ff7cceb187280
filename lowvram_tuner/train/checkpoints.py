"""Checkpoints that survive a power cut, a full disk and a flipped bit.

    step-40/
      tensors.safetensors   adapter, optimizer state, random states
      meta.json             step, scheduler, position in the data, config and fingerprint of the data
      manifest.json         size and sha256 of the other two, written last

A checkpoint is written to a temporary sibling, flushed to the disk, read back, and renamed into place: a folder named
step-N is whole, or a later accident damaged it, which its manifest tells. No pickle anywhere. Torch is imported only
where tensors are handled, so that the page can list checkpoints.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowvram_tuner.config import ConfigError, TrainConfig
from lowvram_tuner.train.files import patiently, read_json, sync_folder, write_json

if TYPE_CHECKING:
    import torch

TENSORS, META, MANIFEST, BEST = "tensors.safetensors", "meta.json", "manifest.json", "best.json"
_WINDOWS_DISK_FULL = 112
FREE_OPTIONS = frozenset({
    "output_dir", "vram_gb", "save_steps", "eval_steps", "keep_checkpoints", "report_to", "patience", "compare_prompts",
    "num_epochs", "max_steps",
})  # fmt: skip
"""Options that may differ on a resume: they change where, how often or how long, never what a step computes from its
inputs. With another number of steps the learning rate's schedule is laid over the new number."""


class CheckpointError(RuntimeError):
    """A checkpoint that could not be written or read: one sentence with the reason and what is still safe."""


def save(path: Path | str, tensors: dict[str, torch.Tensor], meta: dict[str, Any]) -> Path:
    """Writes the checkpoint folder `path` (checkpoints/step-N) whole or not at all, and returns it.

    `tensors`: any shapes and dtypes on any device. `meta`: nested JSON values, its floats kept exactly.
    Raises CheckpointError when the disk is full or what was written reads back differently.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _sweep(path.parent)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.mkdir()
        _write_files(temporary, tensors, meta)
        if problem := why_invalid(temporary):
            raise CheckpointError(f"{path.name} reads back differently from what was written ({problem}); check the disk.")
        _put_in_place(temporary, path)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(_disk_words(path, error)) from error
    except CheckpointError:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return path


def load(path: Path | str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """(tensors on the CPU, meta) of a checkpoint, verified first. CheckpointError when it is damaged."""
    from safetensors.torch import load_file

    path = Path(path)
    if problem := why_invalid(path):
        raise CheckpointError(f"{path.name} is damaged ({problem}); resume from an older checkpoint.")
    return load_file(path / TENSORS), json.loads((path / META).read_text(encoding="utf-8"))


def steps(folder: Path | str) -> list[int]:
    """The steps that have a complete checkpoint folder, ascending. Cheap: contents are not verified."""
    found = Path(folder).glob("step-*/" + MANIFEST)
    return sorted(int(p.parent.name[5:]) for p in found if p.parent.name[5:].isdigit())


def newest_valid(folder: Path | str, report: Callable[[str], None] | None = None) -> Path | None:
    """The newest checkpoint that verifies. `report` gets a sentence for each newer one that does not."""
    _sweep(Path(folder))
    for path in _all(Path(folder)):
        problem = why_invalid(path)
        if problem is None:
            return path
        if report:
            report(f"Checkpoint {path.name} is damaged ({problem}) and is passed over.")
    return None


def why_invalid(path: Path) -> str | None:
    """What is wrong with a checkpoint folder, or None when every byte is as it was written."""
    manifest = read_json(path / MANIFEST)
    if not isinstance(manifest, dict) or set(manifest.get("files", ())) != {TENSORS, META}:
        return f"{MANIFEST} is missing or unreadable"
    for name, expected in manifest["files"].items():
        try:
            size = (path / name).stat().st_size
            if size != expected["size"]:
                return f"{name} has {size} bytes instead of {expected['size']}"
            if _sha256(path / name) != expected["sha256"]:
                return f"the contents of {name} changed"
        except OSError as error:
            return f"{name}: {error.strerror}"
    return None


def mark_best(path: Path | str, eval_loss: float) -> None:
    """Remembers `path` as the checkpoint with the lowest held-out loss; pruning keeps it."""
    path = Path(path)
    write_json(path.parent / BEST, {"checkpoint": path.name, "eval_loss": eval_loss}, durable=True)


def best(folder: Path | str) -> tuple[Path, float] | None:
    """(checkpoint, held-out loss) of the best one, or None when there is none."""
    found = read_json(Path(folder) / BEST)
    if not isinstance(found, dict) or not (Path(folder) / str(found.get("checkpoint")) / MANIFEST).is_file():
        return None
    return Path(folder) / found["checkpoint"], found["eval_loss"]


def prune(folder: Path | str, keep: int) -> list[Path]:
    """Removes all but the newest `keep` checkpoints and the best one; returns what was removed."""
    folder = Path(folder)
    champion = best(folder)
    removed = [p for p in _all(folder)[keep:] if champion is None or p != champion[0]]
    for path in removed:
        _remove(path)
    return removed


def same_run(meta: dict[str, Any], config: TrainConfig, fingerprint: str) -> list[str]:
    """What differs between a checkpoint (meta["config"], meta["fingerprint"]) and the run that would go on from it.

    One phrase for each option whose change makes it another run, else one for changed data; empty: the same run.
    """
    then, now = meta["config"], config.to_dict()
    changed = [
        f"{name} was {then.get(name)!r} and is now {now[name]!r}"
        for name in now
        if name not in FREE_OPTIONS and then.get(name) != now[name]
    ]
    if meta["fingerprint"] != fingerprint and not changed:  # most options change the fingerprint too
        changed.append(f"the contents of dataset={config.dataset!r} changed")
    return changed


def require_same_run(meta: dict[str, Any], config: TrainConfig, fingerprint: str) -> None:
    """ConfigError naming what changed, unless the checkpoint belongs to this very run."""
    if changed := same_run(meta, config, fingerprint):
        raise ConfigError(f"Cannot resume: {'; '.join(changed)}. Put it back as it was, or start a new run.")


def pack(tree: Any, prefix: str, tensors: dict[str, torch.Tensor]) -> Any:
    """Moves the tensors of a nested state (dicts, lists, tuples, scalars) into `tensors` as prefix.0, prefix.1, ...

    Returns JSON values that `unpack` turns back into the same tree: keys that are no strings and tuples included.
    """
    import torch

    if isinstance(tree, torch.Tensor):
        name = f"{prefix}.{sum(k.startswith(prefix + '.') for k in tensors)}"
        tensors[name] = tree
        return {"tensor": name}
    if isinstance(tree, dict):
        return {"dict": [[pack(k, prefix, tensors), pack(v, prefix, tensors)] for k, v in tree.items()]}
    if isinstance(tree, (list, tuple)):
        return {type(tree).__name__: [pack(v, prefix, tensors) for v in tree]}
    if tree is None or isinstance(tree, (bool, int, float, str)):
        return tree
    raise TypeError(f"a {type(tree).__name__} cannot be kept in a checkpoint")


def unpack(packed: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """The tree that `pack` took apart."""
    if not isinstance(packed, dict):
        return packed
    ((kind, value),) = packed.items()
    if kind == "tensor":
        return tensors[value]
    if kind == "dict":
        return {unpack(k, tensors): unpack(v, tensors) for k, v in value}
    return (tuple if kind == "tuple" else list)(unpack(v, tensors) for v in value)


def random_state(tensors: dict[str, torch.Tensor]) -> Any:
    """The state of Python's, numpy's and torch's generators (each card's too) as JSON; torch's go into `tensors`."""
    import numpy
    import torch

    kind, keys, *rest = numpy.random.get_state()
    tree = {
        "python": random.getstate(),
        "numpy": [kind, torch.from_numpy(keys.astype("int64")), *rest],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }
    return pack(tree, "random", tensors)


def set_random_state(packed: Any, tensors: dict[str, torch.Tensor]) -> None:
    """Puts all generators where `random_state` found them. Cards that are no longer there are left out."""
    import numpy
    import torch

    tree = unpack(packed, tensors)
    random.setstate(tree["python"])
    kind, keys, *rest = tree["numpy"]
    numpy.random.set_state((kind, keys.numpy().astype("uint32"), *rest))
    torch.set_rng_state(tree["torch"])
    for index, state in enumerate(tree["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(state, index)


def _write_files(folder: Path, tensors: dict[str, torch.Tensor], meta: dict[str, Any]) -> None:
    needed = sum(t.numel() * t.element_size() for t in tensors.values())
    if shutil.disk_usage(folder).free < needed:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    _write_tensors(folder / TENSORS, tensors)
    (folder / META).write_text(json.dumps(meta), encoding="utf-8")
    files = {}
    for name in (TENSORS, META):
        with (folder / name).open("rb+") as written:
            os.fsync(written.fileno())
        files[name] = {"size": (folder / name).stat().st_size, "sha256": _sha256(folder / name)}
    write_json(folder / MANIFEST, {"version": 1, "files": files}, durable=True)


def _write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """save_file, whose own error hides the system's error number."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:  # a copy each: safetensors refuses tensors that share memory, as tied or viewed ones do
        save_file({k: t.detach().to("cpu", copy=True).contiguous() for k, t in tensors.items()}, path)
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        full = number is not None and int(number[1]) in (errno.ENOSPC, _WINDOWS_DISK_FULL)
        raise OSError(errno.ENOSPC if full else errno.EIO, str(error)) from None


def _put_in_place(temporary: Path, path: Path) -> None:
    """Renames `temporary` to `path`. An older one of the same step steps aside; cut short here, `_sweep` puts it back."""
    older = path.with_name(f".{path.name}.old")
    if path.exists():
        patiently(lambda: path.rename(older))
    patiently(lambda: temporary.rename(path))
    sync_folder(path.parent)
    shutil.rmtree(older, ignore_errors=True)


def _remove(path: Path) -> None:
    """Removes a checkpoint so that a removal cut short leaves nothing that looks like one."""
    doomed = path.with_name(f".{path.name}.gone")
    patiently(lambda: path.rename(doomed))
    shutil.rmtree(doomed, ignore_errors=True)


def _sweep(folder: Path) -> None:
    """Tidies up after a save or a removal that was cut short. Only the run's worker calls this."""
    for older in folder.glob(".step-*.old"):
        replaced = folder / older.name[1:-4]
        if replaced.exists():
            shutil.rmtree(older, ignore_errors=True)
        else:
            older.rename(replaced)
    for litter in (*folder.glob(".step-*.tmp"), *folder.glob(".step-*.gone")):
        shutil.rmtree(litter, ignore_errors=True)


def _all(folder: Path) -> list[Path]:
    """Every folder named as a checkpoint, the newest first."""
    found = [p for p in folder.glob("step-*") if p.is_dir() and p.name[5:].isdigit()]
    return sorted(found, key=lambda p: int(p.name[5:]), reverse=True)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as source:
        while block := source.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _disk_words(path: Path, error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = shutil.disk_usage(path.parent).free / 1e9
        return f"No room for {path.name}: the disk has {free:.2f} GB free. Make room; the older checkpoints are untouched."
    return f"{path.name} could not be written ({error.strerror or error}). The older checkpoints are untouched."
