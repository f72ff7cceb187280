"""Activations that wait in pinned host memory from forward to backward, copied while the card computes.

The bus is idle towards the host during a step (slabs only come in), so what backward would have to compute again may go out
instead: the layers' inputs, and gate and up, whose recomputation is most of a layer's. A copy out holds its tensor until a
few later ones were begun; a copy back is started one ahead of its use.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable
from itertools import pairwise

import torch

from lowvram_tuner.memory.estimate import LEAVING
from lowvram_tuner.memory.slabs import copy_in_pieces, pinned_bytes


class HostStore:
    """Rows of activations on the host, by unit: a layer, or a part of one. Without CUDA it copies at once, for tests.

    shape: (rows, columns) of the largest unit. depth: copies out that may be under way at once; each keeps its tensor alive.
    """

    def __init__(self, units: int, shape: tuple[int, int], dtype: torch.dtype, device: torch.device, depth: int = 1) -> None:
        cuda = device.type == "cuda"
        self.shape, self.dtype, self.host = shape, dtype, []
        self.grow(units)
        self.stream = torch.cuda.Stream(device) if cuda else None
        self.depth = depth
        self.begun = False  # a copy, in this pass
        self.leaving: deque[tuple[torch.Tensor, torch.cuda.Event]] = deque()
        self.coming: dict[int, tuple[torch.Tensor, torch.cuda.Event | None]] = {}

    def grow(self, units: int) -> None:
        """Has host memory for so many units at least."""
        size = self.shape[0] * self.shape[1] * self.dtype.itemsize
        while len(self.host) < units:
            self.host.append(pinned_bytes(size).view(self.dtype).view(self.shape))

    def put(self, unit: int, x: torch.Tensor) -> None:
        """Starts copying x out; its memory is free again once `depth` later copies were begun, or after `settle`.

        `Tensor.record_stream` would free x by itself, but a graph being captured never reuses such memory.
        """
        target = self.host[unit][: x.shape[0]]
        if self.stream is None:
            target.copy_(x)
            return
        self.settle(self.depth - 1)
        self._copy(target, x)
        self.leaving.append((x, self.stream.record_event()))

    def settle(self, left: int = 0) -> None:
        """Makes the current stream wait for all copies out but the `left` newest, and lets go of their tensors."""
        while len(self.leaving) > left:
            torch.cuda.current_stream().wait_event(self.leaving.popleft()[1])

    def prefetch(self, unit: int, rows: int) -> None:
        """Starts copying a unit back, unless it is on its way."""
        if unit in self.coming:
            return
        host = self.host[unit][:rows]
        if self.stream is None:
            self.coming[unit] = (host.clone(), None)
            return
        like = torch.empty(host.shape, dtype=host.dtype, device=self.stream.device)
        self._copy(like, host)
        self.coming[unit] = (like, self.stream.record_event())

    def _copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Starts a copy on the store's stream, behind all that the current stream was given."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            copy_in_pieces(target, source)
        self.begun = True

    def get(self, unit: int, rows: int) -> torch.Tensor:
        """A unit's rows, once their copy is done."""
        self.prefetch(unit, rows)
        tensor, arrived = self.coming.pop(unit)
        if arrived is not None:
            torch.cuda.current_stream().wait_event(arrived)
        return tensor

    def forget(self) -> None:
        """Drops what is under way: a pass was broken off."""
        self.leaving.clear()
        self.coming.clear()
        self.begun = False

    def leave(self) -> None:
        """Joins the copies, so that a captured pass is complete. A stream without any is no part of the capture, and waiting for
        it would end that."""
        self.settle()
        if self.begun:
            torch.cuda.current_stream().wait_stream(self.stream)
        self.begun = False


class GateUpAway:
    """Which chunks' gate and up wait on the host, and in which order they come back.

    A unit is one chunk of tokens of one layer. The units that go are spread evenly over forward, so that the bus is busy all
    the time, the first of each stretch, so that the last one is out before its memory is needed. layers: those that compute
    their MLP again. rows: tokens of a chunk; columns: 2 I.
    """

    def __init__(
        self, layers: list[int], tokens: int, rows: int, away: int, columns: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.rows = min(rows, tokens)
        chunks = -(-tokens // self.rows)
        units = [(layer, chunk) for layer in layers for chunk in range(chunks)]
        self.store = HostStore(0, (self.rows, columns), dtype, device, min(LEAVING, chunks))
        self._take_memory(min(away, len(units)), columns, dtype)
        away = len(self.store.host)
        chosen = [units[i * len(units) // away] for i in range(away)]
        self.slot = {unit: i for i, unit in enumerate(chosen)}
        self.backward = sorted(chosen, key=lambda unit: (-unit[0], unit[1]))

    def _take_memory(self, units: int, columns: int, dtype: torch.dtype) -> None:
        """Pinned memory for the units, or for as many as it can be had for: what does not go is computed again."""
        pin = self.store.stream is not None
        for unit in range(units):
            try:
                self.store.host.append(torch.empty(self.rows, columns, dtype=dtype, pin_memory=pin))
            except RuntimeError as error:
                reason = str(error).splitlines()[0]
                warnings.warn(f"RAM for the activations of {unit} of {units} parts can be pinned ({reason}); the rest is computed again.", stacklevel=2)
                return

    def begin(self, tokens: int) -> None:
        """A pass over `tokens`, which may be fewer than the most."""
        present = [unit for unit in self.backward if unit[1] * self.rows < tokens]
        self.tokens, self.next = tokens, dict(pairwise(present))
        self.first = present[0] if present else None

    def takes(self, layer: int) -> Callable[[int, torch.Tensor], None]:
        """`away` of `FusedLayer.forward`."""

        def put(chunk: int, gate_up: torch.Tensor) -> None:
            if (layer, chunk) in self.slot:
                self.store.put(self.slot[layer, chunk], gate_up)

        return put

    def turn(self) -> None:
        """The first copy back begins. All copies out are done: whoever calls settles them when memory is needed."""
        self._prefetch(self.first)

    def gives(self, layer: int) -> Callable[[int], torch.Tensor | None]:
        """`back` of `FusedLayer.backward`."""

        def get(chunk: int) -> torch.Tensor | None:
            unit = (layer, chunk)
            if unit not in self.slot:
                return None
            gate_up = self.store.get(self.slot[unit], self._count(unit))
            self._prefetch(self.next.get(unit))
            return gate_up

        return get

    def _prefetch(self, unit: tuple[int, int] | None) -> None:
        if unit is not None:
            self.store.prefetch(self.slot[unit], self._count(unit))

    def _count(self, unit: tuple[int, int]) -> int:
        return min(self.rows, self.tokens - unit[1] * self.rows)
