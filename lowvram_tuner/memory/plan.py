"""The fastest way to train inside a memory budget, decided before anything is loaded. No torch, a few milliseconds.

`plan_run` starts from the fastest plan and gives up speed in this order until it fits: activations are recomputed instead
of stored, their checkpoints move to host memory, the embeddings move to the host, the head takes fewer bits, the optimizer's
state moves to the host, working buffers shrink, and last of all layers are streamed from the host. What room is left then
buys back stored activations, layer by layer.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from lowvram_tuner.config import ConfigError, TrainConfig
from lowvram_tuner.hardware.measured import measured
from lowvram_tuner.memory.estimate import Work, optimizer_bytes
from lowvram_tuner.models.catalogue import ModelShape
from lowvram_tuner.quant.registry import methods, resolve

if TYPE_CHECKING:
    from collections.abc import Callable

    from lowvram_tuner.hardware.card import Card
    from lowvram_tuner.hardware.ram import Ram

MB = 10**6
GB = 10**9
CONTEXT_BYTES = 450 * MB  # CUDA's context of one process until a card's own was measured (`hardware.measured`)
ROUNDING_BYTES = 48 * MB  # the allocator's: blocks of 512 bytes, segments of 2 to 20 MB
WORKSPACE_BYTES = 2 * 8519680  # cuBLAS's own, one for each stream that multiplies; `train.session` sets its size
RAM_PROCESS_BYTES = 350 * MB  # Python, torch and transformers on a machine without a card
DESKTOP_RESERVE = 300 * MB  # left for the desktop when the user names no budget
COMPONENT_LABELS = {
    "weights": "model", "embeddings": "word table", "head": "output layer", "adapter": "adapter",
    "gradients": "gradients", "optimizer": "optimizer", "activations": "kept activations", "layer_work": "one layer's work",
    "loss": "loss", "scratch": "unpacking buffer", "context": "CUDA itself",
}  # fmt: skip


@dataclass(frozen=True)
class Rates:
    """What a card does per second. The defaults are a 6 GB laptop card's, until a card's own were measured."""

    flops: float = 20e12
    copy_bytes: float = 250e9
    host_bytes: float = 8e9


CPU_RATES = Rates(flops=60e9, copy_bytes=10e9, host_bytes=10e9)  # two laptop cores


@dataclass(frozen=True)
class Budget:
    """Memory that a run may use. `limit_bytes` is the most for this program's process, CUDA's own share included."""

    total_bytes: int
    others_bytes: int
    limit_bytes: int
    kind: str  # "vram" or "ram"
    context_bytes: int = CONTEXT_BYTES
    rates: Rates = Rates()

    @classmethod
    def of(cls, config: TrainConfig, card: Card | None, ram: Ram | None = None) -> Budget:
        """The budget the config asks for, else what is free on the card (or in RAM without one) less a reserve."""
        if card is None:
            total, free, kind = (ram.total_bytes, ram.available_bytes, "ram") if ram else (0, 0, "ram")
        else:
            total, free, kind = card.total_bytes, card.free_bytes, "vram"
        limit = int(config.vram_gb * GB) if config.vram_gb and kind == "vram" else max(0, free - DESKTOP_RESERVE)
        if card is None:
            return cls(total, total - free, limit, kind, RAM_PROCESS_BYTES, CPU_RATES)
        known = measured(card.uuid)
        rates = Rates(**{k: known[k] for k in ("flops", "copy_bytes", "host_bytes") if k in known})
        return cls(total, total - free, limit, kind, int(known.get("context_bytes", CONTEXT_BYTES)), rates)


@dataclass(frozen=True)
class Remedy:
    """A change of settings that helps, as a button says it and as config values."""

    label: str
    changes: dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """Where everything lives. The engine follows it; the gauge shows it."""

    fits: bool
    components: dict[str, int]
    budget: Budget
    host_bytes: int
    step_s: float
    words: tuple[str, ...]
    remedies: tuple[Remedy, ...] = ()
    keep_all: int = 0  # layers that store all activations (the last ones)
    keep_attention: int = 0  # layers before those that store attention's output
    streamed: int = 0  # layers whose slab stays in host memory
    inputs_on_host: bool = False
    embeddings_on_host: bool = False
    head_bits: int = 16
    optimizer_on_host: bool = False
    optimizer_bits: int = 32
    scratch_bytes: int = 0
    mlp_chunk: int = 1 << 30
    unpacked: bool = False  # CPU only: quantized weights are unpacked once, at load
    item: int = 2

    @property
    def allocated_bytes(self) -> int:
        return sum(v for k, v in self.components.items() if k != "context")

    @property
    def process_bytes(self) -> int:
        return sum(self.components.values())

    def to_dict(self) -> dict[str, Any]:
        """The decisions, for logs and `--json`."""
        names = ("keep_all", "keep_attention", "streamed", "inputs_on_host", "embeddings_on_host", "head_bits",
                 "optimizer_on_host", "optimizer_bits", "scratch_bytes", "mlp_chunk")  # fmt: skip
        return {n: getattr(self, n) for n in names} | {"words": list(self.words)}


@dataclass(frozen=True)
class _Choice:
    """One point of the planner's search: everything but how many activations are stored."""

    inputs_on_host: bool = False
    embeddings_on_host: bool = False
    head_bits: int = 16
    optimizer_on_host: bool = False
    optimizer_bits: int = 32
    scratch_rows: float = 1.0  # share of the largest fused weight that the scratch holds
    mlp_chunk: int = 1 << 30
    unpacked: bool = False
    streamed: int = 0


def plan_run(config: TrainConfig, shape: ModelShape, budget: Budget, rates: Rates | None = None) -> Plan:
    """The fastest plan of a config on a budget; `fits` is False when even the leanest does not."""
    rates = rates or budget.rates
    work = _work(config, shape, budget)
    choices = _sacrifices(work, budget)
    plans = [_plan(work, choice, budget, config, rates) for choice in choices]
    fitting = [_spend(work, c, p, config, rates) for c, p in zip(choices, plans) if p.fits]
    if fitting:  # a head at fewer bits costs quality, so it is never the price of speed
        return min((p for p in fitting if p.head_bits == fitting[0].head_bits), key=lambda p: p.step_s)
    lean = [(c, p) for c, p in zip(choices, plans) if p.head_bits == plans[-1].head_bits and c.optimizer_on_host]
    streaming = [_streaming(work, c, p) for c, p in lean or [(choices[-1], plans[-1])]]
    plans = [_plan(work, choice, budget, config, rates) for choice in streaming]
    fitting = [_spend(work, c, p, config, rates) for c, p in zip(streaming, plans) if p.fits]
    if fitting:
        return min(fitting, key=lambda p: p.step_s)
    plan = plans[-1]
    return replace(plan, remedies=_remedies(config, shape, budget), words=(_too_big(plan),))


def _streaming(work: Work, choice: _Choice, plan: Plan) -> _Choice:
    """`choice` with as few layers streamed as make up for what does not fit; two more pay for the ring's slots."""
    if plan.budget.kind == "ram":
        return choice
    over = plan.process_bytes - plan.budget.limit_bytes
    return replace(choice, streamed=min(work.shape.num_hidden_layers, 2 + -(-over // work.layer_bytes())))


def _work(config: TrainConfig, shape: ModelShape, budget: Budget) -> Work:
    spec = resolve(config.bits, config.method, group_size=shape.group_for(config.group_size))
    tokens = config.micro_batch_size * config.max_seq_length
    return Work(shape, spec, tokens, config.lora_r, config.target_modules, item=2 if budget.kind == "vram" else 4)


def _sacrifices(work: Work, budget: Budget) -> list[_Choice]:
    """Choices from the fastest to the leanest; each gives up one thing more than the one before."""
    steps = [_Choice()]

    def then(**changes: Any) -> None:
        steps.append(replace(steps[-1], **changes))

    if budget.kind == "ram":  # host memory is all there is: nothing can move out of it
        return [_Choice(unpacked=True), _Choice(scratch_rows=0.5)]
    then(optimizer_bits=8)
    then(inputs_on_host=True)
    if not work.shape.tie_word_embeddings:
        then(embeddings_on_host=True)
        for bits in (8, 4):
            if methods(bits):
                then(head_bits=bits)
    then(optimizer_on_host=True)
    then(scratch_rows=0.5)
    then(scratch_rows=0.25)
    if work.tokens > 1024:
        steps = [replace(s, mlp_chunk=c) for s in steps for c in (1 << 30, 4096, 2048) if c == 1 << 30 or c < work.tokens]
        then(mlp_chunk=1024)
    return steps


def _components(work: Work, choice: _Choice, context: int, all_: int = 0, attention: int = 0) -> dict[str, int]:
    """Bytes of every part. The layers that keep everything are the last: their backward is over, and their memory free,
    before the first layer computes again. So the peak is the larger of two moments: the loss with everything kept, and the
    first recomputing layer."""
    s = work.shape
    resident = s.num_hidden_layers - choice.streamed + (2 if choice.streamed else 0)
    parameters = work.adapter_parameters()
    unpacked = work.item * sum(o * i for o, i in s.linears().values())
    scratch = _scratch_bytes(work, choice)
    hidden = work.tokens * s.hidden_size * work.item
    inputs = 2 * hidden if choice.inputs_on_host else (s.num_hidden_layers + 1) * hidden
    kept_attention = attention * _extra(work, choice, "attention")
    kept = inputs + all_ * _extra(work, choice, "all") + kept_attention
    loss = work.loss_bytes(scratch if choice.head_bits < 16 else 0)
    at_loss = kept + max(loss, work.kept_work_bytes() if all_ else 0)
    recomputing = inputs + kept_attention + work.recompute_work_bytes(choice.mlp_chunk) if all_ < s.num_hidden_layers else 0
    beyond = max(at_loss, recomputing) - kept
    layer_work = min(beyond, work.kept_work_bytes() if at_loss > recomputing else beyond)
    head = work.head_bytes(choice.head_bits)
    return {
        "weights": resident * (unpacked if choice.unpacked else work.layer_bytes()) + work.norm_bytes(),
        "embeddings": 0 if choice.embeddings_on_host else work.embedding_bytes(),
        "head": head,
        "adapter": parameters * work.item,
        "gradients": parameters * work.item,
        "optimizer": 0 if choice.optimizer_on_host else optimizer_bytes(parameters, choice.optimizer_bits, work.item),
        "activations": kept,
        "layer_work": layer_work,
        "loss": beyond - layer_work,
        "scratch": scratch + (WORKSPACE_BYTES if work.item == 2 else 0),
        "context": context + (ROUNDING_BYTES if work.item == 2 else 0),
    }


def _scratch_bytes(work: Work, choice: _Choice) -> int:
    """The scratch: gate and up together at full size, less when memory is short; none when nothing is packed."""
    if (work.spec.method == "none" or choice.unpacked) and choice.head_bits == 16:
        return 0
    linears = work.shape.linears()
    largest = linears["gate_proj"][0] * linears["gate_proj"][1] * 2
    rows = -(-int(largest * choice.scratch_rows) // work.shape.hidden_size)
    return rows * work.shape.hidden_size * work.item


def _plan(
    work: Work, choice: _Choice, budget: Budget, config: TrainConfig, rates: Rates, all_: int = 0, attention: int = 0
) -> Plan:
    components = _components(work, choice, budget.context_bytes, all_, attention)
    return Plan(
        fits=sum(components.values()) <= budget.limit_bytes,
        components=components,
        budget=budget,
        host_bytes=_host_bytes(work, choice),
        step_s=_step_seconds(work, choice, config, rates, all_, attention),
        words=_words(work, choice, all_),
        keep_all=all_,
        keep_attention=attention,
        streamed=choice.streamed,
        inputs_on_host=choice.inputs_on_host,
        embeddings_on_host=choice.embeddings_on_host,
        head_bits=choice.head_bits,
        optimizer_on_host=choice.optimizer_on_host,
        optimizer_bits=choice.optimizer_bits,
        scratch_bytes=_scratch_bytes(work, choice),
        mlp_chunk=choice.mlp_chunk,
        unpacked=choice.unpacked,
        item=work.item,
    )


def _extra(work: Work, choice: _Choice, level: str) -> int:
    """Bytes that a layer of that level takes beyond one that keeps its input: its input too, where others put theirs away."""
    return work.saved_bytes(level) - (0 if choice.inputs_on_host else work.saved_bytes("input"))


def _spend(work: Work, choice: _Choice, plan: Plan, config: TrainConfig, rates: Rates) -> Plan:
    """Buys stored activations with the room left: whole layers first (most time saved per byte), then attention's output."""
    n = work.shape.num_hidden_layers

    def holds(all_: int, attention: int) -> bool:
        return sum(_components(work, choice, plan.budget.context_bytes, all_, attention).values()) <= limit

    limit = plan.budget.limit_bytes
    if plan.budget.kind == "ram":
        limit = (limit + plan.process_bytes) // 2  # host memory is shared with everything else
    all_ = _most(n, lambda k: holds(k, 0))
    attention = _most(n - all_, lambda k: holds(all_, k))
    return _plan(work, choice, plan.budget, config, rates, all_, attention)


def _most(highest: int, fits: Callable[[int], bool]) -> int:
    """The largest k <= highest that fits, by bisection; 0 is taken to fit."""
    low = 0
    while low < highest:
        middle = (low + highest + 1) // 2
        low, highest = (middle, highest) if fits(middle) else (low, middle - 1)
    return low


def _host_bytes(work: Work, choice: _Choice) -> int:
    """Host memory that the plan needs: streamed slabs, checkpoints, embeddings, optimizer state."""
    s, total = work.shape, choice.streamed * work.layer_bytes()
    if choice.inputs_on_host:
        total += s.num_hidden_layers * work.tokens * s.hidden_size * work.item
    if choice.embeddings_on_host:
        total += work.embedding_bytes()
    if choice.optimizer_on_host:
        total += optimizer_bytes(work.adapter_parameters(), choice.optimizer_bits, work.item)
    return total


def _step_seconds(work: Work, choice: _Choice, config: TrainConfig, rates: Rates, all_: int, attention: int) -> float:
    """Seconds of one optimizer step: per layer the larger of its arithmetic and its transfer, plus head and optimizer.

    A pass through linears of P parameters takes 2 P T operations; dequantizing writes 2 P bytes and reads the packed ones.
    """
    s, t = work.shape, work.tokens
    linears = s.linears()
    per_layer = sum(o * i for o, i in linears.values())
    recomputed = sum(linears[n][0] * linears[n][1] for n in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"))
    o_proj = linears["o_proj"][0] * linears["o_proj"][1]
    packed = work.spec.method != "none"

    def seconds(parameters: float, times: int = 1) -> float:
        unpack = times * parameters * (2 + work.spec.bits / 8) / rates.copy_bytes if packed else 0.0
        return 2 * parameters * t / rates.flops + unpack

    n = s.num_hidden_layers
    mlp = sum(linears[k][0] * linears[k][1] for k in ("gate_proj", "up_proj", "down_proj"))
    again_times = max(0, -(-t // choice.mlp_chunk) - 1)  # chunks of tokens unpack the MLP's weights again
    chunked = (n - all_) * again_times * (seconds(mlp) - seconds(mlp, 0))
    forward = n * seconds(per_layer) + chunked
    again = (n - all_) * seconds(recomputed) + (n - all_ - attention) * seconds(o_proj)
    backward = n * seconds(per_layer) + again + 2 * chunked
    transfer = choice.streamed * work.layer_bytes() / rates.host_bytes
    passes = max(forward, transfer) + max(backward, transfer)
    elementwise = n * t * (12 * s.hidden_size + 6 * s.intermediate_size) * 2 * work.item / rates.copy_bytes
    head = 4 * s.vocab_size * s.hidden_size * t / rates.flops
    optimizer = 12 * work.adapter_parameters() / (rates.host_bytes if choice.optimizer_on_host else rates.copy_bytes)
    return config.gradient_accumulation_steps * (passes + elementwise + head) + optimizer


def _words(work: Work, choice: _Choice, all_: int) -> tuple[str, ...]:
    n = work.shape.num_hidden_layers
    words = [f"{work.spec.bits}-bit {work.spec.method}" if work.spec.method != "none" else "16-bit, not quantized"]
    if choice.streamed:
        words.append(f"{n - choice.streamed} of {n} layers stay on the GPU, {choice.streamed} stream from RAM")
    if choice.embeddings_on_host:
        words.append("word table in RAM")
    if choice.head_bits < 16:
        words.append(f"output layer at {choice.head_bits} bits")
    if choice.optimizer_on_host:
        words.append("optimizer in RAM")
    if choice.inputs_on_host:
        words.append("checkpoints of activations in RAM")
    words.append("activations kept" if all_ == n else f"activations recomputed in {n - all_} of {n} layers")
    return tuple(words)


def _too_big(plan: Plan) -> str:
    return f"Too big by {(plan.process_bytes - plan.budget.limit_bytes) / GB:.1f} GB."


def _remedies(config: TrainConfig, shape: ModelShape, budget: Budget) -> tuple[Remedy, ...]:
    """Single changes that make the run fit, gentlest first."""
    offers: list[Remedy] = []
    if config.micro_batch_size > 1:
        accumulate = config.gradient_accumulation_steps * config.micro_batch_size
        offers.append(Remedy("batch 1, added up to the same size", {"micro_batch_size": 1, "gradient_accumulation_steps": min(accumulate, 4096)}))
    length = config.max_seq_length
    while length > 128:
        length //= 2
        offers.append(Remedy(f"shorten to {length} tokens", {"max_seq_length": length}))
    offers += [Remedy(f"use {b}-bit", {"bits": b, "method": "auto"}) for b in (8, 4, 3, 2) if b < config.bits and methods(b)]
    fitting = [r for r in offers if _fits(config, r, shape, budget)]
    if not fitting and config.bits > 4 and config.micro_batch_size > 1:
        both = Remedy("4-bit and batch 1", {"bits": 4, "method": "auto", "micro_batch_size": 1})
        fitting = [both] if _fits(config, both, shape, budget) else []
    return tuple(fitting[:4])


def _fits(config: TrainConfig, remedy: Remedy, shape: ModelShape, budget: Budget) -> bool:
    try:
        changed = TrainConfig.from_dict({**config.to_dict(), **remedy.changes})
    except ConfigError:
        return False
    work = _work(changed, shape, budget)
    leanest = _sacrifices(work, budget)[-1]
    if budget.kind == "vram":
        leanest = replace(leanest, streamed=shape.num_hidden_layers)
    return sum(_components(work, leanest, budget.context_bytes).values()) <= budget.limit_bytes
