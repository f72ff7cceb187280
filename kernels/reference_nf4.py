"""NF4 in plain torch: quantization, and the dequantization that every kernel is compared with.

    w[i] = quant_map[code[i]] * absmax[i // 64],   absmax[k] = nested_quant_map[c[k]] * nested_absmax[k // 256] + offset

The levels are those of QLoRA (https://arxiv.org/abs/2305.14314, appendix E): the means of 16 equally probable parts of a
standard normal, scaled to [-1, 1] with an exact zero. The 8-bit code of the absmaxes is the dynamic map of
https://arxiv.org/abs/1511.04561. Both are what bitsandbytes writes, so that a result here equals a result there.
"""

from __future__ import annotations

from functools import lru_cache

import torch

BLOCK = 64  # values that share one absmax
NESTED = 256  # absmaxes that share one nested absmax
CHUNK = 1 << 22  # values quantized at a time, so that fp32 copies of a large weight never exist

LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


@lru_cache(maxsize=1)
def dynamic_map() -> torch.Tensor:
    """The 256 signed levels of the dynamic 8-bit type, ascending, fp32: for each of 7 decades 2^e means of equal parts of
    [0.1, 1] with either sign, 0 and 1."""
    values = [0.0, 1.0]
    for e in range(7):
        edges = torch.linspace(0.1, 1, 2**e + 1, dtype=torch.float32)
        means = (edges[:-1] + edges[1:]) / 2.0
        for sign in (1, -1):
            values += (sign * 10 ** (e - 6) * means).tolist()
    return torch.tensor(sorted(values), dtype=torch.float32)


def quantize(weight: torch.Tensor, double_quant: bool = True, codes: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    """Packs a weight (any shape, float dtype) as `quant.nf4.NF4` describes, chunk by chunk, on its device or into `codes` on theirs."""
    flat = weight.reshape(-1)
    if codes is None:
        codes = torch.empty(-(-flat.numel() // 2), dtype=torch.uint8, device=weight.device)
    device = codes.device
    absmax = torch.empty(-(-flat.numel() // BLOCK), device=device)
    for start in range(0, flat.numel(), CHUNK):
        chunk_codes, chunk_absmax = _blocks(flat[start : start + CHUNK].to(device))
        codes[start // 2 : start // 2 + len(chunk_codes)] = chunk_codes
        absmax[start // BLOCK : start // BLOCK + len(chunk_absmax)] = chunk_absmax
    packed = {"weight": codes, "quant_map": torch.tensor(LEVELS, device=device)}
    if not double_quant:
        return packed | {"absmax": absmax}
    offset = absmax.mean()
    levels = dynamic_map().to(device)
    nested, scales = _nearest(absmax - offset, levels)
    return packed | {
        "absmax": nested,
        "nested_absmax": scales,
        "nested_quant_map": levels,
        "nested_offset": offset.reshape(1),
    }


def absmaxes(packed: dict[str, torch.Tensor], first: int, count: int) -> torch.Tensor:
    """fp32 absmax of blocks [first, first + count)."""
    absmax = packed["absmax"][first : first + count]
    if "nested_absmax" not in packed:
        return absmax
    group = torch.arange(first, first + count, device=absmax.device) // NESTED
    return packed["nested_quant_map"][absmax.int()] * packed["nested_absmax"][group] + packed["nested_offset"]


def dequantize(packed: dict[str, torch.Tensor], out: torch.Tensor, start: int = 0) -> torch.Tensor:
    """out.flatten()[i] = w[start + i]. `start` is a multiple of BLOCK; out: contiguous, any float dtype."""
    assert start % BLOCK == 0, start
    flat, levels = out.view(-1), packed["quant_map"]
    # byte -> its two levels, as one 64-bit word: a single-word lookup is 8 times faster on a CPU than one of pairs
    pairs = levels[torch.cartesian_prod(torch.arange(16), torch.arange(16)).to(levels.device)].view(torch.int64).view(-1)
    for begin in range(0, flat.numel(), CHUNK):
        size = min(CHUNK, flat.numel() - begin)
        first, blocks = (start + begin) // BLOCK, -(-size // BLOCK)
        codes = packed["weight"][(start + begin) // 2 : (start + begin + size + 1) // 2]
        values = torch.index_select(pairs, 0, codes.int()).view(torch.float32)
        scale = absmaxes(packed, first, blocks)
        if size % BLOCK:
            flat[begin : begin + size] = (values[:size] * scale.repeat_interleave(BLOCK)[:size]).to(out.dtype)
        else:
            torch.mul(values.view(-1, BLOCK), scale[:, None], out=values.view(-1, BLOCK))
            flat[begin : begin + size] = values
    return out


def _blocks(flat: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (two a byte, first in the high nibble) and absmax of one chunk."""
    values = torch.nn.functional.pad(flat.float(), (0, -flat.numel() % BLOCK)).view(-1, BLOCK)
    absmax = values.abs().amax(1)
    scaled = values.mul_((1.0 / absmax.clamp(min=1e-38))[:, None]).clamp_(-1, 1)
    levels = torch.tensor(LEVELS, device=flat.device)
    codes = torch.bucketize(scaled.view(-1)[: flat.numel()], (levels[:-1] + levels[1:]) / 2, out_int32=True).to(torch.uint8)
    return (codes[0::2] << 4) | codes[1::2], absmax


def _nearest(values: torch.Tensor, levels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """8-bit codes of the nearest level, and the absmax of each NESTED values that scales them.

    A value is first rounded to one of 65,536 equal steps of [-1, 1], as bitsandbytes' CPU backend does with its lookup
    table: without it 1 code in 600 differs, and the result would not be the same file.
    """
    rows = torch.nn.functional.pad(values, (0, -values.numel() % NESTED)).view(-1, NESTED)
    scale = rows.abs().amax(1)
    scaled = (rows * (1.0 / scale.clamp(min=1e-38))[:, None]).view(-1)[: values.numel()]
    scaled = torch.floor((scaled + 1) * 32767.5 + 0.5) / 32767.5 - 1
    return torch.bucketize(scaled, (levels[:-1] + levels[1:]) / 2).to(torch.uint8), scale
