"""Floating-point operations a decoder needs: the limit of what a prefix tree can gain, counted and not measured.

A multiplication and its addition are two. Backward of a product with a frozen matrix costs its forward once more (the
gradient of the input), of any other product twice more. What an implementation computes again is not needed.
"""

from dataclasses import dataclass

from transformers import PreTrainedConfig


@dataclass(frozen=True)
class Window:
    """Tokens of one window: ``shared``, of each of ``cells`` its ``prompt``, and ``written`` by each candidate."""

    shared: int
    cells: int
    prompt: int
    candidates: int
    written: int

    @property
    def leaves(self) -> int:
        return self.cells * self.candidates

    @property
    def read(self) -> int:
        """Tokens of a candidate that are read: the last one is only predicted."""
        return self.written - 1

    @property
    def tree_tokens(self) -> int:
        return self.shared + self.cells * self.prompt + self.leaves * self.read

    @property
    def sample_tokens(self) -> int:
        return self.leaves * (self.shared + self.prompt + self.read)

    @property
    def tree_keys(self) -> int:
        """Σ over the tree's tokens of the keys each attends to."""
        v, t, k = self.shared, self.prompt, self.read
        return _causal(v) + self.cells * (t * v + _causal(t)) + self.leaves * (k * (v + t) + _causal(k))

    @property
    def sample_keys(self) -> int:
        return self.leaves * _causal(self.shared + self.prompt + self.read)


def _causal(tokens: int) -> int:
    return tokens * (tokens + 1) // 2


@dataclass(frozen=True)
class Flops:
    """Of one pass: ``training`` with a frozen base, LoRA of rank ``lora_r`` and trainable head rows, or inference."""

    config: PreTrainedConfig
    training: bool
    lora_r: int = 0

    def total(self, tokens: int, keys: int, predicted: int, head_rows: int) -> int:
        c = self.config
        head_dim = c.hidden_size // c.num_attention_heads
        q, kv = c.num_attention_heads * head_dim, c.num_key_value_heads * head_dim
        d, mlp = c.hidden_size, c.intermediate_size
        projections = [(d, q), (d, kv), (d, kv), (q, d), (d, mlp), (d, mlp), (mlp, d)]
        linear = 2 * sum(a * b for a, b in projections) * c.num_hidden_layers
        lora = 2 * self.lora_r * sum(a + b for a, b in projections) * c.num_hidden_layers
        attention = 4 * q * c.num_hidden_layers
        head = 2 * d * head_rows
        frozen, trained = (2, 3) if self.training else (1, 1)
        per_token = frozen * linear + trained * lora
        return tokens * per_token + trained * (keys * attention + predicted * head)
