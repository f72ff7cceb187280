"""What each family's template makes of an answer, and random conversations that the family accepts."""

from __future__ import annotations

from hypothesis import strategies as st

END = {
    "demo": "<|im_end|>", "chatml": "<|im_end|>", "llama3": "<|eot_id|>", "qwen": "<|im_end|>", "mistral": "</s>",
    "gemma": "<end_of_turn>", "phi": "<|end|>",
}  # fmt: skip
# (answer, is the last one) -> the text the model must write before the end of the turn
ANSWER = {
    "demo": lambda text, last: text,
    "chatml": lambda text, last: text,
    "llama3": lambda text, last: text.strip(),
    "qwen": lambda text, last: "<think>\n\n</think>\n\n" + text.lstrip("\n") if last else text,
    "mistral": lambda text, last: " " + text.strip(),
    "gemma": lambda text, last: text.strip(),
    "phi": lambda text, last: text,
}
_WORDS = st.sampled_from(["yes", " no ", "\n", "\n\n", "  ", "\t", "Füße", "日本", "🙂", "e\u0301", "<b>", "{{ x }}", "{% if %}", "assistant\n",
                          "<|im_start|>", "<|end|>", "[INST]", "\ufeff", "\u2028", "\r\n", "'s", "12", "\ue0b0", "'''"])  # fmt: skip
_TEXT = st.one_of(
    st.lists(_WORDS, min_size=1, max_size=8).map("".join),
    st.text(alphabet=st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=40),
).filter(lambda text: text.strip() != "")


@st.composite
def chat_strategy(draw, family: str) -> list[dict[str, str]]:
    """One to four turns, sometimes with a system prompt."""
    messages = [{"role": "system", "content": draw(_TEXT)}] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 4))):
        messages.append({"role": "user", "content": draw(_TEXT)})
        messages.append({"role": "assistant", "content": draw(_TEXT)})
    return messages
