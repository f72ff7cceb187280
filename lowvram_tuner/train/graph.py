"""Replaying a micro-batch as one CUDA graph: thousands of launches become one.

At batch 1 the launches of a step take longer than its arithmetic (ANCHORS: the best peer's card is busy 83 of 325 ms).
A graph needs fixed shapes and addresses, so there is one per shape of a micro-batch, fed through static input tensors. All
graphs share one memory pool, since only one runs at a time. Nothing else can use that pool, and a plan has room for one pass only:
whoever else runs out of memory has the graphs give theirs back (`release`), and they are captured again.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from lowvram_tuner.memory.allocator import abandon_capture, recording, room
from lowvram_tuner.memory.cost import MOST_TOGETHER
from lowvram_tuner.train.step import Batch, FusedStep

log = logging.getLogger(__name__)
Shapes = tuple[tuple[int, ...], ...]  # of the micro-batches of a pass
TRIES = 4  # to capture a pass, each keeping less than the one before


class CapturedStep:
    """`FusedStep.accumulate` with graphs, of `limit` micro-batches in all. A shape is run eagerly once, then captured. Where the
    gaps in a graph's pool are larger than planned (`cost.GAPS`), fewer activations are kept; else a failed capture stays eager."""

    def __init__(self, step: FusedStep, device: torch.device, limit: int = MOST_TOGETHER) -> None:
        self.step, self.limit = step, limit
        self.enabled = device.type == "cuda"
        self.graphs: dict[Shapes, tuple[torch.cuda.CUDAGraph, list[Batch], torch.Tensor]] = {}
        self.seen: set[Shapes] = set()
        self.scale = torch.ones((), device=device)
        self.pool = torch.cuda.graph_pool_handle() if self.enabled else None
        self.held = 0  # bytes of the pool
        self.failed = ""  # why the last capture failed

    def accumulate(self, batches: Batch | Sequence[Batch], scale: float) -> torch.Tensor:
        """Adds scale x the gradient of the summed loss. Returns the sum of losses; valid until the next call."""
        self.scale.fill_(scale)
        batches = [batches] if isinstance(batches, Batch) else batches
        key = tuple((*(t.numel() for t in batch.tensors()), batch.max_len, batch.even) for batch in batches)
        if key in self.graphs:
            return self._replay(key, batches)
        allowed = sum(map(len, self.graphs)) + len(key) <= self.limit
        if self.enabled and allowed and key in self.seen:
            return self._capture(key, batches)
        if self.graphs and not self._room_for_another():
            self.release()
            if not allowed:  # it would have the others captured again and again
                log.warning("passes have too many shapes for graphs of all of them; they run eagerly.")
                self.enabled = False
        self.seen.add(key)
        return self.step.accumulate(batches, self.scale)

    def _room_for_another(self) -> bool:
        """Whether an eager pass has room beside the graphs' pool, which holds a pass."""
        if room(self.scale.device, self.step.plan) < self.held:
            torch.cuda.empty_cache()
        return room(self.scale.device, self.step.plan) >= self.held

    def release(self) -> bool:
        """Gives the graphs' memory back until their shapes come again. False when there are none."""
        if not self.graphs:
            return False
        torch.cuda.synchronize()
        self._new_pool()
        return True

    def _new_pool(self) -> None:
        """Begins anew: of a capture that failed or left something behind PyTorch takes the pool as still being recorded to."""
        self.graphs.clear()
        self.pool, self.held = torch.cuda.graph_pool_handle(), 0
        torch.cuda.empty_cache()

    def _replay(self, key: Shapes, batches: Sequence[Batch]) -> torch.Tensor:
        graph, static, loss = self.graphs[key]
        for its, given in zip(static, batches):
            for target, source in zip(its.tensors(), given.tensors()):
                target.copy_(source)
        graph.replay()
        return loss

    def _capture(self, key: Shapes, batches: Sequence[Batch]) -> torch.Tensor:
        """Capturing records the pass without running it, so it is replayed right after."""
        static = [Batch(*[t.clone() for t in batch.tensors()], max_len=batch.max_len, even=batch.even) for batch in batches]
        plan, tries = self.step.plan, TRIES
        while failure := self._record(key, static):
            self.failed, short = failure
            tries -= 1
            if not (short and tries and self.step.keep_less()):
                log.warning("this step cannot be captured as a CUDA graph (%s); it runs eagerly.", self.failed)
                self.enabled, self.step.plan = False, plan
                return self.step.accumulate(batches, self.scale)
            log.info("the pass's graph needs more memory than planned; it keeps fewer activations.")
        return self._replay(key, batches)

    def _record(self, key: Shapes, static: list[Batch]) -> tuple[str, bool] | None:
        """Makes the graph. If that fails: why, and whether memory was short."""
        graph = torch.cuda.CUDAGraph()
        try:
            with recording(graph, self.pool):
                before = torch.cuda.memory_reserved()
                loss = self.step.accumulate(static, self.scale)
        except RuntimeError as error:
            failure = str(error).splitlines()[0], _ran_out_of_memory(error)
            torch.cuda.synchronize()
            self.step.forget()
        else:
            self.graphs[key] = (graph, static, loss)
            self.held += torch.cuda.memory_reserved() - before
            return None
        abandon_capture(graph, self.pool)  # here, since the error's traceback held the pass's tensors until now
        self._new_pool()
        return failure


def _ran_out_of_memory(error: BaseException | None) -> bool:
    """Ending a capture that ran out of memory raises again, which hides the first error."""
    return error is not None and (isinstance(error, torch.cuda.OutOfMemoryError) or _ran_out_of_memory(error.__context__))
