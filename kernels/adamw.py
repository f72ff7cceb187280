"""AdamW over one flat buffer in one pass: 8- or 32-bit moments, 16-bit parameters with exact fp32 masters.

    m = b1 m + (1 - b1) g        v = b2 v + (1 - b2) g^2
    w = w (1 - lr wd) - lr (m / c1) / (sqrt(v / c2) + eps),   c1 = 1 - b1^t,  c2 = 1 - b2^t

(https://arxiv.org/abs/1711.05101.) g is the gradient times `factor`, a device scalar that holds clipping and loss scale; when
it is not finite nothing changes.

A bf16 parameter is the rounded upper half of its fp32 master (halves away from zero, so that the rest always fits); `low`
int16 is the difference of the bit patterns, so that 2 + 2 bytes hold the master exactly. An fp16 parameter has its fp32
master beside it.

8-bit moments are companded per block of 256 with the block's largest magnitude a: m = a sign(q) (|q| / 127)^3 and
v = a (q / 255)^4. A step changes v by a thousandth, less than the spacing of its codes: rounded up it would only ever climb,
rounded to the nearest it would stand still. So both are rounded at random, right on average, by a hash of index and step
that gives the same run again. A v above zero keeps at least code 1. `tests/train/test_optimizer.py` holds the training
curve to that of 32-bit moments.
The state may lie in pinned host memory: the kernel then reads and writes it over PCIe, and the card holds none of it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 256
ROWS = 4  # blocks per program


@triton.jit
def _chance(index, step):
    """A number in [0, 1) for every index and step: 24 bits of a hash."""
    h = (index.to(tl.uint32) * 0x9E3779B1) ^ (step.to(tl.uint32) * 0x85EBCA6B)
    h = (h ^ (h >> 16)) * 0x7FEB352D
    h = (h ^ (h >> 15)) * 0x846CA68B
    return ((h ^ (h >> 16)) >> 8).to(tl.float32) * (1.0 / 16777216)


@triton.jit(do_not_specialize=["step"])
def _adamw_kernel(
    w_ptr, g_ptr, m_ptr, v_ptr, ma_ptr, va_ptr, master_ptr, factor_ptr, n, step, lr, b1, b2, c1, c2, eps, decay,
    EIGHT: tl.constexpr, SPLIT: tl.constexpr, MASTER: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    index = row[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]  # [ROWS, BLOCK]
    mask = index < n
    inside = row * BLOCK < n
    factor = tl.load(factor_ptr)
    if (factor == factor) & (tl.abs(factor) < 1e30):
        g = tl.load(g_ptr + index, mask=mask, other=0.0).to(tl.float32) * factor
        if EIGHT:
            q = tl.load(m_ptr + index, mask=mask, other=0).to(tl.float32) / 127
            m = q * q * q * tl.load(ma_ptr + row, mask=inside, other=0.0)[:, None]
            q = tl.load(v_ptr + index, mask=mask, other=0).to(tl.float32) / 255
            v = q * q * q * q * tl.load(va_ptr + row, mask=inside, other=0.0)[:, None]
        else:
            m = tl.load(m_ptr + index, mask=mask, other=0.0)
            v = tl.load(v_ptr + index, mask=mask, other=0.0)
        w = tl.load(w_ptr + index, mask=mask, other=0.0)
        if SPLIT:
            low = tl.load(master_ptr + index, mask=mask, other=0).to(tl.int32)
            w = ((w.to(tl.int16, bitcast=True).to(tl.int32) << 16) + low).to(tl.float32, bitcast=True)
        elif MASTER:
            w = tl.load(master_ptr + index, mask=mask, other=0.0)
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g * g
        w = w * (1 - lr * decay) - lr * (m / c1) / (tl.sqrt(v / c2) + eps)
        if SPLIT:
            bits = w.to(tl.int32, bitcast=True)
            high = (bits + 0x8000) >> 16
            tl.store(master_ptr + index, (bits - (high << 16)).to(tl.int16), mask=mask)
            tl.store(w_ptr + index, high.to(tl.int16).to(tl.bfloat16, bitcast=True), mask=mask)
        else:
            if MASTER:
                tl.store(master_ptr + index, w, mask=mask)
            tl.store(w_ptr + index, w.to(w_ptr.dtype.element_ty), mask=mask)
        if EIGHT:
            am = tl.max(tl.where(mask, tl.abs(m), 0.0), 1)
            av = tl.max(tl.where(mask, v, 0.0), 1)
            tl.store(ma_ptr + row, am, mask=inside)
            tl.store(va_ptr + row, av, mask=inside)
            chance = _chance(index, step)
            x = tl.abs(m) / tl.maximum(am, 1e-38)[:, None]
            code = tl.minimum(tl.floor(127 * tl.exp2(tl.log2(tl.maximum(x, 1e-30)) * (1.0 / 3.0))), 126.0)
            below, above = code / 127, (code + 1) / 127
            below, above = below * below * below, above * above * above
            code += tl.where(x - below > chance * (above - below), 1.0, 0.0)
            tl.store(m_ptr + index, tl.where(m < 0, -code, code).to(tl.int8), mask=mask)
            y = v / tl.maximum(av, 1e-38)[:, None]
            code = tl.minimum(tl.floor(255 * tl.sqrt(tl.sqrt(y))), 254.0)
            below, above = code / 255, (code + 1) / 255
            below, above = below * below * below * below, above * above * above * above
            code += tl.where(y - below > chance * (above - below), 1.0, 0.0)
            tl.store(v_ptr + index, tl.maximum(code, tl.where(v > 0, 1.0, 0.0)).to(tl.uint8), mask=mask)
        else:
            tl.store(m_ptr + index, m, mask=mask)
            tl.store(v_ptr + index, v, mask=mask)


def adamw(
    w: torch.Tensor, g: torch.Tensor, state: dict[str, torch.Tensor], factor: torch.Tensor,
    lr: float, step: int, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, decay: float = 0.0,
) -> None:  # fmt: skip
    """Updates w [n] in place. `state` as `make_state` returns it; factor: fp32 scalar on w's device; step counts from 1."""
    c1, c2 = 1 - betas[0] ** step, 1 - betas[1] ** step
    if not w.is_cuda:
        return _reference(w, g, state, factor, lr, step, betas, c1, c2, eps, decay)
    eight = "m_scale" in state
    m_scale, v_scale = (state["m_scale"], state["v_scale"]) if eight else (factor, factor)
    _adamw_kernel[(triton.cdiv(w.numel(), BLOCK * ROWS),)](
        w, g, state["m"], state["v"], m_scale, v_scale, state.get("low", state.get("master", factor)), factor, w.numel(),
        step, lr, *betas, c1, c2, eps, decay, EIGHT=eight, SPLIT="low" in state, MASTER="master" in state, ROWS=ROWS, BLOCK=BLOCK,
        num_warps=4,
    )  # fmt: skip
    return None


def make_state(w: torch.Tensor, bits: int, pinned: bool = False) -> dict[str, torch.Tensor]:
    """Zeroed moments (8 or 32 bit) and, for 16-bit parameters, what completes their fp32 masters."""
    n, blocks = w.numel(), -(-w.numel() // BLOCK)

    def zeros(count: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(count, dtype=dtype, pin_memory=True) if pinned else torch.zeros(count, dtype=dtype, device=w.device)

    if bits == 8:
        state = {"m": zeros(n, torch.int8), "v": zeros(n, torch.uint8)}
        state |= {"m_scale": zeros(blocks, torch.float32), "v_scale": zeros(blocks, torch.float32)}
    else:
        state = {"m": zeros(n, torch.float32), "v": zeros(n, torch.float32)}
    if w.dtype == torch.bfloat16:
        state["low"] = zeros(n, torch.int16)
    elif w.dtype == torch.float16:
        state["master"] = zeros(n, torch.float32).copy_(w)
    return state


def join(high: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
    """The fp32 master of a bf16 parameter and its int16 difference."""
    return ((high.view(torch.int16).int() << 16) + low.int()).view(torch.float32)


def split(master: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(bf16, int16) of an fp32 master; `join` gives it back bit for bit."""
    bits = master.view(torch.int32)
    high = (bits + 0x8000) >> 16
    return high.to(torch.int16).view(torch.bfloat16), (bits - (high << 16)).to(torch.int16)


def _reference(w, g, state, factor, lr, step, betas, c1, c2, eps, decay) -> None:
    if not torch.isfinite(factor):
        return
    g, eight = g.float() * factor, "m_scale" in state
    m, v = expand(state) if eight else (state["m"], state["v"])
    master = join(w, state["low"]) if "low" in state else state.get("master", w)
    m.mul_(betas[0]).add_(g, alpha=1 - betas[0])
    v.mul_(betas[1]).addcmul_(g, g, value=1 - betas[1])
    master.mul_(1 - lr * decay).sub_((m / c1).mul_(lr).div_((v / c2).sqrt_().add_(eps)))
    if "low" in state:
        high, low = split(master)
        w.copy_(high)
        state["low"].copy_(low)
    elif "master" in state:
        w.copy_(master)
    if eight:
        compress(state, m, v, step)


def expand(state: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """(m, v) in fp32 of 8-bit moments."""
    n = state["m"].numel()
    m_scale, v_scale = (state[k].repeat_interleave(BLOCK)[:n] for k in ("m_scale", "v_scale"))
    return (state["m"].float() / 127) ** 3 * m_scale, (state["v"].float() / 255) ** 4 * v_scale


def compress(state: dict[str, torch.Tensor], m: torch.Tensor, v: torch.Tensor, step: int = 0) -> None:
    """Writes m and v [n] into the 8-bit tensors of `state`."""
    n, chance = m.numel(), _chances(m.numel(), step).to(m.device)
    for name, values, top, power in (("m", m, 127, 3), ("v", v, 255, 4)):
        rows = torch.nn.functional.pad(values, (0, -n % BLOCK)).view(-1, BLOCK).abs()
        scale = rows.amax(1)
        state[f"{name}_scale"].copy_(scale)
        ratio = (rows / scale.clamp(min=1e-38)[:, None]).view(-1)[:n]
        code = torch.floor(top * ratio.pow(1 / power)).clamp(max=top - 1)
        below, above = (code / top) ** power, ((code + 1) / top) ** power
        code += ratio - below > chance * (above - below)
        state[name].copy_(torch.copysign(code, m) if name == "m" else torch.maximum(code, (v > 0).float()))


def _chances(n: int, step: int) -> torch.Tensor:
    """The kernel's `_chance` of indices 0 to n - 1."""
    low = 0xFFFFFFFF
    h = (torch.arange(n) * 0x9E3779B1 & low) ^ (step * 0x85EBCA6B & low)
    h = (h ^ (h >> 16)) * 0x7FEB352D & low
    h = (h ^ (h >> 15)) * 0x846CA68B & low
    return ((h ^ (h >> 16)) >> 8).float() / 16777216
