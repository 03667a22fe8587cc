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

from stdist.training.loop import Stage
from stdist.training.process_group import ProcessGroup
from stdist.vision_llm.config import GRPOConfig
from stdist.vision_llm.kernels.token_losses import token_log_probs
from stdist.vision_llm.policy.adapters import as_reference
from stdist.vision_llm.policy.city_windows import CityWindows, PolicyBatch
from stdist.vision_llm.policy.model import PolicyModel
from stdist.vision_llm.rollout.forecaster import validation_errors
from stdist.vision_llm.rollout.sampler import Completions, Decoding, Sampler
from stdist.vision_llm.stages.reward import advantages, grpo_loss, reward
from stdist.vision_llm.tree import prefix_tree
from stdist.vision_llm.tree.micro_batches import MicroBatches
from stdist.vision_llm.tree.prefix_tree import Level, Tree

# A candidate may run past K so that the length term of Eq. 17 can tell it off; it is cut this far behind.
EXTRA_TOKENS = 4
# d of Eq. 19 never falls below this share of the city's mean: a cell at rest would make any error enormous.
NORMALIZER_FLOOR = 0.05


class GRPOStage(Stage):
    """See :class:`stdist.training.loop.Stage`. Call ``policy.begin_grpo`` before.

    Args:
        cell_mean: ``[H·W of the region]`` mean of each cell over the training span, in units.
    """

    name = "grpo"
    monitor: str | None = "nrmse"
    headline = ("nrmse", "reward")

    def __init__(
        self,
        policy: PolicyModel,
        train: CityWindows,
        validation: CityWindows,
        cell_mean: Float[np.ndarray, "cells"],
        config: GRPOConfig,
        seed: int,
        decoding: Decoding,
        group: ProcessGroup = ProcessGroup(),
    ):
        self.policy, self.train, self.validation = policy, train, validation
        self.cell_mean, self.config, self.seed, self.decoding = cell_mean, config, seed, decoding
        self.group = group
        self.sampler = Sampler(
            policy, "sample", config.num_generations, config.temperature, config.top_p, allow_eos=True
        )
        self.micro_batches = MicroBatches(policy, config.activation_bytes)

    def step(self, step: int, backward: Callable[[Tensor], None]) -> dict[str, float]:
        config, policy = self.config, self.policy
        batch = self.train.batch(*self._draw(step))
        written = self._write(batch, self._generator(step), self.group)
        rewards = self._reward(batch, written).view(-1, config.num_generations)
        tree = candidate_tree(policy, batch, written)
        sizes = self.micro_batches.sizes(tree)
        with as_reference(policy):
            reference = completion_log_probs(policy, tree, written, config.temperature, sizes)
        gain = advantages(rewards, config.scale_rewards).flatten()
        sums: dict[str, float] = defaultdict(float)

        def loss(rows: slice, states: Float[Tensor, "candidates tokens d"]) -> Float[Tensor, ""]:
            part, details = grpo_loss(
                candidate_log_probs(policy, states, written, rows, config.temperature),
                written.log_probs[rows],
                reference[rows],
                gain[rows],
                written.mask[rows],
                config.epsilon,
                config.beta,
            )
            share = (rows.stop - rows.start) / len(gain)
            for name, value in details.items():
                sums[name] += value * share
            return part * share

        total = prefix_tree.backward(policy, tree, loss, backward, sizes)
        tokens = {"tokens": tree.tokens, "tokens_saved": tree.tokens_per_sample - tree.tokens}
        return {**sums, "loss": total, **tokens, **self._statistics(rewards, written)}

    def evaluate(self) -> dict[str, float]:
        """Validation errors of the run's own decoding, and the mean reward of sampled candidates."""
        config = self.config
        indices = self.validation.evenly(config.eval_windows)
        errors = validation_errors(
            self.policy, self.validation, indices, config.windows_per_step, self.decoding, self.group
        )
        rewards = [torch.zeros(0)]
        for first in self.group.local_items(range(0, len(indices), config.windows_per_step)):
            batch = self.validation.batch(indices[first : first + config.windows_per_step], self.validation.cells)
            written = self._write(batch, self._generator(2**31 + first))  # the same draws at every evaluation
            rewards.append(self._reward(batch, written).cpu())
        return errors | {"reward": float(torch.cat(self.group.all_gather_object(torch.cat(rewards))).mean())}

    def _draw(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Windows of this learner, and cells of all."""
        rng = np.random.default_rng([self.seed, 4, step])
        windows, cells = self.train.draw(rng, self.config.windows_per_step, self.config.cells_per_window)
        return windows[self.group.local_slice(len(windows), "grpo.windows_per_step")], cells

    def describe_batch(self, step: int) -> str:
        return self.train.describe(self._draw(step)[0])

    # --- rollouts ----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _write(
        self, batch: PolicyBatch, generator: torch.Generator, among: ProcessGroup = ProcessGroup()
    ) -> Completions:
        """Candidates of this learner's batch, drawn as they would be were all learners' batches one."""
        sequences = len(batch.prompts) * self.config.num_generations
        max_tokens = self.policy.spec.setting.horizon + EXTRA_TOKENS
        drawn = torch.rand(among.size * sequences, max_tokens, generator=generator, device=self.policy.device)
        written = self.sampler.generate(
            self.policy.prefix(batch.shared, batch.grids),
            batch.prompts,
            max_tokens,
            uniforms=drawn[among.rank * sequences : (among.rank + 1) * sequences],
        )
        # All learners' trees have one shape, and so as many backward passes: each of them may be a collective.
        return written.widened(max(among.all_gather_object(written.mask.shape[1])))

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


def candidate_tree(policy: PolicyModel, batch: PolicyBatch, written: Completions) -> Tree:
    """Windows, their cells' prompts, and what was written behind each: the last token is predicted, never read."""
    end = len(policy.vocabulary)
    ids = torch.where(written.answer_ids == end, policy.end_id, written.answer_ids + policy.first_numeral_id)
    return Tree(batch.shared, batch.grids, (Level(batch.prompts), Level(ids[:, :-1])))


def candidate_log_probs(
    policy: PolicyModel,
    states: Float[Tensor, "candidates tokens d"],
    written: Completions,
    rows: slice,
    temperature: float,
) -> Float[Tensor, "candidates tokens"]:
    """Log-probability of the tokens of candidates ``rows`` under the distribution they were sampled from (without
    top-p's cut); 0 outside the mask. ``states`` predict them."""
    mask = written.mask[rows]
    log_probs = token_log_probs(states[mask], policy.answer_head, written.answer_ids[rows][mask], temperature)
    return torch.zeros(mask.shape, device=mask.device).masked_scatter(mask, log_probs)


def completion_log_probs(
    policy: PolicyModel, tree: Tree, written: Completions, temperature: float, sizes: list[int]
) -> Float[Tensor, "candidates tokens"]:
    """Log-probability of every written token, without gradients."""
    log_probs = torch.empty_like(written.log_probs)

    def visit(rows: slice, states: Tensor) -> Tensor:
        log_probs[rows] = candidate_log_probs(policy, states, written, rows, temperature)
        return log_probs

    prefix_tree.forward(policy, tree, visit, sizes)
    return log_probs
