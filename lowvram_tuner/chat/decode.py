"""Generating text with the hand-written layers: a static cache, and on a card one captured graph per token.

The prompt is read in chunks, as training reads its examples. Then every token is the same step on fixed addresses: on a card
it runs once eagerly, is captured as a CUDA graph, and from then on costs one launch. The chosen token stays on the card as
the next step's input, and that step is started before the host has read it, so the card never waits for Python.

What the cache holds from the conversation so far is kept: the next turn reads only what is new.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from itertools import takewhile
from typing import Any

import torch

from kernels.attention_cache import attend, attend_one
from kernels.gather import gather_rows
from lowvram_tuner.chat.cache import ROOM, Cache
from lowvram_tuner.chat.layers import Attend, Layer, Place, normed
from lowvram_tuner.chat.sampling import Sampling
from lowvram_tuner.config import ConfigError
from lowvram_tuner.lora.adapter import LoraQuantLinear
from lowvram_tuner.memory.allocator import abandon_capture, recording
from lowvram_tuner.quant.linear import QuantLinear
from lowvram_tuner.train.fused_layer import supports

log = logging.getLogger(__name__)
CHUNK = 512  # tokens of a prompt read at a time
LINEARS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


def decoder_for(model: Any) -> Decoder | None:
    """The decoder of a model, wrapped by PEFT or not; None where transformers' own generate has to do it.

    That is: another family, linears that this program did not load, adapters elsewhere than on a layer's linears.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    layers = getattr(getattr(base, "model", None), "layers", None)
    if not layers or not supports(base, base.config.max_position_embeddings):
        return None
    linears = [layer.get_submodule(name) for layer in layers for name in LINEARS]
    known = all(type(m) in (QuantLinear, LoraQuantLinear) for m in linears)
    adapters = sum(hasattr(m, "lora_A") for m in base.modules())
    here = base.lm_head.weight.device == base.model.norm.weight.device if hasattr(base.lm_head, "weight") else True
    if not known or not here or adapters != sum(isinstance(m, LoraQuantLinear) for m in linears):
        return None
    return Decoder(base)


class Decoder:
    """Generates on one model, one answer at a time. `fast`: one-token steps take the card's kernels."""

    def __init__(self, base: Any, fast: bool | None = None) -> None:
        inner, config = base.model, base.config
        self.table, self.rotary, self.final_norm, self.head = inner.embed_tokens.weight, inner.rotary_emb, inner.norm, base.lm_head
        self.device, self.dtype = inner.norm.weight.device, inner.norm.weight.dtype
        self.fast = self.device.type == "cuda" if fast is None else fast
        self.layers = [Layer(layer, config, self.fast) for layer in inner.layers]
        first = self.layers[0]
        limit = config.max_position_embeddings
        self.cache = Cache(len(self.layers), first.kv_heads, first.head_dim, limit, self.dtype, self.device)
        self._switch = next((m for m in base.modules() if isinstance(m, LoraQuantLinear)), None)
        self._held: list[int] = []  # tokens whose keys and values the cache holds
        self._held_adapted = False
        self._length = 0  # the next token's position; `_position` is the same on the device
        self._token = torch.zeros(1, dtype=torch.int64, device=self.device)
        self._position = torch.zeros(1, dtype=torch.int64, device=self.device)
        self._ring = getattr(inner.layers, "ring", None)
        self._graphs = _Graphs(self.device.type == "cuda" and self._ring is None)  # copies take longer than launches

    @property
    def adapted(self) -> bool:
        """Whether an adapter is there and switched on (PEFT's own switch, `disable_adapter`)."""
        return self._switch is not None and not self._switch.disable_adapters and bool(self._switch.active_adapters)

    @property
    def captured(self) -> bool:
        """Whether the last steps ran as a graph."""
        return bool(self._graphs.kept)

    @torch.no_grad()
    def generate(self, prompt: list[int], most: int, sampling: Sampling, ends: list[int], stop: threading.Event) -> Iterator[int]:
        """Yields up to `most` token ids after `prompt`; an ending one is not yielded, nor any after `stop` was set.

        ConfigError where the logits are inf or nan, of which every token is as likely as another.
        """
        adapted, ahead = self.adapted, self.device.type == "cuda"
        logits = self._read(prompt, adapted)
        if not bool(logits.isfinite().all()):
            why = "fp16, which this card takes, is too narrow for it; try --device cpu" if self.dtype == torch.float16 else "get the adapter again"
            raise ConfigError(f"what the model computes for this question is inf or nan: {why}.")
        for count in range(1, most + 1):
            self._token.copy_(next_token(logits, sampling))
            arrival = _Arrival(self._token)
            started = ahead and count < most
            if started:
                logits = self._step(adapted)
            token = arrival.value()
            if started:
                self._held.append(token)
            if token in ends or stop.is_set():
                return
            yield token
            if not started and count < most:
                if stop.is_set():
                    return
                logits = self._step(adapted)
                self._held.append(token)

    def _read(self, prompt: list[int], adapted: bool) -> torch.Tensor:
        """Logits [1, V] after the prompt, reading what of it the cache does not hold yet."""
        same = takewhile(lambda pair: pair[0] == pair[1], zip(prompt[:-1], self._held)) if adapted == self._held_adapted else ()
        start = sum(1 for _ in same)
        self._held, self._held_adapted = prompt[:start], adapted
        self._make_room(len(prompt) + ROOM)
        ids = torch.tensor(prompt, device=self.device)
        while start < len(prompt):
            stop = min(start + CHUNK, len(prompt))
            positions = torch.arange(start, stop, device=self.device)
            x = self._walk(ids[start:stop], positions, lambda q, cache, scale, at=start: attend(q, cache, at, scale), adapted)
            self._held, start = prompt[:stop], stop
        self._length = len(prompt)
        self._position.fill_(self._length)
        return self._logits(x[-1:])

    def _step(self, adapted: bool) -> torch.Tensor:
        """Logits [1, V] after the token in `_token`, which is added to the cache. Valid until the next step."""
        self._make_room(self._length + 1)
        logits = self._graphs.run(adapted, lambda: self._one(adapted))
        self._length += 1
        return logits

    def _one(self, adapted: bool) -> torch.Tensor:
        """The step itself, which on a card depends on nothing but device memory."""
        if self.fast:
            x = self._walk(self._token, self._position, lambda q, cache, scale: attend_one(q, cache, self._position, scale), adapted)
        else:
            x = self._walk(self._token, self._position, lambda q, cache, scale: attend(q, cache, self._length, scale), adapted)
        self._position.add_(1)
        return self._logits(x)

    def _walk(self, ids: torch.Tensor, positions: torch.Tensor, see: Attend, adapted: bool) -> torch.Tensor:
        """Hidden states [T, H] before the final norm."""
        x = gather_rows(ids, self.table)
        cos, sin = self.rotary(x, positions[None])
        place = Place(positions, cos[0], sin[0], see)
        for index, (layer, cache) in enumerate(zip(self.layers, self.cache.layers)):
            if self._ring is not None and index in self._ring.host:
                self._ring.fetch(index)
                self._ring.prefetch(self._ring.neighbour(index, +1))
            x = layer(x, place, cache, adapted)
        if self._ring is not None:
            self._ring.prefetch(self._ring.order[0])  # for the next token
        return x

    def _logits(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(normed(self.final_norm, x))

    def _make_room(self, tokens: int) -> None:
        """Graphs know addresses, so they go before the cache moves."""
        if tokens > self.cache.capacity:
            self._graphs.forget()
            self.cache.hold(tokens)


class _Graphs:
    """One captured step per state of the adapter, all in one memory pool; see `train/graph.py`."""

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled
        self.forget()

    def forget(self) -> None:
        """Drops all graphs: what they point at is about to move."""
        self.kept: dict[bool, tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}
        self.seen: set[bool] = set()
        self.pool = torch.cuda.graph_pool_handle() if self.enabled else None

    def run(self, key: bool, step: Any) -> torch.Tensor:
        """The step's result: eagerly the first time, so that its kernels are compiled, then as a graph."""
        if key not in self.kept:
            if not self.enabled or key not in self.seen:
                self.seen.add(key)
                return step()
            self._capture(key, step)
            if key not in self.kept:
                return step()
        graph, result = self.kept[key]
        graph.replay()
        return result

    def _capture(self, key: bool, step: Any) -> None:
        """Recording runs nothing; a step that cannot be recorded is said once and stays eager."""
        graph = torch.cuda.CUDAGraph()
        try:
            with recording(graph, self.pool):
                result = step()
        except RuntimeError as error:
            log.warning("a token's step cannot be captured as a CUDA graph (%s); it runs eagerly.", str(error).splitlines()[0])
            self.enabled = False
            torch.cuda.synchronize()
        else:
            self.kept[key] = (graph, result)
            return
        abandon_capture(graph, self.pool)


class _Arrival:
    """A token on its way to the host: `value` waits for it alone, not for what was started after it."""

    def __init__(self, token: torch.Tensor) -> None:
        self.token, self.event = token, None
        if token.is_cuda:
            self.token = torch.empty(1, dtype=torch.int64, pin_memory=True).copy_(token, non_blocking=True)
            self.event = torch.cuda.Event()
            self.event.record()

    def value(self) -> int:
        if self.event is not None:
            self.event.synchronize()
        return int(self.token[0])


def next_token(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """The next id, int64 [1], from logits [1, V], without asking the host.

    top_p keeps the likeliest tokens up to that share, at least one. Sampling takes the largest p / e of independent
    exponential e, which is each token with probability p (what `torch.multinomial` does after a check on the host).
    """
    if sampling.temperature == 0:
        return logits.argmax(-1)
    ranked, order = (logits.float() / sampling.temperature).sort(descending=True)
    p = ranked.softmax(-1)
    p.masked_fill_(p.cumsum(-1) - p >= sampling.top_p, 0.0)
    return order.gather(1, p.div_(torch.empty_like(p).exponential_()).argmax(-1, keepdim=True))[0]
