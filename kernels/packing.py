"""Codes of 2, 3, 4 and 8 bits in 32-bit words: a contiguous little-endian bit stream, and the other layouts on disk.

    bit k of the stream is bit k % 32 of word k // 32; code j takes bits j * bits up to (j + 1) * bits

32 codes fill exactly `bits` words at every width, so a row is padded to a multiple of 32 codes. For 2, 4 and 8 bits a
word holds whole codes; for 3 bits codes 10 and 21 of every 32 cross a word's end. 8 codes are always `bits` whole bytes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

BITS = (2, 3, 4, 8)
UNIT = 32  # codes that fill whole words at every width


def words(count: int, bits: int) -> int:
    """32-bit words that `count` codes take."""
    return -(-count // UNIT) * bits


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """codes: [..., n] integers in [0, 2**bits). Returns int32 [..., words(n, bits)], zero where n is no multiple of 32."""
    units = _units(codes)
    out = torch.zeros(*units.shape[:-1], bits, dtype=torch.int32, device=codes.device)
    for k in range(UNIT):
        word, shift = divmod(k * bits, 32)
        out[..., word] |= units[..., k] << shift
        if shift + bits > 32:
            out[..., word + 1] |= units[..., k] >> (32 - shift)
    return out.flatten(-2)


def unpack(packed: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """packed: int32 [..., words(count, bits)]. Returns the codes, uint8 [..., count]."""
    stream = packed.contiguous().view(torch.uint8)
    if bits == 8:
        return stream[..., :count]
    if bits == 3:
        runs = stream.unflatten(-1, (-1, 3)).to(torch.int32)
        runs = runs[..., 0] | runs[..., 1] << 8 | runs[..., 2] << 16
        codes = torch.stack([(runs >> 3 * j & 7).to(torch.uint8) for j in range(8)], -1)
    else:
        mask = (1 << bits) - 1
        codes = torch.stack([stream >> shift & mask for shift in range(0, 8, bits)], -1)
    return codes.flatten(-2)[..., :count]


def pack_planar(codes: torch.Tensor) -> torch.Tensor:
    """3-bit codes [..., n] in GPTQ's planar layout: of every 32 codes, two words of the low 2 bits, one of the high bits."""
    codes = _units(codes)
    low = pack(codes & 3, 2)
    high = torch.zeros(codes.shape[:-1], dtype=torch.int32, device=codes.device)
    for k in range(UNIT):
        high |= codes[..., k] >> 2 << k
    return torch.cat([low, high.unsqueeze(-1)], -1).flatten(-2)


def unpack_planar(packed: torch.Tensor, count: int) -> torch.Tensor:
    """The inverse of `pack_planar`: int32 [..., words(count, 3)] to uint8 [..., count]."""
    units = packed.unflatten(-1, (-1, 3))
    low = unpack(units[..., :2], 2, UNIT)
    high = torch.stack([(units[..., 2] >> k & 1).to(torch.uint8) for k in range(UNIT)], -1)
    return (low | high << 2).flatten(-2)[..., :count]


def pack_chunks(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """HQQ's layout: dim 0 is cut into equal contiguous chunks, one per field of a word, the first in the top field.

    codes: [n, m] uint8. Returns uint8 [n * bits / 8, m], or int32 [ceil(n / 10), m] for 3 bits (10 fields from bit 27 down).
    Raises ValueError when n is no multiple of the codes in a byte.
    """
    fields, dtype = _chunk_fields(bits)
    if bits == 3:
        codes = F.pad(codes, (0, 0, 0, -len(codes) % fields))
    if len(codes) % fields:
        raise ValueError(f"{len(codes)} rows cannot be packed at {bits} bits; use a multiple of {fields}.")
    chunks = codes.to(dtype).chunk(fields)
    out = torch.zeros_like(chunks[0])
    for k, chunk in enumerate(chunks):
        out |= chunk << bits * (fields - 1 - k)
    return out


def unpack_chunks(packed: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """The inverse of `pack_chunks`: the first `count` rows of codes, uint8 [count, m]."""
    fields, _ = _chunk_fields(bits)
    mask = (1 << bits) - 1
    return torch.cat([(packed >> bits * (fields - 1 - k) & mask).to(torch.uint8) for k in range(fields)])[:count]


def _chunk_fields(bits: int) -> tuple[int, torch.dtype]:
    return (10, torch.int32) if bits == 3 else (8 // bits, torch.uint8)


def _units(codes: torch.Tensor) -> torch.Tensor:
    """int32 [..., n / 32, 32], n rounded up with zeros."""
    return F.pad(codes.to(torch.int32), (0, -codes.shape[-1] % UNIT)).unflatten(-1, (-1, UNIT))
