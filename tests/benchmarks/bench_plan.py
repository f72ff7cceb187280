"""Does a run take what the plan says? Predicted against measured peak memory, case by case: JSON and a table.

    python tests/benchmarks/bench_plan.py --out plan.json                 # all cases, on a card: some 6 minutes on an H100
    python tests/benchmarks/bench_plan.py --out plan.json --minutes 4     # as many as fit; the same command goes on later
    python tests/benchmarks/bench_plan.py --out plan.json --only qwen     # cases whose name contains a text
    python tests/benchmarks/bench_plan.py --out plan.json --fresh 4       # some again, each in a process of its own
    python tests/benchmarks/bench_plan.py --out plan.json --show          # the table of what is there; needs no card

A case is a real model's shape with fewer layers (the arithmetic is per layer) and a mixture of settings: format, batch,
length, rank, and how much of the way from the leanest plan's memory to the one that keeps everything its budget is.
The peak is the allocator's, `torch.cuda.max_memory_allocated` after the load, as `bench` reports it. The cases of a shape
share one process, because a start takes longer than a case: after each one everything is dropped, cuBLAS's workspaces too,
and what is left allocated must be less than 1 MB or the case is marked. The allocator counts its own blocks only, so what ran
before cannot change the figure; --fresh measures that claim.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from lowvram_tuner.config import TrainConfig  # noqa: E402
from lowvram_tuner.memory.budget import GB, Budget  # noqa: E402
from lowvram_tuner.memory.plan import Plan, plan_run  # noqa: E402
from lowvram_tuner.models.catalogue import ModelShape, shape_of  # noqa: E402
from lowvram_tuner.quant.registry import quant_format, resolve  # noqa: E402
from lowvram_tuner.quant.spec import QuantError  # noqa: E402

TOO_LOW, TOO_HIGH = 0.01, 0.03  # a peak may be so much above the plan, and so much below it
SHAPES = {  # name: (catalogue id, layers)
    "llama2-7b": ("meta-llama/Llama-2-7b-chat-hf", 8),
    "llama2-13b": ("meta-llama/Llama-2-13b-chat-hf", 6),
    "llama3-8b": ("meta-llama/Llama-3.1-8B-Instruct", 8),
    "mistral-7b": ("mistralai/Mistral-7B-Instruct-v0.3", 8),
    "qwen2.5-1.5b": ("Qwen/Qwen2.5-1.5B-Instruct", 14),
    "qwen2.5-7b": ("Qwen/Qwen2.5-7B-Instruct", 7),
    "qwen3-8b": ("Qwen/Qwen3-8B", 8),
    "qwen3-14b": ("Qwen/Qwen3-14B", 8),
}
PER_SHAPE = 8
TOLD = 3  # a worker's exit code after a case that failed and said so
METHODS = (("nf4", 4), ("quip", 2), ("hqq", 3), ("int8", 8), ("none", 16), ("gptq", 4), ("hqq", 2))
SIZES = ((1, 512), (4, 512), (1, 2048), (16, 128), (2, 1024), (1, 4096), (16, 512), (8, 256), (1, 128))  # batch x length
RANKS = (16, 4, 64, 8, 128)
SHARES = (0.1, 1.0, 0.45, 0.25, 0.7, 0.0, 0.05, 0.85)  # 0: the leanest plan, all layers streamed; 1: everything kept


@dataclass(frozen=True)
class Case:
    """One run to predict and to measure."""

    shape: str
    layers: int
    bits: int
    method: str
    batch: int
    length: int
    rank: int
    share: float

    @property
    def name(self) -> str:
        return f"{self.shape}x{self.layers} {self.method}-{self.bits} {self.batch}x{self.length} r{self.rank} {self.share:.0%}"


def cases() -> list[Case]:
    """Every shape PER_SHAPE times. The lists of settings have lengths without a common factor, so all mix with all."""
    settings = zip(*(itertools.cycle(x) for x in (METHODS, SIZES, RANKS, SHARES)))
    found = []
    for name, (model, layers) in SHAPES.items():
        for (method, bits), (batch, length), rank, share in itertools.islice(settings, PER_SHAPE):
            method, bits = holding(shape_of(model), method, bits)
            found.append(Case(name, layers, bits, method, batch, length, rank, share))
    return found


def holding(shape: ModelShape, method: str, bits: int) -> tuple[str, int]:
    """The method and bits, or hqq at the same bits where the method cannot hold that shape (quip's rotations)."""
    try:
        for size in shape.linears().values():
            quant_format(resolve(bits, method, group_size=shape.group_for(128))).layout(*size)
    except QuantError:
        return "hqq", bits
    return method, bits


def small_shape(case: Case) -> ModelShape:
    return replace(shape_of(SHAPES[case.shape][0]), num_hidden_layers=case.layers, name=case.shape)


def write_config(case: Case, folder: Path) -> Path:
    """The shape as a transformers config.json that `bench` takes for a model."""
    s = small_shape(case)
    values = {k: v for k, v in asdict(s).items() if k not in ("name", "family")} | {"model_type": s.family}
    path = folder / case.shape / "config.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values | {"_name_or_path": s.name}), encoding="utf-8")
    return path


def config_for(case: Case, model: str, context: int) -> TrainConfig:
    """The run of a case, its budget `share` of the way between the leanest plan and the one that keeps everything."""
    config = TrainConfig(
        model=model, bits=case.bits, method=case.method, micro_batch_size=case.batch, max_seq_length=case.length,
        lora_r=case.rank, gradient_accumulation_steps=1, packing=False,
    )  # fmt: skip
    leanest, richest = (planned(case, config, limit, context).process_bytes for limit in (0, 10**13))
    return replace(config, vram_gb=(leanest + case.share * (richest - leanest) + 10**6) / GB)


def planned(case: Case, config: TrainConfig, limit: int, context: int) -> Plan:
    return plan_run(config, small_shape(case), Budget(limit, 0, limit, "vram", context))


# measuring ---------------------------------------------------------------------------------------------------------------


def measure(case: Case, folder: Path) -> dict[str, Any]:
    """Predicted and measured peak of a case, on this process' card."""
    import torch

    from lowvram_tuner.hardware.card import read_card
    from lowvram_tuner.memory.calibrate import measure as calibrate
    from lowvram_tuner.models.precision import pick_dtype
    from lowvram_tuner.train.bench import bench

    known = calibrate(read_card(), pick_dtype(torch.device("cuda"), "auto"))
    left = forget()
    config = config_for(case, str(write_config(case, folder)), int(known["context_bytes"]))
    started = time.perf_counter()
    found = bench(config, steps=2, random_weights=True, profiled=False)
    plan = found["plan"]
    return {
        **asdict(case), "name": case.name, "vram_gb": round(config.vram_gb, 3), "predicted_gb": found["predicted_peak_gb"],
        "measured_gb": found["peak_allocated_gb"], "predicted_ms": plan["step_s"] * 1e3, "measured_ms": found["step_ms"],
        "streamed": plan["streamed"], "keep_all": plan["keep_all"], "head_bits": plan["head_bits"],
        "components": plan["components"], "left_over_mb": left / 1e6, "seconds": time.perf_counter() - started,
        "card": torch.cuda.get_device_name(),
    }  # fmt: skip


def forget() -> int:
    """Drops what the case before left, pinned memory and cuBLAS's workspaces included; returns the bytes still allocated."""
    import gc

    import torch

    gc.collect()
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    if hasattr(torch._C, "_host_emptyCache"):
        torch._C._host_emptyCache()
    return torch.cuda.memory_allocated()


def work(names: list[str], until: float) -> None:
    """A worker process: measures the cases, one JSON line each, and stops at `until` (time.time())."""
    chosen = {case.name: case for case in cases()}
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            if time.time() > until:
                break
            try:
                row = measure(chosen[name], Path(folder))
            except Exception as error:  # whatever fails is told, and must not hide the other cases
                row = {**asdict(chosen[name]), "name": name, "error": f"{type(error).__name__}: {str(error).strip().split(chr(10))[0]}"[:900]}
            print("ROW " + json.dumps(row), flush=True)
            if "error" in row:  # what the case left behind would be counted in the next one's peak
                sys.exit(TOLD)


def run_group(names: list[str], until: float, keep: Callable[[dict[str, Any]], None]) -> None:
    """Measures cases in a process of their own and hands each row to `keep` as it comes. A case that ends the process is
    told, and the others go on in a new one."""
    while names and time.time() < until:
        command = [sys.executable, __file__, "--worker", json.dumps(names), "--until", str(until)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("ROW "):
                row = json.loads(line[4:])
                names = [n for n in names if n != row["name"]]
                keep(row)
        if process.wait() not in (0, TOLD) and names:
            keep({"name": names[0], "error": f"its process ended with {process.returncode}"})
            names = names[1:]


# the result --------------------------------------------------------------------------------------------------------------


def read(path: Path) -> dict[str, dict[str, Any]]:
    return json.loads(path.read_text(encoding="utf-8"))["cases"] if path.is_file() else {}


def write(path: Path, rows: dict[str, dict[str, Any]]) -> None:
    """All rows so far, replaced at once, so that an end in the middle loses nothing."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps({"summary": summary(rows), "cases": rows}, indent=1), encoding="utf-8")
    temporary.replace(path)


def off(row: dict[str, Any]) -> float:
    """How far the prediction is above the measurement, as a share of the measurement; below zero: too low."""
    return row["predicted_gb"] / row["measured_gb"] - 1


def summary(rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """How many cases hold what was promised, and the worst on either side."""
    measured = [r for r in rows.values() if "error" not in r and not r.get("fresh")]
    if not measured:
        return {"cases": 0, "failed": sum("error" in r for r in rows.values())}
    low, high = min(measured, key=off), max(measured, key=off)
    fresh = [r for r in rows.values() if r.get("fresh") and "error" not in r and r["fresh"] in rows]
    return {
        "cases": len(measured), "failed": sum("error" in r for r in rows.values()),
        "held": sum(-TOO_LOW <= off(r) <= TOO_HIGH for r in measured), "streamed": sum(r["streamed"] > 0 for r in measured),
        "most_too_low": [low["name"], round(off(low), 4)], "most_too_high": [high["name"], round(off(high), 4)],
        "unclean": [r["name"] for r in measured if r["left_over_mb"] > 1],
        "fresh_differs_mb": max((abs(r["measured_gb"] - rows[r["fresh"]]["measured_gb"]) * 1e3 for r in fresh), default=None),
        "card": measured[-1]["card"],
    }  # fmt: skip


def table(rows: dict[str, dict[str, Any]]) -> str:
    """A Markdown table, the worst first, and the summary line under it."""
    lines = ["| case (shape x layers, format, batch x length, rank, room) | streamed | predicted | measured | off | step, predicted/measured |", "|---|---|---|---|---|---|"]
    shown = sorted((r for r in rows.values() if "error" not in r), key=lambda r: -abs(off(r)))
    for r in shown:
        mark = "" if -TOO_LOW <= off(r) <= TOO_HIGH else " **"
        lines.append(
            f"| {r['name']} | {r['streamed']} of {r['layers']} | {r['predicted_gb']:.3f} GB | {r['measured_gb']:.3f} GB "
            f"| {off(r):+.1%}{mark} | {r['predicted_ms'] / r['measured_ms']:.2f} |"
        )
    lines += [f"| {r['name']} | | | | {r['error']} | |" for r in rows.values() if "error" in r]
    return "\n".join([*lines, "", line(summary(rows))])


def line(s: dict[str, Any]) -> str:
    if not s["cases"]:
        return f"no case measured, {s['failed']} failed"
    fresh = "" if s["fresh_differs_mb"] is None else f"; a process of its own differs by {s['fresh_differs_mb']:.1f} MB at most"
    return (
        f"{s['held']} of {s['cases']} predictions within +{TOO_HIGH:.0%}/-{TOO_LOW:.0%} ({s['streamed']} streamed, {s['failed']} failed): "
        f"most too low {s['most_too_low'][1]:+.1%} ({s['most_too_low'][0]}), "
        f"most too high {s['most_too_high'][1]:+.1%} ({s['most_too_high'][0]}){fresh}; {s['card']}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("bench_plan.json"), help="where results are kept and gone on with")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--minutes", type=float, default=60.0, help="start nothing after so many minutes")
    parser.add_argument("--again", action="store_true", help="measure cases that are in the file already, too")
    parser.add_argument("--fresh", type=int, default=0, metavar="N", help="N measured cases again, each in its own process")
    parser.add_argument("--show", action="store_true", help="print the table of the file and end")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, default=0.0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return work(json.loads(args.worker), args.until)
    rows = read(args.out)
    if not args.show:
        measure_all(args, rows)
    print(table(rows))
    print(json.dumps(summary(rows)))


def measure_all(args: argparse.Namespace, rows: dict[str, dict[str, Any]]) -> None:
    from lowvram_tuner.hardware.card import read_card

    if read_card() is None:
        sys.exit("error: this measures a CUDA card, and none is here; --show prints what was measured.")
    until = time.time() + 60 * args.minutes

    def keep(row: dict[str, Any]) -> None:
        rows[row["name"]] = row
        write(args.out, rows)
        print(f"{row['name']}: {row.get('error') or f'{off(row):+.2%}'}", file=sys.stderr, flush=True)

    def keep_fresh(row: dict[str, Any]) -> None:
        keep(row | {"fresh": row["name"], "name": f"{row['name']}, own process"})

    wanted = [c for c in cases() if args.only in c.name and (args.again or "measured_gb" not in rows.get(c.name, {}))]
    for _, group in itertools.groupby([] if args.fresh else wanted, key=lambda c: c.shape):
        if time.time() < until:
            run_group([c.name for c in group], until, keep)
    done = [name for name, r in rows.items() if "measured_gb" in r and not r.get("fresh") and args.only in name]
    for name in done[:: max(1, len(done) // args.fresh)][: args.fresh] if args.fresh else []:
        if time.time() < until:
            run_group([name], until, keep_fresh)


if __name__ == "__main__":
    main()
