"""Shapes of models that only the hub knows, for the gauge: asked for beside the page, once each.

A question that failed is asked again after a while: the network may be back, or a licence accepted.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from lowvram_tuner.config import ConfigError
from lowvram_tuner.models.catalogue import ModelShape
from lowvram_tuner.models.hub import find_shape

AGAIN_S = 30.0


class HubShapes:
    """Shared by all tabs; every method returns at once."""

    def __init__(self, find: Callable[[str], ModelShape] = find_shape) -> None:
        self._find = find
        self._lock = threading.Lock()
        self._asked: set[str] = set()
        self._found: dict[str, ModelShape] = {}
        self._failed: dict[str, tuple[float, str]] = {}  # when, and why in a sentence

    def ask(self, model: str) -> ModelShape | str:
        """The model's shape; the sentence that says why there is none; "" while the hub is asked."""
        with self._lock:
            if model in self._found:
                return self._found[model]
            since, why = self._failed.get(model, (0.0, ""))
            if model not in self._asked and (not why or time.monotonic() - since > AGAIN_S):
                self._asked.add(model)
                threading.Thread(target=self._look, args=(model,), daemon=True).start()
            return why

    def _look(self, model: str) -> None:
        found, why = None, "The hub could not be asked for this model."
        try:
            found = self._find(model)
        except ConfigError as error:
            why = str(error)
        finally:
            with self._lock:
                self._asked.discard(model)
                if found is not None:
                    self._found[model] = found
                else:
                    self._failed[model] = (time.monotonic(), why)
