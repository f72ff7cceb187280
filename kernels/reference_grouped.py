"""Grouped affine codes in plain torch: the definition that GPTQ and HQQ share, the CPU's way, and the oracle of tests.

    W[o, i] = scales[g] * (q[o, i] - zeros[g])        g = the group of (o, i)

GPTQ's zeros are integers, HQQ's are fractions; a symmetric weight has the constant 2**(bits - 1) and stores none.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from kernels import packing

ROW, INDEX, FLAT, MODULO = range(4)
CHUNK = 1 << 18  # values decoded at a time on the CPU, so that no second whole weight exists


class Grouping(NamedTuple):
    """Which group a value belongs to.

    ROW    g = o * count + i // size          groups of `size` columns; the last of a row may be shorter
    INDEX  g = o * count + g_idx[i]           columns in any order
    FLAT   g = (o * in + i) // size           groups of `size` values that may run on into the next row
    MODULO g = (o * in + i) % count           groups down the rows
    """

    mode: int
    size: int
    count: int


def codes_of(qweight: torch.Tensor, bits: int, cols: int) -> torch.Tensor:
    """qweight: int32 [rows, words]. Returns uint8 [rows, cols]."""
    return packing.unpack(qweight, bits, cols)


def group_index(grouping: Grouping, row_start: int, rows: int, cols: int, g_idx: torch.Tensor | None, device) -> torch.Tensor:
    """g of each value of rows [row_start, row_start + rows), int64 [rows, cols]."""
    o = torch.arange(row_start, row_start + rows, device=device).unsqueeze(1)
    i = torch.arange(cols, device=device)
    if grouping.mode == ROW:
        return o * grouping.count + i // grouping.size
    if grouping.mode == INDEX:
        return o * grouping.count + g_idx.long()
    flat = o * cols + i
    return flat // grouping.size if grouping.mode == FLAT else flat % grouping.count


def dequantize(
    qweight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, g_idx: torch.Tensor | None,
    grouping: Grouping, bits: int, out: torch.Tensor, row_start: int = 0,
) -> torch.Tensor:  # fmt: skip
    """out[r, :] = W[row_start + r, :], computed in fp32, rounded once to out's dtype. out: [rows, in]. Returns out."""
    rows, cols = out.shape
    step = max(1, CHUNK // cols)
    for start in range(0, rows, step):
        piece = out[start : start + step]
        first = row_start + start
        codes = codes_of(qweight[first : first + len(piece)], bits, cols).to(torch.float32)
        g = _groups(grouping, first, len(piece), cols, g_idx, out.device)
        codes = codes.view(*g.shape[:-1], -1)  # [rows, cols], or [rows, groups, size] beside g of [rows, groups, 1]
        zero = 1 << bits - 1 if zeros is None else zeros.reshape(-1)[g].float()
        codes.sub_(zero).mul_(scales.reshape(-1)[g].float())
        piece.copy_(codes.view(piece.shape))
    return out


def _groups(grouping, first, rows, cols, g_idx, device):
    """`group_index`, or one index per whole group of a row, [rows, groups, 1], where groups divide the row."""
    if grouping.mode == ROW and grouping.size * grouping.count == cols:
        o = torch.arange(first, first + rows, device=device).view(-1, 1, 1)
        return o * grouping.count + torch.arange(grouping.count, device=device).unsqueeze(1)
    return group_index(grouping, first, rows, cols, g_idx, device)
