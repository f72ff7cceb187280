"""Answers of a tiny model: equal to transformers' own generation, adapter on and off, context, stop, text in pieces."""

import threading
import time

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lowvram_tuner.chat import session as module
from lowvram_tuner.chat.sampling import Sampling
from lowvram_tuner.chat.session import ChatSession
from lowvram_tuner.config import ConfigError

TEMPLATE = (
    "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)


def byte_tokenizer():
    """One token per byte, so that a character of several bytes comes in several tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {c: n for n, c in enumerate(alphabet)} | {"<|end|>": 256}
    raw = Tokenizer(models.BPE(vocabulary, []))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|end|>", pad_token="<|end|>")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=257, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, eos_token_id=256, pad_token_id=256,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(100)  # a fresh model finds all tokens equally likely
    return model


def user(text):
    return [{"role": "user", "content": text}]


def expected_greedy(model, tokenizer, text, n):
    ids = torch.tensor([tokenizer.encode(text)])
    for _ in range(n):
        with torch.no_grad():
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    return ids[0, -n:].tolist()


def test_greedy_equals_the_likeliest_token_without_a_cache(model, tokenizer):
    chat = ChatSession(model, tokenizer)
    expected = expected_greedy(model, tokenizer, "u:hi<|end|>a:", 20)
    expected = expected[: expected.index(256)] if 256 in expected else expected
    text = chat.answer(user("hi"), temperature=0, max_new_tokens=20)
    assert text == tokenizer.decode(expected)
    assert chat.tokens == len(expected) and chat.tokens_per_s > 0 and not chat.stopped_early


def test_the_adapter_can_be_left_out(model, tokenizer):
    from peft import LoraConfig, get_peft_model

    base = ChatSession(model, tokenizer).answer(user("hi"), temperature=0, max_new_tokens=12)
    peft_model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"))
    for name, parameter in peft_model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=2.0)
    chat = ChatSession(peft_model.eval(), tokenizer)
    adapted = chat.answer(user("hi"), temperature=0, max_new_tokens=12)
    assert adapted != base
    assert chat.answer(user("hi"), adapter=False, temperature=0, max_new_tokens=12) == base
    assert chat.answer(user("hi"), temperature=0, max_new_tokens=12) == adapted


def test_system_prompt_and_turns_are_rendered_by_the_template(model, tokenizer, monkeypatch):
    seen = []

    def spy(model, prompt, *_):
        seen.append(tokenizer.decode(prompt[0]))
        return iter(())

    monkeypatch.setattr(module, "generate_ids", spy)
    chat = ChatSession(model, tokenizer)
    chat.answer([*user("one"), {"role": "assistant", "content": "two"}, *user("three")], system="be brief")
    chat.answer(user("one"), system="  ")
    assert seen == ["s:be brief<|end|>u:one<|end|>a:two<|end|>u:three<|end|>a:", "u:one<|end|>a:"]


def test_the_oldest_turns_are_dropped_when_the_context_is_full(model, tokenizer, monkeypatch):
    seen = []
    monkeypatch.setattr(module, "generate_ids", lambda model, prompt, most, *_: seen.append((prompt, most)) or iter(()))
    chat = ChatSession(model, tokenizer)
    turns = [m for n in range(4) for m in (*user(f"question {n} is this"), {"role": "assistant", "content": f"answer {n}"})]
    chat.answer([*turns, *user("and the last?")], system="sys", max_new_tokens=64)
    prompt, most = seen[0]
    text = tokenizer.decode(prompt[0])
    assert text.startswith("s:sys<|end|>u:question 2 is this") and text.endswith("u:and the last?<|end|>a:")
    assert chat.dropped == 4
    assert prompt.shape[1] + most <= 128 and most >= 32
    with pytest.raises(ConfigError, match=r"the message has 20\d tokens; this model reads 128 with its answer"):
        chat.answer(user("x" * 200))


def test_the_answer_never_runs_past_the_context(model, tokenizer):
    chat = ChatSession(model, tokenizer)
    chat._ends = lambda: [300]  # nothing ends it
    chat.answer(user("y" * 60), temperature=0, max_new_tokens=1000)
    assert chat.tokens == 128 - len(tokenizer.encode("u:" + "y" * 60 + "<|end|>a:"))


def test_stop_ends_after_the_current_token(model, tokenizer):
    chat = ChatSession(model, tokenizer)
    chat._ends = lambda: [300]
    pieces = []
    for piece in chat.stream(user("hi"), temperature=0, max_new_tokens=100):
        pieces.append(piece)
        if chat.tokens >= 5:
            chat.stop()
    assert chat.stopped_early and 5 <= chat.tokens <= 8
    assert chat.answer(user("hi"), temperature=0, max_new_tokens=3) and not chat.stopped_early


def test_leaving_the_iteration_ends_the_thread(model, tokenizer):
    before = threading.active_count()
    stream = ChatSession(model, tokenizer).stream(user("hi"), max_new_tokens=100)
    next(stream)
    stream.close()
    assert threading.active_count() == before


@pytest.mark.parametrize("text", ["plain words", "Grüße aus München", "你好，世界", "👩‍🚀 ok", "a\n\nb  c"], ids=range(5))
def test_pieces_never_split_a_character_and_add_up(model, tokenizer, monkeypatch, text):
    ids = tokenizer.encode(text)
    monkeypatch.setattr(module, "generate_ids", lambda *_: iter(ids))
    pieces = list(ChatSession(model, tokenizer).stream(user("x")))
    assert "".join(pieces) == text
    assert not any("\ufffd" in p for p in pieces)
    assert len(pieces) == len(text) if text.isascii() else len(pieces) > 1


def test_an_answer_that_breaks_off_inside_a_character_shows_it(model, tokenizer, monkeypatch):
    ids = tokenizer.encode("ü")[:1]
    monkeypatch.setattr(module, "generate_ids", lambda *_: iter(ids))
    assert ChatSession(model, tokenizer).answer(user("x")) == "\ufffd"


def test_sampling_follows_the_seed_and_the_temperature(model, tokenizer):
    def sample(seed, **options):
        torch.manual_seed(seed)
        return ChatSession(model, tokenizer).answer(user("hi"), max_new_tokens=12, **options)

    assert sample(1, temperature=3.0, top_p=1.0) == sample(1, temperature=3.0, top_p=1.0)
    assert len({sample(n, temperature=3.0, top_p=1.0) for n in range(5)}) == 5
    assert len({sample(n, temperature=3.0, top_p=0.01) for n in range(5)}) == 1


def test_errors_of_the_model_reach_the_caller(model, tokenizer, monkeypatch):
    def broken(**_):
        raise RuntimeError("CUDA error: unspecified launch failure")

    monkeypatch.setattr(model, "generate", broken)
    with pytest.raises(RuntimeError, match="unspecified launch failure"):
        ChatSession(model, tokenizer).answer(user("hi"))


def test_a_full_card_says_what_to_do_and_the_next_answer_comes(model, tokenizer, monkeypatch):
    chat = ChatSession(model, tokenizer)

    def full(*_):
        yield 72
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    with monkeypatch.context() as patched:
        patched.setattr(module, "generate_ids", full)
        with pytest.raises(ConfigError, match="no room for a conversation this long"):
            chat.answer(user("Hello"))
    assert len(chat.answer(user("Hello"), temperature=0.0, max_new_tokens=4)) > 0


def test_a_model_without_a_template_talks_as_it_was_trained(model):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    chat = ChatSession(model, tokenizer)
    text = tokenizer.decode(chat._render([{"role": "system", "content": "sys"}, *user("hi")]))
    assert text == "sys\n\n### User:\nhi\n\n### Assistant:\n"
    assert chat._ends() == [256]


def test_a_template_that_refuses_is_said(model):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% if messages | length > 2 %}{{ raise_exception('too many turns') }}{% endif %}" + TEMPLATE
    with pytest.raises(ConfigError, match=r"refuses the conversation: too many turns"):
        ChatSession(model, tokenizer).answer([*user("a"), {"role": "assistant", "content": "b"}, *user("c")])


def test_bad_sampling_and_conversations_are_refused(model, tokenizer):
    for name, value in {"temperature": -1, "top_p": 0, "max_new_tokens": 0}.items():
        with pytest.raises(ConfigError, match=f"{name}={value} is outside"):
            Sampling(**{name: value})
    with pytest.raises(ConfigError, match=r"temperature='hot' is outside 0\.0 to 5\.0"):
        Sampling(temperature="hot")
    for messages in ([], [{"role": "assistant", "content": "x"}]):
        with pytest.raises(ConfigError, match="last message is not the user's"):
            ChatSession(model, tokenizer).answer(messages)


def test_tokens_per_second_is_that_of_the_tokens(model, tokenizer, monkeypatch):
    def slow(*_):
        for token in tokenizer.encode("abcdef"):
            time.sleep(0.02)
            yield token

    monkeypatch.setattr(module, "generate_ids", slow)
    chat = ChatSession(model, tokenizer)
    chat.answer(user("x"))
    assert 20 < chat.tokens_per_s <= 50.5
