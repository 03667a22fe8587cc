"""The head at target positions: cross-entropy and log-probabilities over [text rows | numeral rows].

Only the positions asked for pass the head; nothing of shape [tokens × vocabulary] exists for the rest of a sequence.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F


def full_logits(
    hidden: Float[Tensor, "positions d"],
    text_rows: Float[Tensor, "text d"],
    numeral_rows: Float[Tensor, "numerals d"],
) -> Float[Tensor, "positions text+numerals"]:
    """Logits in the order of token ids: text rows first, numerals from ``first_numeral_id`` on."""
    return torch.cat([hidden @ text_rows.T, hidden @ numeral_rows.to(hidden.dtype).T], dim=-1)


def answer_logits(
    hidden: Float[Tensor, "positions d"],
    end_row: Float[Tensor, "d"],
    numeral_rows: Float[Tensor, "numerals d"],
) -> Float[Tensor, "positions numerals+1"]:
    """Logits of what a forecast may contain: numerals, and the end token as the last column."""
    rows = torch.cat([numeral_rows.to(hidden.dtype), end_row[None]])
    return hidden @ rows.T


def target_cross_entropy(
    logits: Float[Tensor, "positions choices"], targets: Int[Tensor, "positions"]
) -> Float[Tensor, "positions"]:
    """−log P(target) at each target position (summand of Eq. 16), accumulated in float32."""
    return F.cross_entropy(logits.float(), targets, reduction="none")
