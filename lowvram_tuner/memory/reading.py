"""Where a model lives that only reads and answers: chat and evaluation. No torch.

Everything stays on the card when it fits. When it does not, the word table moves to host memory, which costs nothing (a
token is one row of it), then the output layer takes fewer bits, and last of all layers are streamed from the host.
"""

from __future__ import annotations

from dataclasses import replace

from lowvram_tuner.config import TrainConfig
from lowvram_tuner.memory.budget import GB, Budget
from lowvram_tuner.memory.cost import ROUNDING_BYTES, WORKSPACE_BYTES
from lowvram_tuner.memory.estimate import Work
from lowvram_tuner.memory.plan import Plan
from lowvram_tuner.models.catalogue import ModelShape
from lowvram_tuner.quant.registry import methods, resolve

CHAT_TOKENS = 2048  # of a conversation that are provided for; `chat.cache` grows beyond when there is room
CHUNK = 512  # tokens of a prompt read at a time


def plan_chat(config: TrainConfig, shape: ModelShape, budget: Budget) -> Plan:
    """The plan of a chat. `fits` is False when the card cannot hold even two layers at a time."""
    return _plan_reading(config, shape, budget, CHUNK, _cache_bytes(shape, budget))


def plan_evaluation(config: TrainConfig, shape: ModelShape, budget: Budget) -> Plan:
    """The plan of a pass over `max_seq_length` tokens that takes their loss and keeps nothing."""
    return _plan_reading(config, shape, budget, config.max_seq_length, 0)


def _plan_reading(config: TrainConfig, shape: ModelShape, budget: Budget, tokens: int, cache: int) -> Plan:
    spec = resolve(config.bits, config.method, group_size=shape.group_for(config.group_size))
    item = 2 if budget.kind == "vram" else 4
    work = Work(shape, spec, tokens, config.lora_r, config.target_modules, item)
    if budget.kind == "ram":  # quantized weights are unpacked once, which the processor does slowly
        return _plan(work, budget, cache, unpacked=True)
    choices = [{}]
    if not shape.tie_word_embeddings:
        choices.append({"embeddings_on_host": True})
        choices += [{"embeddings_on_host": True, "head_bits": bits} for bits in (8, 4) if methods(bits)]
    plans = [_plan(work, budget, cache, **choice) for choice in choices]
    for plan in plans:
        if plan.fits:
            return plan
    over = plans[-1].process_bytes - budget.limit_bytes
    streamed = min(shape.num_hidden_layers, 2 + -(-over // work.layer_bytes()))  # two more pay for the ring's slots
    plan = _plan(work, budget, cache, **choices[-1], streamed=streamed)
    if plan.fits:
        return plan
    return replace(plan, words=(f"Too big by {(plan.process_bytes - budget.limit_bytes) / GB:.1f} GB.",))


def _plan(
    work: Work, budget: Budget, cache: int, embeddings_on_host: bool = False, head_bits: int = 16, streamed: int = 0,
    unpacked: bool = False,
) -> Plan:  # fmt: skip
    s = work.shape
    linears = s.linears()
    packed = work.spec.method != "none" and not unpacked
    scratch = max(o * i for o, i in linears.values()) * work.item if packed or head_bits < 16 else 0
    slab = sum(o * i for o, i in linears.values()) * work.item if unpacked else work.layer_bytes()
    on_card = work.item == 2
    components = {
        "weights": (s.num_hidden_layers - streamed + (2 if streamed else 0)) * slab + work.norm_bytes(),
        "embeddings": 0 if embeddings_on_host else work.embedding_bytes(),
        "head": work.head_bytes(head_bits),
        "adapter": work.adapter_parameters() * work.item,
        "activations": cache,
        "layer_work": _layer_work(work),
        "loss": work.loss_bytes(scratch if head_bits < 16 else 0),
        "scratch": scratch + (WORKSPACE_BYTES if on_card else 0),
        "context": budget.context_bytes + (ROUNDING_BYTES if on_card else 0),
    }
    words = [f"{s.num_hidden_layers - streamed} of {s.num_hidden_layers} layers stay on the GPU, {streamed} stream from RAM"] if streamed else []
    return Plan(
        fits=sum(components.values()) <= budget.limit_bytes,
        components=components,
        budget=budget,
        host_bytes=streamed * work.layer_bytes() + (work.embedding_bytes() if embeddings_on_host else 0),
        step_s=0.0,
        words=tuple(words),
        streamed=streamed,
        embeddings_on_host=embeddings_on_host,
        head_bits=head_bits,
        scratch_bytes=scratch,
        unpacked=unpacked,
        item=work.item,
    )


def _layer_work(work: Work) -> int:
    """A forward pass of one layer beside its input: the larger of attention T (H + 3 Q + 3 KV) and the MLP T (2 H + 3 I)."""
    s = work.shape
    attention = s.hidden_size + 3 * work.q + 3 * work.kv + work.rotated
    return work.tokens * (s.hidden_size + max(attention, 2 * s.hidden_size + 3 * s.intermediate_size)) * work.item


def _cache_bytes(shape: ModelShape, budget: Budget) -> int:
    item = 2 if budget.kind == "vram" else 4
    return CHAT_TOKENS * shape.num_hidden_layers * 2 * shape.num_key_value_heads * shape.head_dim * item
