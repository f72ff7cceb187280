"""Tiny models with an adapter, flat micro-batches of several examples, full cards: what tests of the engine work on."""

from __future__ import annotations

import itertools
import weakref
from types import SimpleNamespace

import numpy as np
import torch

from lowvram_tuner.config import TrainConfig
from lowvram_tuner.lora.adapter import Adapter, attach
from lowvram_tuner.memory.plan import Budget, Plan
from lowvram_tuner.models.load import Loaded, random_model
from lowvram_tuner.quant.registry import resolve
from lowvram_tuner.train.step import Batch, to_batch

VOCABULARY = 300


def model_values(family: str, tied: bool = True, **extra) -> dict:
    """The transformers config of a model that computes in milliseconds."""
    values = {
        "model_type": family, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": VOCABULARY, "tie_word_embeddings": tied,
    }  # fmt: skip
    return values | ({"head_dim": 24} if family == "qwen3" else {}) | extra


def make_plan(kind: str = "ram", **decisions) -> Plan:
    """A plan whose scratch holds 2 x the largest linear of the tiny models; `decisions` are the engine's fields."""
    return Plan(True, {}, Budget(0, 0, 0, kind), 0, 0.0, (), **({"scratch_bytes": 2 * 160 * 64 * 4} | decisions))


def make_case(
    values: dict, bits: int = 16, plan: Plan | None = None, device: str = "cpu", dtype: torch.dtype = torch.float32, **options
) -> tuple[Loaded, Adapter]:
    """A random model and an adapter whose A and B are both away from zero. `options` are config values."""
    torch.set_num_threads(1)
    target = torch.device(device)
    loaded = random_model(values, resolve(bits), plan or make_plan(), target, dtype)
    adapter = attach(loaded.model, TrainConfig(**({"lora_r": 4} | options)), target, dtype)
    generator = torch.Generator().manual_seed(1)
    adapter.parameters.copy_(torch.randn(adapter.parameters.shape, generator=generator) * 0.05)
    return loaded, adapter


def flat(edges: tuple[int, ...] = (0, 17, 18, 40), vocabulary: int = VOCABULARY, ids: np.ndarray | None = None) -> SimpleNamespace:
    """Examples end to end, one of them a single token, with a few positions that do not count."""
    total = edges[-1]
    ids = np.random.default_rng(0).integers(0, vocabulary, total) if ids is None else ids
    labels, positions = np.full(total, -100, np.int64), np.empty(total, np.int64)
    for a, b in itertools.pairwise(edges):
        labels[a : b - 1] = ids[a + 1 : b]
        positions[a:b] = np.arange(b - a)
    labels[3:6] = -100
    return SimpleNamespace(input_ids=ids, position_ids=positions, cu_seqlens=np.array(edges, np.int32), labels=labels, tokens=total)


def batch_of(data: SimpleNamespace, device: str = "cpu") -> Batch:
    return to_batch(data, torch.device(device), int(np.diff(data.cu_seqlens).max()))


def reference(adapter: Adapter, data: SimpleNamespace) -> tuple[float, torch.Tensor]:
    """Summed loss and gradient by transformers' own forward and autograd, one example at a time, with full logits."""
    adapter.gradients.zero_()
    device, total = adapter.parameters.device, 0.0
    for a, b in zip(data.cu_seqlens.tolist(), data.cu_seqlens.tolist()[1:]):
        labels = torch.from_numpy(data.labels[a:b]).to(device)
        if bool((labels >= 0).any()):
            logits = adapter.model(input_ids=torch.from_numpy(data.input_ids[a:b])[None].to(device), use_cache=False).logits[0].float()
            loss = torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
            loss.backward()
            total += loss.item()
    return total, adapter.gradients.clone()


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double().cpu() - want.double().cpu()).norm() / want.double().norm())


def fails(monkeypatch, owner, name: str, when) -> list[int]:
    """Makes `owner.name` raise like a full card in those of its calls (counted from 1) for which `when` is true."""
    original, calls = getattr(owner, name), [0]

    def method(*args, **kwargs):
        calls[0] += 1
        if when(calls[0], *args):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, method)
    return calls


class Allocations(torch.utils._python_dispatch.TorchDispatchMode):
    """Of storages of at least `size` bytes that operators return, at addresses not in `known`: how many in all (`large`), and
    the most that were alive at once (`most`)."""

    def __init__(self, size: int, known: set[int] = frozenset()) -> None:
        super().__init__()
        self.size, self.known, self.large, self.most = size, known, 0, 0
        self.alive: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, torch.Tensor):
                storage = t.untyped_storage()
                if storage.nbytes() >= self.size and storage.data_ptr() not in self.known:
                    self.large += 1
                    self._note(storage)
        return out

    def _note(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata not in self.alive:
            self.alive.add(storage._cdata)
            weakref.finalize(storage, self.alive.discard, storage._cdata)
        self.most = max(self.most, len(self.alive))
