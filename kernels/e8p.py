"""The E8P codebook of QuIP# (https://arxiv.org/abs/2402.04396): eight weights in a 16-bit code. Construction, packing and
the plain-torch decoding that the kernels are compared with.

    w[i] = (-1)^sign_i * |grid[a]|_i + (1/4 or -1/4)          a: 8 bits, signs: 7 bits, shift: 1 bit

256 absolute vectors of half-integers in the lattice D8 + 1/2, an even number of sign changes, and a shift of all eight by
a quarter give 2^16 points of E8 + 1/4. Codes here are int16: byte a below, sign byte above, where bit i of the sign byte
belongs to weight i, and a sign byte of odd parity means "shift by -1/4, and bit 0 flipped".

The residual forms add a second, finer layer: another E8P code (4 bits a weight) or an 8-bit index into 256 points of E8
(3 bits a weight), both divided by a scale.
"""

from __future__ import annotations

import functools
import itertools

import numpy as np
import torch

GROUP = 8  # weights in a code
CHUNK = 1 << 17  # codes decoded at a time by the reference

# Position in QuIP#'s bytes and nibbles of each of the eight weights.
_SLOT = (0, 4, 1, 5, 2, 6, 3, 7)
# Where a vector of norm 12 is 1/2 instead of 3/2.
_NORM12 = (
    "123 023 013 012 367 357 347 356 346 345 267 257 247 256 246 245 167 157 147 156 146 045 067 057 047 056 046 014 237"
)


@functools.lru_cache(maxsize=1)
def published_grid() -> np.ndarray:
    """The 256 absolute vectors as QuIP# packs them: uint32, nibble k holds 2 v + 8 of slot k, the lowest first."""
    short = [v for v in itertools.product((1, 3, 5), repeat=GROUP) if sum(x * x for x in v) <= 40]
    long = [tuple(1 if str(i) in triple else 3 for i in range(GROUP)) for triple in _NORM12.split()]
    twice = np.array(short + long, dtype=np.int64)[:, [0, 2, 4, 6, 1, 3, 5, 7]]
    twice[:, 7] *= np.where(twice.sum(1) // 2 % 2, -1, 1)
    return ((twice + 8) << (4 * np.arange(GROUP))).sum(1).astype(np.uint32)


@functools.lru_cache(maxsize=1)
def abs_grid() -> torch.Tensor:
    """The same vectors with nibble i holding 2 v + 8 of weight i: int32 [256] (its bits; the sign means nothing)."""
    nibbles = (published_grid()[:, None] >> (4 * np.array(_SLOT, dtype=np.uint32))) & 15
    words = (nibbles.astype(np.uint64) << (4 * np.arange(GROUP, dtype=np.uint64))).sum(1)
    return torch.from_numpy(words.astype(np.uint32).view(np.int32))


@functools.lru_cache(maxsize=1)
def residual_grid() -> torch.Tensor:
    """The 256 points of E8 for the 3-bit form's second layer, packed like `abs_grid`, int32 [256].

    The 241 points of squared norm 0 and 2, integers before half-integers and each in ascending order, then +2 and -2 along
    single axes (-2 along the last is left out).
    """
    near = [v for v in itertools.product((-2, 0, 2), repeat=GROUP) if sum(map(abs, v)) in (0, 4)]
    halves = [v for v in itertools.product((-1, 1), repeat=GROUP) if sum(v) % 4 == 0]
    axes = [tuple(sign if i == k else 0 for i in range(GROUP)) for sign in (4, -4) for k in range(GROUP)][:-1]
    twice = np.array(near + halves + axes, dtype=np.int64)
    return torch.from_numpy(((twice + 8) << (4 * np.arange(GROUP))).sum(1).astype(np.uint32).view(np.int32))


@functools.lru_cache(maxsize=1)
def codebook() -> torch.Tensor:
    """Every point by its 16-bit code, fp32 [65536, 8]: multiples of 1/4, at most 2.75 in size. Do not write into it."""
    code = torch.arange(1 << 16)
    signs = (code[:, None] >> 8 + torch.arange(GROUP)) & 1
    odd = signs.sum(1) & 1
    signs[:, 0] ^= odd
    return _vectors(abs_grid())[code & 255] * (1 - 2 * signs) + (0.25 - 0.5 * odd)[:, None]


@functools.lru_cache(maxsize=1)
def residual_codebook() -> torch.Tensor:
    """The points of `residual_grid` by index, fp32 [256, 8]. Do not write into it."""
    return _vectors(residual_grid())


def _vectors(grid: torch.Tensor) -> torch.Tensor:
    return (((grid[:, None] >> 4 * torch.arange(GROUP)) & 15) - 8) / 2


def dequantize(
    codes: torch.Tensor, out: torch.Tensor, residual: torch.Tensor | None = None, residual_scale: float = 1.0
) -> torch.Tensor:
    """out[r, 8 g + i] = codebook[codes[r, g]][i] + codebook'[residual[r, g]][i] / residual_scale. Returns out.

    codes: int16 [rows, groups]; residual: int16 (E8P) or uint8 (E8), same shape; out: [rows, 8 groups], any float dtype.
    Strided views are fine for all of them. Sums are made in fp32.
    """
    rows = max(1, CHUNK // codes.shape[1])
    for start in range(0, codes.shape[0], rows):
        part = slice(start, start + rows)
        values = _look_up(codebook(), codes[part])
        if residual is not None:
            table = codebook() if residual.dtype == torch.int16 else residual_codebook()
            values += _look_up(table, residual[part]) / residual_scale
        out[part] = values
    return out


def _look_up(table: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    index = codes.to(torch.int32) & 0xFFFF
    return table.to(codes.device).index_select(0, index.flatten()).view(codes.shape[0], -1)


def unpack(qidxs: torch.Tensor) -> torch.Tensor:
    """Codes int16 [out, in/8] from QuIP#'s int64 [out, in/32].

    There a word holds 2 rows of 16 columns: 4 absolute bytes below, and above them sign j of code k at bit 4 j + k. Words
    are ordered in tiles of 16 rows and 64 columns.
    """
    rows, words = qidxs.shape
    byte = qidxs.contiguous().view(torch.uint8).view(rows // 16, words // 2, 8, 4, 8)  # I J P Q byte
    absolute, signs = byte[..., :4], byte[..., 4:]
    natural = torch.zeros_like(absolute)
    for bit in range(GROUP):
        slot = _SLOT[bit]
        lane = torch.stack([(signs[..., slot // 2] >> 4 * (slot % 2) + k) & 1 for k in range(4)], -1)
        natural |= lane << bit
    codes = torch.stack([absolute, natural], -1).view(torch.int16)[..., 0]
    codes = codes.unflatten(-1, (2, 2)).permute(0, 2, 5, 1, 3, 4)  # I J P Q h r -> I P r J Q h
    return codes.reshape(rows, words * 4)


def pack(codes: torch.Tensor) -> torch.Tensor:
    """The inverse of `unpack`. codes: int16 [out, in/8], out a multiple of 16, in of 64."""
    rows, groups = codes.shape
    tiles = codes.view(rows // 16, 8, 2, groups // 8, 4, 2).permute(0, 3, 1, 4, 5, 2)  # I J P Q h r
    byte = tiles.contiguous().view(torch.uint8).view(*tiles.shape[:4], 4, 2)
    absolute, natural = byte[..., 0], byte[..., 1]
    signs = torch.zeros_like(absolute)
    for bit in range(GROUP):
        slot = _SLOT[bit]
        for k in range(4):
            signs[..., slot // 2] |= ((natural[..., k] >> bit) & 1) << 4 * (slot % 2) + k
    return torch.cat([absolute, signs], -1).view(torch.int64).reshape(rows, groups // 4)


def unpack_residual_indices(qidxs: torch.Tensor) -> torch.Tensor:
    """uint8 [out, in/8] from the last third of the 3-bit form, int64 [out, in/64]: eight consecutive indices a word."""
    return qidxs.contiguous().view(torch.uint8)
