"""The frozen linear layer, whatever its quantizer, with its LoRA adapter inside one autograd Function.

    y = x W^T + b + s (drop(x) A^T) B^T

Backward dequantizes W again into the shared scratch instead of having kept it, returns gradients only for the inputs that
need them, and never one for W. x is saved only where the adapter needs it.
"""

from __future__ import annotations

import torch
from torch import nn

from lowvram_tuner.quant.spec import QuantFormat, Scratch


class QuantLinear(nn.Module):
    """A frozen linear. `packed` holds the format's tensors: views of the layer's slab, replaced by `bind`.

    The packed tensors are plain attributes, not parameters or buffers: their bytes belong to the slab, and a state dict of
    the adapter must not see them. A bias [out] stays beside them unquantized.
    """

    def __init__(self, in_features: int, out_features: int, fmt: QuantFormat, bias: torch.Tensor | None = None) -> None:
        super().__init__()
        self.in_features, self.out_features, self.format = in_features, out_features, fmt
        self.qweight = torch.empty(0)  # PEFT puts a new adapter where this lies: on the CPU, until it is made flat
        self.packed: dict[str, torch.Tensor] = {}
        self.scratch: Scratch | None = None
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def bind(self, packed: dict[str, torch.Tensor], scratch: Scratch) -> None:
        """Points the layer at its packed tensors and at the model's scratch."""
        self.packed, self.scratch = packed, scratch

    def dense(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """W [out, in], freshly allocated: for merging and tests, never used by a step."""
        out = torch.empty(self.out_features, self.in_features, dtype=dtype, device=next(iter(self.packed.values())).device)
        return self.format.dequantize(self.packed, out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in] to [..., out] in x's dtype."""
        return quant_linear(x, self)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.format.spec.method} {self.format.spec.bits}-bit"


def quant_linear(
    x: torch.Tensor,
    base: QuantLinear,
    lora_a: torch.Tensor | None = None,
    lora_b: torch.Tensor | None = None,
    scaling: float = 1.0,
    x_lora: torch.Tensor | None = None,
) -> torch.Tensor:
    """The layer's output with an optional adapter. lora_a: [r, in], lora_b: [out, r]; x_lora: x after dropout, default x."""
    return _QuantLinear.apply(x, x_lora, lora_a, lora_b, base, scaling)


class _QuantLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, x_lora, lora_a, lora_b, base, scaling):
        rows = x.reshape(-1, x.shape[-1])
        y = rows.new_empty(rows.shape[0], base.out_features)
        if rows.shape[0] <= base.format.fused_rows and rows.is_cuda:
            y = base.format.matmul(rows, base.packed, base.out_features)
        else:
            base.format.forward(rows, base.packed, base.scratch, y)
        if base.bias is not None:
            y += base.bias.to(y.dtype)
        ctx.base, ctx.scaling, ctx.with_dropout = base, scaling, x_lora is not None
        if lora_a is not None:
            source = rows if x_lora is None else x_lora.reshape(rows.shape)
            down = source @ lora_a.to(rows.dtype).t()  # [M, r]
            y.addmm_(down, lora_b.to(rows.dtype).t(), alpha=scaling)
            ctx.save_for_backward(source, down, lora_a, lora_b)
        return y.view(*x.shape[:-1], base.out_features)

    @staticmethod
    def backward(ctx, grad):
        base, s = ctx.base, ctx.scaling
        gy = grad.reshape(-1, grad.shape[-1])
        gx = gx_lora = ga = gb = None
        saved = ctx.saved_tensors  # read once: checkpointing recomputes at the first read and refuses a second
        if saved:
            source, down, lora_a, lora_b = saved
            up = gy @ lora_b.to(gy.dtype)  # [M, r]
            ga = (up.t() @ source).mul_(s).to(lora_a.dtype) if ctx.needs_input_grad[2] else None
            gb = (gy.t() @ down).mul_(s).to(lora_b.dtype) if ctx.needs_input_grad[3] else None
            lora = (up, lora_a.to(gy.dtype))
        if ctx.needs_input_grad[0]:
            gx = gy.new_zeros(gy.shape[0], base.in_features)
            base.format.grad_input(gy, base.packed, base.scratch, gx)
            if saved and not ctx.with_dropout:
                gx.addmm_(*lora, alpha=s)
            gx = gx.view(*grad.shape[:-1], -1)
        if ctx.with_dropout and ctx.needs_input_grad[1]:
            gx_lora = (lora[0] @ lora[1]).mul_(s).view(*grad.shape[:-1], -1)
        return gx, gx_lora, ga, gb, None, None
