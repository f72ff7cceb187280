"""Speed and memory of the data path, beside TRL's SFTTrainer on the same file in the same process.

    python tests/benchmarks/bench_data.py                 # tokenizing and masking, JSON on the last line
    python tests/benchmarks/bench_data.py --memory 200    # peak memory of preparing a 200 MB file, against 20 MB and 2 MB

TRL needs `{% generation %}` markers for its mask, so both sides use Qwen 2.5's template, for which TRL has a patched form, on
the demo model's tokenizer. Each side reads the file, renders, tokenizes and masks; TRL is timed with one and with two
processes and its better time counts.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from lowvram_tuner.config import TrainConfig  # noqa: E402
from lowvram_tuner.data.prepare import prepare  # noqa: E402
from lowvram_tuner.data.sources import DEMO_FILE  # noqa: E402
from lowvram_tuner.models.source import load_tokenizer  # noqa: E402

LENGTH = 2048


def write_chats(path: Path, size: int) -> int:
    """About `size` bytes of conversations of one to six turns made from the demo's; returns the rows."""
    demo = [json.loads(line)["messages"] for line in DEMO_FILE.read_text(encoding="utf-8").splitlines()]
    turns = [chat[-2:] for chat in demo]
    draw, rows, written = random.Random(1), 0, 0
    with path.open("w", encoding="utf-8") as file:
        while written < size:
            chat = [m for turn in draw.sample(turns, draw.randint(1, 6)) for m in turn]
            chat = [{**chat[0], "content": f"{rows}. {chat[0]['content']}"}, *chat[1:]]
            written += file.write(json.dumps({"messages": chat}) + "\n")
            rows += 1
    return rows


def ours(path: Path, tokenizer, runs: Path) -> tuple[float, float, int, int]:
    """Seconds, seconds of CPU, tokens and trained tokens of `prepare` without a cache."""
    started, cpu = time.perf_counter(), time.process_time()
    report = prepare(TrainConfig(dataset=str(path), max_seq_length=LENGTH, output_dir=str(runs), held_out=0), tokenizer).report
    return time.perf_counter() - started, time.process_time() - cpu, report.tokens, report.trained_tokens


def trls(path: Path, tokenizer, processes: int | None, folder: Path) -> tuple[float, float, int, int]:
    """Seconds, seconds of CPU (of this process), tokens and trained tokens of `datasets` and SFTTrainer's preparation."""
    import datasets
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    datasets.disable_progress_bars()
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
    ))  # fmt: skip
    spent = cpu = 0.0
    original = SFTTrainer._prepare_dataset

    def timed(self, *args, **kwargs):
        nonlocal spent, cpu
        started, before = time.perf_counter(), time.process_time()
        result = original(self, *args, **kwargs)
        spent, cpu = spent + time.perf_counter() - started, cpu + time.process_time() - before
        return result

    started, before = time.perf_counter(), time.process_time()
    data = datasets.load_dataset("json", data_files=str(path), split="train", cache_dir=str(folder))
    reading, cpu_reading = time.perf_counter() - started, time.process_time() - before
    settings = SFTConfig(
        output_dir=str(folder), assistant_only_loss=True, max_length=LENGTH, dataset_num_proc=processes, use_cpu=True, report_to=[],
        bf16=False,
    )  # fmt: skip
    SFTTrainer._prepare_dataset = timed
    try:
        trainer = SFTTrainer(model, args=settings, train_dataset=data, processing_class=tokenizer)
    finally:
        SFTTrainer._prepare_dataset = original
    made = trainer.train_dataset
    tokens = sum(map(len, made["input_ids"]))
    return reading + spent, cpu_reading + cpu, tokens, sum(label != -100 for labels in made["labels"] for label in labels)


def qwen_tokenizer():
    """The demo's tokenizer with Qwen 2.5's template, which TRL knows."""
    import trl

    tokenizer = load_tokenizer("demo")
    tokenizer.chat_template = (Path(trl.__file__).parent / "chat_templates/qwen2_5.jinja").read_text(encoding="utf-8")
    return tokenizer


def speed(megabytes: float) -> dict:
    """Both sides on one file, ours twice and TRL's with one and two processes; the better time of each counts."""
    tokenizer = qwen_tokenizer()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = write_chats(folder / "chats.jsonl", int(megabytes * 1e6))
        mine = [ours(folder / "chats.jsonl", tokenizer, folder / f"runs{i}") for i in range(2)]
        theirs = [trls(folder / "chats.jsonl", tokenizer, n, folder / f"trl{n}") for n in (None, 2)]
    best, other = min(mine), min(theirs)
    return {
        "rows": rows, "tokens": best[2], "trained_tokens": best[3], "seconds": round(best[0], 2), "cpu_seconds": round(best[1], 2),
        "tokens_per_s": round(best[2] / best[0]), "trl_tokens": other[2], "trl_trained_tokens": other[3],
        "trl_seconds_by_processes": {"1": round(theirs[0][0], 2), "2": round(theirs[1][0], 2)},
        "trl_cpu_seconds": round(theirs[0][1], 2), "trl_tokens_per_s": round(other[2] / other[0]),
        "times_faster": round(other[0] / best[0], 2), "times_less_cpu": round(theirs[0][1] / best[1], 2),
    }  # fmt: skip


def memory(megabytes: float) -> dict:
    """Peak memory of a process that prepares a file, for a small one, a tenth, and the whole."""
    with tempfile.TemporaryDirectory() as name:
        peaks = {}
        for size in (2, megabytes / 10, megabytes):
            path = Path(name) / f"{size}.jsonl"
            write_chats(path, int(size * 1e6))
            code = f"import sys; sys.path[:0] = {sys.path!r}; from bench_data import peak; print(peak({str(path)!r}, {name!r}))"
            out = subprocess.run(
                [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parent
            ).stdout
            peaks[size] = json.loads(out.splitlines()[-1])
    return {"by_megabytes": peaks, "growth_mb": round(peaks[megabytes]["peak_mb"] - peaks[2]["peak_mb"], 1)}


def peak(path: str, runs: str) -> str:
    """Prepares a file; its own peak memory (anonymous, without mapped files) in MB, and the seconds taken."""
    tokenizer = load_tokenizer("demo")
    started, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    prepare(TrainConfig(dataset=path, max_seq_length=LENGTH, output_dir=runs), tokenizer)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    return json.dumps({"before_mb": round(before, 1), "peak_mb": round(after, 1), "seconds": round(time.perf_counter() - started, 1)})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=4.0, help="size of the file for the speed comparison")
    parser.add_argument("--memory", type=float, default=0.0, help="measure memory on a file of so many megabytes instead")
    args = parser.parse_args()
    print(json.dumps(memory(args.memory) if args.memory else speed(args.megabytes)))
