"""SwiGLU on fused [gate | up] rows: a = silu(gate) * up, and a backward that works in place.

    ggate = ga * up * s (1 + gate (1 - s)),   gup = ga * gate * s,   s = sigmoid(gate)

Backward overwrites gate and up with their gradients and ga with a, which the adapter of the next linear needs: three reads
and three writes, and no new memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _forward_kernel(gu_ptr, a_ptr, cols, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = col < cols
    g = tl.load(gu_ptr + row * 2 * cols + col, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(gu_ptr + row * 2 * cols + cols + col, mask=mask, other=0.0).to(tl.float32)
    tl.store(a_ptr + row * cols + col, (g * tl.sigmoid(g) * u).to(a_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _backward_kernel(gu_ptr, ga_ptr, cols, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = col < cols
    g = tl.load(gu_ptr + row * 2 * cols + col, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(gu_ptr + row * 2 * cols + cols + col, mask=mask, other=0.0).to(tl.float32)
    ga = tl.load(ga_ptr + row * cols + col, mask=mask, other=0.0).to(tl.float32)
    s = tl.sigmoid(g)
    tl.store(gu_ptr + row * 2 * cols + col, (ga * u * s * (1 + g * (1 - s))).to(gu_ptr.dtype.element_ty), mask=mask)
    tl.store(gu_ptr + row * 2 * cols + cols + col, (ga * g * s).to(gu_ptr.dtype.element_ty), mask=mask)
    tl.store(ga_ptr + row * cols + col, (g * s * u).to(ga_ptr.dtype.element_ty), mask=mask)


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """gate_up: [T, 2 I] contiguous. Returns a [T, I]."""
    t, cols = gate_up.shape[0], gate_up.shape[1] // 2
    if not gate_up.is_cuda:
        return torch.nn.functional.silu(gate_up[:, :cols]) * gate_up[:, cols:]
    a = torch.empty(t, cols, dtype=gate_up.dtype, device=gate_up.device)
    _forward_kernel[(t, triton.cdiv(cols, 1024))](gate_up, a, cols, BLOCK=1024, num_warps=4)
    return a


def swiglu_backward(gate_up: torch.Tensor, ga: torch.Tensor) -> None:
    """In place: gate_up becomes its gradient, ga becomes a. Both contiguous, [T, 2 I] and [T, I]."""
    t, cols = ga.shape
    if not ga.is_cuda:
        g, u = gate_up[:, :cols].float(), gate_up[:, cols:].float()
        s, upstream = torch.sigmoid(g), ga.to(torch.float32, copy=True)
        ga.copy_(g * s * u)
        gate_up.copy_(torch.cat([upstream * u * s * (1 + g * (1 - s)), upstream * g * s], 1))
        return
    _backward_kernel[(t, triton.cdiv(cols, 1024))](gate_up, ga, cols, BLOCK=1024, num_warps=4)
