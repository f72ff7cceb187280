"""The keys and values of a conversation, in memory that grows in steps: a small card is not filled with an empty cache.

A captured step needs fixed addresses, so the cache is allocated for a bucket of tokens (512, 1024, 2048, ..). When it is
full, the layers move to the next bucket one after the other, so that two caches never stand side by side.
"""

from __future__ import annotations

import torch

SMALLEST = 512  # tokens
ROOM = 128  # tokens of an answer that are provided for at its start


def bucket(tokens: int) -> int:
    """The capacity that holds `tokens`: the next power of two from SMALLEST on."""
    return max(SMALLEST, 1 << max(tokens - 1, 0).bit_length())


def cache_bytes(tokens: int, layers: int, kv_heads: int, head_dim: int, item: int = 2) -> int:
    """Bytes of the cache that holds `tokens`: bucket x layers x 2 x kv_heads x head_dim values of `item` bytes."""
    return bucket(tokens) * layers * 2 * kv_heads * head_dim * item


class Cache:
    """`layers`: one [capacity, 2, kv_heads, head_dim] a layer, a token's key and value side by side.

    limit: the most tokens that the model reads; a bucket does not go beyond it.
    """

    def __init__(self, layers: int, kv_heads: int, head_dim: int, limit: int, dtype: torch.dtype, device: torch.device) -> None:
        self.capacity, self.limit = 0, limit
        self.layers = [torch.empty(0, 2, kv_heads, head_dim, dtype=dtype, device=device) for _ in range(layers)]

    def hold(self, tokens: int) -> bool:
        """Makes room for `tokens` and keeps what is there. Returns True when the cache has moved."""
        if tokens <= self.capacity:
            return False
        capacity = max(tokens, min(bucket(tokens), self.limit))
        for index, old in enumerate(self.layers):
            new = old.new_empty(capacity, *old.shape[1:])
            new[: self.capacity] = old[: self.capacity]  # a move that ran out of memory left some layers larger
            self.layers[index] = new
        self.capacity = capacity
        return True

    @property
    def nbytes(self) -> int:
        """Bytes allocated now."""
        return sum(layer.nbytes for layer in self.layers)
