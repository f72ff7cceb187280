"""Weights of grouped codes for the tests of GPTQ's and HQQ's kernels, with an oracle that shares no code with them."""

from __future__ import annotations

from typing import NamedTuple

import torch

from kernels import packing
from kernels.reference_grouped import FLAT, INDEX, MODULO, ROW, Grouping


class Case(NamedTuple):
    operands: tuple  # as `dequantize` and `matmul` take them: qweight, scales, zeros, g_idx, grouping, bits
    weight: torch.Tensor  # fp32 [out, in]: the definition, value by value


def make(bits: int, rows: int, cols: int, mode: int, size: int, zeros: str, device: str = "cpu", seed: int = 0) -> Case:
    """zeros: 'none' (symmetric), 'int' (GPTQ) or 'float' (HQQ). The first row holds the largest code everywhere."""
    g = torch.Generator().manual_seed(seed + 31 * bits + cols)
    q = torch.randint(0, 2**bits, (rows, cols), generator=g)
    q[0] = 2**bits - 1
    per_row = -(-cols // size)
    grouping, shape = {
        ROW: (Grouping(ROW, size, per_row), (rows, per_row)),
        INDEX: (Grouping(INDEX, size, per_row), (rows, per_row)),
        FLAT: (Grouping(FLAT, size, per_row), (-(-rows * cols // size),)),
        MODULO: (Grouping(MODULO, size, 2 * cols), (2 * cols,)),
    }[mode]
    scales = torch.rand(shape, generator=g).mul_(0.02).half()
    z = {
        "none": None,
        "int": torch.randint(0, 2**bits, shape, generator=g).to(torch.uint8),
        "float": torch.randn(shape, generator=g).mul_(3).half(),
    }[zeros]
    g_idx = torch.randint(0, per_row, (cols,), generator=g, dtype=torch.int32) if mode == INDEX else None
    group = torch.empty(rows, cols, dtype=torch.long)
    for o in range(rows):
        for i in range(cols) if rows * cols < 20000 else ():
            flat = o * cols + i
            group[o, i] = {ROW: o * per_row + i // size, INDEX: o * per_row + (int(g_idx[i]) if g_idx is not None else 0),
                           FLAT: flat // size, MODULO: flat % (2 * cols)}[mode]  # fmt: skip
    if rows * cols >= 20000:
        assert mode == ROW
        group = torch.arange(rows).unsqueeze(1) * per_row + torch.arange(cols) // size
    zero = float(2 ** (bits - 1)) if z is None else z.view(-1)[group].float()
    weight = (q.float() - zero) * scales.view(-1)[group].float()
    on = [t if t is None else t.to(device) for t in (packing.pack(q, bits), scales, z, g_idx)]
    return Case((*on, grouping, bits), weight.to(device))
