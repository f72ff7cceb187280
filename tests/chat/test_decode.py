"""The fast decoder says what transformers' generate says, token for token, and keeps its cache straight."""

from __future__ import annotations

import os
import threading

import pytest
import torch

from lowvram_tuner.chat import cache as cache_module
from lowvram_tuner.chat import decode
from lowvram_tuner.chat.cache import bucket, cache_bytes
from lowvram_tuner.chat.decode import Decoder, decoder_for, next_token
from lowvram_tuner.chat.sampling import Sampling
from lowvram_tuner.chat.session import ChatSession, generate_ids
from lowvram_tuner.config import ConfigError
from tests.engine_cases import VOCABULARY, make_case, make_plan, model_values
from tests.tiny_model import byte_tokenizer

GREEDY = Sampling(temperature=0.0)
FAMILIES = ("llama", "qwen2", "qwen3", "mistral")


def case(family="llama", bits=16, tied=True, **extra):
    """(PEFT model with a strong adapter, prompt) of a tiny model whose answers depend on what was read."""
    values = model_values(family, tied, max_position_embeddings=512, **({"sliding_window": None} if family == "mistral" else {}), **extra)
    loaded, adapter = make_case(values, bits=bits, plan=make_plan())
    with torch.no_grad():
        if family == "qwen2":
            for layer in loaded.layers:
                layer.self_attn.q_proj.base_layer.bias.normal_(generator=torch.Generator().manual_seed(3))
        loaded.model.model.embed_tokens.weight.mul_(20)
        adapter.parameters.mul_(4)
    generator = torch.Generator().manual_seed(5)
    return adapter.model.eval(), torch.randint(0, VOCABULARY, (1, 30), generator=generator)


def collect(decoder, prompt, most=24, sampling=GREEDY, ends=(), stop=None):
    return list(decoder.generate(prompt[0].tolist(), most, sampling, list(ends), stop or threading.Event()))


def by_transformers(model, prompt, most=24):
    return list(generate_ids(model, prompt, most, GREEDY, [], threading.Event()))


@pytest.mark.parametrize("bits, tied", [(16, True), (4, False), (8, True)])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_those_of_transformers(family, bits, tied):
    model, prompt = case(family, bits, tied)
    decoder = decoder_for(model)
    adapted = by_transformers(model, prompt)
    assert collect(decoder, prompt) == adapted and len(set(adapted)) > 5
    with model.disable_adapter():
        base = by_transformers(model, prompt)
        assert collect(decoder, prompt) == base != adapted
    assert collect(decoder, prompt) == adapted


def test_an_adapter_on_some_linears_and_none_at_all():
    values = model_values("llama", max_position_embeddings=512)
    _, adapter = make_case(values, target_modules=("q_proj", "v_proj", "down_proj"))
    adapter.parameters.mul_(20)
    model, prompt = adapter.model.eval(), torch.arange(7, 37)[None]
    assert collect(decoder_for(model), prompt) == by_transformers(model, prompt)
    plain = model.unload()
    decoder = decoder_for(plain)
    assert not decoder.adapted and collect(decoder, prompt) == by_transformers(plain, prompt)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="the kernels are compiled here")
@pytest.mark.parametrize("family, targets", [("qwen2", None), ("qwen3", ("q_proj", "v_proj", "down_proj"))])
def test_the_cards_kernels_say_the_same_interpreted(family, targets, monkeypatch):
    """The path of a card, on the CPU: fused products of packed codes, thin adapters, attention over the static cache."""
    from kernels import matmul_nf4

    monkeypatch.setattr(matmul_nf4, "gemv_rows", lambda rows: 64)  # the interpreter's time goes by programs
    extra = {"target_modules": targets} if targets else {}
    values = model_values(family, False, max_position_embeddings=512)
    loaded, adapter = make_case(values, bits=4, **extra)
    adapter.parameters.mul_(10)
    loaded.model.model.embed_tokens.weight.mul_(20)
    model, prompt = adapter.model.eval(), torch.arange(7, 37)[None]
    decoder = Decoder(loaded.model, fast=True)
    expected = by_transformers(model, prompt, 4)
    assert collect(decoder, prompt, 4) == expected
    with model.disable_adapter():
        assert collect(decoder, prompt, 4) == by_transformers(model, prompt, 4) != expected


def test_stacked_adapters_are_views_where_they_can_be():
    loaded, adapter = make_case(model_values("llama", max_position_embeddings=512), bits=4)
    layer = Decoder(loaded.model, fast=True).layers[1]
    inside = range(adapter.parameters.data_ptr(), adapter.parameters.data_ptr() + adapter.parameters.nbytes)
    for group, out in ((layer.qkv, 128), (layer.gate_up, 320), (layer.down, 64)):
        assert group.thin.a.data_ptr() in inside and group.thin.b.data_ptr() in inside
        assert group.thin.b.shape == (out, 4)


def test_long_prompts_are_read_in_chunks_and_the_cache_grows(monkeypatch):
    model, _ = case()
    prompt = torch.randint(0, VOCABULARY, (1, 45), generator=torch.Generator().manual_seed(6))
    expected = by_transformers(model, prompt, 60)
    monkeypatch.setattr(decode, "CHUNK", 16)
    monkeypatch.setattr(decode, "ROOM", 4)
    monkeypatch.setattr(cache_module, "SMALLEST", 16)
    decoder, capacities = decoder_for(model), []
    ids = []
    for token in decoder.generate(prompt[0].tolist(), 60, GREEDY, [], threading.Event()):
        ids.append(token)
        capacities.append(decoder.cache.capacity)
    assert ids == expected
    assert (capacities[0], capacities[-1]) == (64, 128)
    assert decoder.cache.nbytes == cache_bytes(104, 3, 2, 16, 4) == 128 * 3 * 2 * 2 * 16 * 4


def test_what_the_cache_holds_is_not_read_again(monkeypatch):
    model, prompt = case()
    decoder, read = decoder_for(model), []
    walk = Decoder._walk
    monkeypatch.setattr(Decoder, "_walk", lambda self, ids, *rest: read.append(len(ids)) or walk(self, ids, *rest))
    first = collect(decoder, prompt, 10)
    assert read == [30] + [1] * 9
    longer = torch.cat([prompt, torch.tensor([first]), torch.tensor([[5, 6, 7]])], 1)
    read.clear()
    assert collect(decoder, longer, 4) == by_transformers(model, longer, 4)
    assert read[:1] == [4]  # the last token of the answer was never put in, and three are new
    read.clear()
    with model.disable_adapter():
        assert collect(decoder, longer, 4) == by_transformers(model, longer, 4)
    assert read[:1] == [43]
    read.clear()
    collect(decoder, prompt[:, 5:], 1)
    assert read == [25]


def test_an_answer_that_is_no_number_is_refused():
    model, prompt = case()
    decoder = decoder_for(model)
    next(p for n, p in model.named_parameters() if "lora_A" in n).data.fill_(torch.inf)
    with pytest.raises(ConfigError, match="is inf or nan: get the adapter again"):
        collect(decoder, prompt)
    with model.disable_adapter():
        assert len(collect(decoder, prompt)) == 24


def test_ends_and_stop():
    model, prompt = case()
    decoder = decoder_for(model)
    tokens = collect(decoder, prompt)
    cut = tokens.index(tokens[9])
    assert collect(decoder, prompt, ends=[tokens[9]]) == tokens[:cut]
    stop, got = threading.Event(), []
    for token in decoder.generate(prompt[0].tolist(), 24, GREEDY, [], stop):
        got.append(token)
        if len(got) == 4:
            stop.set()
    assert got == tokens[:4]
    left = decoder.generate(prompt[0].tolist(), 24, GREEDY, [], threading.Event())
    assert next(left) == tokens[0]
    left.close()
    assert collect(decoder, prompt) == tokens


def test_a_session_uses_it(monkeypatch):
    model, _ = case()
    chat = ChatSession(model, byte_tokenizer())
    assert isinstance(chat.decoder, Decoder)
    monkeypatch.setattr(model, "generate", None)
    text = chat.answer([{"role": "user", "content": "hi"}], temperature=0, max_new_tokens=12)
    assert chat.tokens > 0 and text == chat.answer([{"role": "user", "content": "hi"}], temperature=0, max_new_tokens=12)
    chat.answer([{"role": "user", "content": "hi"}], adapter=False, max_new_tokens=3)


def test_models_that_are_left_to_transformers():
    windowed = make_case(model_values("mistral", max_position_embeddings=512, sliding_window=64))[1].model
    assert decoder_for(windowed) is None
    gemma = make_case(model_values("gemma2", head_dim=16))[1].model
    assert decoder_for(gemma) is None


def test_layers_that_are_streamed():
    values = model_values("llama", False, max_position_embeddings=512)
    loaded, adapter = make_case(values, bits=4, plan=make_plan(streamed=3))
    adapter.parameters.mul_(10)
    model, prompt = adapter.model.eval(), torch.arange(7, 37)[None]
    decoder = decoder_for(model)
    assert loaded.ring is not None and decoder._ring is loaded.ring and not decoder._graphs.enabled
    assert collect(decoder, prompt, 6) == by_transformers(model, prompt, 6)


def test_sampling_draws_from_the_nucleus_in_proportion():
    logits = torch.tensor([[0.0, 2.0, -1.0, 3.0, 1.0]])
    p = logits[0].softmax(0)
    torch.manual_seed(0)
    drawn = torch.bincount(torch.cat([next_token(logits, Sampling(1.0, 1.0)) for _ in range(4000)]), minlength=5) / 4000
    assert (drawn - p).abs().max() < 0.025  # three standard deviations of the likeliest
    kept = torch.cat([next_token(logits, Sampling(1.0, 0.9)) for _ in range(400)])
    assert set(kept.tolist()) == {3, 1, 4}  # 0.64 + 0.23 < 0.9, so the third is the last one in
    assert set(torch.cat([next_token(logits, Sampling(5.0, 0.01)) for _ in range(50)]).tolist()) == {3}
    assert next_token(logits, GREEDY).tolist() == [3]


def test_buckets():
    assert [bucket(n) for n in (0, 1, 512, 513, 1024, 1025)] == [512, 512, 512, 1024, 1024, 2048]
    assert cache_bytes(600, 32, 8, 128) == 1024 * 32 * 2 * 8 * 128 * 2  # Llama 8B: 134 MB
    held = cache_module.Cache(1, 1, 4, 700, torch.float32, torch.device("cpu"))
    assert held.hold(600) and held.capacity == 700 and not held.hold(700)


def test_the_demo_says_what_it_said_before(demo_gguf):
    from lowvram_tuner.models.load import load_for_chat

    model, tokenizer = load_for_chat("demo", 16, "auto", None, "cpu")
    prompt = torch.tensor([tokenizer.apply_chat_template([{"role": "user", "content": "Name three colours."}], add_generation_prompt=True)["input_ids"]])
    assert collect(decoder_for(model), prompt, 12) == by_transformers(model, prompt, 12)


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [4, 16])
@pytest.mark.parametrize("family", FAMILIES)
def test_graphs_on_a_card_say_what_eager_steps_say(family, bits):
    values = model_values(family, False, max_position_embeddings=2048, **({"sliding_window": None} if family == "mistral" else {}))
    loaded, adapter = make_case(values, bits=bits, device="cuda", dtype=torch.float16)
    loaded.model.model.embed_tokens.weight.mul_(20)
    adapter.parameters.mul_(10)
    model, prompt = adapter.model.eval(), torch.arange(7, 37)[None]
    decoder, eager = decoder_for(model), decoder_for(model)
    eager._graphs.enabled = False
    for _ in range(2):
        assert collect(decoder, prompt, 600) == collect(eager, prompt, 600)  # through a move of the cache
        with model.disable_adapter():
            assert collect(decoder, prompt, 40) == collect(eager, prompt, 40)
    assert decoder.captured and not eager.captured and decoder.cache.capacity == 1024


@pytest.mark.gpu
def test_a_step_that_cannot_be_captured_stays_eager(caplog):
    _, adapter = make_case(model_values("llama", max_position_embeddings=512), bits=4, device="cuda", dtype=torch.float16)
    decoder, prompt = decoder_for(adapter.model.eval()), torch.arange(7, 37)[None]
    expected = collect(decoder, prompt, 8)
    again, one = decoder_for(adapter.model), Decoder._one
    again._one = lambda adapted: (again._token.item(), one(again, adapted))[1]
    assert collect(again, prompt, 8) == expected and not again.captured
    assert "cannot be captured" in caplog.text


def test_a_cache_whose_move_ran_out_of_memory_can_be_moved_again(monkeypatch):
    cache = cache_module.Cache(3, 2, 4, 4096, torch.float32, torch.device("cpu"))
    cache.hold(10)
    for layer in cache.layers:
        layer.normal_()
    kept = [layer[:512].clone() for layer in cache.layers]
    original, calls = torch.Tensor.new_empty, []

    def scarce(self, *size, **options):
        calls.append(size)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return original(self, *size, **options)

    monkeypatch.setattr(torch.Tensor, "new_empty", scarce)
    with pytest.raises(torch.OutOfMemoryError):
        cache.hold(600)
    assert cache.capacity == 512
    assert cache.hold(600) and cache.capacity == 1024
    assert all(torch.equal(layer[:512], old) and len(layer) == 1024 for layer, old in zip(cache.layers, kept, strict=True))
