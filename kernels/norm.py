"""RMSNorm with a frozen weight: forward, and the gradient of its input added to the residual's.

    y = w * x * rstd,  rstd = 1 / sqrt(mean(x^2) + eps)
    gx = g + rstd * (w gy - xhat * mean(w gy xhat)),  xhat = x rstd

The weight's own gradient is never needed, so it is not computed; the addition of the residual gradient g rides along.
One program per row; statistics in fp32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _forward_kernel(x_ptr, w_ptr, y_ptr, rstd_ptr, x_stride, cols, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK)
    mask = col < cols
    x = tl.load(x_ptr + row * x_stride + col, mask=mask, other=0.0).to(tl.float32)
    w = tl.load(w_ptr + col, mask=mask, other=0.0).to(tl.float32)
    rstd = 1.0 / tl.sqrt(tl.sum(x * x, 0) / cols + eps)
    tl.store(rstd_ptr + row, rstd)
    tl.store(y_ptr + row * cols + col, (x * rstd * w).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _backward_kernel(gy_ptr, x_ptr, w_ptr, rstd_ptr, g_ptr, x_stride, cols, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK)
    mask = col < cols
    rstd = tl.load(rstd_ptr + row)
    xhat = tl.load(x_ptr + row * x_stride + col, mask=mask, other=0.0).to(tl.float32) * rstd
    w = tl.load(w_ptr + col, mask=mask, other=0.0).to(tl.float32)
    wgy = tl.load(gy_ptr + row * cols + col, mask=mask, other=0.0).to(tl.float32) * w
    gx = rstd * (wgy - xhat * (tl.sum(wgy * xhat, 0) / cols))
    g = tl.load(g_ptr + row * cols + col, mask=mask, other=0.0).to(tl.float32)
    tl.store(g_ptr + row * cols + col, (g + gx).to(g_ptr.dtype.element_ty), mask=mask)


def _warps(block: int) -> int:
    return 4 if block <= 2048 else 8 if block <= 8192 else 16


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """x: [T, H] (row stride may exceed H), weight: [H]. Returns y [T, H] in x's dtype and rstd fp32 [T]."""
    if not x.is_cuda:
        rstd = torch.rsqrt(x.float().square().mean(1) + eps)
        return (x.float() * rstd[:, None] * weight.float()).to(x.dtype), rstd
    y, rstd = torch.empty(x.shape, dtype=x.dtype, device=x.device), torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(x.shape[1])
    _forward_kernel[(x.shape[0],)](x, weight, y, rstd, x.stride(0), x.shape[1], eps, BLOCK=block, num_warps=_warps(block))
    return y, rstd


def rms_norm_backward(gy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, rstd: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    """Adds the gradient of x to `residual` [T, H] in place and returns it. gy, residual: [T, H] contiguous."""
    if not x.is_cuda:
        xhat, wgy = x.float() * rstd[:, None], gy.float() * weight.float()
        gx = rstd[:, None] * (wgy - xhat * (wgy * xhat).mean(1, keepdim=True))
        return residual.copy_(residual.float() + gx)
    block = triton.next_power_of_2(x.shape[1])
    _backward_kernel[(x.shape[0],)](gy, x, weight, rstd, residual, x.stride(0), x.shape[1], BLOCK=block, num_warps=_warps(block))
    return residual
