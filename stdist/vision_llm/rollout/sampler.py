"""Constrained sampling: a forecast is numerals and the end token, nothing else can be said.

A window's prompt is prefilled once, a cell's once; all candidates decode together over shared keys and values
(``decode_batch``). Every token is the inverse of its step's cumulative distribution over *values*, at a quantile: at a
uniform number it is a sample, at one half it is the median, which is what point forecasts want of a distribution over
thousands of neighbouring numerals. Behind blanks all steps are there after one pass, and candidates cost no more of it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from stdist.training.inference import inference
from stdist.vision_llm.kernels.prefix import Prefix, parents_of
from stdist.vision_llm.kernels.token_losses import head_logits
from stdist.vision_llm.policy.model import PolicyModel
from stdist.vision_llm.rollout.decode_batch import PREFILL_TOKENS, DecodeBatch, batch_sizes, most_cells
from stdist.vision_llm.rollout.recorded_step import RECORDINGS, RecordedStep
from stdist.vision_llm.tree.prefix_tree import slices

# Logits are made for as many sequences at a time as keep them within this.
LOGIT_BYTES = 2**28

Decoding = Literal["greedy", "median", "sample", "direct"]


@dataclass
class Completions:
    """Generated tokens of each sequence.

    Attributes:
        answer_ids: numeral indices; the vocabulary's length is the end token, which also fills the rest.
        mask: True at generated tokens, the end token included.
        log_probs: of the constrained distribution at the sampling temperature; 0 outside the mask.
        values: decoded numerals in units; 0 elsewhere.
        lengths: numerals of each sequence.
    """

    answer_ids: Int[Tensor, "sequences tokens"]
    mask: Bool[Tensor, "sequences tokens"]
    log_probs: Float[Tensor, "sequences tokens"]
    values: Float[Tensor, "sequences tokens"]
    lengths: Int[Tensor, " sequences"]

    def widened(self, tokens: int) -> "Completions":
        """The same with at least ``tokens`` columns, the new ones outside the mask."""
        columns = (0, max(0, tokens - self.mask.shape[1]))
        answer_ids, mask, log_probs, values = (
            nn.functional.pad(x, columns) for x in (self.answer_ids, self.mask, self.log_probs, self.values)
        )
        return Completions(answer_ids, mask, log_probs, values, self.lengths)


def one_pass_ids(policy: PolicyModel, prompts: Int[Tensor, "cells tokens"]) -> Int[Tensor, "cells tokens+K-1"]:
    """Prompts and K − 1 blanks: the last K states of each predict the steps, from the history alone."""
    blanks = prompts.new_full((len(prompts), policy.spec.setting.horizon - 1), policy.blank_id)
    return torch.cat([prompts, blanks], dim=1)


def at_quantile(
    probabilities: Float[Tensor, "sequences tokens"], quantile: Float[Tensor, "sequences draws"]
) -> Int[Tensor, "sequences draws"]:
    """Columns where the cumulative probability first exceeds ``quantile`` (the inverse distribution function)."""
    cumulative = probabilities.cumsum(-1)
    # Rounding leaves the last sum a little off 1: compare with its own total, so that a column of probability 0 at
    # the end is never drawn.
    level = quantile.to(cumulative.dtype) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, level, right=True).clamp(max=cumulative.shape[-1] - 1)


def nucleus(p: Float[Tensor, "sequences tokens"], top_p: float) -> Float[Tensor, "sequences tokens"]:
    """Zero outside the fewest most likely tokens whose probabilities reach ``top_p`` (Holtzman et al. 2020)."""
    descending, order = p.sort(-1, descending=True)
    outside = descending.cumsum(-1) - descending >= top_p
    return p.masked_fill(torch.empty_like(outside).scatter_(-1, order, outside), 0.0)


class Sampler:
    """Generates completions with a policy.

    Args:
        policy: on the device it generates on.
        decoding: ``greedy``, ``median``, ``sample``; ``direct`` forecasts only.
        num_generations: completions of each prompt, G.
        temperature: of the distribution that is drawn from and whose log-probabilities are returned.
        top_p: samples come from the most likely tokens that hold this probability; log-probabilities stay those among
            all tokens, which is what a learner computes for them.
        allow_eos: the end token may be drawn and stops its sequence; without it exactly ``max_tokens`` numerals are
            generated.
        levels: of the quantiles that ``direct`` forecasts have behind their mean.
    """

    def __init__(
        self,
        policy: PolicyModel,
        decoding: Decoding,
        num_generations: int = 1,
        temperature: float = 1.0,
        top_p: float = 1.0,
        allow_eos: bool = False,
        levels: tuple[float, ...] = (),
    ):
        self.policy, self.decoding, self.num_generations = policy, decoding, num_generations
        self.temperature, self.top_p, self.allow_eos, self.levels = temperature, top_p, allow_eos, levels
        values = torch.tensor(policy.vocabulary.values)
        # Answer ids in the order of their values, which the inverse distribution function needs; the end comes last.
        order = values.argsort()
        self._order = (torch.cat([order, order.new_tensor([len(values)])]) if allow_eos else order).to(policy.device)
        self._values = values.to(policy.device, torch.float32)
        self._recorded: RecordedStep | None = None

    def generate(
        self,
        prefix: Prefix,
        prompts: Int[Tensor, "cells tokens"],
        max_tokens: int,
        uniforms: Float[Tensor, "sequences max_tokens"] | None = None,
    ) -> Completions:
        """Up to ``max_tokens`` tokens behind each prompt, ``num_generations`` times each (consecutive sequences).

        ``uniforms``: quantiles at which ``sample`` draws each token, in [0, 1); they belong to a sequence and a step,
        whatever is decoded beside it.
        """
        assert (uniforms is not None) == (self.decoding == "sample"), "samples, and only they, are drawn at uniforms"
        end, shape = len(self.policy.vocabulary), (len(prompts) * self.num_generations, max_tokens)
        quantiles = torch.full(shape, 0.5, device=prompts.device) if uniforms is None else uniforms
        answer_ids = prompts.new_full(shape, end)
        log_probs = torch.zeros(shape, device=prompts.device)
        mask = torch.zeros(shape, dtype=torch.bool, device=prompts.device)
        head = self._head(prefix.last.dtype)
        per_window = len(prompts) // prefix.sequences
        with inference(self.policy):
            for start, stop in self._windows_at_once(prefix, per_window, max_tokens):
                batch = self._batch(
                    prefix.part(start, stop), prompts[start * per_window : stop * per_window], max_tokens
                )
                first = start * per_window * self.num_generations
                hidden = prefix.last[:0]
                while len(batch) or batch.waiting:
                    hidden = torch.cat([hidden, batch.admit()])
                    at = batch.number + first, batch.step
                    drawn, drawn_log_probs = self._next_tokens(hidden, head, quantiles[at][:, None])
                    tokens = drawn[:, 0]
                    answer_ids[at], log_probs[at], mask[at] = tokens, drawn_log_probs[:, 0], True
                    stays = (tokens != end) & (batch.step + 1 < max_tokens)
                    ids = tokens[batch.keep(stays)] + self.policy.first_numeral_id
                    hidden = batch.feed(ids) if len(batch) else hidden[:0]
        longest = int(mask.sum(1).max())
        answer_ids, mask, log_probs = answer_ids[:, :longest], mask[:, :longest], log_probs[:, :longest]
        numeral = mask & (answer_ids != end)
        values = torch.where(numeral, self._values[answer_ids.clamp(max=end - 1)], 0.0)
        return Completions(answer_ids, mask, log_probs, values, numeral.sum(1))

    def _windows_at_once(self, prefix: Prefix, cells_per_window: int, max_tokens: int) -> list[tuple[int, int]]:
        """All windows; where steps are recorded, as many as decode at once, since a fixed step has room for all
        sequences of each window that it reads."""
        if prefix.last.device.type not in RECORDINGS:
            return [(0, prefix.sequences)]
        at_once = max(1, most_cells(self.policy, self.num_generations, max_tokens) // cells_per_window)
        return slices(prefix.sequences, at_once, 1)

    def _batch(self, prefix: Prefix, prompts: Int[Tensor, "cells tokens"], max_tokens: int) -> DecodeBatch:
        """A batch on the one recorded step, made anew only where that one has no room."""
        policy, g = self.policy, self.num_generations
        if prefix.last.device.type in RECORDINGS:
            sizes = batch_sizes(policy, prefix, prompts, g, max_tokens)
            if self._recorded is None or not self._recorded.serves(policy, sizes):
                self._recorded = None  # its memory is free before another is made
                self._recorded = RecordedStep(policy, prefix, sizes)
            self._recorded.begin(prefix)
        return DecodeBatch(policy, prefix, prompts, g, max_tokens, self._recorded)

    def release(self) -> None:
        """Gives the memory back that is kept for more batches of the same sizes."""
        self._recorded = None

    def draw(
        self, prefix: Prefix, prompts: Int[Tensor, "cells tokens"], uniforms: Float[Tensor, "sequences K"]
    ) -> Completions:
        """``num_generations`` candidates of exactly K numerals behind each prompt (consecutive sequences), all from one
        pass: each step is drawn from its distribution given the history alone, whatever the other steps drew.

        ``uniforms``: as in ``generate``. For policies that learned to answer behind blanks (``sft.blank_share``).
        """
        assert self.decoding == "sample" and not self.allow_eos, "every step behind blanks draws a numeral"
        g, horizon, head = self.num_generations, uniforms.shape[1], self._head(prefix.last.dtype)
        answer_ids: list[Tensor] = []
        log_probs: list[Tensor] = []
        with inference(self.policy):
            for cells, states in self._states_behind_blanks(prefix, prompts):
                of_cells = uniforms[cells.start * g : cells.stop * g].view(-1, g, horizon).transpose(1, 2)
                drawn = self._next_tokens(states.flatten(0, 1), head, of_cells.flatten(0, 1))
                for parts, x in zip((answer_ids, log_probs), drawn, strict=True):
                    parts.append(x.view(-1, horizon, g).transpose(1, 2).flatten(0, 1))
        ids = torch.cat(answer_ids)
        mask, lengths = torch.ones_like(ids, dtype=torch.bool), ids.new_full((len(ids),), horizon)
        return Completions(ids, mask, torch.cat(log_probs), self._values[ids], lengths)

    def _head(self, dtype: torch.dtype) -> list[Float[Tensor, "_ d"]]:
        """In the hidden states' dtype once, not at every step; without the end where it may not be drawn."""
        return [block.to(dtype) for block in self.policy.answer_head[: 2 if self.allow_eos else 1]]

    def _next_tokens(
        self,
        hidden: Float[Tensor, "sequences d"],
        head: list[Float[Tensor, "_ d"]],
        quantiles: Float[Tensor, "sequences draws"],
    ) -> tuple[Int[Tensor, "sequences draws"], Float[Tensor, "sequences draws"]]:
        """Next answer ids of each sequence and their log-probabilities, some sequences at a time."""
        at_once = max(1, LOGIT_BYTES // (4 * len(self._order)))
        tokens, log_probs = [], []
        for states, quantile in zip(hidden.split(at_once), quantiles.split(at_once), strict=True):
            log_p = (head_logits(states, head) / self.temperature).log_softmax(-1)
            if self.decoding == "greedy":
                token = log_p.argmax(-1, keepdim=True)
            else:
                p = log_p.exp() if self.top_p == 1.0 else nucleus(log_p.exp(), self.top_p)
                token = self._order[at_quantile(p[:, self._order], quantile)]
            tokens.append(token)
            log_probs.append(log_p.gather(-1, token))
        return torch.cat(tokens), torch.cat(log_probs)

    def forecast(
        self,
        prefix: Prefix,
        prompts: Int[Tensor, "cells tokens"],
        uniforms: Float[Tensor, "sequences K"] | None = None,
    ) -> Float[Tensor, "cells G K"]:
        """Exactly K values for each cell, ``num_generations`` candidates each, in the data's units; of ``direct`` the
        mean, then ``levels``."""
        horizon = self.policy.spec.setting.horizon
        if self.decoding == "direct":
            return self._direct(prefix, prompts, horizon)
        return self.generate(prefix, prompts, horizon, uniforms).values.view(len(prompts), -1, horizon)

    def _direct(
        self, prefix: Prefix, prompts: Int[Tensor, "cells tokens"], horizon: int
    ) -> Float[Tensor, "cells quantities K"]:
        """All steps in one pass: the mean of each step's distribution given the history alone, and its quantiles, in
        units.

        The mean is what minimises squared error; a chain of steps cannot use it, since it need not be a numeral. For
        policies that learned to answer behind blanks (``sft.blank_share``).
        """
        found = []
        with inference(self.policy):
            for _, states in self._states_behind_blanks(prefix, prompts):
                logits = head_logits(states.flatten(0, 1), self.policy.answer_head[:1])
                p = logits.softmax(-1)
                values = (p @ self._values)[:, None]
                if self.levels:
                    levels = p.new_tensor(self.levels).expand(len(p), -1).contiguous()
                    quantiles = self._values[self._order[at_quantile(p[:, self._order], levels)]]
                    values = torch.cat([values, quantiles], 1)
                found.append(values.view(-1, horizon, values.shape[1]).transpose(1, 2))
        return torch.cat(found)

    def _states_behind_blanks(
        self, prefix: Prefix, prompts: Int[Tensor, "cells tokens"]
    ) -> Iterator[tuple[slice, Float[Tensor, "some K d"]]]:
        """Some cells at a time, and the states that predict their K steps."""
        policy, cells, horizon = self.policy, len(prompts), self.policy.spec.setting.horizon
        ids = one_pass_ids(policy, prompts)
        at_once = max(1, min(PREFILL_TOKENS // ids.shape[1], LOGIT_BYTES // (4 * horizon * len(policy.vocabulary))))
        per_window = cells // prefix.sequences
        for start, stop in slices(cells, at_once, per_window):
            windows = prefix.part(*parents_of(start, stop, per_window))
            hidden, _ = policy.branch(windows, ids[start:stop])
            yield slice(start, stop), hidden[:, -horizon:]
