"""Stage 4: group relative policy optimisation (Vision-LLMs for Spatiotemporal Traffic Forecasting, Eq. 17–19).

For every (window, cell): sample G candidates, reward each (Eq. 17), subtract the group's mean, raise the likelihood of
the better ones inside the clip, stay near the frozen SFT model; ``num_iterations`` updates on the same candidates. The
stage ends when validation NRMSE stops falling. Candidates drawn in one pass (``candidates: direct``) share its states:
``one_pass``.
"""

import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from stdist.errors import DivergenceError
from stdist.training.loop import Stage
from stdist.training.process_group import ProcessGroup
from stdist.vision_llm.config import GRPOConfig
from stdist.vision_llm.kernels.token_losses import token_log_probs
from stdist.vision_llm.policy.adapters import as_reference
from stdist.vision_llm.policy.city_windows import CityWindows, PolicyBatch
from stdist.vision_llm.policy.model import PolicyModel
from stdist.vision_llm.rollout.forecaster import validation_errors
from stdist.vision_llm.rollout.rollouts import LocalRollouts, Rollouts, Weights, completions_of, max_tokens
from stdist.vision_llm.rollout.sampler import Completions, Decoding
from stdist.vision_llm.stages import one_pass
from stdist.vision_llm.stages.batches import StepBatches
from stdist.vision_llm.stages.loss import LOSSES, LossInputs
from stdist.vision_llm.stages.reward import RewardTerms, error_of_mean, group_advantages, normalizers, reward_terms
from stdist.vision_llm.tree import prefix_tree
from stdist.vision_llm.tree.micro_batches import MicroBatches
from stdist.vision_llm.tree.prefix_tree import Level, Tree

# The step that candidates of evaluations are drawn for, the same ones every time.
EVALUATION = 2**32 - 1
EVALUATED = "the weights that are evaluated"
LogProbs = Callable[[PolicyModel, Tensor, Completions, slice, float], Float[Tensor, "candidates tokens"]]
"""Of the candidates ``slice``, from the states of their leaves, at a temperature."""


@dataclass(frozen=True)
class Rollout:
    """This learner's candidates of a step, one tree of them, and what all updates on them share.

    ``advantages``: one a candidate, or one a token. ``old_log_probs``: of the weights that begin to learn from them,
    filled in by the first update. ``tokens``: written
    by the candidates of all learners. ``sizes``: the tree's micro-batches. ``per_leaf``: candidates of each of its
    leaves.
    """

    completions: Completions
    reference_log_probs: Float[Tensor, "candidates tokens"]
    advantages: Float[Tensor, " candidates"] | Float[Tensor, "candidates tokens"]
    old_log_probs: Float[Tensor, "candidates tokens"]
    tokens: int
    tree: Tree
    sizes: list[int]
    statistics: dict[str, float]

    @property
    def per_leaf(self) -> int:
        return candidates_per_leaf(self.tree, self.completions)

    @property
    def token_counts(self) -> dict[str, float]:
        """That the tree computes, and that one sequence per candidate would in addition."""
        tokens = self.tree.tokens
        return {"tokens": tokens, "tokens_saved": self.per_leaf * self.tree.tokens_per_sample - tokens}


class GRPOStage(Stage):
    """See :class:`stdist.training.loop.Stage`. Call ``begin_grpo(policy)`` before.

    Args:
        cell_mean: ``[H·W of the region]`` mean of each cell over the training span, in units.
        rollouts: samples the candidates; by default this process does.
    """

    name = "grpo"
    monitor: str | None = "nrmse"
    headline = ("nrmse", "reward")

    def __init__(
        self,
        policy: PolicyModel,
        train: CityWindows,
        validation: CityWindows,
        cell_mean: Float[np.ndarray, " cells"],
        config: GRPOConfig,
        seed: int,
        decoding: Decoding,
        group: ProcessGroup = ProcessGroup(),
        rollouts: Rollouts | None = None,
    ):
        self.policy, self.validation, self.config = policy, validation, config
        self.decoding, self.group = decoding, group
        self.cell_mean, self._city_mean = cell_mean, float(cell_mean[train.cells].mean())
        self.batches = StepBatches(train, config, "grpo", seed, group)
        self.rollouts = rollouts or LocalRollouts(policy, config, seed)
        self._evaluator = LocalRollouts(policy, config, seed)
        self.micro_batches = MicroBatches(policy, config.activation_bytes)
        self._scoring = SCORINGS[config.candidates]
        self.resumable_every = config.num_iterations
        self._rollout: Rollout | None = None
        self._rollout_step = -1
        self._generated: tuple[PolicyBatch, Completions] | None = None
        self._requested: dict[int, PolicyBatch] = {}

    def on_weights_changed(self, step: int) -> None:
        if step % self.config.num_iterations == 0:
            self.rollouts.update_weights(step, Weights.of(self.policy))

    def close(self) -> None:
        self.rollouts.close()

    def step(self, step: int, backward: Callable[[Tensor], None]) -> dict[str, float]:
        if step % self.config.num_iterations == 0 and self._rollout_step != step:
            self._rollout = self._new_rollout(step)
            self._rollout_step, self._generated = step, None
        assert self._rollout, "steps begin where a rollout does"
        policy, config, rollout, learners = self.policy, self.config, self._rollout, self.group.size
        sums: dict[str, float] = defaultdict(float)
        first = step % config.num_iterations == 0

        def loss(leaves: slice, states: Float[Tensor, "leaves tokens d"]) -> Float[Tensor, ""]:
            completions, rows = rollout.completions, candidates_of(leaves, rollout.per_leaf)
            trainer_log_probs = self._scoring.log_probs(policy, states, completions, rows, config.temperature)
            if first:
                rollout.old_log_probs[rows] = trainer_log_probs.detach()
            inputs = LossInputs(
                trainer_log_probs=trainer_log_probs,
                rollout_log_probs=completions.log_probs[rows],
                old_log_probs=rollout.old_log_probs[rows] if self.rollouts.max_staleness else None,
                reference_log_probs=rollout.reference_log_probs[rows],
                advantages=rollout.advantages[rows],
                mask=completions.mask[rows],
                tokens=rollout.tokens,
                sequences=len(rollout.advantages) * learners,
                max_tokens=max_tokens(policy, config.candidates),
            )
            part, details = LOSSES[config.loss_type](inputs, config)
            # The engine and the log take means over learners, but a learner's parts are some of a sum over all of them.
            for name, value in details.items():
                sums[name] += value * learners
            return part * learners

        tree, began = rollout.tree, time.perf_counter()
        total = prefix_tree.backward(policy, tree, loss, backward, rollout.sizes)
        if first:
            rollout.statistics.update(mismatch(rollout.completions, rollout.old_log_probs))
        seconds = {"seconds/update": time.perf_counter() - began}
        return {**sums, "loss": total, **rollout.token_counts, **rollout.statistics, **seconds}

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
            records = self._evaluator.sample(EVALUATION, batch, EVALUATED)
            completions = completions_of(records, EVALUATION, batch, (EVALUATED,), self.policy)
            rewards.append(self._reward(batch, completions).reward.cpu())
        self._evaluator.release()
        return errors | {"reward": float(torch.cat(self.group.all_gather_object(torch.cat(rewards))).mean())}

    def halve_memory(self) -> bool:
        self.policy.train()  # wherever it was left
        self._evaluator.release()
        if isinstance(self.rollouts, LocalRollouts):
            self.rollouts.release()
        self.micro_batches.halve()
        if self._rollout is not None:
            self._rollout = replace(self._rollout, sizes=self.micro_batches.sizes(self._rollout.tree))
        return True

    def describe_batch(self, step: int) -> str:
        return self.batches.describe(step // self.config.num_iterations)

    # --- rollouts ----------------------------------------------------------------------------------------------

    def _new_rollout(self, step: int) -> "Rollout":
        """Candidates of the policy as it is at ``step``, and what the updates on them need."""
        config, policy = self.config, self.policy
        if self._generated is None:
            batch = self._request(step)
            self._generated = batch, self._generate(step, batch)
        batch, completions = self._generated  # drawn before, where scoring them had no memory
        longest, tokens = zip(
            *self.group.all_gather_object((completions.mask.shape[1], int(completions.mask.sum()))), strict=True
        )
        # All learners' trees have one shape, and so as many backward passes: each of them may be a collective.
        completions = completions.widened(max(longest))
        began = time.perf_counter()
        terms = self._reward(batch, completions)
        rewards = terms.reward.view(-1, config.num_generations)
        if not torch.isfinite(rewards).all():
            raise DivergenceError(
                f"grpo: a reward is {rewards[~torch.isfinite(rewards)][0]:g} on {self.describe_batch(step)}; "
                "see that the values of its windows are finite (`stdist check`)"
            )
        tree = self._scoring.tree(policy, batch, completions)
        sizes = self.micro_batches.sizes(tree)
        with as_reference(policy):
            reference_log_probs = completion_log_probs(
                policy, tree, completions, config.temperature, sizes, self._scoring.log_probs
            )
        return Rollout(
            completions,
            reference_log_probs,
            self._advantages(batch, completions, rewards),
            torch.zeros_like(completions.log_probs),
            sum(tokens),
            tree,
            sizes,
            {
                **self._statistics(terms, completions),
                **self.rollouts.metrics,
                "seconds/score": time.perf_counter() - began,
            },
        )

    def _request(self, step: int) -> PolicyBatch:
        """Requests the candidates of this step, and of as many later ones as the rollouts may run ahead. Returns this
        learner's batch of ``step``."""
        n = self.config.num_iterations
        for ahead in range(step, min(step + n * self.rollouts.max_staleness + 1, self.config.max_steps), n):
            if ahead not in self._requested:
                self._requested[ahead] = self.batches(ahead // n)
                self.rollouts.request(ahead, self._requested[ahead])
        return self._requested.pop(step)

    def _generate(self, step: int, batch: PolicyBatch) -> Completions:
        """Candidates of this learner's batch, whoever samples them, by weights that are new enough."""
        records = self.rollouts.generate(step, batch)
        oldest = step - self.config.num_iterations * self.rollouts.max_staleness
        allowed = [name for name, at in self.rollouts.versions.items() if oldest <= at <= step]
        return completions_of(records, step, batch, allowed, self.policy)

    def _truth(
        self, batch: PolicyBatch, completions: Completions
    ) -> tuple[Float[Tensor, "candidates K"], Float[Tensor, " candidates"]]:
        """Each candidate's truth, and its d of Eq. 19."""
        g, device = self.config.num_generations, completions.values.device
        truth = torch.from_numpy(batch.truth).flatten(0, 1).float().to(device)
        normalizers = self.normalizers(batch).to(device)
        return truth.repeat_interleave(g, 0), normalizers.repeat_interleave(g, 0)

    def normalizers(self, batch: PolicyBatch) -> Float[Tensor, " sequences"]:
        """d of Eq. 19 of each sequence of a batch, in units."""
        truth = torch.from_numpy(batch.truth).flatten(0, 1).float()
        cell_mean = torch.from_numpy(np.tile(self.cell_mean[batch.cells], len(batch.shared))).float()
        return normalizers(self.config.normalizer, truth, cell_mean, self._city_mean)

    def _reward(self, batch: PolicyBatch, completions: Completions) -> RewardTerms:
        config = self.config
        return reward_terms(
            completions.values,
            completions.lengths,
            *self._truth(batch, completions),
            config.half_score,
            kind=config.reward,
            num_generations=config.num_generations,
        )

    def _advantages(
        self, batch: PolicyBatch, completions: Completions, rewards: Float[Tensor, "groups G"]
    ) -> Float[Tensor, " candidates"] | Float[Tensor, "candidates tokens"]:
        """A candidate's, from its reward; of each step by itself where the reward adds up steps that were drawn
        independently, so that no step pays for another one's luck."""
        config = self.config
        if config.reward != "error_of_mean":
            return group_advantages(rewards, config.scale_rewards).flatten()
        truth, normalizer = self._truth(batch, completions)
        groups, horizon = (len(rewards), config.num_generations, -1), truth.shape[1]
        errors = error_of_mean(completions.values.view(groups), truth.view(groups))
        of_steps = -(errors / normalizer.view(groups) ** 2).transpose(1, 2).flatten(0, 1)
        advantages = group_advantages(of_steps, config.scale_rewards)
        return advantages.view(-1, horizon, config.num_generations).transpose(1, 2).flatten(0, 1)

    def _statistics(self, terms: RewardTerms, completions: Completions) -> dict[str, float]:
        rewards = terms.reward.view(-1, self.config.num_generations)
        # A reward that is always about zero teaches nothing: watch this share.
        low = {"reward_under_0.05": float((rewards < 0.05).float().mean())} if self.config.reward == "eq17" else {}
        return {
            "reward": float(rewards.mean()),
            **{f"reward/{name}": float(term.mean()) for name, term in terms._asdict().items()},
            "reward_std": float(rewards.std(1).mean()),
            # Such a group has no advantages: nothing is learnt from it.
            "equal_rewards": float((rewards.std(1) < 1e-6).float().mean()),
            **low,
            "right_length": float((completions.lengths == self.policy.spec.setting.horizon).float().mean()),
            "tokens_per_candidate": float(completions.mask.sum(1).float().mean()),
        }


def mismatch(completions: Completions, trainer_log_probs: Float[Tensor, "candidates tokens"]) -> dict[str, float]:
    """How far what wrote is from what learns: ``mismatch_kl``, mean of log π_rollout − log π_trainer over tokens, and
    ``effective_samples``, (Σw)² / (n Σw²) of the importance weights w = π_trainer / π_rollout; 0 and 1 where equal."""
    difference = (completions.log_probs - trainer_log_probs)[completions.mask].double()
    weights = (-difference).exp()
    effective = weights.sum().square() / (len(weights) * weights.square().sum())
    return {"mismatch_kl": float(difference.mean()), "effective_samples": float(effective)}


def candidate_tree(policy: PolicyModel, batch: PolicyBatch, completions: Completions) -> Tree:
    """Windows, their cells' prompts, and what was written behind each: the last token is predicted, never read."""
    end = len(policy.vocabulary)
    ids = torch.where(completions.answer_ids == end, policy.end_id, completions.answer_ids + policy.first_numeral_id)
    return Tree(batch.shared, batch.grids, (Level(batch.prompts), Level(ids[:, :-1])))


def candidate_log_probs(
    policy: PolicyModel,
    states: Float[Tensor, "candidates tokens d"],
    completions: Completions,
    rows: slice,
    temperature: float,
) -> Float[Tensor, "candidates tokens"]:
    """Log-probability of the tokens of candidates ``rows`` under the distribution they were sampled from (without
    top-p's cut); 0 outside the mask. ``states`` predict them."""
    mask = completions.mask[rows]
    log_probs = token_log_probs(states[mask], policy.answer_head, completions.answer_ids[rows][mask], temperature)
    return torch.zeros(mask.shape, device=mask.device).masked_scatter(mask, log_probs)


class Scoring(NamedTuple):
    """How candidates are read again: the tree that is computed for them, and their log-probabilities from the states of
    its leaves. Each leaf has the same number of candidates, consecutive ones."""

    tree: Callable[[PolicyModel, PolicyBatch, Completions], Tree]
    log_probs: LogProbs


SCORINGS = {
    "chain": Scoring(candidate_tree, candidate_log_probs),
    "direct": Scoring(one_pass.tree, one_pass.log_probs),
}


def candidates_per_leaf(tree: Tree, completions: Completions) -> int:
    return len(completions.mask) // len(tree.levels[-1])


def candidates_of(leaves: slice, per_leaf: int) -> slice:
    return slice(leaves.start * per_leaf, leaves.stop * per_leaf)


def completion_log_probs(
    policy: PolicyModel,
    tree: Tree,
    completions: Completions,
    temperature: float,
    sizes: list[int],
    log_probs_of: LogProbs = candidate_log_probs,
) -> Float[Tensor, "candidates tokens"]:
    """Log-probability of every written token, without gradients."""
    log_probs, per_leaf = torch.empty_like(completions.log_probs), candidates_per_leaf(tree, completions)

    def visit(leaves: slice, states: Tensor) -> Tensor:
        rows = candidates_of(leaves, per_leaf)
        log_probs[rows] = log_probs_of(policy, states, completions, rows, temperature)
        return log_probs

    prefix_tree.forward(policy, tree, visit, sizes)
    return log_probs
