"""The plan's bytes against the engine's own, without a card: a pass over tensors that have shapes and no contents.

What a Triton kernel or flash attention allocates stands in for it; all else is the engine's code. Every block goes to a best-fit
allocator as PyTorch's is, which also shows how much of a graph's pool lies in gaps. On a card `bench_plan.py` measures the same.
"""

from __future__ import annotations

from collections import deque
from dataclasses import replace

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from kernels.attention import Saved
from kernels.loss import RunningSoftmax
from lowvram_tuner.config import TrainConfig
from lowvram_tuner.lora.adapter import attach
from lowvram_tuner.memory import cost, offload
from lowvram_tuner.memory.budget import MB, Budget, Rates
from lowvram_tuner.memory.estimate import ALIGN, SEQUENCE_ROWS
from lowvram_tuner.memory.plan import GB, plan_run
from lowvram_tuner.models import load
from lowvram_tuner.models.catalogue import shape_of
from lowvram_tuner.models.load import config_values, random_model
from lowvram_tuner.quant.registry import resolve
from lowvram_tuner.train import fused_layer
from lowvram_tuner.train import step as step_module
from lowvram_tuner.train.step import Batch, FusedStep

META = torch.device("meta")
CONTEXT = 780 * MB
RATES = Rates(flops=6.6e14, copy_bytes=1.6e12, host_bytes=47e9)  # an H100's


class BestFit:
    """Blocks of one pool: the smallest free one that holds a request, split; neighbours join; else the pool grows."""

    def __init__(self) -> None:
        self.free: dict[int, int] = {}
        self.live = self.peak = self.end = self.fullest = 0

    def take(self, size: int) -> tuple[int, int]:
        size = -(-size // ALIGN) * ALIGN
        fitting = min((free, at) for at, free in self.free.items() if free >= size) if any(f >= size for f in self.free.values()) else None
        at = fitting[1] if fitting else next((a for a, free in self.free.items() if a + free == self.end), self.end)
        left = self.free.pop(at, 0) - size
        if left > 0:
            self.free[at + size] = left
        self.live += size
        self.end = max(self.end, at + size)
        self.peak, self.fullest = max(self.peak, self.live), max(self.fullest, self.end)
        return at, size

    def give(self, at: int, size: int) -> None:
        self.live -= size
        for a, free in list(self.free.items()):
            if a + free == at or at + size == a:
                del self.free[a]
                at, size = min(a, at), size + free
        self.free[at] = size


class Counted(TorchDispatchMode):
    """Hands every new block of at least 1 MB to the allocator, and back when its last tensor is gone."""

    def __init__(self, pool: BestFit) -> None:
        super().__init__()
        self.pool, self.blocks = pool, {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.give_back()
        before = {t.untyped_storage()._cdata for t in args if isinstance(t, torch.Tensor)}
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor) and tensor.device == META:
                storage = tensor.untyped_storage()
                if storage._cdata not in before and storage._cdata not in self.blocks and storage.nbytes() >= 1 << 20:
                    self.blocks[storage._cdata] = (StorageWeakRef(storage), *self.pool.take(storage.nbytes()))
        return out

    def give_back(self) -> None:
        for key, (reference, at, size) in list(self.blocks.items()):
            if reference.expired():
                del self.blocks[key]
                self.pool.give(at, size)


class Store(offload.HostStore):
    """The order of a card's copies, without a stream: what leaves is let go of as late, what comes back is there as early."""

    def __init__(self, units, shape, dtype, device, depth=1):
        super().__init__(0, shape, dtype, torch.device("cpu"), depth)
        self.host, self.columns = [None] * units, shape[1]

    def put(self, unit, x):
        self.settle(self.depth - 1)
        self.leaving.append((x, None))

    def settle(self, left=0):
        self.leaving = deque(list(self.leaving)[-left:] if left else [])

    def prefetch(self, unit, rows):
        if unit not in self.coming:
            self.coming[unit] = (torch.empty(rows, self.columns, dtype=torch.bfloat16, device=META), None)


def like(x: torch.Tensor, *shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape or x.shape, dtype=dtype, device=META)


def attention(q, k, v, cu_seqlens, max_len, scale, even):
    return Saved(like(q), like(q, q.shape[1], q.shape[0], dtype=torch.float32), ())


def attention_backward(grad, q, k, v, saved, cu_seqlens, max_len, scale):
    """dq, dk, dv; those of every head where heads share k and v; the padded sum a head and accumulator, fp32."""
    found = like(q), like(k), like(v)
    rows = q.shape[0] + SEQUENCE_ROWS * (cu_seqlens.shape[0] - 1)
    beside = [like(q), like(q)] if k.shape[1] != q.shape[1] else []
    beside += [like(q, rows, q.shape[1], dtype=torch.float32), like(q, rows, *q.shape[1:], dtype=torch.float32)]
    return found


def rope(qkv, cos, sin, heads, kv_heads, norm=None):
    rotated = qkv[:, : (heads + kv_heads) * (qkv.shape[1] // (heads + 2 * kv_heads))]
    return rotated if norm is None else like(rotated)


@pytest.fixture
def weightless(monkeypatch):
    for module in (fused_layer, step_module):
        monkeypatch.setattr(module, "rms_norm", lambda x, w, eps: (like(x), like(x, x.shape[0], dtype=torch.float32)))
        monkeypatch.setattr(module, "rms_norm_backward", lambda gy, x, w, rstd, residual: residual)
    for name, function in (("attention", attention), ("attention_backward", attention_backward), ("rope", rope)):
        monkeypatch.setattr(fused_layer, name, function)
    monkeypatch.setattr(fused_layer, "swiglu", lambda gate_up: like(gate_up, gate_up.shape[0], gate_up.shape[1] // 2))
    monkeypatch.setattr(fused_layer, "swiglu_backward", lambda gate_up, ga: None)
    monkeypatch.setattr(
        fused_layer, "rope_backward",
        lambda gq, gk, gv, *rest: like(gq, gq.shape[0], (gq.shape[1] + 2 * gk.shape[1]) * gq.shape[2]),
    )  # fmt: skip
    monkeypatch.setattr(step_module, "gather_rows", lambda ids, table: like(table, ids.shape[0], table.shape[1]))
    monkeypatch.setattr(RunningSoftmax, "add", lambda self, logits, start, rows: like(logits, logits.shape[0], 1, dtype=torch.float32))
    monkeypatch.setattr(load, "_read", lambda weights, name, shape, *where: torch.empty(shape, dtype=torch.bfloat16, device=META))
    monkeypatch.setattr(step_module, "HostStore", Store)
    monkeypatch.setattr(offload, "HostStore", Store)
    monkeypatch.setattr(offload.GateUpAway, "_take_memory", lambda self, units, columns, dtype: self.store.host.extend([None] * units))


def one_pass(model: str, layers: int, batch: int, length: int, gb: float, **options):
    """The plan of a model's first layers in a budget, and what one pass as planned takes of a pool, of 16-bit weights."""
    options = {"bits": 16, "gradient_accumulation_steps": 1} | options
    config = TrainConfig(model=model, micro_batch_size=batch, max_seq_length=length, packing=False, **options)
    shape = replace(shape_of(model), num_hidden_layers=layers)
    plan = plan_run(config, shape, Budget(int(gb * GB), 0, int(gb * GB), "vram", CONTEXT, RATES, "", 60 * GB))
    resident = replace(plan, streamed=0, embeddings_on_host=False, head_bits=16)
    loaded = random_model(config_values(config) | {"num_hidden_layers": layers}, resolve(16), resident, META, torch.bfloat16)
    with META:
        adapter = attach(loaded.model, config, META, torch.bfloat16)
    step = FusedStep(loaded, adapter, resident, batch * length)
    if plan.head_bits < 16:
        rows, table = plan.scratch_bytes // (shape.hidden_size * 2), like(loaded.head.packed["weight"])
        step.head.tiles = lambda dtype: ((start, table[start : start + rows]) for start in range(0, len(table), rows))
    tokens = torch.empty(batch * length, dtype=torch.int64, device=META)
    flat = Batch(tokens, tokens, torch.empty(batch + 1, dtype=torch.int32, device=META), tokens, tokens, length)
    pool = BestFit()
    with Counted(pool):
        step.accumulate([flat] * plan.together, torch.ones((), device=META))
    return plan, pool


CASES = [  # layers, batch, length, GB, and what the plan does there
    ("Qwen/Qwen3-8B", 6, 4, 1024, 2.5, "streamed"), ("Qwen/Qwen3-8B", 6, 4, 1024, 4.5, "gate_up_on_host"),
    ("Qwen/Qwen3-8B", 6, 4, 1024, 5.5, "keep_all"), ("Qwen/Qwen3-8B", 6, 4, 1024, 9, "keep_all"),
    ("meta-llama/Llama-3.1-8B-Instruct", 6, 16, 512, 7, "gate_up_on_host"), ("meta-llama/Llama-2-13b-chat-hf", 6, 1, 4096, 4, "inputs_on_host"),
    ("meta-llama/Llama-2-7b-chat-hf", 6, 16, 128, 2.6, "keep_attention"), ("Qwen/Qwen3-14B", 6, 1, 512, 5.5, "keep_all"),
    ("mistralai/Mistral-7B-Instruct-v0.3", 8, 2, 1024, 6.6, "keep_all"), ("Qwen/Qwen2.5-1.5B-Instruct", 10, 8, 256, 3.5, "keep_all"),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_pass_takes_what_the_plan_says(case, weightless):
    plan, pool = one_pass(*case[:-1])
    assert plan.fits and getattr(plan, case[-1]), plan.to_dict()
    planned = sum(plan.components[name] for name in ("activations", "layer_work", "loss"))
    elsewhere = plan.allocated_bytes - planned  # weights, adapter, optimizer: counted where they are made
    assert -0.01 <= plan.allocated_bytes / (elsewhere + pool.peak) - 1 <= 0.03, (planned, pool.peak)
    if not plan.gate_up_on_host:  # else a graph may need more and then keeps less
        room = plan.components["context"] - CONTEXT  # gaps, and what the allocator rounds up
        assert pool.fullest - pool.peak <= room, plan.to_dict()


def test_micro_batches_that_share_a_transfer_take_what_the_plan_says(weightless):
    plan, pool = one_pass("Qwen/Qwen3-8B", 6, 1, 512, 3, gradient_accumulation_steps=8)
    assert plan.streamed and plan.together > 1, plan.to_dict()
    planned = sum(plan.components[name] for name in ("activations", "layer_work", "loss"))
    assert -0.01 <= plan.allocated_bytes / (plan.allocated_bytes - planned + pool.peak) - 1 <= 0.03, (planned, pool.peak)


@pytest.mark.parametrize("gb, layers", [(6.5, 4), (12, 6)])
def test_weights_that_stay_unpacked_take_what_the_plan_says(gb, layers, weightless):
    plan, pool = one_pass("meta-llama/Llama-3.1-8B-Instruct", 6, 1, 512, gb, bits=4)
    assert plan.keep_weights == layers and plan.keep_all == 6, plan.to_dict()
    unpacked = layers * 2 * sum(o * i for o, i in shape_of("meta-llama/Llama-3.1-8B-Instruct").linears().values())
    planned = unpacked + sum(plan.components[name] for name in ("activations", "layer_work", "loss"))
    assert plan.components["scratch"] == unpacked + plan.scratch_bytes + cost.WORKSPACE_BYTES
    assert -0.01 <= plan.allocated_bytes / (plan.allocated_bytes - planned + pool.peak) - 1 <= 0.03, (planned, pool.peak)
    assert pool.fullest - pool.peak <= plan.components["context"] - CONTEXT


def test_gaps_of_a_whole_model_stay_within_the_plan(weightless):
    """A layer's output lies below its work, which leaves gaps of 64 MB here; above it, it left 198."""
    plan, pool = one_pass("meta-llama/Llama-3.1-8B-Instruct", 32, 16, 512, 23)
    room = plan.components["context"] - CONTEXT - cost.ROUNDING_BYTES
    assert plan.gate_up_on_host and pool.fullest - pool.peak <= room, plan.to_dict()
