"""Where a run stands, and what its held-out checks say so far: kept in every checkpoint, so that a resume goes on from it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from lowvram_tuner.data.verdict import improved, judge, standard_error


@dataclass
class Progress:
    """Counters of a run and its held-out checks.

    history: (step, loss) of each check, the base's first. best_loss: the lowest of a trained adapter. since_best: checks since one was
    noticeably better than all before it, which `good_loss` remembers. by_example: the summed loss of each held-out example for
    the base, at the best check and at the last one.
    """

    step: int = 0  # optimizer steps done
    epoch: int = 0
    position: int = 0  # micro-batches of the epoch done
    tokens: int = 0  # trained tokens seen
    best_loss: float | None = None
    good_loss: float | None = None
    since_best: int = 0
    history: list[tuple[int, float]] = field(default_factory=list)
    by_example: dict[str, list[float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.history = [tuple(h) for h in self.history]

    def checked(self, losses: np.ndarray, tokens: np.ndarray) -> bool:
        """Takes in a check: each held-out example's summed loss and trained tokens. True where the adapter is the best so far."""
        loss = float(losses.sum() / tokens.sum())
        self.history.append((self.step, loss))
        self.by_example["last"] = losses.tolist()
        if self.good_loss is None or improved(self.good_loss, loss):
            self.good_loss, self.since_best = loss, 0
        else:
            self.since_best += 1
        if not self.step:
            self.by_example["base"] = self.by_example["last"]
            return False
        best = math.isfinite(loss) and (self.best_loss is None or loss < self.best_loss)
        if best:
            self.best_loss, self.by_example["best"] = loss, self.by_example["last"]
        return best

    def verdict(self, tokens: np.ndarray, same_answers: Sequence[bool], steps_per_epoch: int) -> tuple[str, str]:
        """What `data.verdict.judge` makes of the checks. tokens: trained tokens of each held-out example."""
        base, last = self.by_example.get("base"), self.by_example.get("last")
        better = self.best_loss is not None and self.best_loss < self.history[0][1]
        best = self.by_example["best"] if better else base
        won, lost = standard_error(base, best, tokens), standard_error(best, last, tokens)
        return judge(self.history, same_answers, won, lost, steps_per_epoch)
