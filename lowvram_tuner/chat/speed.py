"""How fast a model answers on this machine: `bench --decode N`.

A prompt of random tokens is read and N tokens are generated greedily, alone (batch 1), as the chat does it: first with the
base, then with an adapter of the config's rank, which costs its own products.
"""

from __future__ import annotations

import threading
import time
from typing import Any

import torch

from lowvram_tuner.chat.decode import decoder_for
from lowvram_tuner.chat.sampling import Sampling
from lowvram_tuner.chat.session import generate_ids
from lowvram_tuner.config import ConfigError, TrainConfig
from lowvram_tuner.lora.adapter import attach
from lowvram_tuner.memory.plan import GB
from lowvram_tuner.memory.reading import plan_chat
from lowvram_tuner.models.load import config_values, load_model, random_model, reading_plan, spec_for
from lowvram_tuner.models.precision import pick_device, pick_dtype

PROMPT = 128  # tokens, as the field's figures were taken


def decode_speed(config: TrainConfig, tokens: int, random_weights: bool = False) -> dict[str, Any]:
    """Generates `tokens` after PROMPT random ones. Returns `bench --decode`'s JSON keys.

    ConfigError for a family that transformers' own generate answers for, and for fewer than 4 tokens.
    """
    if tokens < 4:
        raise ConfigError(f"decode={tokens} is too few to measure a speed; generate 4 tokens or more.")
    device = pick_device()
    dtype, plan = pick_dtype(device, config.precision), reading_plan(config, device, plan_chat)
    began = time.perf_counter()
    if random_weights:
        loaded = random_model(config_values(config), spec_for(config), plan, device, dtype)
    else:
        loaded = load_model(config.model, spec_for(config), plan, device, dtype)
    load_s = time.perf_counter() - began
    loaded.model.eval()
    base = _measure(loaded.model, config, tokens, device)
    adapter = attach(loaded.model, config, device, dtype)
    with_adapter = _measure(adapter.model.eval(), config, tokens, device)
    return {
        "decode_tokens_per_s": base["tokens_per_s"],
        "decode_peak_allocated_gb": base["peak_gb"],
        "decode_adapter_tokens_per_s": with_adapter["tokens_per_s"],
        "decode_captured": base["captured"] and with_adapter["captured"],
        "decode_prompt_s": base["prompt_s"],
        "decode_cache_gb": base["cache_gb"],
        "decode_tokens": tokens,
        "load_s": load_s,
    }


def _measure(model: Any, config: TrainConfig, tokens: int, device: torch.device) -> dict[str, Any]:
    """One answer to warm up (kernels are compiled, graphs captured), one that is timed from its first token on."""
    decoder = decoder_for(model)
    if decoder is None:
        raise ConfigError(f"model={config.model!r} is of a family that the fast decoder does not know; use a Llama, Mistral or Qwen model.")
    greedy, never = Sampling(temperature=0.0, max_new_tokens=tokens), threading.Event()
    generator = torch.Generator().manual_seed(0)
    vocabulary, size = decoder.table.shape[0], min(PROMPT, decoder.cache.limit - tokens)
    if size < 1:
        raise ConfigError(f"decode={tokens} is more than the {decoder.cache.limit} tokens that this model reads; generate fewer.")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        prompt = torch.randint(5, vocabulary, (1, size), generator=generator)
        began, times = time.perf_counter(), []
        for _ in generate_ids(model, prompt, tokens, greedy, [], never, decoder):
            times.append(time.perf_counter())
    return {
        "tokens_per_s": (len(times) - 1) / (times[-1] - times[0]),
        "prompt_s": times[0] - began,
        "peak_gb": torch.cuda.max_memory_allocated() / GB if device.type == "cuda" else 0.0,
        "cache_gb": decoder.cache.nbytes / GB,
        "captured": decoder.captured,
    }
