"""The nearest E8P code of eight values, exactly, without comparing with all 65,536.

A point is a half-integer vector with signs, shifted by +1/4 or -1/4. For one shift let y be the values less the shift.
Its absolute vectors are 1/2 everywhere but for t values of 3/2 (t = 0..4), or one 5/2, or one 5/2 and one 3/2; the larger
values belong where |y| is largest, so sorting |y| leaves 7 candidates, of which

    |y - v|^2 = |y|^2 - (2 |y|.|v| - |v|^2)          is smallest where the bracket is largest.

The signs of v are those of y if they have the parity that the lattice asks for; else the cheapest one is flipped, which
costs 4 |y_i| |v_i|, least where |y| is smallest. The 29 remaining vectors, of norm 12, are compared one by one, and only
for values that reach so far out.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from kernels.e8p import GROUP, codebook

CHUNK = 1 << 15  # vectors at a time on the CPU, where they then stay in its cache
CHUNK_CUDA = 1 << 20

# The seven short forms: what stands at each rank of |y|, 0 for 1/2, 1 for 3/2, 2 for 5/2.
_FORMS = [[1] * t + [0] * (GROUP - t) for t in range(5)] + [[2] + [0] * 7, [2, 1] + [0] * 6]


@functools.lru_cache(maxsize=8)
def _tables(device: torch.device) -> dict[str, torch.Tensor]:
    vectors = codebook()[:256] - 0.25  # sign byte 0: the absolute vectors, one sign of theirs negative where they are odd
    negative = (vectors < 0).any(1)
    size = vectors.abs()
    digits = (size - 0.5).round().long()
    power = 3 ** torch.arange(GROUP)
    index = torch.zeros(3**GROUP, dtype=torch.long)
    index[(digits * power).sum(1)] = torch.arange(256)
    forms = torch.tensor(_FORMS)
    tables = {
        "size": size, "negative": negative, "power": power, "index": index, "forms": forms,
        "form_norm": (forms + 0.5).square().sum(1), "form_odd": (forms == 1).sum(1) % 2 == 1,
        "long": torch.nonzero(size.square().sum(1) > 11)[:, 0], "bit": torch.arange(GROUP),
    }  # fmt: skip
    return {name: t.to(device) for name, t in tables.items()}


def nearest(x: torch.Tensor) -> torch.Tensor:
    """The code of the E8P point nearest to each row. x: fp32 [n, 8]. Returns int16 [n]; of equals any."""
    return _in_chunks(x, _nearest)


def nearest_of_each_shift(x: torch.Tensor) -> torch.Tensor:
    """The nearest point shifted by +1/4 and the nearest shifted by -1/4, int16 [n, 2]: the two that a search may choose from."""
    return _in_chunks(x, _nearest_of_each_shift)


def _in_chunks(x: torch.Tensor, function: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    step = CHUNK_CUDA if x.is_cuda else CHUNK
    if x.shape[0] <= step:
        return function(x)
    return torch.cat([function(x[start : start + step]) for start in range(0, x.shape[0], step)])


def points(codes: torch.Tensor) -> torch.Tensor:
    """The points of codes of any shape, fp32 [..., 8]."""
    return _points_on(codes.device).index_select(0, (codes.to(torch.int32) & 0xFFFF).flatten()).view(*codes.shape, GROUP)


@functools.lru_cache(maxsize=8)
def _points_on(device: torch.device) -> torch.Tensor:
    return codebook().to(device)


class _Search:
    """The best absolute vector for each row of y [n, 8]: `distance` [n] to its point, and what `codes` makes of it."""

    def __init__(self, y: torch.Tensor) -> None:
        self.t = _tables(y.device)
        self.y, self.size = y, y.abs()
        self.odd = (y < 0).sum(1) % 2 == 1
        ordered, self.order = self.size.sort(1, descending=True)
        score, self.form = _best_form(ordered, self.odd, self.t)
        score, self.far = _best_long(self.size, ordered, self.odd, score, self.t)
        self.distance = y.square().sum(1) - score

    def codes(self, row: torch.Tensor | slice, shifted: torch.Tensor) -> torch.Tensor:
        """int16 codes of some rows; shifted: 1 for those whose y is x + 1/4."""
        t, order, far, odd = self.t, self.order[row], self.far[row], self.odd[row]
        absolute = t["index"][(t["power"][order] * t["forms"][self.form[row]]).sum(1)]
        absolute = torch.where(far >= 0, far, absolute)
        flip = torch.where(far >= 0, (self.size[row] * t["size"][absolute]).argmin(1), order[:, -1])
        signs = (self.y[row] < 0).long()
        signs[:, -1] ^= t["negative"][absolute]  # the grid holds that sign already
        signs.scatter_add_(1, flip[:, None], (odd ^ t["negative"][absolute]).long()[:, None])
        signs[:, 0] += shifted
        return (absolute | ((signs & 1) << t["bit"]).sum(1) << 8).to(torch.int16)


def _nearest(x: torch.Tensor) -> torch.Tensor:
    n = x.shape[0]
    search = _Search(torch.cat([x - 0.25, x + 0.25]))
    shifted = search.distance[n:] < search.distance[:n]
    return search.codes(torch.arange(n, device=x.device) + n * shifted, shifted)


def _nearest_of_each_shift(x: torch.Tensor) -> torch.Tensor:
    n = x.shape[0]
    shifted = torch.arange(2 * n, device=x.device) >= n
    return _Search(torch.cat([x - 0.25, x + 0.25])).codes(slice(None), shifted).view(2, n).t()


def _best_form(ordered: torch.Tensor, odd: torch.Tensor, t: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """(2 |y|.|v| - |v|^2 less the cost of a flip, which) of the best short form, from |y| in descending order."""
    score = ordered @ (2 * t["forms"] + 1).to(ordered.dtype).t() - t["form_norm"]
    score -= torch.where(odd[:, None] != t["form_odd"], 2 * ordered[:, -1:], 0.0)
    return score.max(1)


def _best_long(size, ordered, odd, score, t) -> tuple[torch.Tensor, torch.Tensor]:
    """(score, absolute vector or -1) after the vectors of norm 12, of which five 3/2 would at best reach `bound`."""
    far = torch.full(score.shape, -1, dtype=torch.long, device=score.device)
    bound = ordered.sum(1) + 2 * ordered[:, :5].sum(1) - 12 - torch.where(odd, 0.0, 2 * ordered[:, -1])
    rows = torch.nonzero(bound > score)[:, 0]
    if len(rows):
        long = t["size"][t["long"]]
        near = size[rows]
        cost = near[:, :1] * long[:, 0]
        for i in range(1, GROUP):
            cost = torch.minimum(cost, near[:, i : i + 1] * long[:, i])
        reached = 2 * near @ long.t() - 12 - torch.where(odd[rows, None], 0.0, 4 * cost)
        best, which = reached.max(1)
        better = best > score[rows]
        score = score.index_put((rows[better],), best[better])
        far[rows[better]] = t["long"][which[better]]
    return score, far
