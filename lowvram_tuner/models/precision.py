"""Which device and which arithmetic: bf16 from compute capability 8.0, else fp16, fp32 on the CPU. Never by card name."""

from __future__ import annotations

import torch

from lowvram_tuner.config import ConfigError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def pick_device() -> torch.device:
    """The first CUDA card, or the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def pick_dtype(device: torch.device, precision: str = "auto") -> torch.dtype:
    """The dtype of activations and adapter. Raises ConfigError for bf16 on a card without it."""
    if precision != "auto":
        if precision == "bf16" and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
            raise ConfigError("precision='bf16' needs compute capability 8.0 or newer; use 'auto' or 'fp16'.")
        return DTYPES[precision]
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
