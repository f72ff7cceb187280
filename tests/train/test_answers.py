"""The before/after questions: together what one by one the chat answers, by base and by adapter."""

from __future__ import annotations

import pytest
import torch
from tiny_model import byte_tokenizer, make_model

from lowvram_tuner.chat.decode import decoder_for
from lowvram_tuner.chat.session import ChatSession
from lowvram_tuner.train import answers
from lowvram_tuner.train.answers import LONGEST, Questions, _batches
from tests.engine_cases import make_case, make_plan, model_values

PROMPTS = [[{"role": "user", "content": text}] for text in ("Hello?", "What is the engine on your ship called, and who built it?", "x", "Grüße 日本")]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny model whose adapter changes what it says."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM

    plain = LlamaForCausalLM.from_pretrained(make_model(tmp_path_factory.mktemp("model")))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        wrapped = get_peft_model(plain, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter)
    return wrapped.eval()


@pytest.mark.parametrize("room", [1, 200, 10_000], ids=["alone", "some", "all"])
def test_together_they_are_answered_as_one_by_one_in_chat(model, room):
    tokenizer = byte_tokenizer()
    chat = ChatSession(model, tokenizer)
    rows = Questions(PROMPTS, tokenizer).ask(model, room)
    wanted = [[chat.answer(p, adapter=a, temperature=0.0, max_new_tokens=LONGEST) for a in (False, True)] for p in PROMPTS]
    assert [[r["base"], r["adapter"]] for r in rows] == wanted
    assert [r["prompt"] for r in rows] == [p[0]["content"] for p in PROMPTS]
    assert any(base != adapter for base, adapter in wanted)


def test_an_answer_ends_at_the_end_of_turn(model, monkeypatch):
    questions = Questions(PROMPTS[:2], byte_tokenizer())
    end = questions.template.end_id

    def generate(input_ids, **_):
        new = torch.tensor([[72, 105, end, 33], [79, 107, 33, end]])
        return torch.cat([input_ids, new], 1)

    monkeypatch.setattr(type(model), "generate", lambda self, **options: generate(**options))
    decode = questions.template.tokenizer.decode
    assert [row["adapter"] for row in questions.ask(model, 10_000)] == [decode([72, 105]), decode([79, 107, 33])]


def test_the_base_is_asked_once(model, monkeypatch):
    questions, calls = Questions(PROMPTS, byte_tokenizer()), []
    real = Questions._answers
    monkeypatch.setattr(Questions, "_answers", lambda self, *args: calls.append(1) or real(self, *args))
    first, second = questions.ask(model, 10_000), questions.ask(model, 10_000)
    assert first == second and len(calls) == 3


def test_batches_hold_what_there_is_room_for(monkeypatch):
    monkeypatch.setattr(answers, "LONGEST", 10)
    assert list(_batches([30, 5, 200, 6, 40], 100)) == [[1, 3], [0, 4], [2]]
    assert list(_batches([], 100)) == []
    assert list(_batches([500, 500], 1)) == [[0], [1]]


def test_a_question_longer_than_the_model_reads_is_left_out(model):
    prompts = [*PROMPTS[:1], [{"role": "user", "content": "long " * 200}]]
    assert [row["prompt"] for row in Questions(prompts, byte_tokenizer()).ask(model, 10_000)] == ["Hello?"]


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["llama", "gemma2"])  # by the chat's own decoder, and by transformers
def test_wherever_the_model_lies_it_answers_the_same(family):
    tokenizer, rows = byte_tokenizer(), []
    values = model_values(family, False, vocab_size=len(tokenizer), head_dim=16)
    for plan in ({}, {"embeddings_on_host": True, "streamed": 2, "optimizer_on_host": True}):
        _, adapter = make_case(values, 4, make_plan("vram", **plan), "cuda", torch.bfloat16)
        adapter.parameters.mul_(10)
        model = adapter.model.eval()
        assert model.device.type == "cuda" and (decoder_for(model) is None) == (family == "gemma2")
        rows.append(Questions(PROMPTS, tokenizer).ask(model, 10_000))
        assert [row["adapter"] for row in rows[-1]] != [row["base"] for row in rows[-1]]
        chat = ChatSession(model, tokenizer)
        rows[-1].append([chat.answer(p, adapter=True, temperature=0.0, max_new_tokens=LONGEST) for p in PROMPTS])
    assert rows[0] == rows[1]
