"""Perplexity of a model quantized in every way: one JSON object on stdout. The README's table of quality per bit width.

    python tests/benchmarks/bench_quantizers.py --text ../shared/data/wiki_demo.txt --calibration ../shared/data/c4_demo.jsonl

Each specification is `quantize`d into a checkpoint, read back through the checkpoint readers, and its exact weights are put
into transformers' own fp32 model: windows of 512 tokens over the first 60,000 characters. A name is
METHOD-BITS[-sym|-asym][-act][-gSIZE], `rtn-...` is GPTQ's format rounded to nearest.

    ... --train ../shared/data/alpaca_en_demo.json none-16 int8-8 nf4-4 gptq-8-sym gptq-4-asym ...

also trains each for 200 steps of 8 examples, by `lowvram_tuner train` from that checkpoint, and adds its held-out loss: the README's
second table.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from lowvram_tuner.models.source import load_tokenizer, locate
from lowvram_tuner.quant import calibrate
from lowvram_tuner.quant.checkpoint import open_checkpoint
from lowvram_tuner.quant.registry import quant_format
from lowvram_tuner.quant.spec import QuantSpec

DEFAULT = [
    "none-16", "int8-8", "nf4-4", "gptq-8-sym", "gptq-4-sym", "gptq-4-asym", "gptq-4-sym-act", "hqq-4", "rtn-4-asym",
    "gptq-3-sym", "gptq-3-asym", "hqq-3", "rtn-3-asym", "gptq-2-sym", "gptq-2-asym", "hqq-2", "rtn-2-asym", "quip-2", "quip-4",
]  # fmt: skip
ROOT = Path(__file__).resolve().parents[2]
WINDOW = 512
TRAINING = (
    "--micro-batch-size 8 --max-seq-length 512 --gradient-accumulation-steps 1 --max-steps 200 --held-out 0.1 "
    "--learning-rate 5e-4 --compare-prompts Hello"
)


def spec_of(name: str, group_size: int) -> QuantSpec:
    method, bits, *flags = name.split("-")
    sizes = [int(f[1:]) for f in flags if f.startswith("g")]
    return QuantSpec(
        "gptq" if method == "rtn" else method, int(bits), sizes[0] if sizes else group_size,
        desc_act="act" in flags, sym="asym" not in flags,
    )  # fmt: skip


def load(model: str, device: str):
    from transformers import AutoModelForCausalLM

    source = locate(model)
    return AutoModelForCausalLM.from_pretrained(source.folder, dtype=torch.float32, **source.hf_kwargs()).to(device).eval()


@torch.no_grad()
def perplexity(model, ids: torch.Tensor) -> float:
    total = tokens = 0
    for window in ids.split(WINDOW):
        if len(window) > 1:
            logits = model(window.unsqueeze(0)).logits[0, :-1].float()
            total += float(torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum"))
            tokens += len(window) - 1
    return math.exp(total / tokens)


@torch.no_grad()
def apply(model, name: str, spec: QuantSpec, args: argparse.Namespace) -> dict:
    """Replaces the model's linears by their quantized selves. Returns what `quantize` reported of it."""
    linears = {f"model.layers.{n}": m for n, m in model.model.layers.named_modules() if isinstance(m, torch.nn.Linear)}
    if spec.method == "none":
        return trained(args.model, spec, args)
    if name.startswith("rtn"):
        fmt = quant_format(spec)
        for module in linears.values():
            fmt.dequantize(fmt.quantize(module.weight), module.weight.data)
        return {}
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "out"
        report = calibrate.quantize_model(
            args.model, spec, args.calibration, output, rows=args.rows, device=args.device,
            progress=lambda what, done, total: print(f"\r{name}: {what} {done:.0f}/{total:.0f}   ", end="", file=sys.stderr),
        )  # fmt: skip
        reader = open_checkpoint(output)
        for module_name, module in linears.items():
            found = reader.load(module_name)
            packed = {k: t.to(args.device) for k, t in found.packed.items()}
            module.weight.data = _dense(found, packed, module.weight)
        return {"quantize_s": report["seconds"], "peak_allocated_gb": report["peak_allocated_gb"]} | trained(str(output), spec, args)


def trained(model: str, spec: QuantSpec, args: argparse.Namespace) -> dict:
    """The held-out loss after TRAINING, where it is asked for."""
    if not args.train:
        return {}
    with tempfile.TemporaryDirectory() as runs:
        command = [sys.executable, "-m", "lowvram_tuner", "train", "--model", model, "--bits", str(spec.bits), "--dataset", str(args.train)]
        done = subprocess.run([*command, *TRAINING.split(), "--output-dir", runs, "--json"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        return {"error": done.stderr.strip().splitlines()[-1]}
    return {"eval_loss": round(json.loads(done.stdout.splitlines()[-1])["eval_loss"], 4)}


def _dense(found, packed, weight: torch.Tensor) -> torch.Tensor:
    """W in fp32; for a format with rotations the product with the unit matrix."""
    from lowvram_tuner.quant.spec import Scratch

    fmt = quant_format(found.spec)
    if fmt.dense:
        return fmt.dequantize(packed, torch.empty_like(weight))
    unit = torch.eye(found.in_features, device=weight.device)
    out = torch.empty(found.in_features, found.out_features, device=weight.device)
    return fmt.forward(unit, packed, Scratch(weight.numel() * 4, weight.device), out).t().contiguous()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*", default=DEFAULT)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--characters", type=int, default=60_000)
    parser.add_argument("--rows", type=int, default=calibrate.ROWS)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--correction", type=float, default=calibrate.CORRECTION, help="share of earlier layers' error taken over")
    parser.add_argument("--train", type=lambda p: Path(p).resolve(), help="a file of examples: also the held-out loss after 200 steps on it")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    calibrate.CORRECTION = args.correction
    text = args.text.read_text(encoding="utf-8")[: args.characters]
    ids = torch.tensor(load_tokenizer(args.model)(text).input_ids, device=args.device)
    result = {"model": args.model, "tokens": len(ids), "group_size": args.group_size, "rows": args.rows, "perplexity": {}}
    for name in args.names:
        began = time.perf_counter()
        model = load(args.model, args.device)
        entry = apply(model, name, spec_of(name, args.group_size), args)
        entry = {"perplexity": round(perplexity(model, ids), 3), **entry, "seconds": round(time.perf_counter() - began)}
        result["perplexity"][name] = entry
        print(f"\n{name}: {entry}", file=sys.stderr, flush=True)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
