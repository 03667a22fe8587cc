"""Constrained sampling: a forecast is numerals and the end token, nothing else can be said.

A window's prompt is prefilled once, a cell's once; all candidates decode together over shared keys and values
(``decode_batch``). Every draw is an inverse of the step's cumulative distribution over *values*: at a uniform number it
is a sample, at one half it is the median, which is what point forecasts want of a distribution over thousands of
neighbouring numerals.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from stdist.vision_llm.kernels.prefix import Prefix, parents_of
from stdist.vision_llm.kernels.token_losses import row_logits
from stdist.vision_llm.rollout.decode_batch import PREFILL_TOKENS, DecodeBatch
from stdist.vision_llm.tree.prefix_tree import slices

if TYPE_CHECKING:
    from stdist.vision_llm.policy.model import Policy

# Logits are made for as many sequences at a time as keep them within this.
LOGIT_BYTES = 2**28

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

    def widened(self, tokens: int) -> "Completions":
        """The same with at least ``tokens`` columns, the new ones outside the mask."""
        columns = (0, max(0, tokens - self.mask.shape[1]))
        choices, mask, log_probs, values = (
            nn.functional.pad(x, columns) for x in (self.choices, self.mask, self.log_probs, self.values)
        )
        return Completions(choices, mask, log_probs, values, self.lengths)


def at_quantile(
    probabilities: Float[Tensor, "sequences choices"], quantile: Float[Tensor, "sequences"]
) -> Int[Tensor, "sequences"]:
    """Column where the cumulative probability first exceeds ``quantile`` (the inverse distribution function)."""
    cumulative = probabilities.cumsum(-1)
    # Rounding leaves the last sum a little off 1: compare with its own total, so that a column of probability 0 at
    # the end is never drawn.
    level = quantile.to(cumulative.dtype).unsqueeze(-1) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, level, right=True).squeeze(-1).clamp(max=cumulative.shape[-1] - 1)


def nucleus(p: Float[Tensor, "sequences choices"], top_p: float) -> Float[Tensor, "sequences choices"]:
    """Zero outside the fewest most likely choices whose probabilities reach ``top_p`` (Holtzman et al. 2020)."""
    descending, order = p.sort(-1, descending=True)
    outside = descending.cumsum(-1) - descending >= top_p
    return p.masked_fill(torch.empty_like(outside).scatter_(-1, order, outside), 0.0)


@dataclass(frozen=True)
class _Choice:
    """How a token is chosen: head ``rows`` of what may be said, and ``order``, their indices by value, the end last."""

    rows: list[Float[Tensor, "_ d"]]
    order: Int[Tensor, "choices"]
    decoding: Decoding
    temperature: float
    top_p: float

    def __call__(
        self, hidden: Float[Tensor, "sequences d"], quantiles: Float[Tensor, "sequences"]
    ) -> tuple[Int[Tensor, "sequences"], Float[Tensor, "sequences"]]:
        """The next choice of each sequence and its log-probability at ``temperature`` (among all choices: ``top_p``
        narrows the draw, not what the learner will compute for it)."""
        at_once = max(1, LOGIT_BYTES // (4 * len(self.order)))
        parts = [self._choose(*pair) for pair in zip(hidden.split(at_once), quantiles.split(at_once), strict=True)]
        choices, log_probs = zip(*parts, strict=True)
        return torch.cat(choices), torch.cat(log_probs)

    def _choose(self, hidden: Tensor, quantile: Tensor) -> tuple[Tensor, Tensor]:
        log_p = (row_logits(hidden, self.rows) / self.temperature).log_softmax(-1)
        if self.decoding == "greedy":
            choice = log_p.argmax(-1)
        else:
            p = log_p.exp() if self.top_p == 1.0 else nucleus(log_p.exp(), self.top_p)
            choice = self.order[at_quantile(p[:, self.order], quantile)]
        return choice, log_p.gather(-1, choice[:, None])[:, 0]


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
        top_p: float = 1.0,
        may_end: bool = False,
        lengths: Int[Tensor, "cells"] | None = None,
        generator: torch.Generator | None = None,
        share: tuple[int, int] = (0, 1),
    ) -> Completions:
        """Writes up to ``max_tokens`` after each cell's prompt, ``num_generations`` times each (consecutive rows).

        ``may_end``: the end token may be chosen and stops its sequence; without it exactly ``max_tokens`` numerals are
        written. ``top_p``: samples come from the most likely choices that hold this probability. ``lengths``: real
        tokens of each prompt, where they are padded on the right. ``generator`` makes sampling reproducible: its draws
        belong to a candidate and a step, whatever is decoded beside it. ``share``: (i, n) draws for these candidates
        as for the i-th of n equal parts of a larger call.
        """
        policy, end = self.policy, len(self.policy.vocabulary)
        total = len(cell_prompts) * num_generations
        choices = cell_prompts.new_full((total, max_tokens), end)
        log_probs = torch.zeros(total, max_tokens, device=policy.device)
        mask = torch.zeros(total, max_tokens, dtype=torch.bool, device=policy.device)
        quantiles = torch.full((total, max_tokens), 0.5, device=policy.device)
        if decoding == "sample":
            part, parts = share
            drawn = torch.rand(parts * total, max_tokens, generator=generator, device=policy.device)
            quantiles = drawn[part * total : (part + 1) * total]
        # In the hidden states' dtype once, not at every step; without the end where it may not be chosen.
        rows = [block.to(prefix.last.dtype) for block in policy.answer_rows[: 2 if may_end else 1]]
        order = torch.cat([self._by_value, self._by_value.new_tensor([end])]) if may_end else self._by_value
        choose = _Choice(rows, order, decoding, temperature, top_p)
        batch = DecodeBatch(policy, prefix, cell_prompts, lengths, num_generations, max_tokens)
        hidden = prefix.last[:0]
        while len(batch) or batch.waiting:
            hidden = torch.cat([hidden, batch.admit()])
            at = batch.number, batch.step
            choice, choices_log_probs = choose(hidden, quantiles[at])
            choices[at], log_probs[at], mask[at] = choice, choices_log_probs, True
            stays = (choice != end) & (batch.step + 1 < max_tokens)
            ids = choice[batch.keep(stays)] + policy.first_numeral_id
            hidden = batch.feed(ids) if len(batch) else hidden[:0]
        longest = int(mask.sum(1).max())
        choices, mask, log_probs = choices[:, :longest], mask[:, :longest], log_probs[:, :longest]
        numeral = mask & (choices != end)
        values = torch.where(numeral, self._values[choices.clamp(max=end - 1)], 0.0)
        return Completions(choices, mask, log_probs, values, numeral.sum(1))

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
        policy, cells = self.policy, len(cell_prompts)
        blanks = cell_prompts.new_full((cells, horizon - 1), policy.blank_id)
        ids = torch.cat([cell_prompts, blanks], dim=1)
        at_once = max(1, min(PREFILL_TOKENS // ids.shape[1], LOGIT_BYTES // (4 * horizon * len(policy.vocabulary))))
        per_window = cells // prefix.sequences
        means = []
        for start, stop in slices(cells, at_once, per_window):
            windows = prefix.part(*parents_of(start, stop, per_window))
            hidden, _ = policy.branch(windows, ids[start:stop])
            logits = row_logits(hidden[:, -horizon:].flatten(0, 1), policy.answer_rows[:1])
            means.append((logits.softmax(-1) @ self._values).view(-1, horizon))
        return torch.cat(means)
