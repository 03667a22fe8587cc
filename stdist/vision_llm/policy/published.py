"""Shapes of published bases, facts of their ``config.json``: a run is planned in seconds and without a network."""

from dataclasses import dataclass

from transformers import Qwen2_5_VLConfig


@dataclass(frozen=True)
class Published:
    """The decoder of a Qwen2.5-VL; the vision towers of all are one but for the width that they end in."""

    d: int
    mlp: int
    layers: int
    heads: int
    kv_heads: int
    tokens: int
    tied: bool


PUBLISHED = {
    "Qwen/Qwen2.5-VL-3B-Instruct": Published(2048, 11008, 36, heads=16, kv_heads=2, tokens=151_936, tied=True),
    "Qwen/Qwen2.5-VL-7B-Instruct": Published(3584, 18944, 28, heads=28, kv_heads=4, tokens=152_064, tied=False),
}


def published_config(name: str) -> Qwen2_5_VLConfig | None:
    """The configuration of a published base; None of one whose shape is not known here."""
    if (shape := PUBLISHED.get(name)) is None:
        return None
    text = {
        "hidden_size": shape.d,
        "intermediate_size": shape.mlp,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "vocab_size": shape.tokens,
        "tie_word_embeddings": shape.tied,
    }
    vision = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": shape.d}
    return Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=shape.tied)
