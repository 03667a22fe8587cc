"""A run on nodes: one model that every stage trains further, what it cost, and what a report shows of it."""

from functools import partial
from pathlib import Path
from typing import Any

import torch

from stdist.data.audit import Fitted
from stdist.evaluation import Efficiency, Table, write_embeddings
from stdist.files import own_file, write_atomically
from stdist.nodes import efficiency
from stdist.nodes.checkpoints import ForecasterFiles, digest_of
from stdist.nodes.dataset import NodeDataset
from stdist.nodes.interface import Forecaster
from stdist.nodes.learners import NodeLearners
from stdist.nodes.predictor import NodesPredictor
from stdist.nodes.stage import ForecastStage, WindowForecasts
from stdist.runs.forecasting import Predictor, Written
from stdist.runs.run import Run
from stdist.training.engines import engine_name
from stdist.training.loop import LoopSettings, Trainer
from stdist.urbanpg.checkpoints import require_same_frozen, stage_names
from stdist.urbanpg.config import UrbanConfig
from stdist.urbanpg.continual import COLUMNS, TITLE, expanded, period_row

EFFICIENCY = "efficiency.json"
"""A file beside a stage's checkpoints: the cost of its training."""


class NodesRun(Run):
    """One model that every stage trains further. Nothing else holds it: a learner with some of the nodes lets go of the
    whole city's embeddings.

    Args:
        datasets: of every stage. model: as the first stage begins. fitted: the data each stage's result is fitted on.
    """

    metric = "mae"
    config: UrbanConfig

    def __init__(
        self,
        config: UrbanConfig,
        datasets: list[NodeDataset],
        model: Forecaster,
        fitted: list[tuple[Fitted, ...]],
        notes: list[str],
    ):
        self.config, self.datasets, self.model, self.notes = config, datasets, model, notes
        self.store, self.train, self.test = datasets[-1].store, datasets[-1].train, datasets[-1].test
        self._fitted, self._periods = fitted, list[list[str | float | None]]()
        self._learners: NodeLearners | None = None
        self._device = learner_device()

    @property
    def summary(self) -> str:
        return f"{len(self.datasets[-1].nodes)} nodes"

    def fit(self, stage: str, trainer: Trainer) -> dict[str, Any]:
        config, number = self.config, stage_names(self.config).index(stage)
        dataset, before = self.datasets[number], None
        if config.continual and number:
            before = self.model if trainer.group.is_main else None
            self.model = expanded(self.model, dataset, config.continual, config.seed)
        if self._learners is None:
            self._learners = NodeLearners.current(len(dataset.nodes), config.nodes.ranks)
        self._learners = self._learners.of_nodes(len(dataset.nodes))
        frozen = [name for name, parameter in self.model.named_parameters() if not parameter.requires_grad]
        digest = digest_of(self.model, frozen)
        if frozen:
            require_same_frozen(config, stage, digest, trainer.group)
        summary = self._train(stage, dataset, self._fitted[number], self._learners, trainer)
        self._take_result(trainer.checkpoints(stage).folder / summary["checkpoint"], frozen, digest, trainer)
        if config.continual and trainer.group.is_main:
            batch_size = config.training.train_batch_size
            self._periods.append(period_row(number + 1, dataset, before, self.model, batch_size))
        return summary

    def predictor(self) -> Predictor:
        return nodes_predictor(self.config, self.model, self._fitted[-1])

    def report_extras(self, written: Written) -> dict[str, Any]:
        config = self.config
        if embeddings := self.model.embeddings(self.datasets[-1].node_means, config.seed):
            write_embeddings(config.run_dir, embeddings)
        paths = [config.run_dir / "checkpoints" / stage / EFFICIENCY for stage in stage_names(config)]
        costs = [_cost(path) for path in paths if path.exists()]
        if costs:
            costs[-1] = costs[-1].model_copy(update={"inference_samples_per_second": written.windows_per_second})
        tables = [Table(title=TITLE, columns=COLUMNS, rows=self._periods)] if self._periods else []
        return {"efficiency": costs, "tables": tables}

    def _train(
        self,
        name: str,
        dataset: NodeDataset,
        fitted: tuple[Fitted, ...],
        learners: NodeLearners,
        trainer: Trainer,
    ) -> dict[str, Any]:
        """Trains the model on the windows of ``dataset``, or only loads what that left; notes the cost."""
        config, settings, group = self.config, self.config.training, trainer.group
        counts = efficiency.count(self.model), efficiency.count(self.model, trained=True)
        model = self.model = config.model.on_learner(self.model, learners)
        model.to(self._device).train()
        train, validation = (WindowForecasts(model, part, learners) for part in (dataset.train, dataset.validation))
        stage = ForecastStage(name, train, validation, settings, config.seed)
        epoch = stage.steps_per_epoch
        steps = settings.max_epochs * epoch
        summary = trainer.fit(
            stage,
            ForecasterFiles(model, fitted),
            partial(config.model.make_engine, model, settings, steps, config.learners, learners.data_ranks),
            LoopSettings(steps, settings.logging_steps, epoch, epoch, settings.patience),
            run_info={"device": str(self._device), "learners": f"{group.size}, {engine_name(config.learners)}"},
        )
        if group.is_main and stage.seconds_per_epoch is not None:
            cost = Efficiency(
                name=name,
                parameters=counts[0],
                trained_parameters=counts[1],
                batch_size=settings.train_batch_size,
                hardware=efficiency.hardware(self._device, group.size),
                seconds_per_epoch=stage.seconds_per_epoch,
                samples_per_second=epoch * settings.train_batch_size / stage.seconds_per_epoch,
                peak_memory_bytes=efficiency.peak_memory(self._device),
            )
            write_atomically(trainer.checkpoints(name).folder / EFFICIENCY, cost.model_dump_json(indent=1))
        return summary

    def _take_result(self, checkpoint: Path, frozen: list[str], digest: str, trainer: Trainer) -> None:
        """Reads the whole city's model from a stage's result. Raises RuntimeError where a byte of what was frozen
        changed."""
        model = self.config.model.load(checkpoint)
        model.block_nodes = self.config.nodes.block_nodes
        if digest_of(model, frozen) != digest:
            raise RuntimeError(f"frozen weights are not in {checkpoint} as they were; this is a bug")
        if frozen:
            size = sum(parameter.nbytes for name, parameter in model.named_parameters() if name in frozen)
            stage = checkpoint.parent.name
            note = f"{stage}: {size:,} bytes of frozen weights are in its result as they were (sha256 {digest[:12]}…)"
            self.notes.append(note)
            trainer.log(note)
        for name, parameter in model.named_parameters():
            parameter.requires_grad = name not in frozen
        self.model = model.to(self._device)


def _cost(path: Path) -> Efficiency:
    with own_file(path, "delete it; the report then lacks what the training cost"):
        return Efficiency.model_validate_json(path.read_text())


def learner_device() -> torch.device:
    """This learner's GPU, where it has one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def nodes_predictor(config: UrbanConfig, model: Forecaster, fitted: tuple[Fitted, ...]) -> NodesPredictor:
    """``model`` as it forecasts for ``config``; ``fitted``: the data that it is fitted on."""
    first_nodes = model.nodes if config.continual else None
    return NodesPredictor(model, config.data, config.training.train_batch_size, fitted, first_nodes)
