"""A model of a real shape with random 16-bit weights, as an ordinary folder: what loading and the peers are measured on.

    python tests/benchmarks/random_checkpoint.py meta-llama/Llama-3.1-8B-Instruct FOLDER [--text FILE] [--layers N]

Every layer holds the same random numbers: they are made once and written under each layer's names, one file per layer. The
tokenizer is a byte-level BPE learned from a text, so that nothing is downloaded; its chat format is ChatML.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from lowvram_tuner.data.sources import DEMO_FILE
from lowvram_tuner.models.catalogue import ModelShape, shape_of

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
VOCABULARY = 16384
READY = "ready"  # written last


def make(model: str, folder: Path, text: Path | None = None, layers: int | None = None, device: str | None = None) -> Path:
    """The folder of a catalogue model's shape, made unless it is there complete. Returns it."""
    if (folder / READY).is_file():
        return folder
    shape = shape_of(model)
    layers = layers or shape.num_hidden_layers
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    write_config(shape, layers, folder)
    write_tokenizer(folder, text or DEMO_FILE, min(VOCABULARY, shape.vocab_size))
    write_weights(shape, layers, folder, device)
    (folder / READY).write_text("complete")
    return folder


def write_config(shape: ModelShape, layers: int, folder: Path) -> None:
    from transformers import AutoConfig

    values = {k: v for k, v in asdict(shape).items() if k not in ("name", "family", "attention_bias")} | {"num_hidden_layers": layers}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = AutoConfig.for_model(shape.family, **values, **ids)
    kind = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}[shape.family]
    config.architectures, config.dtype = [f"{kind}ForCausalLM"], "bfloat16"
    config.save_pretrained(folder)


def write_tokenizer(folder: Path, text: Path, size: int) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False)
    core.train_from_iterator(text.read_text(encoding="utf-8").splitlines(), trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token=SPECIAL[0], bos_token=SPECIAL[1], eos_token=SPECIAL[2])
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)


def write_weights(shape: ModelShape, layers: int, folder: Path, device: str | None) -> None:
    """One file of tables and one per layer, bf16, with the index that names them."""
    import torch
    from safetensors.torch import save_file

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator(device).manual_seed(0)

    def random(*size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.bfloat16, device=device).normal_(0, 0.02, generator=generator).cpu()

    layer = {name: random(*size) for name, size in layer_tensors(shape)}
    layer |= {name: torch.ones(size, dtype=torch.bfloat16) for name, size in norm_tensors(shape)}
    tables = {"model.embed_tokens.weight": random(shape.vocab_size, shape.hidden_size)}
    tables["model.norm.weight"] = torch.ones(shape.hidden_size, dtype=torch.bfloat16)
    if not shape.tie_word_embeddings:
        tables["lm_head.weight"] = random(shape.vocab_size, shape.hidden_size)
    index: dict[str, str] = {}
    files = [tables, *({f"model.layers.{n}.{name}": t for name, t in layer.items()} for n in range(layers))]
    for n, tensors in enumerate(files):
        name = f"model-{n + 1:05d}-of-{len(files):05d}.safetensors"
        save_file(tensors, folder / name, metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, name)
    total = sum(t.nbytes for tensors in files for t in tensors.values())
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": index})
    (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")


def layer_tensors(shape: ModelShape) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names within a layer and sizes of its linears, and of q's, k's and v's biases where the family has them."""
    for name, size in shape.linears().items():
        place = "self_attn" if name in ("q_proj", "k_proj", "v_proj", "o_proj") else "mlp"
        yield f"{place}.{name}.weight", size
        if shape.attention_bias and name in ("q_proj", "k_proj", "v_proj"):
            yield f"{place}.{name}.bias", size[:1]


def norm_tensors(shape: ModelShape) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "input_layernorm.weight", (shape.hidden_size,)
    yield "post_attention_layernorm.weight", (shape.hidden_size,)
    if shape.family == "qwen3":
        yield "self_attn.q_norm.weight", (shape.head_dim,)
        yield "self_attn.k_norm.weight", (shape.head_dim,)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--text", type=Path, help="what the tokenizer is learned from; default the demo's data")
    parser.add_argument("--layers", type=int, help="fewer layers than the model has")
    args = parser.parse_args()
    print(make(args.model, args.folder, args.text, args.layers))
