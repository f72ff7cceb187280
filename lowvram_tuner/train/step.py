"""One micro-batch through the model: forward, loss and backward, layer by layer, as the plan says.

The walk over the layers is explicit, not autograd's: that is what lets a layer's slab be streamed in while its neighbour
computes, its input wait in host memory, and the whole pass be captured as one CUDA graph, replayed without Python.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from kernels.gather import gather_rows
from kernels.norm import rms_norm, rms_norm_backward
from lowvram_tuner.data.packing import MicroBatch
from lowvram_tuner.lora.adapter import Adapter
from lowvram_tuner.memory.offload import GateUpAway, HostStore
from lowvram_tuner.memory.plan import Plan
from lowvram_tuner.models.load import Loaded
from lowvram_tuner.train.fused_layer import ALL, ATTENTION, INPUT, FusedLayer, Kept, Sequences
from lowvram_tuner.train.loss import Head, head_loss, head_losses


@dataclass
class Batch:
    """A flat micro-batch on the device; see `data.packing`. `targets`: int64 [M], the positions whose label counts, padded
    with position 0 and label -100; labels: int64 [M]; even: all examples have `max_len` tokens."""

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    cu_seqlens: torch.Tensor
    targets: torch.Tensor
    labels: torch.Tensor
    max_len: int
    even: bool = False
    counted: int = 0  # labels that count
    tokens: int = 0  # of the examples, without padding
    after: tuple[int, int] | None = None  # (epoch, micro-batch) where a run stands once this batch's step is done

    def tensors(self) -> list[torch.Tensor]:
        return [self.input_ids, self.position_ids, self.cu_seqlens, self.targets, self.labels]


def to_batch(flat, device: torch.device, max_len: int, round_targets: int = 64, sequences: int = 0) -> Batch:
    """A `data.packing.MicroBatch` on the device. `sequences` pads cu_seqlens to a fixed count, so that shapes repeat."""
    targets = np.flatnonzero(flat.labels >= 0)
    size = max(round_targets, -(-len(targets) // round_targets) * round_targets)
    size = min(size, max(len(flat.labels), 1))
    positions, labels = np.zeros(size, np.int64), np.full(size, -100, np.int64)
    positions[: len(targets)], labels[: len(targets)] = targets, flat.labels[targets]
    edges = np.asarray(flat.cu_seqlens, np.int32)
    if sequences >= len(edges):
        edges = np.concatenate([edges, np.full(sequences + 1 - len(edges), edges[-1], np.int32)])
    arrays = (flat.input_ids, flat.position_ids, edges, positions, labels)
    moved = [torch.from_numpy(np.ascontiguousarray(a)).to(device, non_blocking=True) for a in arrays]
    even = bool(np.all(np.diff(flat.cu_seqlens) == max_len))  # padding is a sequence as well
    return Batch(*moved, max_len=max_len, even=even, counted=len(targets), tokens=flat.tokens)


def to_batches(flats: Sequence[MicroBatch], device: torch.device, max_len: int, together: int) -> list[Batch]:
    """Micro-batches for passes of `together`. On a card each has as many targets and sequences as the fullest one of its pass,
    in coarse steps: every mixture of shapes would be a graph of its own."""
    batches = []
    for begin in range(0, len(flats), together):
        shared = flats[begin : begin + together]
        sequences, targets = 0, 1
        if device.type == "cuda":
            sequences = 1 << max(3, (max(len(flat.cu_seqlens) for flat in shared) - 2).bit_length())
            half = max(64, max(len(flat.input_ids) for flat in shared) // 2)
            targets = -(-max(flat.targets for flat in shared) // half) * half
        batches += [to_batch(flat, device, max_len, targets, sequences) for flat in shared]
    return batches


class FusedStep:
    """Forward and backward of a model of `fused_layer.FAMILIES` under a plan."""

    def __init__(self, loaded: Loaded, adapter: Adapter | None, plan: Plan, max_tokens: int = 0) -> None:
        self.loaded, self.plan, self.ring = loaded, plan, loaded.ring
        config, inner = loaded.config, loaded.model.model
        self.layers = [FusedLayer(layer, config, adapter, plan.mlp_chunk) for layer in loaded.layers]
        self.final_norm, self.rotary, self.table = inner.norm, inner.rotary_emb, inner.embed_tokens.weight
        cap = getattr(config, "final_logit_softcapping", None) or 0.0
        self.head = Head(loaded.head, self.table, loaded.scratch, cap)
        again = [i for i in range(len(self.layers)) if self.keep_level(i) != ALL]
        self.inputs = self.gate_up = None
        if plan.inputs_on_host and max_tokens:
            # Two may be on their way out, behind a large copy of gate and up: forward has room for what backward needs anyway.
            shape = (max_tokens, config.hidden_size)
            self.inputs = HostStore(self._inputs_away(), shape, loaded.dtype, loaded.device, depth=2)
        if plan.gate_up_on_host and max_tokens:
            # Most memory is taken while the last layer, which keeps everything, and the loss are computed: no copy is under way then.
            last = len(self.layers) - 1
            self.away_until, self.back_from = last if plan.keep_all else last + 1, min(last, max(again) + (plan.keep_all > 1))
            columns = self.layers[0].gate_up.out_features
            self.gate_up = GateUpAway(again, max_tokens, plan.mlp_chunk, plan.gate_up_on_host, columns, loaded.dtype, loaded.device)

    def keep_level(self, layer: int) -> str:
        """What a layer keeps: the last ones everything, the ones before attention's output, the first their input."""
        from_end = len(self.layers) - 1 - layer
        if from_end < self.plan.keep_all:
            return ALL
        return ATTENTION if from_end < self.plan.keep_all + self.plan.keep_attention else INPUT

    def _inputs_away(self) -> int:
        """How many inputs of a pass wait on the host: those of the first layers."""
        return self.plan.together * sum(self.keep_level(i) == INPUT for i in range(len(self.layers)))

    def keep_less(self) -> bool:
        """Keeps less from forward to backward, for a pass that takes more memory than planned: unpacked weights, else attention's
        output in fewer layers, else everything in one layer less. Its results are the same bits. False when nothing is kept."""
        plan = self.plan
        if plan.keep_weights:
            self.plan = replace(plan, keep_weights=plan.keep_weights - max(1, plan.keep_weights // 3))
        elif plan.keep_attention:
            self.plan = replace(plan, keep_attention=plan.keep_attention - max(1, plan.keep_attention // 3))
        elif plan.keep_all:
            self.plan = replace(plan, keep_all=plan.keep_all - 1, keep_attention=1)
        if self.inputs is not None:
            self.inputs.grow(self._inputs_away())
        return self.plan is not plan

    @torch.no_grad()
    def accumulate(self, batches: Batch | Sequence[Batch], scale: torch.Tensor) -> torch.Tensor:
        """Adds scale x the gradient of the summed loss to the adapter's gradients. Returns the sum of losses, fp32 scalar.

        Of several micro-batches all go through a layer before the next one, so that a streamed slab comes in once for all.
        At most `plan.together`.
        """
        batches = [batches] if isinstance(batches, Batch) else batches
        sequences = [self._sequences(batch) for batch in batches]
        xs = [gather_rows(batch.input_ids, self.table) for batch in batches]
        if self.gate_up is not None:
            self.gate_up.begin(len(xs[0]))
        kept = [self._forward(index, xs, sequences) for index in range(len(self.layers))]
        for store in self._stores():
            store.settle()
        total = torch.zeros((), device=xs[0].device)
        for i, batch in enumerate(batches):
            loss, xs[i] = self._loss(xs[i], batch, scale)
            total += loss
        for index in reversed(range(len(self.layers))):
            self._backward(index, xs, kept, sequences)
        self._leave()
        return total

    def _forward(self, index: int, xs: list[torch.Tensor], sequences: list[Sequences]) -> list[Kept | None]:
        """A layer's outputs in the place of its inputs `xs`; returns what it keeps of each."""
        self._enter(index, +1)
        level, kept, weights = self.keep_level(index), [], len(self.layers) - 1 - index < self.plan.keep_weights
        if self.gate_up is not None and index == self.away_until:
            self.gate_up.store.settle()
        if self.inputs is not None and level != INPUT:
            self.inputs.settle()
        for i, x in enumerate(xs):
            xs[i], saved = self.layers[index].forward(x, sequences[i], level, self.gate_up and self.gate_up.takes(index), weights)
            if self.inputs is not None and level == INPUT:
                self.inputs.put(index * self.plan.together + i, x)
                saved.x = None
            kept.append(saved)
        return kept

    def _backward(self, index: int, gxs: list[torch.Tensor], kept: list[list[Kept | None]], sequences: list[Sequences]) -> None:
        """The gradients of a layer's inputs in the place of those of its outputs."""
        self._enter(index, -1)
        if self.gate_up is not None and index == self.back_from:
            self.gate_up.turn()
        for i, gx in enumerate(gxs):
            saved, kept[index][i] = kept[index][i], None
            if self.inputs is not None:
                self._bring_back(index, i, saved, gxs, kept)
            gxs[i] = self.layers[index].backward(gx, saved, sequences[i], self.gate_up and self.gate_up.gives(index))

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> torch.Tensor:
        """The loss of each of the batch's `targets`, fp32 [M], zero where one only fills up; nothing is kept."""
        x = self.hidden(batch)
        rows = torch.index_select(x, 0, batch.targets)
        h, _ = rms_norm(rows, self.final_norm.weight, self.final_norm.variance_epsilon)
        return head_losses(h, batch.labels, self.head)

    @torch.no_grad()
    def hidden(self, batch: Batch) -> torch.Tensor:
        """Hidden states [T, H] before the final norm."""
        sequences, x = self._sequences(batch), gather_rows(batch.input_ids, self.table)
        for index, layer in enumerate(self.layers):
            self._enter(index, +1)
            x, _ = layer.forward(x, sequences, None)
        self._leave()
        return x

    def _sequences(self, batch: Batch) -> Sequences:
        like = torch.empty(1, dtype=self.loaded.dtype, device=batch.input_ids.device)
        cos, sin = self.rotary(like, batch.position_ids[None])
        return Sequences(cos[0], sin[0], batch.cu_seqlens, batch.max_len, batch.even)

    def _loss(self, x: torch.Tensor, batch: Batch, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The summed loss, and scale x its gradient by the last layer's output [T, H]."""
        rows = torch.index_select(x, 0, batch.targets)
        h, rstd = rms_norm(rows, self.final_norm.weight, self.final_norm.variance_epsilon)
        total, gh = head_loss(h, batch.labels, self.head)
        gh.mul_(scale)
        gx_rows = rms_norm_backward(gh, rows, self.final_norm.weight, rstd, torch.zeros_like(rows))
        return total, torch.zeros_like(x).index_add_(0, batch.targets, gx_rows)

    def _enter(self, index: int, direction: int) -> None:
        """Makes the layer's slab available and starts the next streamed one on its way."""
        if self.ring is None:
            return
        if index in self.ring.host:
            self.ring.fetch(index)
        self.ring.prefetch(self.ring.neighbour(index, direction))

    def _leave(self) -> None:
        """Joins the copy streams, so that a captured pass is complete and the next one starts from a known state."""
        if self.ring is not None and self.ring.stream is not None:
            torch.cuda.current_stream().wait_stream(self.ring.stream)
            self.ring.reset()
        for store in self._stores():
            store.leave()

    def forget(self) -> None:
        """Drops what a pass that was broken off left under way."""
        if self.ring is not None:
            self.ring.reset()
        for store in self._stores():
            store.forget()

    def _stores(self) -> list[HostStore]:
        return [store for store in (self.inputs, self.gate_up and self.gate_up.store) if store is not None]

    def _bring_back(self, index: int, i: int, saved: Kept, gxs: list[torch.Tensor], kept: list[list[Kept | None]]) -> None:
        """A layer's input from the host, and the one needed next on its way."""
        if saved.x is None:
            saved.x = self.inputs.get(index * self.plan.together + i, len(gxs[i]))
        index, i = (index, i + 1) if i + 1 < len(gxs) else (index - 1, 0)
        if index >= 0 and kept[index][i].x is None:
            self.inputs.prefetch(index * self.plan.together + i, len(gxs[i]))
