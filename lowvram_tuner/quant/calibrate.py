"""Quantizing a model into a checkpoint of its format, one decoder layer at a time: the `quantize` command.

Only one layer's weights are on the device, as they were and as they become; the calibration activations stay on the CPU. A
calibrated format rounds each weight for the inputs it will see, which come from layers already quantized:

    minimize || W X_full - Q X ||^2        X: inputs behind quantized layers, X_full: behind the original ones

which is rounding W' = W + W (X_full - X) X.T (X X.T)^-1 for the Hessian X X.T: a layer also corrects what the layers before
it got wrong (half of it: see CORRECTION). Finished layers are kept in a folder beside the output, so that a killed run goes
on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowvram_tuner.quant.checkpoint import open_checkpoint, writer_for
from lowvram_tuner.quant.checkpoints.unfinished import Packed, Partial, write_checkpoint
from lowvram_tuner.quant.registry import quant_format
from lowvram_tuner.quant.spec import QuantError, QuantFormat, QuantSpec

if TYPE_CHECKING:
    import torch
    from torch import nn

    from lowvram_tuner.config import TrainConfig
    from lowvram_tuner.models.source import Source
    from lowvram_tuner.models.weights import Weights
    from lowvram_tuner.quant.layerwise import Layers

Progress = Callable[[str, float, float], None]  # what, done, total

ROWS = 64  # calibration sequences
# Share of the earlier layers' error that a layer takes upon itself. Perplexity of the demo model with its first six layers at
# 3 bits, 32 rows of calibration: 16-bit 25.22, share 0 27.76, 0.5 27.24, 1 27.76 (all of it also fits the calibration's noise).
CORRECTION = 0.5
DAMPING = (0.0, 0.03, 0.1, 0.3, 1.0, 10.0)  # of H's mean diagonal, added one after the other until rounding succeeds
SOLVE_DAMPING = 0.01  # of the least squares behind W'
GROUPED = ("gptq", "hqq")
GROUP_SIZES = (128, 64, 32)


def quantize_model(
    model: str,
    spec: QuantSpec,
    calibration: Path | str | TrainConfig | None,
    output: Path,
    max_seq_length: int = 512,
    rows: int = ROWS,
    device: str | torch.device | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Writes `model` quantized as `spec` says into the folder `output`, an ordinary checkpoint of that format.

    model: as everywhere ("demo", folder, hub id). calibration: a dataset of any readable form, the training data for
    example, or a config that names the data of a run; formats that need none ignore it. rows x max_seq_length of its tokens
    are used, of a run's data as many as there are.
    Returns output, seconds, peak_allocated_gb and layers (per linear: name, error, damping, seconds).
    Raises QuantError, ConfigError or DataError when the model or the data cannot be used.
    """
    import torch

    from lowvram_tuner.models.load import build_skeleton
    from lowvram_tuner.models.precision import pick_device, pick_dtype
    from lowvram_tuner.models.source import load_tokenizer, locate
    from lowvram_tuner.models.weights import open_weights

    began = time.perf_counter()
    output = Path(output)
    source = locate(model)
    if not source.gguf and open_checkpoint(source.folder) is not None:
        raise QuantError(f"model={model!r} is quantized already; give the unquantized model.")
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise QuantError(f"output={str(output)!r} is {'not empty' if output.is_dir() else 'a file'}; give a new folder.")
    target = torch.device(device) if device else pick_device()
    dtype = pick_dtype(target)
    skeleton = build_skeleton(source, dtype)
    spec = fitting(spec, skeleton)
    writer, fmt = writer_for(spec), quant_format(spec)
    weights = open_weights(source, skeleton)
    tokenizer = load_tokenizer(model)
    ids = _calibration_ids(model, calibration, tokenizer, rows, max_seq_length) if fmt.calibrated else None
    if target.type == "cuda":
        torch.cuda.reset_peak_memory_stats(target)

    try:
        partial = Partial(output, _fingerprint(source, spec, ids))
    except OSError as error:
        raise QuantError(f"output={str(output)!r} cannot be written ({error.strerror}); give a folder elsewhere.") from None
    with torch.no_grad():
        if fmt.calibrated:
            report = _calibrated(skeleton, weights, ids, fmt, partial, target, dtype, _eta(progress))
        else:
            report = _data_free(skeleton, weights, fmt, partial, target, dtype, _eta(progress))
        write_checkpoint(output, partial, source, skeleton, weights, tokenizer, writer)
    peak = torch.cuda.max_memory_allocated(target) if target.type == "cuda" else _resident_bytes()
    seconds = round(time.perf_counter() - began, 1)
    return {"output": str(output), "seconds": seconds, "peak_allocated_gb": round(peak / 1e9, 3), "layers": report}


def fitting(spec: QuantSpec, model: nn.Module) -> QuantSpec:
    """The spec with a group size that divides every linear's inputs: 64 where 128 does not, and so on."""
    from torch import nn

    inputs = {m.in_features for m in model.model.layers[0].modules() if isinstance(m, nn.Linear)}
    if spec.method not in GROUPED or spec.group_size == -1 or all(n % spec.group_size == 0 for n in inputs):
        return spec
    for size in GROUP_SIZES:
        if size < spec.group_size and all(n % size == 0 for n in inputs):
            return replace(spec, group_size=size)
    raise QuantError(f"group_size={spec.group_size} does not divide in_features={min(inputs)}, nor do 64 and 32; use -1.")


def _calibrated(
    model: nn.Module, weights: Weights, ids: torch.Tensor, fmt: QuantFormat, partial: Partial,
    device: torch.device, dtype: torch.dtype, progress: Progress,
) -> list[dict[str, Any]]:  # fmt: skip
    from lowvram_tuner.quant.layerwise import Layers

    layers = Layers(model, weights, ids, device, dtype)
    hidden, full, report, total = layers.hidden, layers.hidden, [], len(layers) * len(linears_of(model.model.layers[0]))
    for index in range(len(layers)):
        progress("quantizing weights", len(report), total)
        original, quantized = layers.build(index), layers.build(index)
        done = partial.load(index)
        if done is None:
            finished = len(report)
            packed, entries = _round_layer(
                layers, index, original, quantized, hidden, full, fmt, lambda n, finished=finished: progress("quantizing weights", finished + n, total)
            )  # fmt: skip
            partial.save(index, packed, entries)
        else:
            packed, entries = done
            _restore(quantized, packed, fmt)
        report += entries
        if index + 1 < len(layers):
            hidden, full = layers.run(index, quantized, hidden), layers.run(index, original, full)
    progress("quantizing weights", total, total)
    return report


def linears_of(layer: nn.Module) -> list[str]:
    """The names of a layer's linears."""
    from torch import nn

    return [name for name, module in layer.named_modules() if isinstance(module, nn.Linear)]


def _restore(layer: nn.Module, packed: Packed, fmt: QuantFormat) -> None:
    """Gives a layer the weights that a finished run of `_round_layer` left it with."""
    import torch

    from lowvram_tuner.quant.layerwise import set_parameter

    for name, tensors in packed.items():
        weight = layer.get_submodule(name).weight
        # a new tensor: what was read from the file may be memory that the original layer shares
        rounded = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
        fmt.dequantize({k: t.to(weight.device) for k, t in tensors.items()}, rounded)
        set_parameter(layer, f"{name}.weight", rounded.to(weight.dtype))


def _round_layer(
    layers: Layers, index: int, original: nn.Module, quantized: nn.Module, hidden: torch.Tensor, full: torch.Tensor, fmt: QuantFormat,
    progress: Callable[[int], None],
) -> tuple[Packed, list[dict[str, Any]]]:  # fmt: skip
    """Rounds a layer's linears in the order they run; `quantized` is changed as they are. progress(how many are done)."""
    from lowvram_tuner.quant.layerwise import set_parameter

    packed: Packed = {}
    entries = []
    for names in layers.linears(index, original):
        hessian, cross = _statistics(layers, index, original, quantized, names[0], hidden, full)
        wanted = {name: _corrected(quantized.get_submodule(name).weight.float(), hessian, cross) for name in names}
        del cross  # as large as the Hessian, which a 7B's down has at 0.5 GB
        for name in names:
            began = time.perf_counter()
            linear, weight = quantized.get_submodule(name), wanted.pop(name)
            label = f"model.layers.{index}.{name}"
            tensors, rounded, damping = _round(fmt, weight, hessian, label)
            error = _relative_error(weight, rounded, hessian)
            packed[name] = {k: t.cpu() for k, t in tensors.items()}
            set_parameter(quantized, f"{name}.weight", rounded.to(linear.weight.dtype))
            seconds = round(time.perf_counter() - began, 2)
            entries.append({"name": label, "error": error, "damping": damping, "seconds": seconds})
            progress(len(entries))
    return packed, entries


def _statistics(
    layers: Layers, index: int, original: nn.Module, quantized: nn.Module, name: str, hidden: torch.Tensor, full: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(mean of x x.T, mean of (x_full - x) x.T), fp32 [in, in] on the device, over all rows."""
    size = original.get_submodule(name).in_features
    hessian = hidden.new_zeros(size, size, device=layers.device, dtype=_fp32())
    cross = hessian.clone()
    for x, x_full in zip(hidden, full):
        seen = layers.input_of(index, quantized, name, x)
        hessian.addmm_(seen.t(), seen)
        cross.addmm_((layers.input_of(index, original, name, x_full) - seen).t(), seen)
    tokens = hidden.shape[0] * hidden.shape[1]
    return hessian.div_(tokens), cross.div_(tokens)


def _corrected(weight: torch.Tensor, hessian: torch.Tensor, cross: torch.Tensor) -> torch.Tensor:
    """W + CORRECTION * W cross H^-1, or W itself where that cannot be computed."""
    import torch

    damped = hessian.clone()
    damped.diagonal().add_(SOLVE_DAMPING * hessian.diagonal().mean())
    lower, failed = torch.linalg.cholesky_ex(damped)
    del damped
    if int(failed):
        return weight
    change = torch.cholesky_solve((weight @ cross).t(), lower).t()
    return weight + CORRECTION * change if change.isfinite().all() else weight


def _round(fmt: QuantFormat, weight: torch.Tensor, hessian: torch.Tensor, label: str):
    """`fmt.round` with more and more damping until it succeeds: (packed, rounded, damping added)."""
    import torch

    failure: Exception | None = None
    for damping in DAMPING:
        damped = hessian
        if damping:
            damped = hessian.clone()
            damped.diagonal().add_(damping * hessian.diagonal().mean())
        try:
            return *fmt.round(weight, damped), damping
        except (QuantError, torch.linalg.LinAlgError) as error:
            failure = error.with_traceback(None)  # which holds what was computed in vain
    raise QuantError(f"{label} could not be quantized, even with damping {DAMPING[-1]:g}: {failure}") from failure


def _relative_error(weight: torch.Tensor, rounded: torch.Tensor, hessian: torch.Tensor) -> float:
    """tr((W - Q) H (W - Q).T) / tr(W H W.T): the share of the output's energy that rounding costs."""
    difference = weight - rounded
    total = ((weight @ hessian) * weight).sum()
    return float(((difference @ hessian) * difference).sum() / total) if total > 0 else 0.0


def _data_free(
    model: nn.Module, weights: Weights, fmt: QuantFormat, partial: Partial,
    device: torch.device, dtype: torch.dtype, progress: Progress,
) -> list[dict[str, Any]]:  # fmt: skip
    report, total = [], len(model.model.layers) * len(linears_of(model.model.layers[0]))
    for index, layer in enumerate(model.model.layers):
        progress("quantizing weights", len(report), total)
        done = partial.load(index)
        if done is None:
            packed, entries = {}, []
            for name in linears_of(layer):
                began = time.perf_counter()
                label = f"model.layers.{index}.{name}"
                weight = weights.read(f"{label}.weight", layer.get_submodule(name).weight.shape, device)
                tensors = fmt.quantize(weight)
                packed[name] = {k: t.cpu() for k, t in tensors.items()}
                rounded = fmt.dequantize(tensors, weight.new_empty(weight.shape, dtype=_fp32()))
                error = float((weight.float() - rounded).square().sum() / weight.float().square().sum().clamp(min=1e-30))
                entries.append({"name": label, "error": error, "damping": 0.0, "seconds": round(time.perf_counter() - began, 2)})
            partial.save(index, packed, entries)
            done = packed, entries
        report += done[1]
    progress("quantizing weights", total, total)
    return report


def _calibration_ids(
    model: str, calibration: Path | str | TrainConfig | None, tokenizer: Any, rows: int, length: int
) -> torch.Tensor:  # fmt: skip
    """int64 [rows, length]: the dataset's examples one after the other, cut into full rows."""
    import numpy as np
    import torch

    from lowvram_tuner.config import TrainConfig
    from lowvram_tuner.data.prepare import prepare

    if calibration is None:
        raise QuantError("this method needs calibration text; give a file of text or the training data.")
    if isinstance(calibration, TrainConfig):
        config = replace(calibration, max_seq_length=length, train_on="everything")
    else:
        config = TrainConfig(model=model, dataset=str(calibration), max_seq_length=length, train_on="everything", held_out=0.0)
    found, tokens = [], 0
    for example in prepare(config, tokenizer).train:
        found.append(np.asarray(example.input_ids, dtype=np.int64))
        tokens += len(found[-1])
        if tokens >= rows * length:
            break
    ids = np.concatenate(found)
    if isinstance(calibration, TrainConfig):
        length = min(length, len(ids))
    if len(ids) < length:
        raise QuantError(f"calibration={str(calibration)!r} has {len(ids)} tokens; at least {length} (one row) are needed.")
    count = min(rows, len(ids) // length)
    return torch.from_numpy(ids[: count * length]).view(count, length)


def _fingerprint(source: Source, spec: QuantSpec, ids: torch.Tensor | None) -> str:
    """What a finished layer depends on: the model's files as they are now, the format, the calibration's tokens."""
    digest = hashlib.sha256(b"" if ids is None else ids.numpy().tobytes()).hexdigest()
    return json.dumps({"source": source.stamps(), "spec": asdict(spec), "calibration": digest})


def _eta(progress: Progress | None) -> Progress:
    """Adds the time left to what a progress callback is told."""
    began = time.perf_counter()

    def report(what: str, done: float, total: float) -> None:
        if progress and done:
            left = (time.perf_counter() - began) / done * (total - done)
            what = f"{what} (about {left / 60:.0f} min left)" if left > 90 else f"{what} (about {left:.0f} s left)"
        if progress:
            progress(what, done, total)

    return report


def _fp32() -> torch.dtype:
    import torch

    return torch.float32


def _resident_bytes() -> int:
    """On the CPU the process's memory stands in for the card's."""
    import psutil

    return psutil.Process().memory_info().rss
