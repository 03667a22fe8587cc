"""Constrained sampling: a forecast is numerals and the end token, nothing else can be said.

A window's prompt is prefilled once, a cell's once; all candidates decode together. Every draw is an inverse of the
step's cumulative distribution over *values*: at a uniform number it is a sample, at one half it is the median, which is
what point forecasts want of a distribution over thousands of neighbouring numerals.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from stdist.vision_llm.prefix import Prefix, repeated

if TYPE_CHECKING:
    from stdist.vision_llm.policy import Policy

Decoding = Literal["greedy", "median", "sample", "direct"]


@dataclass
class Completions:
    """What was written, per sequence: ``choices`` are columns of ``Policy.answer_logits`` (numeral indices, then end).

    ``mask`` is True where a token was written (the end token included), ``log_probs`` are those of the constrained
    distribution at the sampling temperature, 0 outside the mask. ``values`` are decoded numerals, 0 elsewhere;
    ``lengths`` counts numerals.
    """

    choices: Int[Tensor, "sequences tokens"]
    mask: Bool[Tensor, "sequences tokens"]
    log_probs: Float[Tensor, "sequences tokens"]
    values: Float[Tensor, "sequences tokens"]
    lengths: Int[Tensor, "sequences"]


def at_quantile(
    probabilities: Float[Tensor, "sequences choices"], quantile: Float[Tensor, "sequences"]
) -> Int[Tensor, "sequences"]:
    """Column where the cumulative probability first exceeds ``quantile`` (the inverse distribution function)."""
    cumulative = probabilities.cumsum(-1)
    # Rounding leaves the last sum a little off 1: compare with its own total, so that a column of probability 0 at
    # the end is never drawn.
    level = quantile.to(cumulative.dtype).unsqueeze(-1) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, level, right=True).squeeze(-1).clamp(max=cumulative.shape[-1] - 1)


class Sampler:
    """Draws completions from a policy. Holds the order of numerals by value that inverse sampling needs."""

    def __init__(self, policy: "Policy"):
        self.policy = policy
        values = torch.tensor(policy.vocabulary.values)
        self._by_value = values.argsort().to(policy.device)
        self._values = values.to(policy.device, torch.float32)

    @torch.no_grad()
    def complete(
        self,
        prefix: Prefix,
        cell_prompts: Int[Tensor, "cells tokens"],
        max_tokens: int,
        decoding: Decoding,
        num_generations: int = 1,
        temperature: float = 1.0,
        may_end: bool = False,
        generator: torch.Generator | None = None,
    ) -> Completions:
        """Writes up to ``max_tokens`` after each cell's prompt, ``num_generations`` times each (consecutive rows).

        ``may_end``: the end token may be chosen and stops its sequence; without it exactly ``max_tokens`` numerals are
        written. ``generator`` makes sampling reproducible.
        """
        policy = self.policy
        hidden, cells = policy.branch(prefix, cell_prompts)
        hidden = hidden[:, -1].repeat_interleave(num_generations, dim=0)
        state = repeated(cells, num_generations)
        end = len(policy.vocabulary)
        alive = torch.ones(len(hidden), dtype=torch.bool, device=hidden.device)
        choices, mask, log_probs = [], [], []
        for step in range(max_tokens):
            logits = policy.answer_logits(hidden).float() / temperature
            if not may_end:
                logits = logits[:, :end]
            log_p = logits.log_softmax(-1)
            choice = self._choose(log_p, decoding, generator)
            choices.append(torch.where(alive, choice, end))
            mask.append(alive)
            log_probs.append(log_p.gather(-1, choice[:, None]).squeeze(-1) * alive)
            alive = alive & (choice != end)
            if step + 1 == max_tokens or not alive.any():
                break
            ids = torch.where(choices[-1] == end, policy.end_id, choices[-1] + policy.first_numeral_id)
            hidden, state = policy.extend(state, ids[:, None])
            hidden = hidden[:, -1]
        written, is_written = torch.stack(choices, 1), torch.stack(mask, 1)
        numeral = is_written & (written != end)
        values = torch.where(numeral, self._values[written.clamp(max=end - 1)], 0.0)
        return Completions(written, is_written, torch.stack(log_probs, 1), values, numeral.sum(1))

    def forecast(
        self,
        prefix: Prefix,
        cell_prompts: Int[Tensor, "cells tokens"],
        decoding: Decoding,
        num_generations: int = 1,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "cells G K"]:
        """Exactly K values for each cell, ``num_generations`` candidates each, in the data's units."""
        horizon = self.policy.spec.setting.horizon
        if decoding == "direct":
            return self.direct(prefix, cell_prompts, horizon)[:, None]
        written = self.complete(prefix, cell_prompts, horizon, decoding, num_generations, generator=generator)
        return written.values.view(len(cell_prompts), num_generations, horizon)

    @torch.no_grad()
    def direct(
        self, prefix: Prefix, cell_prompts: Int[Tensor, "cells tokens"], horizon: int
    ) -> Float[Tensor, "cells K"]:
        """All steps in one pass: the mean of each step's distribution given the history alone, in units.

        The mean is what minimises squared error; a chain of steps cannot use it, since it need not be a numeral. For
        policies that learned to answer behind blanks (``sft.blank_share``).
        """
        policy = self.policy
        blanks = cell_prompts.new_full((len(cell_prompts), horizon - 1), policy.blank_id)
        hidden, _ = policy.branch(prefix, torch.cat([cell_prompts, blanks], dim=1))
        logits = policy.answer_logits(hidden[:, -horizon:].flatten(0, 1)).float()[:, :-1]
        return (logits.softmax(-1) @ self._values).view(-1, horizon)

    def _choose(
        self, log_p: Float[Tensor, "sequences choices"], decoding: Decoding, generator: torch.Generator | None
    ) -> Int[Tensor, "sequences"]:
        if decoding == "greedy":
            return log_p.argmax(-1)
        numerals = len(self._by_value)
        order = self._by_value
        if log_p.shape[1] > numerals:  # the end token goes last in the order
            order = torch.cat([order, order.new_tensor([numerals])])
        if decoding == "sample":
            quantile = torch.rand(len(log_p), generator=generator, device=log_p.device)
        else:
            quantile = log_p.new_full((len(log_p),), 0.5)
        return order[at_quantile(log_p[:, order].exp(), quantile)]
