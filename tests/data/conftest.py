"""Tokenizers for the data tests: the demo model's, and the same one behaving like six other families."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

TEMPLATES = Path(__file__).parent / "templates"
# bos, eos, further special tokens
FAMILIES = {
    "demo": (None, None, []),
    "chatml": (None, None, []),
    "llama3": ("<|begin_of_text|>", "<|eot_id|>", ["<|start_header_id|>", "<|end_header_id|>"]),
    "qwen": (None, None, []),
    "mistral": ("<s>", "</s>", ["[INST]", "[/INST]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"]),
    "gemma": ("<bos>", "<eos>", ["<start_of_turn>", "<end_of_turn>"]),
    "phi": (None, "<|endoftext|>", ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]),
}


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory) -> Path:
    """The demo model's tokenizer as tokenizer.json, which loads quickly."""
    from lowvram_tuner.models.source import load_tokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    load_tokenizer("demo").save_pretrained(folder)
    return folder


def _load(folder: Path, family: str):
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    bos, eos, further = FAMILIES[family]
    named = {k: v for k, v in (("bos_token", bos), ("eos_token", eos)) if v}
    tokenizer.add_special_tokens({**named, "additional_special_tokens": further} if further or named else {})
    if family != "demo":
        tokenizer.chat_template = (TEMPLATES / f"{family}.jinja").read_text(encoding="utf-8")
    return tokenizer


@pytest.fixture(scope="session")
def load_family(tokenizer_folder):
    """A function from a family's name to a fresh tokenizer."""
    return lambda family: _load(tokenizer_folder, family)


@pytest.fixture(scope="session")
def families(load_family):
    """All families' tokenizers by name; not to be changed."""
    return {name: load_family(name) for name in FAMILIES}


@pytest.fixture
def tokenizer(families):
    """The demo model's tokenizer; not to be changed."""
    return families["demo"]


@pytest.fixture
def write(tmp_path):
    """A function that writes a file: text as UTF-8, bytes as they are, a list as JSON lines."""

    def written(name: str, content) -> str:
        path = tmp_path / name
        if isinstance(content, list):
            content = "".join(json.dumps(row) + "\n" for row in content)
        path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
        return str(path)

    return written


@pytest.fixture
def prepared(tmp_path, tokenizer):
    """A function that prepares a dataset with the demo tokenizer; options as keywords."""
    from lowvram_tuner.config import TrainConfig
    from lowvram_tuner.data.prepare import prepare

    def run(dataset: str, using=None, **options):
        options = {"output_dir": str(tmp_path / "runs"), "held_out": 0.0, **options}
        return prepare(TrainConfig(dataset=dataset, **options), using or tokenizer)

    return run
