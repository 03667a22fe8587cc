"""Batches of fine-tuning and GRPO: windows in the sampler's order, read ahead, and cells of each.

Draws are functions of the run's seed, the stage, the step and what they are drawn for, whatever the number of learners.
"""

from typing import Literal

import numpy as np

from stdist.data import WindowBatch
from stdist.data.loader import StepLoader
from stdist.data.sampler import uniform
from stdist.training.process_group import ProcessGroup
from stdist.vision_llm.config import ForecastStageConfig
from stdist.vision_llm.policy.city_windows import CityWindows, PolicyBatch

STAGES = ("sft", "grpo")
CELLS, BLANKS = range(2)
"""Purposes of a stream of uniform numbers, in its key."""


class StepBatches:
    """``windows_per_step`` windows, shared out to the learners, and the same ``cells_per_window`` cells of each."""

    def __init__(
        self,
        city: CityWindows,
        config: ForecastStageConfig,
        stage: Literal["sft", "grpo"],
        seed: int,
        group: ProcessGroup,
    ):
        """Raises InputError where the learners cannot share a step's windows evenly."""
        self.city, self.config, self._key = city, config, (seed, STAGES.index(stage))
        mine = group.local_slice(min(config.windows_per_step, len(city)), f"{stage}.windows_per_step")
        share = mine.stop - mine.start
        self._loader = StepLoader(city.windows, share, seed=seed, rank=group.rank, world=group.size)

    def __call__(self, step: int) -> PolicyBatch:
        """This learner's batch of a step, counted from 0."""
        read = self._loader.batch(step)
        windows = WindowBatch(
            read.history.numpy(), read.target.numpy(), read.target_observed.numpy(), read.origin_index.numpy()
        )
        return self.city.batch_of(self.city.in_range(windows), self.cells(step))

    def cells(self, step: int) -> np.ndarray:
        """Different cells, ascending, int64 [C]; the same ones for all learners."""
        cells = self.city.cells
        keys = uniform(len(cells), *self._key, step, CELLS, 0)
        return np.sort(cells[np.argsort(keys, kind="stable")[: self.config.cells_per_window]])

    def blanks(self, step: int, batch: PolicyBatch, share: float) -> np.ndarray:
        """Sequences that read blanks, bool [W·C], each with the probability ``share``."""
        cells = len(batch.cells)
        keys = [uniform(cells, *self._key, step, BLANKS, window) for window in batch.origins.tolist()]
        return np.concatenate(keys) < share

    def describe(self, step: int) -> str:
        return self.city.describe(self._loader.indices(step))
