"""Stage 4: group relative policy optimisation (Vision-LLMs for Spatiotemporal Traffic Forecasting, Eq. 17–19).

For every (window, cell): sample G candidates, reward each (Eq. 17), subtract the group's mean, raise the likelihood of
the better ones inside the clip, stay near the frozen SFT model. The stage ends when validation NRMSE stops falling.
"""

from collections import defaultdict
from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from stdist.config import GRPOConfig
from stdist.vision_llm.city_windows import CityWindows, PolicyBatch
from stdist.vision_llm.forecaster import validation_errors
from stdist.vision_llm.policy import Policy
from stdist.vision_llm.reward import advantages, grpo_loss, reward
from stdist.vision_llm.sampler import Completions, Decoding, Sampler

# A candidate may run past K so that the length term of Eq. 17 can tell it off; it is cut this far behind.
EXTRA_TOKENS = 4
# d of Eq. 19 never falls below this share of the city's mean: a cell at rest would make any error enormous.
NORMALIZER_FLOOR = 0.05


class GRPOStage:
    """See :class:`stdist.training.loop.Stage`. Call ``policy.begin_grpo`` before.

    Args:
        cell_mean: ``[H·W of the region]`` mean of each cell over the training span, in units.
    """

    name = "grpo"
    watched = "nrmse"

    def __init__(
        self,
        policy: Policy,
        train: CityWindows,
        validation: CityWindows,
        cell_mean: Float[np.ndarray, "cells"],
        config: GRPOConfig,
        seed: int,
        decoding: Decoding,
    ):
        self.policy, self.train, self.validation = policy, train, validation
        self.cell_mean, self.config, self.seed, self.decoding = cell_mean, config, seed, decoding
        self.sampler = Sampler(policy)

    def step(self, step: int, backward: Callable[[Tensor], None]) -> dict[str, float]:
        config = self.config
        rng = np.random.default_rng([self.seed, 4, step])
        windows, cells = self.train.draw(rng, config.windows_per_step, config.cells_per_window)
        generator = self._generator(step)
        sums: dict[str, float] = defaultdict(float)
        for first in range(0, len(windows), config.windows_per_micro_batch):
            batch = self.train.batch(windows[first : first + config.windows_per_micro_batch], cells)
            written = self._write(batch, generator)
            rewards = self._reward(batch, written).view(-1, config.num_generations)
            with torch.no_grad(), self.policy.reference():
                reference = completion_log_probs(self.policy, batch, written, config)
            loss, details = grpo_loss(
                completion_log_probs(self.policy, batch, written, config),
                written.log_probs,
                reference,
                advantages(rewards, config.scale_rewards).flatten(),
                written.mask,
                config.epsilon,
                config.beta,
            )
            share = len(batch.shared) / len(windows)
            backward(loss * share)
            details |= {"loss": loss.item(), **self._statistics(rewards, written)}
            for name, value in details.items():
                sums[name] += value * share
        return dict(sums)

    def evaluate(self) -> dict[str, float]:
        """Validation errors of the run's own decoding, and the mean reward of sampled candidates."""
        config = self.config
        indices = self.validation.evenly(config.eval_windows)
        errors = validation_errors(self.policy, self.validation, indices, config.windows_per_micro_batch, self.decoding)
        generator = self._generator(2**31)  # the same draws at every evaluation
        rewards = []
        for first in range(0, len(indices), config.windows_per_micro_batch):
            chosen = indices[first : first + config.windows_per_micro_batch]
            batch = self.validation.batch(chosen, self.validation.cells)
            rewards.append(self._reward(batch, self._write(batch, generator)))
        return errors | {"reward": float(torch.cat(rewards).mean())}

    # --- rollouts ----------------------------------------------------------------------------------------------

    def _write(self, batch: PolicyBatch, generator: torch.Generator) -> Completions:
        with torch.no_grad():
            prefix = self.policy.prefix(batch.shared, batch.grids)
        return self.sampler.complete(
            prefix,
            batch.prompts,
            self.policy.spec.setting.horizon + EXTRA_TOKENS,
            "sample",
            num_generations=self.config.num_generations,
            temperature=self.config.temperature,
            may_end=True,
            generator=generator,
        )

    def _reward(self, batch: PolicyBatch, written: Completions) -> Float[Tensor, "candidates"]:
        g, device = self.config.num_generations, written.values.device
        truth = torch.from_numpy(batch.truth).flatten(0, 1).float().to(device)
        cell_mean = np.tile(self.cell_mean[batch.cells], len(batch.shared))
        city_mean = float(self.cell_mean[self.train.cells].mean())
        normalizer = {
            "cell_mean": torch.from_numpy(cell_mean).float().to(device),
            "window_mean": truth.mean(1),
            "city_mean": torch.full((len(truth),), city_mean, device=device),
        }[self.config.normalizer].clamp(min=NORMALIZER_FLOOR * city_mean)
        return reward(
            written.values,
            written.lengths,
            truth.repeat_interleave(g, 0),
            normalizer.repeat_interleave(g, 0),
            self.config.half_score,
        )

    def _statistics(self, rewards: Float[Tensor, "groups G"], written: Completions) -> dict[str, float]:
        return {
            "reward": float(rewards.mean()),
            "reward_std": float(rewards.std(1).mean()),
            # A reward that is always about zero teaches nothing: watch this share.
            "reward_under_0.05": float((rewards < 0.05).float().mean()),
            "right_length": float((written.lengths == self.policy.spec.setting.horizon).float().mean()),
            "tokens_per_candidate": float(written.mask.sum(1).float().mean()),
        }

    def _generator(self, step: int) -> torch.Generator:
        return torch.Generator(device=self.policy.device).manual_seed(self.seed * 1_000_003 + step)


def completion_log_probs(
    policy: Policy, batch: PolicyBatch, written: Completions, config: GRPOConfig
) -> Float[Tensor, "candidates tokens"]:
    """Log-probability of every written token under the distribution it was sampled from; 0 outside the mask."""
    end = len(policy.vocabulary)
    candidates = written.choices
    ids = torch.where(candidates == end, policy.end_id, candidates + policy.first_numeral_id)
    prompts = batch.prompts.repeat_interleave(config.num_generations, 0)
    prefix = policy.prefix(batch.shared, batch.grids)
    hidden, _ = policy.branch(prefix, torch.cat([prompts, ids[:, :-1]], dim=1))
    predicting = hidden[:, prompts.shape[1] - 1 :][written.mask]
    logits = policy.answer_logits(predicting).float() / config.temperature
    chosen = -torch.nn.functional.cross_entropy(logits, candidates[written.mask], reduction="none")
    return torch.zeros(candidates.shape, device=chosen.device).masked_scatter(written.mask, chosen)
