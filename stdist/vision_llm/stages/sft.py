"""Stage 3: supervised fine-tuning on windows (Vision-LLMs for Spatiotemporal Traffic Forecasting, Eq. 16).

A window's prefix tree has one level: a cell with its ground truth is one child, its only candidate. The loss is the
mean of −log P over target positions (K numerals and the end token), never over the prompt.
"""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from stdist.training.loop import Stage
from stdist.training.process_group import ProcessGroup
from stdist.vision_llm.config import SFTConfig
from stdist.vision_llm.kernels.token_losses import token_log_probs
from stdist.vision_llm.policy.city_windows import CityWindows, PolicyBatch
from stdist.vision_llm.policy.model import PolicyModel
from stdist.vision_llm.rollout.forecaster import validation_errors
from stdist.vision_llm.rollout.sampler import Decoding
from stdist.vision_llm.stages.batches import StepBatches
from stdist.vision_llm.tree import prefix_tree
from stdist.vision_llm.tree.micro_batches import MicroBatches
from stdist.vision_llm.tree.prefix_tree import Level, Tree, Visit


class SFTStage(Stage):
    """See :class:`stdist.training.loop.Stage`. The best validation NRMSE is the result."""

    name = "sft"
    monitor: str | None = "nrmse"
    headline = ("nrmse",)

    def __init__(
        self,
        policy: PolicyModel,
        train: CityWindows,
        validation: CityWindows,
        config: SFTConfig,
        seed: int,
        decoding: Decoding,
        group: ProcessGroup = ProcessGroup(),
    ):
        self.policy, self.validation, self.config = policy, validation, config
        self.decoding, self.group = decoding, group
        self.batches = StepBatches(train, config, "sft", seed, group)
        self.micro_batches = MicroBatches(policy, config.activation_bytes)

    def step(self, step: int, backward: Callable[[Tensor], None]) -> dict[str, float]:
        batch = self.batches(step)
        blank = torch.from_numpy(self.batches.blanks(step, batch, self.config.blank_share)).to(batch.answers.device)
        tree = sft_tree(self.policy, batch, blank)
        loss = prefix_tree.backward(
            self.policy, tree, sft_loss(self.policy, batch), backward, self.micro_batches.sizes(tree)
        )
        return {"loss": loss, "tokens": tree.tokens, "tokens_saved": tree.tokens_per_sample - tree.tokens}

    def halve_memory(self) -> bool:
        self.policy.train()  # wherever it was left
        self.micro_batches.halve()
        return True

    def describe_batch(self, step: int) -> str:
        return self.batches.describe(step)

    def evaluate(self) -> dict[str, float]:
        indices = self.validation.evenly(self.config.eval_windows)
        return validation_errors(
            self.policy, self.validation, indices, self.config.windows_per_step, self.decoding, self.group
        )


def sft_tree(policy: PolicyModel, batch: PolicyBatch, blank: Bool[Tensor, " cells"]) -> Tree:
    """Windows, and below them each cell's prompt and answer. Where ``blank`` is True the sequence reads blanks in
    place of its previous values y_<i."""
    previous = batch.answers[:, :-1].masked_fill(blank[:, None], policy.blank_id)
    return Tree(batch.shared, batch.grids, (Level(torch.cat([batch.prompts, previous], dim=1)),))


def sft_loss(policy: PolicyModel, batch: PolicyBatch) -> Visit:
    """Eq. 16: mean of −log P(y_i) over the target positions of all cells of all windows in the batch; of some cells,
    their share of it."""
    prompt = batch.prompts.shape[1]

    def loss(rows: slice, states: Float[Tensor, "cells tokens d"]) -> Float[Tensor, ""]:
        # A state predicts the token behind it: the prompt's last one the first answer.
        log_probs = token_log_probs(states[:, prompt:].flatten(0, 1), policy.full_head, batch.answers[rows].flatten())
        return -log_probs.sum() / batch.answers.numel()

    return loss
