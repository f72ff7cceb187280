"""`bench` where there is no card: the same keys, the memory that of the process."""

from __future__ import annotations

import math

import pytest

from lowvram_tuner.config import TrainConfig
from lowvram_tuner.train.bench import bench

DEMO = "HuggingFaceTB/SmolLM2-135M-Instruct"


@pytest.mark.parametrize("bits", [2, 4, 16])
def test_a_shape_is_measured_without_its_weights(monkeypatch, bits):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("lowvram_tuner.hardware.card.read_card", lambda: None)
    found = bench(TrainConfig(model=DEMO, bits=bits, max_seq_length=32), steps=1, random_weights=True)
    assert found["plan"]["fits"] and not found["captured"] and found["kernels"] == found["gpu_ms"] == 0
    assert found["step_ms"] > 0 and found["tokens_per_s"] == pytest.approx(32e3 / found["step_ms"])
    assert found["process_gb"] >= found["load_peak_gb"] > 0.2 and 0.3 < found["predicted_process_gb"] < 3
    assert all(math.isfinite(found[name]) and 5 < found[name] < 20 for name in ("loss_first", "loss_last"))
