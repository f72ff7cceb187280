"""What a run takes, byte by byte, from the model's shape and the settings alone. No torch, microseconds.

Every function is the size of one component and names its formula. T is the tokens of one pass (batch x sequence length),
H the hidden size, I the MLP's inner size, Q = heads x head_dim, KV = kv_heads x head_dim, N the layers. The engine
(`train/fused_layer.py`, `train/loss.py`) allocates what stands here; `tests/benchmarks/bench_plan.py` compares both on a card.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from lowvram_tuner.models.catalogue import ModelShape
from lowvram_tuner.quant.registry import quant_format, resolve
from lowvram_tuner.quant.spec import QuantSpec

ALIGN = 512  # the caching allocator rounds every block up to this
HEAD_NORM_FAMILIES = ("qwen3",)  # q and k are normed per head, and kept before and after
VOCABULARY_TILE = 16384  # rows of a head that needs no dequantizing met at a time
MLP, ATTENTION = ("gate_proj", "up_proj", "down_proj"), ("q_proj", "k_proj", "v_proj", "o_proj")
LEAVING = 3  # chunks of gate and up that may be on their way to the host at once
LOSS_ROWS = 2048  # rows of hidden states that meet one tile of the head at a time
SEQUENCE_ROWS = 128  # by which flash attention's backward pads its accumulator, for every sequence of a pass


@dataclass(frozen=True)
class Work:
    """The settings that size a run. `item` is the bytes of one activation or adapter value (2 on a card, 4 on the CPU);
    `sequences`: the most examples that lie in one pass."""

    shape: ModelShape
    spec: QuantSpec
    tokens: int
    lora_r: int
    targets: tuple[str, ...]
    item: int = 2
    sequences: int = 1

    @property
    def q(self) -> int:
        return self.shape.num_attention_heads * self.shape.head_dim

    @property
    def kv(self) -> int:
        return self.shape.num_key_value_heads * self.shape.head_dim

    def layer_bytes(self) -> int:
        """One slab: the packed linears of a decoder layer."""
        return linear_bytes(self.spec, tuple(self.shape.linears().values()))

    def norm_bytes(self) -> int:
        """RMSNorm weights and biases of all layers and the final norm: N (2 H + Q + 2 KV [+ 2 head_dim]) + H."""
        s = self.shape
        per_layer = 2 * s.hidden_size + (self.q + 2 * self.kv if s.attention_bias else 0)
        return self.item * (s.num_hidden_layers * (per_layer + 2 * s.head_dim) + s.hidden_size)

    def adapter_parameters(self) -> int:
        """Sum over the target linears of r (in + out), times N."""
        sizes = [self.lora_r * (o + i) for name, (o, i) in self.shape.linears().items() if name in self.targets]
        return sum(sizes) * self.shape.num_hidden_layers

    def embedding_bytes(self) -> int:
        """V H at 16 bit (32 on the CPU)."""
        return self.item * self.shape.vocab_size * self.shape.hidden_size

    def head_bytes(self, bits: int) -> int:
        """The output matrix [V, H] at 16, 8 or 4 bits; nothing when it is the embedding."""
        if bits == 16:
            return 0 if self.shape.tie_word_embeddings else self.embedding_bytes()
        return linear_bytes(resolve(bits), ((self.shape.vocab_size, self.shape.hidden_size),))

    @property
    def rotated(self) -> int:
        """Values of q and k a token that exist twice, before and after their norm: Q + KV where a family has it, else 0."""
        return self.q + self.kv if self.shape.family in HEAD_NORM_FAMILIES else 0

    def saved_bytes(self, level: str) -> int:
        """What one layer keeps from forward to backward.

        input: x = T H. attention: + attention's output T Q, its log-sum-exp T heads (fp32) and the residual T H.
        all: + q, k, v = T (Q + 2 KV), their rotated copies, gate and up = T 2 I.
        """
        s, t = self.shape, self.tokens
        size = t * s.hidden_size * self.item
        if level in ("attention", "all"):
            size += t * (self.q + s.hidden_size) * self.item + t * s.num_attention_heads * 4
        if level == "all":
            size += t * (self.q + 2 * self.kv + self.rotated + 2 * s.intermediate_size) * self.item
        return size

    def position_bytes(self) -> int:
        """Sine and cosine of every position: T 2 head_dim."""
        return 2 * self.tokens * self.shape.head_dim * self.item

    def kept_work_bytes(self) -> int:
        """The backward of a layer that kept everything: MLP T (2 H + I) and what the format allocates, or attention less the
        gate and up it has freed."""
        s = self.shape
        mlp = self.tokens * (2 * s.hidden_size + s.intermediate_size) * self.item + self.format_bytes(self.tokens, *MLP)
        attention = self.tokens * (s.hidden_size - 2 * s.intermediate_size) * self.item + self._attention_gradients()
        return max(mlp, attention)

    def chunks(self, mlp_chunk: int) -> int:
        """How many chunks of at most that many tokens a pass has."""
        return -(-self.tokens // min(mlp_chunk, self.tokens))

    def gate_up_bytes(self, mlp_chunk: int) -> int:
        """Gate and up of one chunk: C 2 I."""
        return min(mlp_chunk, self.tokens) * 2 * self.shape.intermediate_size * self.item

    def recompute_work_bytes(self, mlp_chunk: int, away: bool = False) -> int:
        """The backward of a layer that computes everything again, beyond its input: the larger of its two halves.

        MLP, C tokens at a time: C (H + 3 I) beside gradient, residual, attention output, q k v = T (2 H + Q + Q + 2 KV).
        Attention: gradient, q k v and output = T (H + 2 Q + 2 KV) and what its own backward holds. Beside either stands what
        the format allocates for one product.
        """
        s, c = self.shape, min(mlp_chunk, self.tokens)
        h, qkv = s.hidden_size, self.q + 2 * self.kv + self.rotated
        mlp = (self.tokens * (2 * h + self.q + qkv) + c * (h + 3 * s.intermediate_size)) * self.item + self.format_bytes(c, *MLP)
        own = max(self._attention_gradients(), self.format_bytes(self.tokens, *ATTENTION))
        backward = max(mlp, self.tokens * (h + self.q + qkv) * self.item + own)
        if not away:
            return backward
        chunk = self.gate_up_bytes(mlp_chunk)
        forward = (2 * self.tokens * h + c * (2 * h + 3 * s.intermediate_size)) * self.item + self.format_bytes(c, *MLP)
        return max(backward + chunk, forward + min(LEAVING, self.chunks(mlp_chunk)) * chunk)

    def format_bytes(self, tokens: int, *names: str) -> int:
        """What the format itself allocates for a product of one of these linears with `tokens` rows (quip's rotated rows)."""
        fmt, sizes = quant_format(self.spec), self.shape.linears()
        return max(fmt.work_bytes(tokens, *sizes[name], self.item) for name in names)

    def _attention_gradients(self) -> int:
        """Attention's backward: the output's gradient Q, dq, dk and dv of every head 3 Q, dk and dv summed over the heads that
        share them 2 KV; and in fp32 an accumulator of dq and a sum a head, for the padded sequences."""
        s = self.shape
        shared = 2 * self.kv if s.num_key_value_heads != s.num_attention_heads else 0
        padded = self.tokens + SEQUENCE_ROWS * self.sequences
        return self.tokens * (4 * self.q + shared) * self.item + padded * (self.q + s.num_attention_heads) * 4

    def loss_bytes(self, scratch: int) -> int:
        """Hidden states, normed and label rows, the fp32 accumulator: T H (4 items + 4 bytes); then the larger of one tile
        of logits with its product, and the final gradient's fp32 temporaries."""
        h, rows = self.shape.hidden_size, min(self.tokens, LOSS_ROWS)
        tile = min(self.shape.vocab_size, max(1, scratch // (h * self.item)) if scratch else VOCABULARY_TILE)
        return self.tokens * h * (4 * self.item + 4) + max(rows * (tile + h) * self.item, self.tokens * h * (8 + self.item))


@lru_cache(maxsize=256)
def linear_bytes(spec: QuantSpec, shapes: tuple[tuple[int, int], ...]) -> int:
    """Packed bytes of linears, each tensor rounded up to the slab's alignment."""
    fmt = quant_format(spec)
    total = 0
    for out_features, in_features in shapes:
        total += sum(-(-t.nbytes // ALIGN) * ALIGN for t in fmt.layout(out_features, in_features).values())
    return total


def optimizer_bytes(parameters: int, state_bits: int, item: int) -> int:
    """AdamW's two moments at 8 or 32 bit, and the low half of the master weights when these are 16 bit."""
    moments = 2 * parameters if state_bits == 8 else 8 * parameters
    return moments + (2 * parameters if item == 2 else 0)
