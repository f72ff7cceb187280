"""One decoder layer of the Llama family with a hand-written backward: the unit that training, planning and streaming share.

    x2 = x + o(attention(rope(qkv(norm1(x)))))          y = x2 + down(swiglu(gate_up(norm2(x2))))

q, k and v share their input, and so do gate and up: each group is dequantized into the scratch once and multiplied once.
Backward is written out because autograd would keep what frozen weights do not need: here a layer keeps its input, or the
attention's output too, or everything, as the plan says, and what was not kept is computed again. The last product of a
layer is never computed again, since only its input is needed. A layer that keeps everything can keep its weights too as
forward unpacked them, for backward.

`memory/estimate.py` counts what is alive here; change both together.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from kernels.attention import Saved, attention, attention_backward
from kernels.norm import rms_norm, rms_norm_backward
from kernels.rope import HeadNorm, rope, rope_backward
from kernels.swiglu import swiglu, swiglu_backward
from lowvram_tuner.lora.adapter import NAME, Adapter
from lowvram_tuner.quant.linear import QuantLinear

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
INPUT, ATTENTION, ALL = "input", "attention", "all"  # what a layer keeps from forward to backward
MERGE_ROWS = 256  # tokens of a pass from which the adapter is merged while dequantizing


@dataclass
class Sequences:
    """Where the examples of a pass lie: cos, sin [T, d], cu_seqlens int32 [n + 1], the longest example allowed, and whether all are
    so long."""

    cos: torch.Tensor
    sin: torch.Tensor
    cu_seqlens: torch.Tensor
    max_len: int
    even: bool = False


@dataclass
class Kept:
    """What one layer keeps until its backward. x2, attention, qkv and gate_up are None when they are computed again; weights is
    a stack of what its groups unpacked, which their backward takes from in turn, or None."""

    x: torch.Tensor
    x2: torch.Tensor | None = None
    attention: Saved | None = None
    qkv: torch.Tensor | None = None
    rotated: torch.Tensor | None = None
    gate_up: torch.Tensor | None = None
    weights: list[torch.Tensor] | None = None


class LinearGroup:
    """Frozen linears that share their input, with their adapters: y = x [W1; W2; ..]^T + b + s (x A^T) B^T.

    A [sum of ranks, in] is one view of the flat adapter; each B stays its own, since the product is block-diagonal.
    Where many tokens meet a format that can, W + s B A is dequantized instead, and the adapter's products with x and gy
    are taken once, for its gradients, not in forward, recomputation and backward.
    """

    def __init__(self, modules: list[nn.Module], adapter: Adapter | None) -> None:
        self.bases = [getattr(m, "base_layer", m) for m in modules]
        self.in_features = self.bases[0].in_features
        self.edges = [0]
        for base in self.bases:
            self.edges.append(self.edges[-1] + base.out_features)
        self.out_features = self.edges[-1]
        self.bias = self._bias()
        self.scaling, self.rank, self.members, self.adapted = 1.0, 0, [], {}
        if adapter is not None:
            self._attach(modules, adapter)

    def _bias(self) -> torch.Tensor | None:
        if all(b.bias is None for b in self.bases):
            return None
        some = next(b.bias for b in self.bases if b.bias is not None)
        return torch.cat([some.new_zeros(b.out_features) if b.bias is None else b.bias.detach() for b in self.bases])

    def _attach(self, modules: list[nn.Module], adapter: Adapter) -> None:
        """Finds the adapter's matrices: `members` holds (columns of y, columns of the ranks, B, gradient of B)."""
        first = None
        for i, module in enumerate(modules):
            if NAME not in getattr(module, "lora_A", {}):
                continue
            a, b = module.lora_A[NAME].weight, module.lora_B[NAME].weight
            first = a if first is None else first
            ranks = slice(self.rank, self.rank + a.shape[0])
            self.members.append((slice(self.edges[i], self.edges[i + 1]), ranks, b.detach(), b.grad))
            self.adapted[i] = (ranks, b.detach())
            self.rank += a.shape[0]
            self.scaling = module.scaling[NAME]
        if first is None:
            return
        start = first.storage_offset()
        size = self.rank * self.in_features
        self.a = adapter.parameters[start : start + size].view(self.rank, self.in_features)
        self.grad_a = adapter.gradients[start : start + size].view(self.rank, self.in_features)

    def _fits(self, dtype: torch.dtype) -> bool:
        """Whether the group fits the scratch in one piece."""
        return self.out_features * self.in_features * dtype.itemsize <= self.bases[0].scratch.buffer.numel()

    def _whole(self, dtype: torch.dtype) -> bool:
        """Whether the group is dequantized in one piece and multiplied once."""
        formats = [base.format for base in self.bases]
        return len(formats) > 1 and formats[0].spec.method != "none" and all(f.dense for f in formats) and self._fits(dtype)

    def _merges(self, x: torch.Tensor) -> bool:
        """Whether the adapter is added to the weights while they are dequantized, for a pass over x [T, ..]."""
        return x.shape[0] >= MERGE_ROWS and bool(self.members) and self._fits(x.dtype) and all(
            base.format.merges(self.in_features, x.device) for base in self.bases
        )

    def _unpacked(self, x: torch.Tensor, merged: bool, kept: list[torch.Tensor] | None = None) -> torch.Tensor | None:
        """The group's weights for a pass over x [T, ..], with the adapter where it is merged: onto the stack `kept` if there is
        one, else in the scratch where they fit it in one piece. None where they are multiplied one by one."""
        if kept is not None:
            w = x.new_empty(self.out_features, self.in_features)
            kept.append(w)
        elif merged or self._whole(x.dtype):
            w = self.bases[0].scratch.tile(self.out_features, self.in_features, x.dtype)
        else:
            return None
        for i, (base, start, stop) in enumerate(zip(self.bases, self.edges, self.edges[1:])):
            if merged and i in self.adapted:
                ranks, b = self.adapted[i]
                base.format.dequantize_merged(base.packed, w[start:stop], self.a[ranks], b, self.scaling)
            else:
                base.format.dequantize(base.packed, w[start:stop])
        return w

    def forward(self, x: torch.Tensor, y: torch.Tensor | None = None, kept: list[torch.Tensor] | None = None) -> torch.Tensor:
        """x [T, in] to y [T, out], which may be given. kept: where the unpacked weights stay for `grad_input`."""
        y = x.new_empty(x.shape[0], self.out_features) if y is None else y
        merged = self._merges(x)
        w = self._unpacked(x, merged, kept)
        if w is not None:
            torch.mm(x, w.t(), out=y)
        else:
            for base, start, stop in zip(self.bases, self.edges, self.edges[1:]):
                base.format.forward(x, base.packed, base.scratch, y[:, start:stop])
        if self.bias is not None:
            y += self.bias
        if self.members and not merged:
            down = x @ self.a.t()  # [T, R]
            for columns, ranks, b, _ in self.members:
                y[:, columns].addmm_(down[:, ranks], b.t(), alpha=self.scaling)
        return y

    def backward(self, gy: torch.Tensor, x: torch.Tensor | None, kept: list[torch.Tensor] | None = None) -> torch.Tensor:
        """Adds the adapter's gradients and returns gx [T, in]. x: the group's input, not needed without an adapter."""
        gx, up = self.grad_input(gy, kept)
        if self.members:
            self.adapter_gradients(gy, x, up)
        return gx

    def grad_input(self, gy: torch.Tensor, kept: list[torch.Tensor] | None = None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """gx [T, in], and with an adapter gy B [T, R], which its gradients need too. kept: as forward filled it."""
        merged = self._merges(gy)
        w = self._unpacked(gy, merged) if kept is None else kept.pop()
        if w is not None:
            gx = torch.mm(gy, w)
        else:
            gx = gy.new_zeros(gy.shape[0], self.in_features)
            for base, start, stop in zip(self.bases, self.edges, self.edges[1:]):
                base.format.grad_input(gy[:, start:stop], base.packed, base.scratch, gx)
        if not self.members:
            return gx, None
        up = gy.new_empty(gy.shape[0], self.rank)
        for columns, ranks, b, _ in self.members:
            torch.mm(gy[:, columns], b, out=up[:, ranks])
        return gx if merged else gx.addmm_(up, self.a, alpha=self.scaling), up

    def adapter_gradients(self, gy: torch.Tensor, x: torch.Tensor, up: torch.Tensor) -> None:
        """grad A += s (gy B)^T x, grad B += s gy^T (x A^T)."""
        self.grad_a.addmm_(up.t(), x, alpha=self.scaling)
        down = x @ self.a.t()
        for columns, ranks, _, grad_b in self.members:
            grad_b.addmm_(gy[:, columns].t(), down[:, ranks], alpha=self.scaling)


class FusedLayer:
    """Forward and backward of one transformers decoder layer of FAMILIES, reading its weights in place."""

    def __init__(self, layer: nn.Module, model_config: object, adapter: Adapter | None, mlp_chunk: int = 1 << 30) -> None:
        attn, mlp = layer.self_attn, layer.mlp
        self.heads, self.kv_heads = model_config.num_attention_heads, model_config.num_key_value_heads
        self.head_dim, self.scale, self.mlp_chunk = attn.head_dim, attn.scaling, mlp_chunk
        self.qkv = LinearGroup([attn.q_proj, attn.k_proj, attn.v_proj], adapter)
        self.o = LinearGroup([attn.o_proj], adapter)
        self.gate_up = LinearGroup([mlp.gate_proj, mlp.up_proj], adapter)
        self.down = LinearGroup([mlp.down_proj], adapter)
        self.norm1, self.norm2 = layer.input_layernorm, layer.post_attention_layernorm
        self.head_norm = None
        if hasattr(attn, "q_norm"):
            self.head_norm = HeadNorm(attn.q_norm.weight, attn.k_norm.weight, attn.q_norm.variance_epsilon)

    def forward(
        self, x: torch.Tensor, sequences: Sequences, keep: str | None,
        away: Callable[[int, torch.Tensor], None] | None = None, keep_weights: bool = False,
    ) -> tuple[torch.Tensor, Kept]:  # fmt: skip
        """x: [T, H]. `keep` None keeps nothing (evaluation). Returns y [T, H] and what backward needs.

        away(chunk, gate_up): takes each chunk's gate and up [C, 2 I] elsewhere, so that they are not computed again.
        keep_weights: with `keep` ALL, the unpacked weights stay as well.
        """
        kept, x2 = Kept(x, weights=[] if keep_weights else None), torch.empty_like(x)  # what outlives the layer lies below: see `cost.GAPS`
        qkv = self.qkv.forward(self._norm(self.norm1, x)[0], kept=kept.weights)
        rotated, saved = self._attend(qkv, sequences)
        self.o.forward(saved.out.flatten(1), x2, kept.weights).add_(x)
        if keep in (ATTENTION, ALL):
            kept.x2, kept.attention = x2, saved
        if keep == ALL:
            kept.qkv, kept.rotated = qkv, rotated
        del qkv, rotated, saved
        if keep == ALL:
            kept.gate_up = self.gate_up.forward(self._norm(self.norm2, x2)[0], kept=kept.weights)
            return self.down.forward(swiglu(kept.gate_up), kept=kept.weights).add_(x2), kept
        y = x2.clone() if keep == ATTENTION else x2
        for chunk, part in enumerate(self._chunks(x.shape[0])):
            gate_up = self.gate_up.forward(self._norm(self.norm2, x2[part])[0])
            if away is not None:
                away(chunk, gate_up)
            hidden = swiglu(gate_up)
            del gate_up
            y[part] += self.down.forward(hidden)
        return y, kept

    def backward(
        self, gy: torch.Tensor, kept: Kept, sequences: Sequences, back: Callable[[int], torch.Tensor | None] | None = None
    ) -> torch.Tensor:
        """The gradient of x from gy [T, H], which is overwritten. Adds to the adapter's gradients and empties `kept`.

        back(chunk): gate and up of a chunk that `away` took, or None; overwritten.
        """
        x, x2, saved, qkv, rotated = kept.x, kept.x2, kept.attention, kept.qkv, kept.rotated
        if qkv is None:
            qkv = self.qkv.forward(self._norm(self.norm1, x)[0])
            if saved is None:
                rotated, saved = self._attend(qkv, sequences)
            else:
                rotated = self._rotate(qkv, sequences)
        if x2 is None:
            x2 = self.o.forward(saved.out.flatten(1)).add_(x)
        for chunk, part in enumerate([slice(None)] if kept.gate_up is not None else self._chunks(x.shape[0])):
            gate_up = back(chunk) if back is not None and kept.gate_up is None else kept.gate_up
            self._mlp_backward(gy[part], x2[part], gate_up, kept.weights)
            del gate_up
        del x2, kept.x2, kept.gate_up
        return self._attention_backward(gy, x, qkv, rotated, saved, sequences, kept.weights)

    def _mlp_backward(self, gy: torch.Tensor, x2: torch.Tensor, gate_up: torch.Tensor | None, weights: list | None) -> None:
        """Turns gy, the gradient of y, into the gradient of x2, in place."""
        h, rstd = self._norm(self.norm2, x2)
        if gate_up is None:
            gate_up = self.gate_up.forward(h)
        ga, up = self.down.grad_input(gy, weights)
        swiglu_backward(gate_up, ga)  # gate_up: its gradient; ga: the input of down
        if up is not None:
            self.down.adapter_gradients(gy, ga, up)
        del ga
        gh = self.gate_up.backward(gate_up, h, weights)
        rms_norm_backward(gh, x2, self.norm2.weight, rstd, gy)

    def _attention_backward(self, gy, x, qkv, rotated, saved, sequences, weights) -> torch.Tensor:
        go = self.o.backward(gy, saved.out.flatten(1), weights)
        q, k, v = self._heads(qkv, rotated)
        grads = attention_backward(
            go.view(q.shape), q, k, v, saved, sequences.cu_seqlens, sequences.max_len, self.scale
        )  # fmt: skip
        del go, q, k, v, saved, rotated
        gqkv = rope_backward(*grads, qkv if self.head_norm else None, sequences.cos, sequences.sin, self.head_norm)
        del grads, qkv
        h, rstd = self._norm(self.norm1, x)
        return rms_norm_backward(self.qkv.backward(gqkv, h, weights), x, self.norm1.weight, rstd, gy)

    def _norm(self, norm: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return rms_norm(x, norm.weight, norm.variance_epsilon)

    def _rotate(self, qkv: torch.Tensor, sequences: Sequences) -> torch.Tensor:
        return rope(qkv, sequences.cos, sequences.sin, self.heads, self.kv_heads, self.head_norm)

    def _attend(self, qkv: torch.Tensor, sequences: Sequences) -> tuple[torch.Tensor, Saved]:
        rotated = self._rotate(qkv, sequences)
        q, k, v = self._heads(qkv, rotated)
        return rotated, attention(q, k, v, sequences.cu_seqlens, sequences.max_len, self.scale, sequences.even)

    def _heads(self, qkv: torch.Tensor, rotated: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q [T, heads, d], k and v [T, kv_heads, d] as views."""
        q_size, kv_size = self.heads * self.head_dim, self.kv_heads * self.head_dim
        parts = (rotated[:, :q_size], rotated[:, q_size : q_size + kv_size], qkv[:, q_size + kv_size :])
        return tuple(p.unflatten(1, (-1, self.head_dim)) for p in parts)

    def _chunks(self, tokens: int) -> list[slice]:
        return [slice(i, min(i + self.mlp_chunk, tokens)) for i in range(0, tokens, self.mlp_chunk)]


def supports(model: nn.Module, max_seq_length: int) -> bool:
    """Whether every decoder layer of a model is one this file computes: family, full rotary, no window that would cut."""
    config = model.config
    layer = model.model.layers[0]
    attn = getattr(layer, "self_attn", None)
    if config.model_type not in FAMILIES or not all(hasattr(attn, n) for n in ("q_proj", "k_proj", "v_proj", "o_proj")):
        return False
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    activation = getattr(config, "hidden_act", "silu")
    rotary = getattr(model.model, "rotary_emb", None)
    full = rotary is not None and rotary.inv_freq.numel() * 2 == attn.head_dim
    linear = getattr(layer.mlp.gate_proj, "base_layer", layer.mlp.gate_proj)
    return activation == "silu" and full and (window is None or window >= max_seq_length) and isinstance(linear, QuantLinear)
