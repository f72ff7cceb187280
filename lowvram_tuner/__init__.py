"""LowVRAM Tuner: fine-tune a language model on the GPU you already have."""

__version__ = "0.1.0"
