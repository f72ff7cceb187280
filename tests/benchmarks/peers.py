"""One QLoRA step of a peer, measured as `bench` measures this program's: one JSON object on the last line.

    python tests/benchmarks/peers.py unsloth FOLDER --batch 1 --length 512                 # random tokens at full length
    python tests/benchmarks/peers.py unsloth FOLDER --batch 8 --what rows --data FILE      # examples of a file, padded
    python tests/benchmarks/peers.py unsloth FOLDER --length 128 --what decode             # 128 new tokens, batch 1

PEER is hf (transformers, peft, bitsandbytes), liger (the same with Liger's kernels) or unsloth; FOLDER a model in 16 bit, as
`random_checkpoint.py` makes it. Each is set up as its own guide for little memory says: NF4 with double quantization, rank 16
on all seven linears, bf16, gradient checkpointing, paged 8-bit AdamW. The driver's count is read before anything touches the
card, so a peer's process and ours are told by the same figure.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
import warnings
from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from lowvram_tuner.config import LINEARS, TrainConfig
from lowvram_tuner.hardware.card import read_card
from lowvram_tuner.memory.budget import GB
from lowvram_tuner.train import profile

WARM_UP = 4  # compiles, tunes, fills caches
RANK, RATE = 16, 1e-4
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "UNSLOTH_DISABLE_STATISTICS": "1", "WANDB_DISABLED": "true"}


def used_bytes() -> int:
    """What the driver counts on the card, of all programs together."""
    card = read_card()
    return card.used_bytes if card else 0


def with_unsloth(folder: str, length: int) -> tuple[Any, Any]:
    import torch
    from unsloth import FastLanguageModel

    model, tokenizer = FastLanguageModel.from_pretrained(folder, max_seq_length=length, load_in_4bit=True, dtype=torch.bfloat16)
    return model, tokenizer


def with_transformers(folder: str, liger: bool) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    if liger:
        import liger_kernel.transformers as kernels

        family = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))["model_type"]
        getattr(kernels, f"apply_liger_kernel_to_{family}")()
    four_bit = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16
    )
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=four_bit, device_map={"": 0}, dtype=torch.bfloat16)
    return model, AutoTokenizer.from_pretrained(folder)


def with_adapter(peer: str, model: Any) -> Any:
    if peer == "unsloth":
        from unsloth import FastLanguageModel

        return FastLanguageModel.get_peft_model(
            model, r=RANK, lora_alpha=RANK, lora_dropout=0, target_modules=list(LINEARS), use_gradient_checkpointing="unsloth"
        )
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    model = prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": True})
    return get_peft_model(model, LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(LINEARS), task_type="CAUSAL_LM"))


def random_batches(batch: int, length: int, vocabulary: int) -> Iterator[dict[str, Any]]:
    """Token ids below `vocabulary` and labels [batch, length], every position a target."""
    import torch

    generator = torch.Generator().manual_seed(0)
    while True:
        ids = torch.randint(5, vocabulary, (batch, length), generator=generator)
        yield {"input_ids": ids, "labels": ids}


def row_batches(data: str, folder: str, tokenizer: Any, batch: int, length: int, runs: str) -> Iterator[dict[str, Any]]:
    """The file's examples as this program prepares them, in its order, `batch` at a time, padded to the longest of them."""
    import torch

    from lowvram_tuner.data.prepare import prepare

    config = TrainConfig(model=folder, dataset=data, max_seq_length=length, held_out=0.0, output_dir=runs)
    examples = prepare(config, getattr(tokenizer, "tokenizer", tokenizer)).train
    for start in range(0, len(examples) - batch + 1, batch):
        some = [examples[i] for i in range(start, start + batch)]
        longest = max(len(e.input_ids) for e in some)
        ids, labels, mask = (torch.full((batch, longest), fill, dtype=torch.int64) for fill in (0, -100, 0))
        for row, example in enumerate(some):
            n, tokens = len(example.input_ids), torch.from_numpy(example.input_ids.astype("int64"))
            ids[row, :n], mask[row, :n] = tokens, 1
            labels[row, :n] = torch.where(torch.from_numpy(example.trained.copy()), tokens, -100)
        yield {"input_ids": ids, "labels": labels, "attention_mask": mask}


def train(model: Any, batches: Iterator[dict[str, Any]], steps: int, zero: int) -> dict[str, Any]:
    """Time, memory and kernels of `steps` optimizer steps of one batch each, after WARM_UP others."""
    import gc

    import bitsandbytes
    import torch

    model.train()
    optimizer = bitsandbytes.optim.PagedAdamW8bit([p for p in model.parameters() if p.requires_grad], lr=RATE)

    def step(batch: dict[str, Any]) -> Any:
        loss = model(**{k: v.cuda() for k, v in batch.items()}).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    times, losses, process = [], [], 0
    for batch in (batch for batch, _ in zip(batches, range(WARM_UP + steps))):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        loss = step(batch)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
        losses.append(float(loss))
        process = max(process, used_bytes() - zero)
    timed = times[WARM_UP:]
    peak = torch.cuda.max_memory_allocated()
    rows = len(batch["input_ids"])
    found = profile.summary(profile.record(lambda: step(batch)), statistics.median(timed) * 1e3)
    return {
        "peak_allocated_gb": peak / GB, "peak_reserved_gb": torch.cuda.max_memory_reserved() / GB, "process_gb": process / GB,
        "step_ms": statistics.median(timed) * 1e3, "tokens_per_s": batch["input_ids"].numel() / statistics.median(timed),
        "samples_per_s": rows * len(timed) / sum(timed), "gpu_ms": found["gpu_ms"], "gpu_busy_share": found["busy_share"],
        "kernels": found["kernels"], "loss_first": losses[0], "loss_last": losses[-1], "profile": found,
    }  # fmt: skip


def decode(peer: str, model: Any, length: int, new: int = 128) -> dict[str, Any]:
    """Tokens a second of `new` tokens after a prompt of `length`, greedily, batch 1."""
    import torch

    if peer == "unsloth":
        from unsloth import FastLanguageModel

        FastLanguageModel.for_inference(model)
    prompt = torch.randint(5, 16000, (1, length), device="cuda")

    def generate(count: int) -> float:
        torch.cuda.synchronize()
        begin = time.perf_counter()
        model.generate(
            input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=count, min_new_tokens=count, do_sample=False,
            use_cache=True, pad_token_id=0,
        )  # fmt: skip
        torch.cuda.synchronize()
        return time.perf_counter() - begin

    with torch.no_grad():
        generate(8)
        seconds = generate(new)
    return {"decode_tokens_per_s": new / seconds, "peak_allocated_gb": torch.cuda.max_memory_allocated() / GB}


def measure(args: argparse.Namespace, zero: int) -> dict[str, Any]:
    if args.peer == "unsloth":
        import_module("unsloth")  # before transformers and peft, which it patches
    import torch

    begin = time.perf_counter()
    if args.peer == "unsloth":
        model, tokenizer = with_unsloth(args.folder, max(args.length, 512))
    else:
        model, tokenizer = with_transformers(args.folder, args.peer == "liger")
    torch.cuda.synchronize()
    loaded = {"load_s": time.perf_counter() - begin, "load_peak_gb": torch.cuda.max_memory_allocated() / GB}
    if args.what == "decode":
        return decode(args.peer, model, args.length) | loaded
    model = with_adapter(args.peer, model)
    if args.what == "rows":
        batches = row_batches(args.data, args.folder, tokenizer, args.batch, args.length, args.runs)
    else:
        batches = random_batches(args.batch, args.length, min(16000, model.config.vocab_size))
    return train(model, batches, args.steps, zero) | loaded


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer", choices=("hf", "liger", "unsloth"))
    parser.add_argument("folder")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--what", choices=("train", "rows", "decode"), default="train")
    parser.add_argument("--data", default="demo", help="for rows: a file of examples")
    parser.add_argument("--runs", default="runs", help="for rows: where prepared data is kept")
    args = parser.parse_args()
    os.environ.update(OFFLINE)
    warnings.filterwarnings("ignore")
    zero = used_bytes()
    found = measure(args, zero)
    names = {"hf": ("transformers", "peft", "bitsandbytes"), "liger": ("transformers", "liger-kernel"), "unsloth": ("unsloth",)}[args.peer]
    print(json.dumps(found | {"versions": {n: version(n) for n in ("torch", *names)}}), flush=True)


if __name__ == "__main__":
    main()
