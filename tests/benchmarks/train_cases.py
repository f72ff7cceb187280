"""What is measured on a card and what it must reach: the cases of `bench_train.py`, as data.

A case is one command of this program; a `Must` is a figure it has to reach, absolute or as a ratio of the same figure of
another measurement of the same session: a peer's, or another case's. Cases stand in the order in which they should be
measured when time is short. GB is 10^9 bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

B7, B13 = "meta-llama/Llama-2-7b-chat-hf", "meta-llama/Llama-2-13b-chat-hf"
B8 = "meta-llama/Llama-3.1-8B-Instruct"
B14, B32 = "Qwen/Qwen3-14B", "Qwen/Qwen3-32B"
B30, B65, B70 = "huggyllama/llama-30b", "huggyllama/llama-65b", "meta-llama/Llama-2-70b-chat-hf"
FOLDER = "{folder}"  # stands for a folder of random bf16 weights of the case's model, which is made when needed
ALPACA = "{alpaca}"
PEERS = {  # name: (how the table calls it, what must be importable)
    "unsloth": ("Unsloth", ("unsloth", "bitsandbytes")),
    "hf": ("transformers + peft + bitsandbytes", ("transformers", "peft", "bitsandbytes")),
    "liger": ("the same + Liger", ("transformers", "peft", "bitsandbytes", "liger_kernel")),
}


@dataclass(frozen=True)
class Must:
    """`metric` of the case compared with `limit`, or with `limit` times the same metric of the measurement `against`."""

    metric: str
    relation: str  # "<=" or ">="
    limit: float
    against: str = ""

    def bound(self, results: dict[str, dict[str, Any]]) -> float | None:
        """The figure to reach; None while the other measurement is missing."""
        if not self.against:
            return self.limit
        other = results.get(self.against, {}).get(self.metric)
        return None if other is None else self.limit * other

    def held(self, result: dict[str, Any], results: dict[str, dict[str, Any]]) -> bool | None:
        """Whether it is reached; None where something is missing."""
        bound, value = self.bound(results), result.get(self.metric)
        if bound is None or value is None:
            return None
        return value <= bound if self.relation == "<=" else value >= bound


@dataclass(frozen=True)
class Case:
    """`cap_gb`: what the allocator may take; the budget is that and CUDA's own share on this card. `minutes`: an estimate."""

    name: str
    model: str
    options: tuple[str, ...]
    musts: tuple[Must, ...]
    command: str = "bench"
    cap_gb: float = 0.0
    minutes: float = 0.4
    published: str = ""  # what others say they need, where they cannot be run here

    @property
    def key(self) -> str:
        return self.name


@dataclass(frozen=True)
class PeerCase:
    """One peer on one shape. `what`: train (random tokens at full length), rows (examples of the data) or decode."""

    peer: str
    model: str
    batch: int
    length: int
    what: str = "train"
    minutes: float = 1.0

    @property
    def key(self) -> str:
        return peer_key(self.peer, self.model, self.batch, self.length, self.what)


def peer_key(peer: str, model: str, batch: int, length: int, what: str = "train") -> str:
    return f"{peer}: {model.split('/')[-1]} {batch}x{length}{'' if what == 'train' else f' {what}'}"


def bench(name: str, model: str, *musts: Must, batch: int = 1, length: int = 512, options: str = "", **more: Any) -> Case:
    size = () if (batch, length) == (1, 512) else ("--micro-batch-size", str(batch), "--max-seq-length", str(length))
    return Case(name, model, ("--model", model, *size, *options.split(), "--random-weights"), musts, **more)


def alpaca(batch: int) -> Case:
    options = f"--model {FOLDER} --dataset {ALPACA} --micro-batch-size {batch} --max-seq-length 512 --gradient-accumulation-steps 1 --held-out 0 --compare-prompts Hello"
    must = Must("samples_per_s", ">=", 3.0, peer_key("unsloth", B8, batch, 512, "rows"))
    return Case(f"8B Alpaca rows, batch {batch}", B8, tuple(options.split()), (must,), "train", minutes=1.2)


FINITE = Must("loss_last", "<=", 30.0)  # it trains: a loss that is nan or inf is not below anything
U8_1, U8_16, U8_2048 = (peer_key("unsloth", B8, b, n) for b, n in ((1, 512), (16, 512), (1, 2048)))
UNSLOTH_16_GB = 8.37  # the peak of Unsloth at 16x512 when the case was set

CASES = (
    bench("8B 1x512, whole card", B8, Must("step_ms", "<=", 0.25, U8_1), Must("gpu_busy_share", ">=", 0.9)),
    bench("8B 16x512, Unsloth's memory", B8, Must("tokens_per_s", ">=", 1.3, U8_16), Must("peak_allocated_gb", "<=", 1.0, U8_16),
          batch=16, cap_gb=UNSLOTH_16_GB),
    bench("8B 16x512, whole card", B8, Must("tokens_per_s", ">=", 1.5, U8_16), batch=16),
    bench("8B 1x2048, whole card", B8, Must("step_ms", "<=", 0.5, U8_2048), length=2048),
    bench("8B in 4.95 GB", B8, Must("peak_allocated_gb", "<=", 4.6), Must("process_gb", "<=", 4.95), options="--vram-gb 4.95"),
    bench("7B in 4.3 GB", B7, Must("peak_allocated_gb", "<=", 3.9), Must("process_gb", "<=", 4.3), options="--vram-gb 4.3"),
    bench("7B 1x512, whole card", B7, Must("step_ms", "<=", 0.25, peer_key("unsloth", B7, 1, 512))),
    bench("14B 1x512, cap 5.2 GB", B14, FINITE, Must("step_ms", "<=", 1.0, peer_key("unsloth", B13, 1, 512)), cap_gb=5.2, minutes=0.5),
    bench("14B 16x512, cap 5.2 GB", B14, FINITE, Must("tokens_per_s", ">=", 0.9, "14B 16x512, resident"), batch=16, cap_gb=5.2, minutes=0.6),
    bench("14B 16x512, resident", B14, FINITE, batch=16, options="--vram-gb 12", minutes=0.6),
    bench("8B 4x512 in 6 GB", B8, FINITE, Must("process_gb", "<=", 6.0), batch=4, options="--vram-gb 6"),
    bench("13B in 7.6 GB", B13, Must("process_gb", "<=", 7.6), options="--vram-gb 7.6"),
    alpaca(8),
    alpaca(1),
    Case("8B from safetensors in 4.95 GB", B8, ("--model", FOLDER, "--vram-gb", "4.95", "--steps", "3"),
         (Must("load_s", "<=", 10.0), Must("load_of_peak", "<=", 1.0)), minutes=0.7),
    Case("8B decode", B8, ("--model", B8, "--decode", "128", "--random-weights"),
         (Must("decode_tokens_per_s", ">=", 6.0, peer_key("unsloth", B8, 1, 128, "decode")),), minutes=0.5),
    bench("32B 1x512, cap 5.2 GB", B32, FINITE, cap_gb=5.2, options="--steps 4", minutes=0.9),
    bench("70B in 22 GB", B70, FINITE, Must("process_gb", "<=", 22.0), options="--vram-gb 22 --steps 4", minutes=1.0, published="Unsloth 41 GB"),
    bench("7B 2-bit, 1x128 r8", B7, Must("peak_allocated_gb", "<=", 2.4), length=128, options="--bits 2 --lora-r 8", cap_gb=2.4,
          published="ModuLoRA 3.2 GB"),
    bench("13B 2-bit, 1x128 r8", B13, Must("peak_allocated_gb", "<=", 4.2), length=128, options="--bits 2 --lora-r 8", cap_gb=4.2,
          published="ModuLoRA 5.4 GB"),
    bench("30B 2-bit, 1x128 r8", B30, Must("peak_allocated_gb", "<=", 9.2), length=128, options="--bits 2 --lora-r 8", cap_gb=9.2,
          published="ModuLoRA 11.4 GB"),
    bench("65B 2-bit, 1x128 r8", B65, Must("peak_allocated_gb", "<=", 17.5), length=128, options="--bits 2 --lora-r 8", cap_gb=17.5,
          minutes=0.7, published="ModuLoRA 21.8 GB"),
    bench("30B gptq-4 in 18.3 GB", B30, Must("process_gb", "<=", 18.3), options="--bits 4 --method gptq --vram-gb 18.3", minutes=0.6,
          published="xTuring 20.15 GB"),
    bench("70B in 39 GB", B70, Must("process_gb", "<=", 39.0), options="--vram-gb 39 --steps 4", minutes=0.9, published="Accessory 46 GB"),
)  # fmt: skip

PEER_CASES = (
    PeerCase("unsloth", B8, 1, 512),
    PeerCase("unsloth", B8, 16, 512),
    PeerCase("unsloth", B8, 1, 2048),
    PeerCase("unsloth", B8, 8, 512, "rows"),
    PeerCase("unsloth", B8, 1, 512, "rows"),
    PeerCase("unsloth", B8, 1, 128, "decode"),
    PeerCase("hf", B8, 1, 512),
    PeerCase("liger", B8, 1, 512),
    PeerCase("hf", B8, 16, 512, minutes=1.5),
    PeerCase("liger", B8, 16, 512, minutes=1.5),
    PeerCase("unsloth", B7, 1, 512),
    PeerCase("unsloth", B13, 1, 512, minutes=1.5),
)

# What is told first when time is short: speed beside Unsloth, memory, the data, the other peers, the largest models.
ORDER: tuple[Case | PeerCase, ...] = (
    *PEER_CASES[:3], *CASES[:8], *PEER_CASES[3:6], *CASES[8:16], *PEER_CASES[10:], *CASES[16:], *PEER_CASES[6:10],
)  # fmt: skip
