"""How the next token is chosen. Needs no torch, so that the page and the command line read their defaults here."""

from __future__ import annotations

from dataclasses import dataclass

from lowvram_tuner.config import ConfigError

MOST_TOKENS = 131072


@dataclass(frozen=True)
class Sampling:
    """`temperature` 0 always takes the likeliest token; `top_p` samples from the likeliest tokens of that share."""

    temperature: float = 0.7
    top_p: float = 0.9
    max_new_tokens: int = 512

    def __post_init__(self) -> None:
        limits = {"temperature": (0.0, 5.0), "top_p": (0.01, 1.0), "max_new_tokens": (1, MOST_TOKENS)}
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
                raise ConfigError(f"{name}={value!r} is outside {low} to {high}.")
        object.__setattr__(self, "max_new_tokens", int(self.max_new_tokens))
