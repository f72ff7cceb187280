"""Did it learn? The verdict from held-out losses alone.

The held-out loss is the mean negative log likelihood, in nats per trained token, over the same examples each time: before the
first step, at each check, and at the end. Three words are possible:

* learned: the adapter that is kept predicts the held-out answers better than the base, by more than the check can waver.
* memorised: the last adapter predicts them clearly worse than an earlier one did (or than the base), while it went on
  learning the training examples. The best checkpoint may still be good; the text says from where on it went wrong.
* no_change: anything smaller than that.

How much a check wavers. Two adapters are compared on the same tokens, so what counts is the spread of the *difference* by
example: twice its standard error is the threshold (a change seen by chance about once in twenty). With too few held-out examples to
know it, 0.02 nats is used: 2 % in perplexity, about what one more seed moves a LoRA run on a few hundred held-out tokens. A
change below 1 % of the loss is never called one, however sure it is: nobody would notice it in the answers. Memorising must
lose at least a tenth of what had been won, or the threshold if that is more, so that the usual wobble at the end of a good run
is not called so.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

LEAST_NATS = 0.02
LEAST_SHARE = 0.01
LOST_SHARE = 0.1
LEAST_EXAMPLES = 5  # fewer do not tell their spread
_UNSEEN = "on examples it was not trained on"


def standard_error(a: Sequence[float] | None, b: Sequence[float] | None, tokens: np.ndarray) -> float | None:
    """Standard error of the difference between two held-out losses per token, in nats; None where too little is known.

    a, b: summed loss of each held-out example, for two adapters. tokens: trained tokens of each. The difference is a ratio
    sum (a - b) / sum tokens; its error comes from the examples' residuals around it (Cochran, Sampling Techniques, 6.13).
    """
    if a is None or b is None or not len(a) == len(b) == len(tokens) or len(a) < LEAST_EXAMPLES:
        return None
    difference = np.asarray(a) - np.asarray(b)
    residual = difference - difference.sum() / tokens.sum() * tokens
    return float(np.sqrt(len(a) / (len(a) - 1) * np.sum(residual**2)) / tokens.sum())


def judge(
    history: Sequence[tuple[int, float]],
    same_answers: Sequence[bool] = (),
    won_error: float | None = None,
    lost_error: float | None = None,
    steps_per_epoch: int = 0,
) -> tuple[str, str]:
    """("learned" | "no_change" | "memorised", a sentence).

    history: (step, held-out loss) of every check in order; the first is the base's, before training.
    same_answers: for each before/after question whether base and adapter said the same; they decide when nothing was held out.
    won_error, lost_error: standard errors of the differences between base and best check, and between best and last check.
    steps_per_epoch: lets a run of several epochs say in which one it went wrong.
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
    threshold = least_change(before, won_error)
    won = before - losses[best]
    if last - losses[best] > max(least_change(before, lost_error), LOST_SHARE * won):
        return "memorised", _memorised(history, best, steps_per_epoch, won > threshold)
    if won > threshold:
        return "learned", f"It learned: {_UNSEEN} the loss went from {before:.3f} to {losses[best]:.3f}{_sure(won_error)}."
    sure = f"; a difference below {threshold:.3f} may be chance" if abs(before - last) >= 0.0005 else ""
    return "no_change", (
        f"No measurable change: {_UNSEEN} the loss went from {before:.3f} to {last:.3f}{sure}. "
        "Train longer, raise the learning rate, or give more examples."
    )


def least_change(loss: float, error: float | None = None) -> float:
    """The smallest difference from `loss`, in nats, that is called a change. error: the difference's standard error."""
    return max(LEAST_SHARE * loss, LEAST_NATS if error is None else 2 * error)


def improved(best: float, loss: float) -> bool:
    """Whether a check counts as better for early stopping: by a tenth of what the verdict calls a change."""
    return loss < best - 0.1 * least_change(best)


def _sure(error: float | None) -> str:
    """How exactly the difference is known, where that is known."""
    return "" if error is None else f" (the difference is known to within {max(2 * error, 0.001):.3f})"


def _memorised(history: Sequence[tuple[int, float]], best: int, steps_per_epoch: int, was_good: bool) -> str:
    def place(check: int) -> str:
        step = history[check][0]
        several = steps_per_epoch and history[-1][0] > steps_per_epoch
        return f"epoch {math.ceil(step / steps_per_epoch)} (step {step:,})" if several else f"step {step:,}"

    before, last = history[0][1], history[-1][1]
    if not best:
        return (
            f"It memorised: {_UNSEEN} it got worse from the start (from {before:.3f} to {last:.3f}). "
            "Lower the learning rate or give more varied examples."
        )
    advice = f"The adapter kept is that of {place(best)}, the best." if was_good else "Give more varied examples."
    return (
        f"It memorised: {_UNSEEN} it got worse from {place(best + 1)} on "
        f"(from {history[best][1]:.3f} to {last:.3f}; the base had {before:.3f}). {advice}"
    )
