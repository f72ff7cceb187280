"""Did it learn? What held-out losses and answers say, without flattery."""

from __future__ import annotations

from collections.abc import Sequence

LEAST_DROP = 0.02  # relative drop of the held-out loss below which nothing can be claimed
RISE = 0.05  # relative rise above the best loss from which the last epochs only memorised


def judge(history: Sequence[tuple[int, float]], same_answers: Sequence[bool]) -> tuple[str, str]:
    """('learned' | 'no_change' | 'memorised', a sentence). history: (step, held-out loss), the first one before training.

    Without held-out examples the answers decide: all the same as the base's is no change.
    """
    if len(history) < 2:
        if all(same_answers):
            return "no_change", "No measurable change: the adapter answers like the base. Train longer or on more examples."
        return "learned", "The answers changed; without held-out examples nothing more can be measured."
    before, last = history[0][1], history[-1][1]
    best_step, best = min(history, key=lambda h: h[1])
    if best > before * (1 - LEAST_DROP):
        return "no_change", f"No measurable change: the held-out loss went from {before:.2f} to {last:.2f}. Train longer or on more data."
    if last > best * (1 + RISE) and best_step < history[-1][0]:
        return "memorised", f"Memorised: held-out loss was best at step {best_step} ({best:.2f}) and got worse to {last:.2f}; the adapter kept is the best one."
    return "learned", f"Learned: the held-out loss fell from {before:.2f} to {last:.2f}."
