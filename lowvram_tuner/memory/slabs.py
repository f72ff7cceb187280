"""Slabs: the frozen tensors of one decoder layer in one contiguous buffer, on the GPU or streamed from host memory.

A resident layer's packed tensors are views of its own slab on the GPU. A streamed layer's slab lies in pinned host memory
and its packed tensors are views of one of two slots on the GPU: before the layer runs, `Ring.fetch` copies its slab into the
slot, and `Ring.prefetch` starts the copy for the layer after it on a stream of its own while this one computes. Frozen
weights only ever travel host to device.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from lowvram_tuner.memory.estimate import ALIGN
from lowvram_tuner.quant.spec import TensorSpec

PIECE = 32 << 20  # bytes of one copy: half a millisecond of a fast bus
Layout = dict[str, dict[str, TensorSpec]]  # linear's name -> packed tensor's name -> spec


@dataclass
class Slab:
    """One buffer, uint8 [nbytes], and the typed views that a layout cuts out of it at multiples of ALIGN."""

    buffer: torch.Tensor
    views: dict[str, dict[str, torch.Tensor]]


def slab_bytes(layout: Layout) -> int:
    """Size of a slab with that layout."""
    return sum(_aligned(spec.nbytes) for spec in {_place(linear, name, spec): spec for linear, name, spec in _tensors(layout)}.values())


def make_slab(layout: Layout, device: torch.device | str, pinned: bool = False, buffer: torch.Tensor | None = None) -> Slab:
    """An uninitialized slab, or the views of a layout in `buffer`, which must be large enough."""
    if buffer is None:
        buffer = pinned_bytes(slab_bytes(layout)) if pinned else torch.empty(slab_bytes(layout), dtype=torch.uint8, device=device)
    views: dict[str, dict[str, torch.Tensor]] = {linear: {} for linear in layout}
    places: dict[tuple, torch.Tensor] = {}
    offset = 0
    for linear, name, spec in _tensors(layout):
        place = _place(linear, name, spec)
        if place not in places:
            part = buffer[offset : offset + spec.nbytes]
            places[place] = part.view(getattr(torch, spec.dtype)).view(spec.shape)
            offset += _aligned(spec.nbytes)
        views[linear][name] = places[place]
    return Slab(buffer, views)


def _tensors(layout: Layout) -> Iterator[tuple[str, str, TensorSpec]]:
    return ((linear, name, spec) for linear, tensors in layout.items() for name, spec in tensors.items())


def _place(linear: str, name: str, spec: TensorSpec) -> tuple:
    """What a tensor is told apart by: linears of one module (q, k, v) hold a shared tensor once."""
    return (linear.rpartition(".")[0], name, spec) if spec.shared else (linear, name)


class Ring:
    """Two slots on the GPU through which the streamed slabs pass, in the order that `fetch` and `prefetch` ask for.

    A slab always lands in the slot its layer is bound to (its rank among the streamed layers modulo 2). Three events keep
    the two streams honest: a copy waits until the slot's last reader is done, a reader waits until its copy is.
    """

    def __init__(self, host: dict[int, torch.Tensor], device: torch.device) -> None:
        self.host, self.device = host, device
        self.order = sorted(host)
        size = max(buffer.numel() for buffer in host.values())
        self.slots = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2)]
        self.holds: list[int | None] = [None, None]
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def slot_of(self, layer: int) -> int:
        """Which slot a streamed layer's tensors are views of."""
        return self.order.index(layer) % 2

    def neighbour(self, layer: int, step: int) -> int | None:
        """The streamed layer that runs after `layer` in the direction of `step` (+1 forward, -1 backward), if any."""
        rest = [k for k in self.order if (k - layer) * step > 0]
        return (min(rest) if step > 0 else max(rest)) if rest else None

    def prefetch(self, layer: int | None) -> None:
        """Starts the copy of a layer's slab unless its slot holds it already. Called after the slot's last reader was queued."""
        if layer is None or self.holds[self.slot_of(layer)] == layer:
            return
        slot = self.slot_of(layer)
        self.holds[slot] = layer
        source = self.host[layer]
        if self.stream is None:
            self.slots[slot][: source.numel()].copy_(source)
            return
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            copy_in_pieces(self.slots[slot][: source.numel()], source)

    def fetch(self, layer: int) -> None:
        """Makes the current stream wait for the layer's slab, copying it now if nobody prefetched it."""
        self.prefetch(layer)
        if self.stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self.stream)

    def reset(self) -> None:
        """Forgets what the slots hold: the start of a captured step must not depend on what ran before it."""
        self.holds = [None, None]


def streamed_layers(layers: int, streamed: int) -> list[int]:
    """Which layers stream: spread evenly, so that each transfer hides behind its resident neighbours too."""
    return sorted({(i * layers + layers // 2) // streamed for i in range(streamed)}) if streamed else []


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGN) * ALIGN


def copy_in_pieces(target: torch.Tensor, source: torch.Tensor) -> None:
    """Copies [n, ..] between pinned memory and the card on the current stream, PIECE bytes at a time.

    A card has one copy engine a direction, which takes the streams' copies in turn: a small copy that is needed soon waits for
    one piece of a large one, not for all of it. At 8B 16x512 the layers' inputs, 1 ms each, stood 9 ms behind gate and up.
    """
    step = max(1, PIECE // (source[0].numel() * source.element_size()))
    for begin in range(0, len(source), step):
        target[begin : begin + step].copy_(source[begin : begin + step], non_blocking=True)


def pinned_bytes(nbytes: int) -> torch.Tensor:
    """uint8 [nbytes] of host memory that the card can reach while it computes; ordinary, slower memory where none can be pinned."""
    if torch.cuda.is_available():
        try:
            return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            warnings.warn(f"{nbytes / 1e9:.2f} GB of pinned memory cannot be had ({reason}); streaming is slower.", stacklevel=2)
    return torch.empty(nbytes, dtype=torch.uint8)
