"""Did it learn? The verdict from held-out losses alone.

The held-out loss is the mean negative log likelihood, in nats per trained token, over the same examples each time: before the
first step, at each check, and at the end. Three words are possible:

* learned: the adapter that is kept predicts the held-out answers better than the base, by more than the check can waver.
* memorised: the last adapter predicts them clearly worse than an earlier one did (or than the base), while it went on
  learning the training examples. The best checkpoint may still be good; the text says from where on it went wrong.
* no_change: anything smaller than that.

How much a check wavers. Base and adapter are compared on the same tokens, so what counts is the spread of the *difference* per
example; given the differences' standard error, twice that is the threshold (a change seen by chance about once in twenty).
Without it 0.02 nats is used: 2 % in perplexity, about what one more seed moves a LoRA run on a few hundred held-out tokens. A
change below 1 % of the loss is never called one, however sure it is: nobody would notice it in the answers. Memorising must
lose at least a tenth of what had been won, or the threshold if that is more, so that the usual wobble at the end of a good run
is not called so.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

LEAST_NATS = 0.02
LEAST_SHARE = 0.01
LOST_SHARE = 0.1
_UNSEEN = "on examples it was not trained on"


def judge(
    history: Sequence[tuple[float, float]],
    same_answers: Sequence[bool] = (),
    unit: str = "step",
    standard_error: float | None = None,
) -> tuple[str, str]:
    """("learned" | "no_change" | "memorised", a sentence).

    history: (step or epoch, held-out loss) of every check in order; the first is the base's, before training.
    same_answers: for each before/after question whether base and adapter said the same; they decide when nothing was held out.
    standard_error: of the mean difference between the last check and the base over the held-out examples, where it is known.
    """
    if len(history) < 2:
        if all(same_answers):
            return "no_change", "No measurable change: the adapter answers like the base. Train longer or on more examples."
        return "learned", "The answers changed. Nothing was held out, so more than that was not measured."
    losses = [loss for _, loss in history]
    if not all(map(math.isfinite, losses)):
        return "no_change", "The loss is no longer a number: the training went wrong. Lower the learning rate."
    before, last = losses[0], losses[-1]
    best = min(range(len(losses)), key=losses.__getitem__)
    threshold = least_change(before, standard_error)
    won = before - losses[best]
    if last - losses[best] > max(threshold, LOST_SHARE * won):
        return "memorised", _memorised(history, best, unit, won > threshold)
    if won > threshold:
        return "learned", f"Learned: {_UNSEEN} the loss went from {before:.3f} to {losses[best]:.3f}."
    return "no_change", (
        f"No measurable change: {_UNSEEN} the loss went from {before:.3f} to {last:.3f}. "
        "Train longer, raise the learning rate, or give more examples."
    )


def least_change(loss: float, standard_error: float | None = None) -> float:
    """The smallest difference from `loss`, in nats, that is called a change."""
    return max(LEAST_SHARE * loss, LEAST_NATS if standard_error is None else 2 * standard_error)


def improved(best: float, loss: float) -> bool:
    """Whether a check counts as better for early stopping: by a tenth of what the verdict calls a change."""
    return loss < best - 0.1 * least_change(best)


def _memorised(history: Sequence[tuple[float, float]], best: int, unit: str, was_good: bool) -> str:
    before, last = history[0][1], history[-1][1]
    if not best:
        return (
            f"Memorised: {_UNSEEN} it got worse from the start (from {before:.3f} to {last:.3f}). "
            "Lower the learning rate or give more varied examples."
        )
    advice = f"The checkpoint of {unit} {history[best][0]:g} is the best." if was_good else "Give more varied examples."
    return (
        f"Memorised: {_UNSEEN} it got worse from {unit} {history[best + 1][0]:g} on "
        f"(from {history[best][1]:.3f} to {last:.3f}; the base had {before:.3f}). {advice}"
    )
