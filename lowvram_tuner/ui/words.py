"""Numbers and states as a hobbyist reads them. Pure text, no HTML: whoever puts it into a page escapes it."""

from __future__ import annotations

import time
from pathlib import PurePath
from typing import Any

BITS_WORDS = {
    2: "2-bit: an eighth of the memory, for models that fit no other way.",
    3: "3-bit: a fifth of the memory.",
    4: "4-bit, recommended: a quarter of the memory.",
    8: "8-bit: half the memory.",
    16: "16-bit: the original weights, the most memory.",
}
# How unsure of the next word the demo model is (perplexity) with its weights held so: the table in the README.
PERPLEXITY = {
    ("none", 16): 29.29, ("int8", 8): 29.37, ("nf4", 4): 36.73, ("gptq", 8): 29.30, ("gptq", 4): 31.91, ("gptq", 3): 39.97,
    ("gptq", 2): 129.4, ("quip", 4): 31.25, ("quip", 2): 69.32,
    ("hqq", 8): 29.33, ("hqq", 4): 36.49, ("hqq", 3): 202.1, ("hqq", 2): 301_648.0,
}  # fmt: skip
OWN_FILES = "That is how this model's files hold it."
# What a calibrated quantization takes for an 8B model (64 rows of 512 tokens): its layers are alike, so 32 times one that was timed
# on an H100: 4 to 5 s for gptq, 70 s for quip at 2 bits, 157 s at 4. The demo model took 5 and 6 min on two processor cores.
MINUTES = {("gptq", 2): 3, ("gptq", 3): 3, ("gptq", 4): 3, ("gptq", 8): 3, ("quip", 2): 37, ("quip", 4): 84}
BUSY = ("preparing", "checking", "training", "saving")


def quality(method: str, bits: int) -> str:
    """What was measured of a quantizer on the demo model, as a sentence; "" when nothing was."""
    here, original = PERPLEXITY.get((method, bits)), PERPLEXITY["none", 16]
    if here is None or bits == 16:
        return ""
    if here < 1.01 * original:
        return "Measured on the demo model: as good as the original."
    times = here / original
    much = f"{100 * (times - 1):.0f} %" if times < 2 else f"{times:.1f} times" if times < 10 else f"{times:,.0f} times"
    return f"Measured on the demo model: {much} less sure of the next word (perplexity)."


def made_once(method: str, bits: int) -> str:
    """What a calibrated quantizer takes before the first run, as a sentence; without a time where none was measured."""
    minutes = MINUTES.get((method, bits))
    takes = f"about {minutes} min for an 8B model on an H100, more on smaller cards" if minutes else "which takes a while"
    return f"The first run quantizes the model on your data, {takes}; later runs use the result."


def gb(nbytes: float) -> str:
    """Bytes as "3.6 GB"; below 0.05 GB two decimals, so that a small part is not shown as nothing."""
    value = nbytes / 1e9
    return f"{value:.2f} GB" if 0 < abs(value) < 0.095 else f"{value:.1f} GB"


def duration(seconds: float | None) -> str:
    """Seconds as "2 h 10 min"; "" when unknown."""
    if seconds is None or not 0 <= seconds < 1e9:
        return ""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    if minutes < 120:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    return f"{round(hours / 24)} days"


def ago(then: float | None, now: float | None = None) -> str:
    """A moment in the past as "3 min ago", or its date when it is long gone."""
    if not then:
        return ""
    seconds = (time.time() if now is None else now) - then
    if seconds < 60:
        return "just now"
    if seconds < 3600:
        return f"{int(seconds // 60)} min ago"
    if seconds < 86400:
        return f"{int(seconds // 3600)} h ago"
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(then))


def number(value: float | None) -> str:
    """A figure such as a loss: "1.32", "2.00" (of one width, so that nothing moves beside it), or "–" when there is none."""
    if value is None or value != value:  # the second is true for NaN only
        return "–"
    return f"{value:#.3g}".rstrip(".") if abs(value) < 100 else f"{value:,.0f}"


def count(number: int, thing: str) -> str:
    """ "1 row", "312 rows"."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def rate(tokens_per_s: float | None) -> str:
    return f"{number(tokens_per_s)} tokens/s" if tokens_per_s else ""


def short_model(model: str) -> str:
    """A model's name without its owner or folders, for tables and headers."""
    if model == "demo":
        return "Demo model (SmolLM2 135M)"
    return model.rstrip("/\\").replace("\\", "/").split("/")[-1] or model


def short_data(dataset: str) -> str:
    """A dataset's name without its folders; a mix as "a.jsonl + b.csv"."""
    return " + ".join(PurePath(part).name or part for part in dataset.split(", "))


def steps(state: dict[str, Any]) -> str:
    """ "140 of 600", or "140" while the total is unknown."""
    step, total = state.get("step") or 0, state.get("total_steps") or 0
    return f"{step:,} of {total:,}" if total else f"{step:,}"


def situation(state: dict[str, Any] | None) -> str:
    """What happens now and what can be done about it: the one sentence that always stands over a run."""
    if state is None:
        return "Idle. Choose, look at the gauge, press Start."
    status, message = state.get("status"), (state.get("message") or "").rstrip(". ")
    if status == "preparing":
        return f"{_saying('Preparing', message or 'starting')}. You can stop now without losing anything."
    if status == "checking":
        return f"{message or 'Checking the fit: one worst-case step is measured'}."
    if status == "training":
        return f"Training: step {steps(state)}. Stop saves and keeps everything up to here."
    if status == "saving":
        return f"{_saying('Saving', message or 'writing a checkpoint')}. This takes a moment."
    if status == "stopped" and not state.get("step"):
        return f"{message or 'Stopped before the first step'}. Start it again when you like."
    if status == "stopped":
        return f"Stopped at step {steps(state)}. Everything up to there is kept; Resume goes on from it."
    if status == "finished":
        return f"Finished after {state.get('step') or 0:,} steps. Compare the answers below, or chat with the result."
    if status == "failed":
        return f"Failed at step {steps(state)}. {_failure(state)}"
    return message or "Idle."


def short_status(state: dict[str, Any] | None) -> str:
    """The state in one or two words, for the header and the table."""
    if state is None:
        return "idle"
    status = state.get("status") or "idle"
    if status == "training" and state.get("total_steps"):
        return f"training {100 * (state.get('step') or 0) // state['total_steps']} %"
    return {"preparing": "preparing", "checking": "checking the fit"}.get(status, status)


def _failure(state: dict[str, Any]) -> str:
    error = state.get("error") or {}
    parts = [error.get("what") or state.get("message") or "The worker ended without saying why.", error.get("fix") or ""]
    return " ".join(_sentence(p) for p in parts if p)


def _sentence(text: str) -> str:
    text = text.strip()
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", "!", "?")) else ".")


def _saying(doing: str, message: str) -> str:
    """What is done, and more exactly what; a message that says both itself stands alone."""
    return message if message.lower().startswith(doing.lower()) else f"{doing}: {_lower(message)}"


def _lower(text: str) -> str:
    """A message as the rest of a sentence: its first letter small, unless it starts a name."""
    return text[:1].lower() + text[1:] if text[1:2].islower() else text
