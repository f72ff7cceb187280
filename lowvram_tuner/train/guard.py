"""Watches a run for what no exception reports: steps that become slow because other programs fill the card.

Windows' display drivers do not refuse memory when the card is full, they move some of it into system memory, and every step
then waits for the bus. The allocator's cap keeps this run from causing that; `Guard` notices when somebody else does. It
compares seconds per token with the run's own first steps, and what others hold on the card with what they held then.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

from lowvram_tuner.hardware.card import Card, read_card
from lowvram_tuner.memory.budget import DESKTOP_RESERVE, GB

LOOK_SECONDS = 5.0  # between two readings of the card
BASELINE = 8  # steps that say how fast this run is; the two before them compile and capture
RECENT = 5
SLOW = 1.5  # times as long as the baseline: something is wrong
FULL_BYTES = 150 * 10**6  # a card with less than this free is full
TAKEN_BYTES = 200 * 10**6  # others hold this much more than at the start: a program was opened


@dataclass(frozen=True)
class Trouble:
    """What the guard saw, as a sentence, and the bytes this process may have left; None: nothing to gain from less."""

    text: str
    limit_bytes: int | None


class Guard:
    """Looks at the card every few seconds. Without a card it sees nothing. `read` gives the card as it is now."""

    def __init__(self, read: Callable[[], Card | None] = read_card, clock: Callable[[], float] = time.monotonic) -> None:
        self._read, self._clock = read, clock
        self.begin()

    def begin(self) -> None:
        """Forgets what was normal: at the start, and after a new plan."""
        self._pace: list[float] = []
        self._recent: deque[float] = deque(maxlen=RECENT)
        self._steps, self._looked, self._others, self._told = 0, 0.0, None, False

    def look(self, seconds: float, tokens: int, own_bytes: int) -> Trouble | None:
        """To be called after every step with its seconds, its tokens and this process' VRAM; mostly answers None."""
        self._steps += 1
        if self._steps <= 2 or tokens == 0:
            return None
        self._recent.append(seconds / tokens)
        if len(self._pace) < BASELINE:
            self._pace.append(seconds / tokens)
        if self._clock() - self._looked < LOOK_SECONDS:
            return None
        self._looked = self._clock()
        card = self._read()
        if card is None:
            return None
        others = max(0, card.used_bytes - own_bytes)
        if self._others is None:
            self._others = others
        return self._judge(card, others)

    def _judge(self, card: Card, others: int) -> Trouble | None:
        if len(self._pace) < BASELINE or len(self._recent) < RECENT:
            return None
        slower = median(self._recent) / median(self._pace)
        if slower < SLOW:
            return None
        taken = others - self._others
        if taken > TAKEN_BYTES and card.free_bytes < FULL_BYTES:
            limit = card.total_bytes - others - DESKTOP_RESERVE
            text = f"Other programs took {taken / GB:.1f} GB of the card and steps take {slower:.1f} times as long."
            return Trouble(text, limit)
        if self._told:
            return None
        self._told = True
        why = "another program is busy on the card, or it is hot or saves power"
        return Trouble(f"Steps take {slower:.1f} times as long as at the start: {why}.", None)
