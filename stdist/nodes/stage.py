"""Training a forecaster of nodes by epochs on the masked MAE in the data's units, as BasicTS and LargeST do."""

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import reduce
from operator import add
from statistics import median
from typing import Any

from jaxtyping import Float
from torch import Tensor

from stdist.data import Windows
from stdist.data.loader import StepLoader, TensorBatch, WindowLoader
from stdist.data.sampler import WindowSampler
from stdist.evaluation import ErrorState
from stdist.nodes.config import EpochsConfig
from stdist.nodes.interface import Forecaster
from stdist.nodes.learners import NodeLearners
from stdist.nodes.node_set import NodeSet
from stdist.training.inference import inference
from stdist.training.loop import Stage


class WindowForecasts:
    """A forecaster on windows: batches of this learner's share of them go in, forecasts in the data's units come out.

    ``windows`` whose history is of the whole city's nodes; this learner reads and forecasts its own of them.
    """

    def __init__(self, model: Forecaster, windows: Windows, learners: NodeLearners) -> None:
        self.model, self.learners = model, learners
        self.nodes = NodeSet.of(windows.store, windows.history_region).part(learners.node_slice)
        self.windows = windows.of_region(self.nodes.region)
        self._slot_times, self._device = windows.store.slot_times, next(model.parameters()).device

    def __call__(self, batch: TensorBatch, noise_seed: int | None = None) -> tuple[Float[Tensor, "B K N"], TensorBatch]:
        """The forecasts, and the batch of these nodes on their device."""
        slot, weekday = self.model.scaling.calendar(self._slot_times[batch.origin_index.numpy()])
        names = "history", "target", "target_observed"
        batch = replace(batch, **{name: self.nodes.select(getattr(batch, name)) for name in names}).to(self._device)
        slot, weekday = slot.to(self._device), weekday.to(self._device)
        return self.model(batch.history, slot, weekday, noise_seed=noise_seed), batch

    def sampler(self, batch_size: int, **settings: Any) -> WindowSampler:
        share = self.learners.share(batch_size)
        return WindowSampler(
            self.windows, share, rank=self.learners.data_rank, world=self.learners.data_ranks, **settings
        )

    def all(self, batch_size: int) -> Iterator[tuple[Float[Tensor, "B K N"], TensorBatch]]:
        """Every window once, in time order, in evaluation mode."""
        for batch in WindowLoader(self.sampler(batch_size, shuffle=False)):
            with inference(self.model):
                made = self(batch)
            yield made

    def errors(self, batch_size: int, nodes: slice = slice(None)) -> ErrorState:
        """On the observed points of all windows and of ``nodes``, counted within this learner's; over all learners."""
        state = ErrorState.empty(self.windows.K)
        for made, batch in self.all(batch_size):
            parts = (of_all[:, :, nodes].cpu().numpy() for of_all in (made, batch.target, batch.target_observed))
            state += ErrorState.of(*parts)
        return reduce(add, self.learners.group.all_gather_object(state))


class ForecastStage(Stage):
    """See :class:`stdist.training.loop.Stage`: a step is a batch of windows, an evaluation all validation windows."""

    monitor: str | None = "mae"
    headline = ("mae", "rmse", "mape")

    def __init__(
        self, name: str, train: WindowForecasts, validation: WindowForecasts, config: EpochsConfig, seed: int
    ) -> None:
        self.name, self.config = name, config
        self._train, self._validation, self._seed = train, validation, seed
        share, ranks = train.learners.share(config.train_batch_size), train.learners.data_ranks
        self._loader = StepLoader(train.windows, share, seed=seed, rank=train.learners.data_rank, world=ranks)
        self._began: float | None = None
        self._seconds: list[float] = []

    @property
    def steps_per_epoch(self) -> int:
        return self._loader.steps_per_epoch

    @property
    def seconds_per_epoch(self) -> float | None:
        """Seconds of training alone: this process's median step times the number of steps; None where it made none."""
        return median(self._seconds) * self.steps_per_epoch if self._seconds else None

    def step(self, step: int, backward: Callable[[Tensor], None]) -> dict[str, float]:
        self._end_step()
        self._began = time.perf_counter()
        made, batch = self._train(self._loader.batch(step), noise_seed=step ^ self._seed << 32)
        learners = self._train.learners
        points = learners.total(batch.target_observed.sum())
        error = (made - batch.target).abs().where(batch.target_observed, 0.0).sum() / points.clamp(min=1)
        # The engine takes the mean over what shares the batch, and this learner's part is one of a sum.
        backward(error * learners.data_ranks)
        return {"loss": float(learners.total(error))}

    def _end_step(self) -> None:
        """A step ends, the engine's part of it too, where the next one or an evaluation begins."""
        if self._began is not None:
            self._seconds.append(time.perf_counter() - self._began)
            self._began = None

    def describe_batch(self, step: int) -> str:
        indices = self._loader.indices(step)
        first = self._train.windows.origin_times[indices].min()
        return f"{len(indices)} windows of {self._train.windows.store.path}, the first with origin {first}"

    def evaluate(self) -> dict[str, float]:
        self._end_step()
        pooled = self._validation.errors(self.config.train_batch_size).pooled()
        return {name: pooled[name] for name in ("mae", "rmse", "mape", "nrmse")}
