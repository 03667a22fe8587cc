"""Stage 3: supervised fine-tuning on windows (Vision-LLMs for Spatiotemporal Traffic Forecasting, Eq. 16).

Every cell of a window is one child of the window's shared prefix; its ground truth is the only candidate. The loss is
the mean of −log P over target positions (K numerals and the end token), never over the prompt.
"""

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from stdist.config import SFTConfig
from stdist.vision_llm.city_windows import CityWindows, PolicyBatch
from stdist.vision_llm.forecaster import validation_errors
from stdist.vision_llm.policy import Policy
from stdist.vision_llm.sampler import Decoding
from stdist.vision_llm.token_losses import target_cross_entropy


class SFTStage:
    """See :class:`stdist.training.loop.Stage`. The best validation NRMSE is the result."""

    name = "sft"
    watched = "nrmse"

    def __init__(
        self,
        policy: Policy,
        train: CityWindows,
        validation: CityWindows,
        config: SFTConfig,
        seed: int,
        decoding: Decoding,
    ):
        self.policy, self.train, self.validation = policy, train, validation
        self.config, self.seed, self.decoding = config, seed, decoding

    def step(self, step: int, backward: Callable[[Tensor], None]) -> dict[str, float]:
        config = self.config
        rng = np.random.default_rng([self.seed, 3, step])
        windows, cells = self.train.draw(rng, config.windows_per_step, config.cells_per_window)
        total = tokens = 0.0
        for first in range(0, len(windows), config.windows_per_micro_batch):
            batch = self.train.batch(windows[first : first + config.windows_per_micro_batch], cells)
            blank = rng.random(len(batch.answers)) < config.blank_share
            loss = sft_loss(self.policy, batch, torch.from_numpy(blank).to(batch.answers.device))
            share = len(batch.shared) / len(windows)
            backward(loss * share)
            total += loss.item() * share
            tokens += batch.shared.numel() + batch.prompts.numel() + batch.answers.numel()
        return {"loss": total, "tokens": tokens}

    def evaluate(self) -> dict[str, float]:
        indices = self.validation.evenly(self.config.eval_windows)
        batch_size = self.config.windows_per_micro_batch
        return validation_errors(self.policy, self.validation, indices, batch_size, self.decoding)


def sft_loss(policy: Policy, batch: PolicyBatch, blank: Bool[Tensor, "cells"]) -> Float[Tensor, ""]:
    """Eq. 16: mean of −log P(y_i) over the target positions of all cells of all windows in the batch.

    Where ``blank`` is True the sequence reads blanks in place of its previous values y_<i.
    """
    prefix = policy.prefix(batch.shared, batch.grids)
    previous = batch.answers[:, :-1].masked_fill(blank[:, None], policy.blank_id)
    hidden, _ = policy.branch(prefix, torch.cat([batch.prompts, previous], dim=1))
    # The token at position i is predicted by the hidden state at i − 1: targets start behind the prompt's last token.
    predicting = hidden[:, batch.prompts.shape[1] - 1 :]
    return target_cross_entropy(policy.logits(predicting.flatten(0, 1)), batch.answers.flatten()).mean()
