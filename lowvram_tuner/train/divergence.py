"""A loss that is inf or nan: whose fault it is, and when a run cannot come back from it.

The adapter of step 0 answers as the base, so a first loss that is no number is the base's. Later ones are the training's: an
update whose gradient is no number is left out, so one bad batch harms nothing, and after several in a row nothing will change.
"""

from __future__ import annotations

import math

import torch

from lowvram_tuner.config import ConfigError, TrainConfig

LOST_STEPS = 5  # in a row without a number for a loss end a run


class Divergence:
    """Looks at the losses of a run whose arithmetic is `dtype`."""

    def __init__(self, config: TrainConfig, dtype: torch.dtype) -> None:
        self.config, self.dtype = config, dtype
        self.lost = 0  # steps in a row whose loss is no number

    def look(self, step: int, loss: float) -> bool:
        """Whether the run is lost with this step's loss. ConfigError where no step ever had one that is a number."""
        self.lost = 0 if math.isfinite(loss) else self.lost + 1
        if self.lost == step == LOST_STEPS:
            self.require_base(loss)
        return self.lost >= LOST_STEPS

    def require_base(self, loss: float) -> None:
        """ConfigError unless the base's loss is a number."""
        if not math.isfinite(loss):
            narrow = ", or fp16 is too narrow for it; try precision='fp32', or" if self.dtype == torch.float16 else ";"
            raise ConfigError(
                f"model={self.config.model!r} gives no number for a loss before any training: one of its weights is inf or nan{narrow} "
                "get the model again."
            )

    def error(self, step: int, kept: int | None) -> ConfigError:
        """What to say of a run that is lost at `step`. kept: the step whose adapter is kept, if one is."""
        known = "" if kept is None else f" The adapter of step {kept}, the best until then, is kept."
        return ConfigError(
            f"learning_rate={self.config.learning_rate:g} is too high for this model and data: the loss has been no number since "
            f"step {step - self.lost + 1}.{known}"
        )
