"""The decoder layer of `train/fused_layer.py` for reading only: no gradients, a cache, and few rows at a time.

A token's step is bound by reading weights and by the number of launches. So linears that share their input are one product
straight from the packed codes where the format has one (`QuantFormat.matmul_stacked`), and their adapter, bias and residual
are two small kernels more (`kernels/thin.py`). A prompt has many rows and takes the ordinary way: dequantize, multiply.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from kernels.norm import rms_norm
from kernels.rope import HeadNorm, rope
from kernels.swiglu import swiglu
from kernels.thin import Thin, finish
from lowvram_tuner.quant.linear import QuantLinear

Attend = Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]  # q, a layer's cache, scale -> o [T, heads * d]


@dataclass
class Place:
    """Where the tokens of a pass stand: positions int64 [T], their cos and sin [T, d], and how they see the cache."""

    positions: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor
    attend: Attend


@dataclass
class Member:
    """The adapter of one linear of a group: columns of y, A [r, in], B [out, r], scaling."""

    columns: slice
    a: torch.Tensor
    b: torch.Tensor
    scaling: float


class Linears:
    """Frozen linears that share their input: y = x [W1; W2; ..]^T + bias + s (x A^T) B^T + residual.

    fast: one row takes the card's kernels.
    """

    def __init__(self, modules: list[nn.Module], fast: bool) -> None:
        self.bases: list[QuantLinear] = [getattr(m, "base_layer", m) for m in modules]
        self.sizes = [base.out_features for base in self.bases]
        self.fast, self.bias = fast, _bias(self.bases)
        self.edges = [sum(self.sizes[:i]) for i in range(len(self.sizes) + 1)]
        formats = [base.format for base in self.bases]
        self.alike = all((type(f), f.spec) == (type(formats[0]), formats[0].spec) for f in formats)
        self.plain = _adjacent([base.packed["weight"] for base in self.bases]) if formats[0].spec.method == "none" and self.alike else None
        self.members = [m for i, module in enumerate(modules) if (m := _member(module, slice(*self.edges[i : i + 2])))]
        self.thin = _thin(self.members, self.edges[-1]) if fast and self.members else None

    def __call__(self, x: torch.Tensor, adapted: bool, residual: torch.Tensor | None = None) -> torch.Tensor:
        """x [T, in] to y [T, out]. adapted: with the adapter, if there is one. residual: [T, out]."""
        y = self._product(x)
        if self.fast and x.shape[0] == 1:
            return finish(y, x, self.thin if adapted else None, self.bias, residual)
        if self.bias is not None:
            y += self.bias
        for member in self.members if adapted else ():
            y[:, member.columns].addmm_(x @ member.a.t(), member.b.t(), alpha=member.scaling)
        return y if residual is None else y.add_(residual)

    def _product(self, x: torch.Tensor) -> torch.Tensor:
        if self.plain is not None:
            return x @ self.plain.t()
        if self.alike and self._fused(x, self.bases[0]):
            return self.bases[0].format.matmul_stacked(x, [base.packed for base in self.bases], self.sizes)
        y = x.new_empty(x.shape[0], self.edges[-1])
        for base, start, stop in zip(self.bases, self.edges, self.edges[1:]):
            if self._fused(x, base):
                y[:, start:stop] = base.format.matmul(x, base.packed, base.out_features)
            else:
                base.format.forward(x, base.packed, base.scratch, y[:, start:stop])
        return y

    def _fused(self, x: torch.Tensor, base: QuantLinear) -> bool:
        return self.fast and x.shape[0] <= base.format.fused_rows


class Layer:
    """Forward of one transformers decoder layer of `fused_layer.FAMILIES`, reading its weights in place."""

    def __init__(self, layer: nn.Module, model_config: object, fast: bool) -> None:
        attn, mlp = layer.self_attn, layer.mlp
        self.heads, self.kv_heads = model_config.num_attention_heads, model_config.num_key_value_heads
        self.head_dim, self.scale = attn.head_dim, attn.scaling
        self.qkv = Linears([attn.q_proj, attn.k_proj, attn.v_proj], fast)
        self.o = Linears([attn.o_proj], fast)
        self.gate_up = Linears([mlp.gate_proj, mlp.up_proj], fast)
        self.down = Linears([mlp.down_proj], fast)
        self.norm1, self.norm2 = layer.input_layernorm, layer.post_attention_layernorm
        self.head_norm = None
        if hasattr(attn, "q_norm"):
            self.head_norm = HeadNorm(attn.q_norm.weight, attn.k_norm.weight, attn.q_norm.variance_epsilon)

    def __call__(self, x: torch.Tensor, place: Place, cache: torch.Tensor, adapted: bool) -> torch.Tensor:
        """x [T, H] to y [T, H]; the tokens' keys and values are written to `cache` [capacity, 2, kv_heads, d]."""
        qkv = self.qkv(normed(self.norm1, x), adapted)
        rotated = rope(qkv, place.cos, place.sin, self.heads, self.kv_heads, self.head_norm)
        if self.head_norm is not None:
            qkv[:, : rotated.shape[1]] = rotated
        queries = self.heads * self.head_dim
        cache.index_copy_(0, place.positions, qkv[:, queries:].unflatten(1, cache.shape[1:]))
        attended = place.attend(qkv[:, :queries].unflatten(1, (self.heads, self.head_dim)), cache, self.scale)
        x = self.o(attended, adapted, x)
        return self.down(swiglu(self.gate_up(normed(self.norm2, x), adapted)), adapted, x)


def normed(norm: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """x [T, H] after an RMSNorm of transformers."""
    return rms_norm(x, norm.weight, norm.variance_epsilon)[0]


def _bias(bases: list[QuantLinear]) -> torch.Tensor | None:
    some = next((base.bias for base in bases if base.bias is not None), None)
    if some is None:
        return None
    return torch.cat([some.new_zeros(base.out_features) if base.bias is None else base.bias.detach() for base in bases])


def _member(module: nn.Module, columns: slice) -> Member | None:
    """The adapter that a PEFT layer applies: its first active one."""
    name = next((n for n in getattr(module, "active_adapters", ()) if n in getattr(module, "lora_A", {})), None)
    if name is None:
        return None
    return Member(columns, module.lora_A[name].weight.detach(), module.lora_B[name].weight.detach(), module.scaling[name])


def _thin(members: list[Member], rows: int) -> Thin:
    """Stacks a group's adapters. Where they lie side by side already (`lora/adapter.py` sees to it), nothing is copied."""
    ranks = [member.a.shape[0] for member in members]
    a, device = _stacked([member.a for member in members]), members[0].a.device
    scaling = torch.cat([torch.full((r,), float(m.scaling), device=device) for r, m in zip(ranks, members)])
    first = torch.zeros(rows, dtype=torch.int32, device=device)
    for i, member in enumerate(members):
        first[member.columns] = sum(ranks[:i])
    if len(set(ranks)) == 1 and sum(m.b.shape[0] for m in members) == rows:
        return Thin(a, scaling, _stacked([member.b for member in members]), first)
    b = torch.zeros(rows, max(ranks), dtype=a.dtype, device=device)
    for rank, member in zip(ranks, members):
        b[member.columns, :rank] = member.b
    return Thin(a, scaling, b, first)


def _stacked(parts: list[torch.Tensor]) -> torch.Tensor:
    """[sum of rows, columns] of matrices: a view where they are adjacent, else a copy."""
    joined = _adjacent(parts)
    return torch.cat(parts) if joined is None else joined


def _adjacent(parts: list[torch.Tensor]) -> torch.Tensor | None:
    """One view of contiguous matrices of the same width that lie one behind the other in one storage; None if they do not."""
    end = parts[0].data_ptr()
    for part in parts:
        same = part.untyped_storage().data_ptr() == parts[0].untyped_storage().data_ptr()
        if not same or part.data_ptr() != end or not part.is_contiguous() or part.shape[1] != parts[0].shape[1]:
            return None
        end += part.nbytes
    return parts[0].as_strided((sum(len(part) for part in parts), parts[0].shape[1]), (parts[0].shape[1], 1))
