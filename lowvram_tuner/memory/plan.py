"""The fastest way to train inside a memory budget, decided before anything is loaded. No torch, a few milliseconds.

Speed is given up in this order until a run fits: activations are recomputed instead of stored, or wait in host memory as far
as the bus carries them there and back in time, their checkpoints move there too, the embeddings move to the host, the head
takes fewer bits, the optimizer's state moves to the host, working buffers shrink, and last of all layers are streamed from the
host. What room is left then buys back stored activations, layer by layer, and where nothing is given up, weights that are
unpacked once a pass, not twice. `cost.py` says what each way takes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from lowvram_tuner.config import ConfigError, TrainConfig
from lowvram_tuner.memory.budget import GB, Budget, Rates
from lowvram_tuner.memory.cost import Choice, Cost, Layers
from lowvram_tuner.memory.estimate import Work
from lowvram_tuner.models.catalogue import ModelShape
from lowvram_tuner.quant.registry import methods, resolve

PACKED = 8  # examples that a packed row is planned to hold; the fit check measures what the data's rows do
FEWEST_STREAMED = 3  # the ring's two slots cost as much as two layers, so streaming fewer saves nothing
COMPONENT_LABELS = {
    "weights": "model", "embeddings": "word table", "head": "output layer", "adapter": "adapter",
    "gradients": "gradients", "optimizer": "optimizer", "activations": "kept activations", "layer_work": "one layer's work",
    "loss": "loss", "scratch": "unpacked weights", "context": "CUDA itself",
}  # fmt: skip

Tier = tuple[list[Cost], int]  # choices that give up the same things, and how many layers are streamed


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
    keep_weights: int = 0  # layers (the last ones) whose weights stay unpacked from forward to backward
    streamed: int = 0  # layers whose slab stays in host memory
    inputs_on_host: bool = False
    gate_up_on_host: int = 0  # chunks of layers whose gate and up wait on the host instead of being computed again
    embeddings_on_host: bool = False
    head_bits: int = 16
    optimizer_on_host: bool = False
    optimizer_bits: int = 32
    scratch_bytes: int = 0
    mlp_chunk: int = 1 << 30
    unpacked: bool = False  # CPU only: quantized weights are unpacked once, at load
    together: int = 1  # micro-batches that go through a layer before the next one
    item: int = 2

    @property
    def allocated_bytes(self) -> int:
        return sum(v for k, v in self.components.items() if k != "context")

    @property
    def process_bytes(self) -> int:
        return sum(self.components.values())

    @property
    def peak_bytes(self) -> int:
        """What a run's own measurement should show: a card's allocator knows nothing of CUDA itself, RAM is counted by process."""
        return self.allocated_bytes if self.budget.kind == "vram" else self.process_bytes

    def to_dict(self) -> dict[str, Any]:
        """The decisions, for logs and `--json`."""
        names = ("keep_all", "keep_attention", "keep_weights", "streamed", "inputs_on_host", "gate_up_on_host", "embeddings_on_host", "head_bits",
                 "optimizer_on_host", "optimizer_bits", "scratch_bytes", "mlp_chunk", "together")  # fmt: skip
        return {n: getattr(self, n) for n in names} | {"words": list(self.words)}


def plan_run(config: TrainConfig, shape: ModelShape, budget: Budget, rates: Rates | None = None) -> Plan:
    """The fastest plan of a config on a budget; `fits` is False when even the leanest does not."""
    rates = rates or budget.rates
    cost, kept = _leanest(config, shape, budget, rates)
    if cost.total(kept) > budget.limit_bytes:
        plan = _plan(cost, kept, budget)
        return replace(plan, fits=False, remedies=_remedies(config, shape, budget), words=(_too_big(plan),))
    return _plan(*_best(_tiers(config, shape, budget, rates), budget), budget)


def _leanest(config: TrainConfig, shape: ModelShape, budget: Budget, rates: Rates) -> tuple[Cost, Layers]:
    """What takes least of all: every sacrifice made, every layer streamed, nothing kept."""
    work, n = _work(config, shape, budget), shape.num_hidden_layers
    choice = _sacrifices(work, budget)[-1]
    streamed = n if budget.kind == "vram" and n >= FEWEST_STREAMED else 0
    return Cost(work, choice, budget, rates, config.gradient_accumulation_steps), Layers(streamed)


def _tiers(config: TrainConfig, shape: ModelShape, budget: Budget, rates: Rates) -> list[Tier]:
    """The choices in tiers, the leanest first: all layers streamed, one less, ..., none; then the head at more bits.

    Layers are streamed only from the leanest choices: with the head at the fewest bits and the optimizer on the host. Each is
    also tried with as many micro-batches to a layer's turn as hide the slabs' way in.
    """
    work = _work(config, shape, budget)
    choices = _sacrifices(work, budget)

    def costs_of(choices: Iterable[Choice]) -> list[Cost]:
        return [Cost(work, c, budget, rates, config.gradient_accumulation_steps) for c in choices]

    costs = costs_of(choices)
    tiers: list[Tier] = []
    if budget.kind == "vram":
        least = choices[-1].head_bits
        lean = [c for c in costs if c.choice.head_bits == least and c.choice.optimizer_on_host]
        shared = {1: lean}
        for streamed in range(work.shape.num_hidden_layers, FEWEST_STREAMED - 1, -1):
            together = lean[-1].hiding(streamed)
            if together not in shared:
                shared[together] = costs_of(replace(c.choice, together=together) for c in lean if not c.choice.gate_up_away) + lean
            tiers.append((shared[together], streamed))
    for bits in sorted({c.head_bits for c in choices}):
        tiers.append(([c for c in costs if c.choice.head_bits == bits], 0))
    return tiers


def _best(tiers: list[Tier], budget: Budget) -> tuple[Cost, Layers]:
    """The fastest of the richest tier that fits, or of a leaner one while that is faster. The leanest must fit.

    A head at fewer bits costs quality and streaming costs RAM, so neither is the price of speed: a leaner tier counts with
    what it reaches just below the budget at which the next one begins to fit. That is also why more memory never makes a
    step slower.
    """
    best, best_s, ceiling = (tiers[0][0][-1], Layers(tiers[0][1])), float("inf"), budget.limit_bytes
    for costs, streamed in reversed(tiers):
        need = min(c.least(streamed) for c in costs)
        if need > ceiling:
            continue
        for cost in costs:
            kept = cost.kept_within(_for_activations(cost, ceiling, budget), streamed)
            if kept is not None and (seconds := cost.seconds(kept)) < best_s:
                best, best_s = (cost, kept), seconds
        ceiling = need - 1
    return best


def _for_activations(cost: Cost, limit: int, budget: Budget) -> int:
    """What activations may grow to: the limit, but only half of spare host memory, which everything else shares."""
    if budget.kind == "vram":
        return limit
    need = cost.total(Layers())
    return (limit + need) // 2 if limit > need else limit


def _work(config: TrainConfig, shape: ModelShape, budget: Budget) -> Work:
    spec = resolve(config.bits, config.method, group_size=shape.group_for(config.group_size))
    tokens = config.micro_batch_size * config.max_seq_length
    sequences = config.micro_batch_size * (PACKED if config.packing else 1)
    return Work(shape, spec, tokens, config.lora_r, config.target_modules, 2 if budget.kind == "vram" else 4, sequences)


def _sacrifices(work: Work, budget: Budget) -> list[Choice]:
    """Choices from the fastest to the leanest; each gives up one thing more than the one before."""
    steps = [Choice()]

    def then(**changes: Any) -> None:
        steps.append(replace(steps[-1], **changes))

    if budget.kind == "ram":  # host memory is all there is: nothing can move out of it
        return [Choice(unpacked=True), Choice(scratch_rows=0.5)]
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
    return [replace(s, gate_up_away=away) for s in steps for away in (True, False)]  # the leaner of the two last


def _plan(cost: Cost, kept: Layers, budget: Budget) -> Plan:
    choice = cost.choice
    return Plan(
        fits=True,
        components=cost.components(kept),
        budget=budget,
        host_bytes=cost.host_bytes(kept),
        step_s=cost.seconds(kept),
        words=_words(cost, kept, budget),
        keep_all=kept.keep_all,
        keep_attention=kept.keep_attention,
        keep_weights=kept.weights,
        streamed=kept.streamed,
        inputs_on_host=cost.inputs_away(kept) > 0,
        gate_up_on_host=kept.gate_up,
        embeddings_on_host=choice.embeddings_on_host,
        head_bits=choice.head_bits,
        optimizer_on_host=choice.optimizer_on_host,
        optimizer_bits=choice.optimizer_bits,
        scratch_bytes=cost.scratch,
        mlp_chunk=choice.mlp_chunk,
        together=choice.together,
        unpacked=choice.unpacked,
        item=cost.work.item,
    )


def _words(cost: Cost, kept: Layers, budget: Budget) -> tuple[str, ...]:
    n, choice, spec = cost.layers, cost.choice, cost.work.spec
    words = [f"{spec.bits}-bit {spec.method}" if spec.method != "none" else "16-bit, not quantized"]
    if kept.streamed:
        words.append(f"{n - kept.streamed} of {n} layers stay on the GPU, {kept.streamed} stream from RAM")
        if choice.together > 1:
            words.append(f"{choice.together} passes share each transfer")
    if choice.embeddings_on_host:
        words.append("word table in RAM")
    if choice.head_bits < 16:
        words.append(f"output layer at {choice.head_bits} bits")
    if choice.optimizer_on_host:
        words.append("optimizer in RAM")
    if cost.inputs_away(kept) or kept.gate_up:
        words.append("some activations wait in RAM")
    recomputed = n - kept.keep_all
    words.append(f"activations recomputed in {recomputed} of {n} layers" if recomputed else "activations kept")
    if kept.weights:
        words.append("weights unpacked once a pass" if kept.weights == n else f"weights of {kept.weights} of {n} layers unpacked once a pass")
    return (*words, budget.note) if budget.note else tuple(words)


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
    cost, kept = _leanest(changed, shape, budget, budget.rates)
    return cost.total(kept) <= budget.limit_bytes
