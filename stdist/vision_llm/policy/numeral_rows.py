"""Embedding and head rows of the numerals: parameters of their own beside a frozen text vocabulary.

The base model's matrices are never resized or copied: a numeral's row is looked up at ``id − first_id`` in ``[n, d]``
matrices that train while the 152 k text rows stay as they were. Rows start from what their numeral says, its digits,
sign, exponent and log-magnitude, not from noise; docs/decisions.md has what that buys.
"""

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from stdist.numerals import Vocabulary

# Periods, in decades of magnitude, of the sine and cosine features: the longest orders the whole range −4…6, the
# shortest separates neighbouring two-digit mantissas.
PERIODS = (20.0, 10.0, 5.0, 2.5, 1.25, 0.6, 0.3, 0.15)


class NumeralRows(nn.Module):
    """Trainable rows of ``n`` numerals, ``input`` for the embedding and ``output`` for the head, each ``[n, d]``."""

    def __init__(self, input_rows: Float[Tensor, "n d"], output_rows: Float[Tensor, "n d"]):
        super().__init__()
        self.input = nn.Parameter(input_rows)
        self.output = nn.Parameter(output_rows)

    def embed(self, ids: Int[Tensor, "*batch"], text_rows: nn.Embedding, first_id: int) -> Float[Tensor, "*batch d"]:
        """Embeddings of a mixture of text ids (below ``first_id``) and numeral ids."""
        is_numeral = ids >= first_id
        text = text_rows(ids.masked_fill(is_numeral, 0))
        numeral = nn.functional.embedding((ids - first_id).clamp(min=0), self.input)
        return torch.where(is_numeral.unsqueeze(-1), numeral.to(text.dtype), text)


def _bind(rows: Tensor, position: int) -> Tensor:
    """Ties a digit's row to its place in the mantissa: shifted copies of a row are nearly orthogonal to it."""
    return rows.roll(position * 7, dims=-1)


def initial_rows(vocabulary: Vocabulary, digit_rows: Float[Tensor, "10 d"], seed: int) -> Float[Tensor, "n d"]:
    """Rows that say what each numeral is worth, scaled like the text rows of the digits 0–9.

    Half of a row's energy is exact (digits bound to their places, exponent, sign, number of digits written), half is
    smooth (sines and cosines of log10|v|, times the sign), so that neighbours in value are neighbours in space.
    """
    digit_rows = digit_rows.detach().float()
    d = digit_rows.shape[1]
    generator = torch.Generator().manual_seed(seed)
    mantissa, exponent = (torch.from_numpy(np.asarray(x)) for x in vocabulary.mantissa_exponent(_all(vocabulary)))
    magnitude = mantissa.abs()
    written = torch.zeros_like(magnitude)
    for digits in range(vocabulary.mantissa_digits):
        written += magnitude >= 10**digits
    padded = magnitude * 10 ** (vocabulary.mantissa_digits - written)

    rms = digit_rows.pow(2).mean().sqrt()

    def random_rows(n: int) -> Tensor:
        return torch.randn(n, d, generator=generator) * rms

    exact = random_rows(10)[exponent + 4] + random_rows(2)[(mantissa < 0).long()]
    exact += random_rows(vocabulary.mantissa_digits + 1)[written]
    for place in range(vocabulary.mantissa_digits):
        digit = padded // 10 ** (vocabulary.mantissa_digits - 1 - place) % 10
        exact += _bind(digit_rows, place + 1)[digit]

    value = torch.tensor(vocabulary.values)
    decades = value.abs().clamp(min=1e-5).log10().float()
    angles = 2 * torch.pi * decades[:, None] / torch.tensor(PERIODS)
    waves = torch.cat([angles.sin(), angles.cos()], dim=1)
    signed = torch.cat([waves, waves * value.sign()[:, None].float()], dim=1)
    smooth = signed @ torch.randn(signed.shape[1], d, generator=generator)

    def scaled(rows: Tensor) -> Tensor:
        return rows * (rms / rows.pow(2).mean().sqrt())

    return (scaled(exact) + scaled(smooth)) / 2**0.5


def _all(vocabulary: Vocabulary) -> np.ndarray:
    return np.arange(len(vocabulary))
