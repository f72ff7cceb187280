"""Hadamard matrices of the orders that QuIP# rotations need: H H^T = K I with entries +1 and -1.

Orders of the form p + 1 and 2 (p + 1) come from Paley's two constructions. Orders 52, 116, 156 and 172 are Williamson
matrices, a 4x4 array of circulant blocks; their first rows below are mathematical facts. `hadamard_order` needs no torch.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# The orders of QuIP#'s own table, in the order in which it tries them. No model in use needs 124.
_TABLE = (172, 156, 140, 124, 116, 108, 60, 52, 36, 28, 20, 12)
_PALEY_TWO = (28, 36)  # of the table; its other Paley matrices are of the first kind
_LARGEST = 512

# First rows of the circulant blocks A, B, C, D.
_WILLIAMSON = {
    52: ("+-+--++++--+-", "+---++++++---", "++-+--++--+-+", "+----+--+----"),
    116: (
        "++--+--+-+++-++++-+++-+--+--+",
        "++++-++-+---++++++---+-++-+++",
        "+-+---++--+-++++++-+--++---+-",
        "+++---++--+-+----+-+--++---++",
    ),
    156: (
        "+++--+-+-----+--++----++--+-----+-+--++",
        "++++---+--++----+-+--+-+----++--+---+++",
        "+++--++-+---+-+--+----+--+-+---+-++--++",
        "+---++-+-+-----+++-++-+++-----+-+-++---",
    ),
    172: (
        "+---++--++++-+-+++-++--++-+++-+-++++--++---",
        "++-++++++----+-+--++-++-++--+-+----++++++-+",
        "+++-+-++--+-+-++++-+----+-++++-+-+--++-+-++",
        "++---++++-+--+--++--------++--+--+-++++---+",
    ),
}
_WILLIAMSON_ARRAY = ("+A+B+C+D", "-B+A-D+C", "-C+D+A-B", "-D-C+B+A")


def hadamard_order(n: int) -> int:
    """The order K of the dense factor in H_n = H_K kron Sylvester_{n/K}: QuIP#'s table first, 1 for a power of two.

    Sizes outside that table (5632 of TinyLlama, 18944 of Qwen2.5-7B) take the smallest Paley matrix that fits; QuIP#
    itself has none for them. Raises ValueError for a size without a known matrix.
    """
    for order in _TABLE:
        if n % order == 0 and _power_of_two(n // order):
            if order == 124:
                raise ValueError(f"a dimension of {n} needs a Hadamard matrix of order 124, which is not included.")
            return order
    if _power_of_two(n):
        return 1
    order = 4 * (n // (n & -n))  # 4 times the odd part
    while order <= min(n, _LARGEST) and n % order == 0:
        if _paley_kind(order):
            return order
        order *= 2
    raise ValueError(f"a dimension of {n} has no known Hadamard matrix; quip needs another size or another method.")


@functools.lru_cache(maxsize=32)
def hadamard_matrix(order: int) -> torch.Tensor:
    """H_K as QuIP# checkpoints use it, fp32 [K, K] of +1 and -1, on the CPU. Do not write into it."""
    import torch

    if order == 1:
        return torch.ones(1, 1)
    if order in _WILLIAMSON:
        return _williamson(_WILLIAMSON[order])
    kind = _paley_kind(order)
    if kind == 0:
        raise ValueError(f"no Hadamard matrix of order {order} is included.")
    return _paley_one(order - 1) if kind == 1 else _paley_two(order // 2 - 1)


@functools.lru_cache(maxsize=32)
def sylvester_matrix(size: int) -> torch.Tensor:
    """S[i, j] = (-1)^popcount(i & j), fp32 [size, size] for a power of two, on the CPU. Do not write into it."""
    import torch

    matrix = torch.ones(1, 1)
    while matrix.shape[0] < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)], 0)
    return matrix


def _power_of_two(n: int) -> bool:
    return n > 0 and n & (n - 1) == 0


def _prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, int(n**0.5) + 1))


def _paley_kind(order: int) -> int:
    """1 or 2 for the Paley construction that gives this order, 0 for neither."""
    if order not in _PALEY_TWO and order % 4 == 0 and _prime(order - 1):
        return 1
    half = order // 2 - 1
    return 2 if order % 4 == 0 and half % 4 == 1 and _prime(half) else 0


def _legendre(p: int) -> torch.Tensor:
    """Q[i, j] = chi(i - j) of the prime p: 1 for a square, -1 for none, 0 on the diagonal. [p, p]"""
    import torch

    chi = torch.full((p,), -1.0)
    chi[[i * i % p for i in range(1, p)]] = 1.0
    chi[0] = 0.0
    i = torch.arange(p)
    return chi[(i[:, None] - i[None, :]) % p]


def _paley_one(p: int) -> torch.Tensor:
    import torch

    matrix = torch.ones(p + 1, p + 1)
    matrix[0, 1:] = -1.0
    matrix[1:, 1:] = _legendre(p) + torch.eye(p)
    return matrix


def _paley_two(p: int) -> torch.Tensor:
    import torch

    core = torch.ones(p + 1, p + 1)
    core[0, 0] = 0.0
    core[1:, 1:] = _legendre(p)
    return torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), core) + torch.kron(
        torch.tensor([[1.0, -1.0], [-1.0, -1.0]]), torch.eye(p + 1)
    )


def _williamson(rows: tuple[str, ...]) -> torch.Tensor:
    import torch

    blocks = {name: _circulant(row) for name, row in zip("ABCD", rows)}
    return torch.cat(
        [
            torch.cat([blocks[line[i + 1]] * (1.0 if line[i] == "+" else -1.0) for i in range(0, 8, 2)], 1)
            for line in _WILLIAMSON_ARRAY
        ]
    )


def _circulant(row: str) -> torch.Tensor:
    """Row k is the first row rolled right by k."""
    import torch

    first = torch.tensor([1.0 if c == "+" else -1.0 for c in row])
    return torch.stack([first.roll(k) for k in range(len(row))])
