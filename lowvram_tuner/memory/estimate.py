"""What a run takes, byte by byte, from the model's shape and the settings alone. No torch, microseconds.

Every function is the size of one component and names its formula. T is the tokens of one pass (batch x sequence length),
H the hidden size, I the MLP's inner size, Q = heads x head_dim, KV = kv_heads x head_dim, N the layers. The engine
(`train/fused_layer.py`, `train/loss.py`) allocates what stands here; `tests/benchmarks/bench_plan.py` compares both on a card.
"""

from __future__ import annotations

from dataclasses import dataclass

from lowvram_tuner.models.catalogue import ModelShape
from lowvram_tuner.quant.registry import quant_format, resolve
from lowvram_tuner.quant.spec import QuantSpec

ALIGN = 512  # the caching allocator rounds every block up to this
CPU_TILE = 64 * 2**20
LOSS_ROWS = 2048  # rows of hidden states that meet one tile of the head at a time


@dataclass(frozen=True)
class Work:
    """The settings that size a run. `item` is the bytes of one activation or adapter value (2 on a card, 4 on the CPU)."""

    shape: ModelShape
    spec: QuantSpec
    tokens: int
    lora_r: int
    targets: tuple[str, ...]
    item: int = 2

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

    def saved_bytes(self, level: str) -> int:
        """What one layer keeps from forward to backward.

        input: x = T H. attention: + attention's output T Q, its log-sum-exp T heads (fp32) and the residual T H.
        all: + q, k, v = T (Q + 2 KV), gate and up = T 2 I.
        """
        s, t = self.shape, self.tokens
        size = t * s.hidden_size * self.item
        if level in ("attention", "all"):
            size += t * (self.q + s.hidden_size) * self.item + t * s.num_attention_heads * 4
        if level == "all":
            size += t * (self.q + 2 * self.kv + 2 * s.intermediate_size) * self.item
        return size

    def work_bytes(self, mlp_chunk: int) -> int:
        """The most that the backward of one layer holds beyond what was saved: the larger of its two halves.

        MLP (C tokens at a time): gate, up and their product 3 C I, input and its gradient 2 C H, beside q k v, attention
        output, residual and two gradients. Attention: q k v and their gradients, output and its gradient, and what flash
        attention's backward holds (fp32 accumulator of dq, dk and dv for every head).
        """
        s, t, c = self.shape, self.tokens, min(mlp_chunk, self.tokens)
        h = s.hidden_size
        qkv = t * (self.q + 2 * self.kv)
        mlp = self.item * (t * (3 * h + self.q) + qkv + c * (3 * s.intermediate_size + 2 * h))
        attention = self.item * (t * (4 * h + 3 * self.q) + 2 * qkv) + t * self.q * 8
        return max(mlp, attention)

    def loss_bytes(self, scratch: int) -> int:
        """Hidden states, their fp32 gradient accumulator, label rows (10 bytes a value), and one tile of logits twice."""
        h, rows = self.shape.hidden_size, min(self.tokens, LOSS_ROWS)
        tile = min(self.shape.vocab_size, max(1, scratch // (h * self.item)))
        return self.tokens * h * (4 + 3 * self.item) + rows * tile * (self.item + 4)


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
