"""Embeddings and head weights of the numerals: parameters of their own beside a frozen text vocabulary.

The base model's matrices are never resized or copied: a numeral's vector is looked up at ``id − first_id`` in
``[n, d]`` matrices that train while those of the 152 k text tokens stay as they were. They start from what their
numeral says, its digits, sign, exponent and log-magnitude, not from noise; docs/decisions.md has what that buys.
"""

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from stdist.numerals import Vocabulary
from stdist.vision_llm.kernels.embedding import embedding

# Periods, in decades of magnitude, of the sine and cosine features: the longest orders the whole range −4…6, the
# shortest separates neighbouring two-digit mantissas.
PERIODS = (20.0, 10.0, 5.0, 2.5, 1.25, 0.6, 0.3, 0.15)


class NumeralEmbeddings(nn.Module):
    """Trainable weights of ``n`` numerals, ``input`` for the embedding and ``output`` for the head, each ``[n, d]``."""

    def __init__(self, embedding: Float[Tensor, "n d"], head: Float[Tensor, "n d"]):
        super().__init__()
        self.input = nn.Parameter(embedding)
        self.output = nn.Parameter(head)

    def embed(self, ids: Int[Tensor, "*batch"], text: nn.Embedding, first_id: int) -> Float[Tensor, "*batch d"]:
        """Embeddings of a mixture of text ids (below ``first_id``) and numeral ids."""
        is_numeral = ids >= first_id
        of_text = text(ids.masked_fill(is_numeral, 0))
        of_numerals = embedding((ids - first_id).clamp(min=0), self.input)
        return torch.where(is_numeral.unsqueeze(-1), of_numerals.to(of_text.dtype), of_text)


def initial_embeddings(vocabulary: Vocabulary, digits: Float[Tensor, "10 d"], seed: int) -> Float[Tensor, "n d"]:
    """Vectors that say what each numeral is worth, scaled like ``digits``, those of the text tokens 0–9.

    Half of a vector's energy is exact (digits bound to their places, exponent, sign, number of digits), half is smooth
    (sines and cosines of log10|v|, times the sign), so that neighbours in value are neighbours in space.
    """
    digits = digits.detach().float()
    d = digits.shape[1]
    generator = torch.Generator().manual_seed(seed)
    mantissa, exponent = map(torch.from_numpy, vocabulary.mantissa_exponent(np.arange(len(vocabulary))))
    magnitude = mantissa.abs()
    length = torch.zeros_like(magnitude)
    for place in range(vocabulary.mantissa_digits):
        length += magnitude >= 10**place
    padded = magnitude * 10 ** (vocabulary.mantissa_digits - length)

    rms = digits.pow(2).mean().sqrt()

    def random(n: int) -> Tensor:
        return torch.randn(n, d, generator=generator) * rms

    exact = random(10)[exponent + 4] + random(2)[(mantissa < 0).long()]
    exact += random(vocabulary.mantissa_digits + 1)[length]
    for place in range(vocabulary.mantissa_digits):
        digit = padded // 10 ** (vocabulary.mantissa_digits - 1 - place) % 10
        # A digit is tied to its place by a shift: shifted copies of a vector are nearly orthogonal to it.
        exact += digits.roll((place + 1) * 7, dims=-1)[digit]

    value = torch.tensor(vocabulary.values)
    decades = value.abs().clamp(min=1e-5).log10().float()
    angles = 2 * torch.pi * decades[:, None] / torch.tensor(PERIODS)
    waves = torch.cat([angles.sin(), angles.cos()], dim=1)
    signed = torch.cat([waves, waves * value.sign()[:, None].float()], dim=1)
    smooth = signed @ torch.randn(signed.shape[1], d, generator=generator)

    def scaled(vectors: Tensor) -> Tensor:
        return vectors * (rms / vectors.pow(2).mean().sqrt())

    return (scaled(exact) + scaled(smooth)) / 2**0.5
