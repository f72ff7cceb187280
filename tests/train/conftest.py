"""What the tests of real runs share."""

import pytest
from tiny_model import make_data, make_model

from lowvram_tuner.config import TrainConfig


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """(folder of a tiny model, file of rows): enough for a run of seconds."""
    folder = tmp_path_factory.mktemp("tiny")
    return make_model(folder / "model"), make_data(folder / "rows.jsonl")


@pytest.fixture
def tiny_run(files, tmp_path):
    """The config of a run on them, which each file of tests gives its lengths."""
    model, data = files
    return TrainConfig(
        model=str(model), dataset=str(data), bits=4, micro_batch_size=2, gradient_accumulation_steps=2, max_seq_length=64, lora_r=4,
        learning_rate=1e-2, precision="fp32", packing=False, compare_prompts=("Hello?",), output_dir=str(tmp_path / "runs"),
    )  # fmt: skip
