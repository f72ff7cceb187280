"""What one way to run costs: its bytes, part by part, and its seconds, for any number of streamed and kept layers. No torch.

A `Choice` is everything that the planner decides but these numbers. `Cost` computes once what they do not change, so that the
planner can try hundreds of them: bytes and seconds are then a few products, and how many layers can keep their activations
in a budget is a division.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from lowvram_tuner.memory.budget import MB, Budget, Rates
from lowvram_tuner.memory.estimate import Work, optimizer_bytes
from lowvram_tuner.quant.registry import quant_format

ROUNDING_BYTES = 48 * MB  # the allocator's: blocks of 512 bytes, segments of 2 to 20 MB
# For GAPS bytes of activations and work one lies in gaps between blocks, which a graph's pool cannot close, up to MOST_GAPS in all.
# Counted by giving a pass's blocks to a best-fit allocator as PyTorch's is: 130 MB at 8B 16x512 in 9.2 GB, 56 at 14B in 6. A layer
# that took its output's memory last instead of first left 196 and 216. Few layers and many tokens can need more (233): then
# the graph keeps less (`FusedStep.keep_less`), or the pass runs eagerly, which gives free pages back.
GAPS, MOST_GAPS = 24, 192 * MB
MOST_TOGETHER = 16  # micro-batches that share a pass, and that all captured passes may have: each takes some 24 MB of graph
HIDDEN = 0.9  # share of the arithmetic's time that transfers are planned to hide behind
WORKSPACE_BYTES = 2 * 8519680  # cuBLAS's own, one for each stream that multiplies; `train.session` sets its size


@dataclass(frozen=True)
class Choice:
    """One way to run; the defaults are the fastest and largest."""

    inputs_on_host: bool = False
    gate_up_away: bool = False  # gate and up may wait on the host instead of being computed again
    embeddings_on_host: bool = False
    head_bits: int = 16
    optimizer_on_host: bool = False
    optimizer_bits: int = 32
    scratch_rows: float = 1.0  # share of the largest fused weight that the scratch holds
    mlp_chunk: int = 1 << 30
    together: int = 1  # micro-batches that go through a layer before the next one: a streamed slab comes in once for all
    unpacked: bool = False  # CPU only


@dataclass(frozen=True)
class Layers:
    """How many layers are streamed, keep all activations, and keep attention's output; how many chunks' gate and up are away; how
    many layers keep their unpacked weights too."""

    streamed: int = 0
    keep_all: int = 0
    keep_attention: int = 0
    gate_up: int = 0
    weights: int = 0


class Cost:
    """The costs of a choice for a work in a budget. `accumulation`: micro-batches of an optimizer step."""

    def __init__(self, work: Work, choice: Choice, budget: Budget, rates: Rates, accumulation: int) -> None:
        self.work, self.choice = work, choice
        self.layers, self.host_limit = work.shape.num_hidden_layers, budget.host_limit_bytes
        self._measure(budget.context_bytes)
        self._time(rates, accumulation)

    # bytes -------------------------------------------------------------------------------------------------------------

    def _measure(self, context: int) -> None:
        work, choice = self.work, self.choice
        parameters = work.adapter_parameters()
        unpacked = work.item * sum(o * i for o, i in work.shape.linears().values())
        self.packed_layer = work.layer_bytes()
        self.layer = unpacked if choice.unpacked else self.packed_layer
        # Weights are kept unpacked from forward to backward only in a run that gives nothing up: quality is no price for this.
        keeps = choice == Choice() and work.item == 2 and work.spec.method != "none" and quant_format(work.spec).dense
        self.unpacked = unpacked if keeps else 0
        self.scratch = self._scratch_bytes()
        self.norms = work.norm_bytes()
        self.fixed = {
            "embeddings": 0 if choice.embeddings_on_host else work.embedding_bytes(),
            "head": work.head_bytes(choice.head_bits),
            "adapter": parameters * work.item,
            "gradients": parameters * work.item,
            "optimizer": 0 if choice.optimizer_on_host else optimizer_bytes(parameters, choice.optimizer_bits, work.item),
            "scratch": self.scratch + (WORKSPACE_BYTES if work.item == 2 else 0),
            "context": context + (ROUNDING_BYTES if work.item == 2 else 0),
        }
        self.always = sum(self.fixed.values())
        hidden, passes = work.saved_bytes("input"), choice.together
        # Beside the layers' inputs backward has its gradient; of inputs on the host it has the one in use and the next one.
        others = (passes - 1) * hidden  # what the micro-batches that are not being worked on have come to
        self.inputs_at_loss = passes * ((0 if choice.inputs_on_host else self.layers * hidden) + work.position_bytes()) + others
        in_backward = 2 * hidden if choice.inputs_on_host else hidden
        self.inputs = self.inputs_at_loss + in_backward
        # What a layer that keeps more takes beyond one that keeps its input; its input too, where others put theirs away.
        counted = 0 if choice.inputs_on_host else hidden
        self.attention_of_one = work.saved_bytes("attention") - counted
        self.extra_all, self.extra_attention = passes * (work.saved_bytes("all") - counted), passes * self.attention_of_one
        self.loss = work.loss_bytes(self.scratch if choice.head_bits < 16 else 0)
        self.kept_work = in_backward + work.kept_work_bytes()
        self.recompute_work = work.recompute_work_bytes(choice.mlp_chunk, choice.gate_up_away)
        least = max(self._moments(Layers()))
        self.beside_weights = self.always + least + self._gaps(least)

    def _scratch_bytes(self) -> int:
        """The scratch: gate and up together at full size, less when memory is short; none when nothing is packed."""
        work, choice = self.work, self.choice
        if (work.spec.method == "none" or choice.unpacked) and choice.head_bits == 16:
            return 0
        rows, columns = work.shape.linears()["gate_proj"]
        return -(-int(2 * rows * columns * choice.scratch_rows) // work.shape.hidden_size) * work.shape.hidden_size * work.item

    def _weights(self, streamed: int) -> int:
        """Packed layers on the card: the resident ones, and the ring's two slots where any is streamed."""
        return self.norms + self.layer * (self.layers - streamed + (2 if streamed else 0))

    def _moments(self, kept: Layers) -> tuple[int, int]:
        """Bytes of activations and work at the two moments that may be the peak.

        The layers that keep everything are the last: their backward is over, and their memory free, before the first layer
        computes again. So the peak is the loss with everything kept, or the first recomputing layer, which need not compute
        again what it kept of its attention.
        """
        attention = kept.keep_attention * self.extra_attention
        at_loss = self.inputs_at_loss + kept.keep_all * self.extra_all + attention + self._loss_work(kept.keep_all) + kept.weights * self.unpacked
        if kept.keep_all == self.layers:
            return at_loss, 0
        others = max(0, attention - self.attention_of_one)
        return at_loss, self.inputs + others + self.recompute_work

    def _gaps(self, moment: int) -> int:
        return min(moment // GAPS, MOST_GAPS) if self.work.item == 2 else 0

    def _without_gaps(self, room: int) -> int:
        """The most bytes that fit `room` together with their gaps."""
        if self.work.item != 2:
            return room
        return max(room - MOST_GAPS, GAPS * (room // (GAPS + 1)) + min(room % (GAPS + 1), GAPS - 1))

    def _loss_work(self, keep_all: int) -> int:
        return max(self.loss, self.kept_work) if keep_all else self.loss

    def total(self, kept: Layers) -> int:
        """All bytes of the process."""
        moment = max(self._moments(kept))
        return self.always + self._weights(kept.streamed) + moment + self._gaps(moment)

    def least(self, streamed: int) -> int:
        """`total` with nothing kept: the planner asks it of every number of streamed layers."""
        return self.beside_weights + self._weights(streamed)

    def components(self, kept: Layers) -> dict[str, int]:
        """Bytes of every part, in display order."""
        at_loss, recomputing = self._moments(kept)
        stored = self.inputs + kept.keep_all * self.extra_all + kept.keep_attention * self.extra_attention
        unpacked = kept.weights * self.unpacked
        beyond = max(at_loss, recomputing) - stored - unpacked
        layer_work = min(beyond, self.kept_work if at_loss > recomputing else beyond)
        parts = {"weights": self._weights(kept.streamed), **self.fixed}
        scratch, context = parts.pop("scratch"), parts.pop("context") + self._gaps(max(at_loss, recomputing))
        return parts | {
            "activations": stored, "layer_work": layer_work, "loss": beyond - layer_work, "scratch": scratch + unpacked, "context": context,
        }  # fmt: skip

    def kept_within(self, limit: int, streamed: int = 0) -> Layers | None:
        """As many stored activations as `limit` bytes hold: whole layers first, which save most time per byte, then attention's
        output; where all are stored, unpacked weights. None when not even a run that stores none fits, or when gate and up could
        go and none does: the same without that choice is leaner."""
        if limit < self.least(streamed):
            return None
        room = self._without_gaps(limit - self.always - self._weights(streamed))
        spare = room - self.inputs_at_loss - max(self.loss, self.kept_work)
        best = self._layers(min(self.layers, max(0, spare // self.extra_all)), room, streamed)
        while 0 < best.keep_all < self.layers:  # where copies bound a step or gate and up wait outside, attention may save more
            fewer = self._layers(best.keep_all - 1, room, streamed)
            if self.seconds(fewer) >= self.seconds(best):
                break
            best = fewer
        return None if self.choice.gate_up_away and not best.gate_up else best

    def _layers(self, all_: int, room: int, streamed: int) -> Layers:
        """With so many layers that keep everything: what else fits `room`."""
        if all_ == self.layers:
            left = room - max(self._moments(Layers(streamed, all_)))
            return Layers(streamed, all_, weights=min(all_, left // self.unpacked) if self.unpacked else 0)
        attention = min(self.layers - all_, self._attention_within(all_, room))
        return Layers(streamed, all_, attention, self._hidden(streamed, all_, attention))

    def _attention_within(self, all_: int, room: int) -> int:
        """How many layers' attention outputs fit `room` bytes at either moment."""
        at_loss = room - self.inputs_at_loss - self._loss_work(all_) - all_ * self.extra_all
        recomputing = room - self.inputs - self.recompute_work + self.attention_of_one
        return min(at_loss, recomputing) // self.extra_attention

    def _hidden(self, streamed: int, all_: int, attention: int) -> int:
        """How many chunks' gate and up can travel out behind forward's arithmetic and back behind backward's, and fit in RAM."""
        if not self.choice.gate_up_away:
            return 0
        forward, backward = self._arithmetic(all_, attention)
        kept = Layers(streamed, all_, attention)
        slabs, inputs = self._transfers(kept)
        out = (HIDDEN * forward - inputs) / self.gate_up_s
        if self.work.chunks(self.choice.mlp_chunk) == 1:  # one is out before the next one goes: whole layers lie between them
            out = (self.layers - all_) // max(1, math.ceil(self.layers / max(out, 1)))
        back = (HIDDEN * backward - slabs - inputs) / (self.gate_up_s + HIDDEN * self.gate_up_again_s)
        room = (self.host_limit - self.host_bytes(kept)) // self.work.gate_up_bytes(self.choice.mlp_chunk)
        return max(0, min((self.layers - all_) * self.work.chunks(self.choice.mlp_chunk), room, int(out), int(back)))

    def inputs_away(self, kept: Layers) -> int:
        """How many layers' inputs wait on the host: those of layers that keep nothing else."""
        return self.layers - kept.keep_all - kept.keep_attention if self.choice.inputs_on_host else 0

    def host_bytes(self, kept: Layers) -> int:
        """Host memory that the plan needs: streamed slabs, inputs, gate and up, embeddings, optimizer state."""
        work, choice = self.work, self.choice
        total = kept.streamed * self.packed_layer + kept.gate_up * work.gate_up_bytes(choice.mlp_chunk)
        total += self.inputs_away(kept) * choice.together * work.saved_bytes("input")
        if choice.embeddings_on_host:
            total += work.embedding_bytes()
        if choice.optimizer_on_host:
            total += optimizer_bytes(work.adapter_parameters(), choice.optimizer_bits, work.item)
        return total

    # seconds -----------------------------------------------------------------------------------------------------------

    def _time(self, rates: Rates, accumulation: int) -> None:
        """Seconds of the parts of a micro-batch. Linears of P parameters take 2 P T operations in one pass; dequantizing
        writes 2 P bytes and reads the packed ones. With chunks of tokens the MLP is unpacked again for each."""
        work, s, t = self.work, self.work.shape, self.work.tokens
        sizes = {name: o * i for name, (o, i) in s.linears().items()}
        packed = work.spec.method != "none" and not self.choice.unpacked
        unpack = (2 + work.spec.bits / 8) / rates.copy_bytes if packed else 0.0
        once = 2 * t / rates.flops + unpack  # a parameter's share of one pass
        mlp = sizes["gate_proj"] + sizes["up_proj"] + sizes["down_proj"]
        self.pass_s = self.layers * sum(sizes.values()) * once
        self.unpack_s = sum(sizes.values()) * unpack  # of a layer, once
        self.again_s = sum(sizes[n] for n in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")) * once
        self.attention_again_s = sizes["o_proj"] * once
        self.chunks_s = max(0, -(-t // self.choice.mlp_chunk) - 1) * mlp * unpack
        gate_up = sizes["gate_proj"] + sizes["up_proj"]
        self.gate_up_again_s = gate_up * (2 * min(t, self.choice.mlp_chunk) / rates.flops + unpack)  # of one chunk
        self.gate_up_s = work.gate_up_bytes(self.choice.mlp_chunk) / rates.host_bytes
        self.slab_s = self.packed_layer / rates.host_bytes
        self.input_s = work.saved_bytes("input") / rates.host_bytes
        self.elementwise_s = self.layers * t * (12 * s.hidden_size + 6 * s.intermediate_size) * 2 * work.item / rates.copy_bytes
        table = s.vocab_size * s.hidden_size
        unpack_head = table * (2 + self.choice.head_bits / 8) / rates.copy_bytes if self.choice.head_bits < 16 else 0.0
        self.rest_s = 4 * table * t / rates.flops + unpack_head
        state = 12 * work.adapter_parameters()
        self.optimizer_s = state / (rates.host_bytes if self.choice.optimizer_on_host else rates.copy_bytes)
        self.accumulation = accumulation

    def _arithmetic(self, all_: int, attention: int) -> tuple[float, float]:
        """Seconds of forward's and backward's own work in all layers, everything that was not kept computed again. Copies hide
        behind all of it, norms and activations (a third of theirs in forward) no less than products."""
        computing = self.layers - all_
        chunks = computing * self.chunks_s
        again = computing * self.again_s + (computing - attention) * self.attention_again_s
        forward = self.pass_s + chunks + self.elementwise_s / 3
        return forward, self.pass_s + 2 * chunks + again + self.elementwise_s * 2 / 3

    def _transfers(self, kept: Layers) -> tuple[float, float]:
        """Seconds of the slabs' way in, in each direction, for as many passes as go together, and of the inputs' way out or back."""
        return kept.streamed * self.slab_s, self.choice.together * self.inputs_away(kept) * self.input_s

    def seconds(self, kept: Layers) -> float:
        """Seconds of one optimizer step: forward and backward each the larger of its arithmetic and its transfers."""
        together = self.choice.together
        forward, backward = (together * s for s in self._arithmetic(kept.keep_all, kept.keep_attention))
        slabs, inputs = self._transfers(kept)
        travelling = inputs + kept.gate_up * self.gate_up_s
        forward = max(forward, slabs, travelling)  # slabs come in while activations go out
        backward = max(backward - kept.gate_up * self.gate_up_again_s - kept.weights * self.unpack_s, slabs + travelling)
        return self.accumulation * ((forward + backward) / together + self.rest_s) + self.optimizer_s

    def hiding(self, streamed: int) -> int:
        """How many micro-batches have to share the slabs' way in for forward's arithmetic to hide it: a divisor of the step's,
        at most MOST_TOGETHER. Backward computes more."""
        least = streamed * self.slab_s / self._arithmetic(0, 0)[0]
        divisors = [n for n in range(1, min(self.accumulation, MOST_TOGETHER) + 1) if self.accumulation % n == 0]
        return next((n for n in divisors if n >= least), divisors[-1])
