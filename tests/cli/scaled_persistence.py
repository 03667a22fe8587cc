"""A third party's system, whole: it forecasts the last value times one trained factor. Its package names the recipe in
the entry points of ``stdist.recipes``; nothing in stdist knows of it."""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from stdist.config import OptimizerConfig, RunConfig
from stdist.data import GridStore, Windows, open_store
from stdist.data.audit import Fitted, data_digest
from stdist.evaluation import Chunk, ChunkGrid
from stdist.runs.forecast_request import ForecastRequest
from stdist.runs.forecasting import Predictor
from stdist.runs.recipes import Recipe
from stdist.runs.run import Run
from stdist.training.engine import ParameterGroup
from stdist.training.engines import make_engine
from stdist.training.loop import LoopSettings, Stage, Trainer
from stdist.training.process_group import ProcessGroup


class ScaledPersistenceConfig(RunConfig):
    recipe: Literal["scaled-persistence"]
    fit: OptimizerConfig = OptimizerConfig(learning_rate=0.01, warmup_steps=1, logging_steps=1)
    max_steps: int = 6


class ScaledPersistence(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(1.0))

    def forward(self, history: Tensor) -> Tensor:
        """[B, S, …] to the next value of each place, [B, 1, …]."""
        return self.factor * history[:, -1:]

    def snapshot(self) -> Callable[[Path], None]:
        factor = self.factor.item()
        return lambda path: (path / "factor.json").write_text(json.dumps(factor)) and None

    def read(self, path: Path) -> None:
        self.factor.data.fill_(json.loads((path / "factor.json").read_text()))


class Fit(Stage):
    """A step is one window."""

    name, monitor, headline = "fit", "rmse", ("rmse",)

    def __init__(self, model: ScaledPersistence, train: Windows, validation: Windows):
        self.model, self.train, self.validation = model, train, validation

    def _squared_error(self, windows: Windows, indices: np.ndarray) -> Tensor:
        batch = windows.read(indices)
        return (self.model(torch.from_numpy(batch.history)) - torch.from_numpy(batch.target)).pow(2).mean()

    def step(self, step: int, backward: Callable[[Tensor], None]) -> dict[str, float]:
        loss = self._squared_error(self.train, np.array([step]))
        backward(loss)
        return {"loss": loss.item()}

    def describe_batch(self, step: int) -> str:
        return f"window {step}"

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        return {"rmse": self._squared_error(self.validation, np.arange(len(self.validation))).sqrt().item()}


class ScaledPersistencePredictor(Predictor):
    def __init__(self, model: ScaledPersistence, train: Windows):
        self.model = model
        self.fitted = (Fitted.on("factor", train.span, data_digest(train.store, train.channel)),)

    def regions(self, store: GridStore, request: ForecastRequest, log: Callable[[str], None]) -> tuple[Any, Any]:
        region = store.region(None)
        return region, region

    def check(self, windows: Windows) -> list[str]:
        return []

    def grid(self, windows: Windows) -> tuple[ChunkGrid, np.ndarray]:
        cells = int(np.prod(windows.region.shape))
        return ChunkGrid(len(windows), cells, 16, cells), np.arange(cells)

    def predict(self, windows: Windows, chunks: Iterable[Chunk]) -> Iterator[tuple[Chunk, np.ndarray, dict[str, int]]]:
        for chunk in chunks:
            history = torch.from_numpy(windows.read(np.arange(len(windows))[chunk.windows]).history)
            with torch.no_grad():
                values = self.model(history).expand(-1, windows.K, -1, -1).flatten(2).numpy()
            yield chunk, values[None, :, :, chunk.cells], {}


@dataclass
class ScaledPersistenceRun(Run):
    metric = "rmse"

    config: ScaledPersistenceConfig
    notes: list[str] = field(default_factory=list)
    model: ScaledPersistence = field(default_factory=ScaledPersistence)

    def __post_init__(self) -> None:
        self.store = open_store(self.config.data.store)
        self.train, self.validation, self.test = (self._windows(part) for part in ("train", "validation", "test"))

    def _windows(self, part: str) -> Windows:
        data = self.config.data
        return self.store.windows(part, data.history, data.horizon, channel=data.channel)

    @property
    def summary(self) -> str:
        return "one factor"

    def fit(self, stage: str, trainer: Trainer) -> dict[str, Any]:
        config, groups = self.config, [ParameterGroup({"factor": self.model.factor}, self.config.fit.learning_rate, 0)]
        return trainer.fit(
            Fit(self.model, self.train, self.validation),
            self.model,
            lambda: make_engine(config.learners, config.fit, config.max_steps, self.model, groups, trainer.group.size),
            LoopSettings(config.max_steps, config.fit.logging_steps, save_steps=2, eval_steps=3),
        )

    def predictor(self) -> ScaledPersistencePredictor:
        return ScaledPersistencePredictor(self.model, self.train)


class ScaledPersistencePlan:
    notes, verdicts = ["one number trains"], ["fits"]

    def as_dict(self) -> dict[str, Any]:
        return {"parameters": 1}

    def as_tables(self) -> str:
        return "parameters 1"


class ScaledPersistenceRecipe(Recipe[ScaledPersistenceConfig]):
    Config = ScaledPersistenceConfig

    def stages(self, config: ScaledPersistenceConfig) -> tuple[str, ...]:
        return ("fit",)

    def check(self, config: ScaledPersistenceConfig, group: ProcessGroup) -> None:
        ScaledPersistenceRun(config)

    def open(self, config: ScaledPersistenceConfig, group: ProcessGroup) -> ScaledPersistenceRun:
        return ScaledPersistenceRun(config)

    def load(self, config: ScaledPersistenceConfig, checkpoint: Path) -> ScaledPersistencePredictor:
        run = ScaledPersistenceRun(config)
        run.model.read(checkpoint)
        return run.predictor()

    def plan(self, config: ScaledPersistenceConfig, device: Any) -> Any:
        return ScaledPersistencePlan()
