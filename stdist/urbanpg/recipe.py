"""Forecasters of nodes as recipes, in UrbanPG's three paradigms: pre-training (or training from scratch), few-shot
(Eq. 8) and continual learning (Eq. 9–10). Baselines train in the same harness."""

from functools import partial
from pathlib import Path
from typing import Any

import torch

from stdist.data.audit import Fitted, data_digest, leak_line, leaks
from stdist.errors import InputError
from stdist.evaluation import Efficiency, Table, write_embeddings
from stdist.files import write_atomically
from stdist.nodes import efficiency
from stdist.nodes.checkpoints import ForecasterFiles, digest_of, load_fitted
from stdist.nodes.dataset import NodeDataset, open_dataset, open_period
from stdist.nodes.interface import Forecaster
from stdist.nodes.learners import NodeLearners, check_grid
from stdist.nodes.stage import ForecastStage, WindowForecasts
from stdist.runs.forecasting import Predictor, Written
from stdist.runs.recipes import Recipe
from stdist.runs.run import Run
from stdist.runs.run_folder import refuse_foreign_folder
from stdist.training.deepspeed_json import deepspeed_json
from stdist.training.engines import engine_name
from stdist.training.loop import LoopSettings, Trainer
from stdist.training.process_group import ProcessGroup
from stdist.urbanpg.checkpoints import backbone_path, load_backbone, require_same_frozen, stage_names
from stdist.urbanpg.config import UrbanConfig
from stdist.urbanpg.continual import COLUMNS, TITLE, expanded, period_row, require_gradients
from stdist.urbanpg.models import UrbanPGModelConfig
from stdist.urbanpg.predictor import NodesPredictor

EFFICIENCY = "efficiency.json"
"""Beside a stage's checkpoints: the cost of its training."""


class UrbanPGRecipe(Recipe[UrbanConfig]):
    """``recipe: urbanpg-train``, ``few-shot`` and ``continual``."""

    Config = UrbanConfig

    def stages(self, config: UrbanConfig) -> tuple[str, ...]:
        return stage_names(config)

    def check(self, config: UrbanConfig, group: ProcessGroup) -> list[NodeDataset]:
        return check(config, group)

    def open(self, config: UrbanConfig, group: ProcessGroup) -> "NodesRun":
        return NodesRun(config, *open_run(config, group))

    def load(self, config: UrbanConfig, checkpoint: Path) -> Predictor:
        model = config.model.load(checkpoint).to(_device())
        model.block_nodes = config.nodes.block_nodes
        return NodesPredictor(model, config, load_fitted(checkpoint) or ())

    def plan(self, config: UrbanConfig, device_memory: int | None, device_flops: float) -> Any:
        from stdist.urbanpg.plan import plan_run

        return plan_run(config, device_memory)


class NodesRun(Run):
    """One model that every stage trains further. Nothing else holds it: a learner with some of the nodes lets go of the
    whole city's rows.

    Args:
        datasets: of every stage. model: as the first stage begins. fitted: of each stage's result.
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
        self._device = _device()

    @property
    def summary(self) -> str:
        return f"{len(self.datasets[-1].nodes)} nodes"

    def fit(self, stage: str, trainer: Trainer) -> dict[str, Any]:
        config, number = self.config, stage_names(self.config).index(stage)
        dataset, before = self.datasets[number], None
        if config.continual and number:
            before = self.model if trainer.group.is_main else None
            self.model = expanded(self.model, dataset, config.continual, config.seed)
        summary = self._fit(stage, dataset, self._fitted[number], trainer)
        if config.continual and trainer.group.is_main:
            batch_size = config.training.train_batch_size
            self._periods.append(period_row(number + 1, dataset, before, self.model, batch_size))
        return summary

    def predictor(self) -> Predictor:
        return NodesPredictor(self.model, self.config, self._fitted[-1])

    def report_extras(self, written: Written) -> dict[str, Any]:
        if projections := self.model.embeddings(self.datasets[-1].node_means, self.config.seed):
            write_embeddings(self.config.run_dir, projections)
        tables = [Table(title=TITLE, columns=COLUMNS, rows=self._periods)] if self._periods else []
        return {"efficiency": self._costs(written.windows_per_second), "tables": tables}

    def _costs(self, windows_per_second: float | None) -> list[Efficiency]:
        paths = [self.config.run_dir / "checkpoints" / stage / EFFICIENCY for stage in stage_names(self.config)]
        costs = [Efficiency.model_validate_json(path.read_text()) for path in paths if path.exists()]
        if costs:
            costs[-1] = costs[-1].model_copy(update={"inference_samples_per_second": windows_per_second})
        return costs

    def _fit(self, name: str, dataset: NodeDataset, fitted: tuple[Fitted, ...], trainer: Trainer) -> dict[str, Any]:
        """Trains the model on the windows of ``dataset``, or only loads what that left; the run then has the stage's
        result, read from the checkpoint, for the whole city.

        Raises InputError where frozen weights are other ones than the stage once began with, RuntimeError where a byte
        of them changed.
        """
        config, settings, model, group = self.config, self.config.training, self.model, trainer.group
        if self._learners is None:
            self._learners = NodeLearners.current(len(dataset.nodes), config.nodes.ranks)
        learners = self._learners = self._learners.of_nodes(len(dataset.nodes))
        frozen = [weight for weight, parameter in model.named_parameters() if not parameter.requires_grad]
        before, counts = digest_of(model, frozen), (efficiency.count(model), efficiency.count(model, trained=True))
        if frozen:
            require_same_frozen(config, name, before, group)
        model = self.model = config.model.on_learner(model, learners)
        model.to(self._device).train()
        train, validation = (WindowForecasts(model, part, learners) for part in (dataset.train, dataset.validation))
        stage = ForecastStage(name, train, validation, settings, config.seed)
        epoch = stage.steps_per_epoch
        steps = settings.max_epochs * epoch
        checkpoints = trainer.checkpoints(name)
        summary = trainer.fit(
            stage,
            ForecasterFiles(model, fitted),
            partial(config.model.make_engine, model, settings, steps, config.learners, learners.data_ranks),
            LoopSettings(steps, settings.logging_steps, epoch, epoch, settings.patience),
            run_info={"device": str(self._device), "learners": f"{group.size}, {engine_name(config.learners)}"},
        )
        result = config.model.load(checkpoints.folder / summary["checkpoint"])
        result.block_nodes = config.nodes.block_nodes
        if digest_of(result, frozen) != before:
            raise RuntimeError(f"weights that {name} froze are not in {checkpoints.folder} as they were; this is a bug")
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
            write_atomically(checkpoints.folder / EFFICIENCY, cost.model_dump_json(indent=1))
        if frozen:
            size = sum(parameter.nbytes for weight, parameter in result.named_parameters() if weight in frozen)
            note = f"{name}: {size:,} bytes of frozen weights are in its result as they were (sha256 {before[:12]}…)"
            self.notes.append(note)
            trainer.log(note)
        for weight, parameter in result.named_parameters():
            parameter.requires_grad = weight not in frozen
        self.model = result.to(self._device)
        return summary


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def check(config: UrbanConfig, group: ProcessGroup) -> list[NodeDataset]:
    """A dataset for every stage. Raises InputError where ``group`` cannot train ``config`` on it, or
    its folder is another run's."""
    learners = config.learners
    periods = config.continual.periods if config.continual else ()
    datasets = [open_period(config.data, period) for period in periods] or [open_dataset(config.data)]
    batch_size = config.training.train_batch_size
    for dataset in datasets:
        if len(dataset.train) < batch_size:
            raise InputError(
                f"{len(dataset.train)} windows of the training days {dataset.train.span} make no batch of "
                f"training.train_batch_size {batch_size}; lower it, or train on more days"
            )
    refuse_foreign_folder(config, datasets[0].store.digest)
    require_gradients(config, stage_names(config), datasets)
    if config.model.batch_normalisation and group.size > 1:
        # Each learner would normalise with the statistics of its own windows.
        raise InputError(
            f"model.kind {config.model.kind} has batch normalisation, which {group.size} learners do not share; set "
            "learners.num_workers to 1, or choose another kind"
        )
    zero_stage = learners.zero_stage if learners.engine == "deepspeed" else 1
    check_grid(group.size, config.nodes.ranks, len(datasets[0].nodes), zero_stage, config.nodes.block_nodes)
    ProcessGroup(0, group.size // config.nodes.ranks).local_slice(batch_size, "training.train_batch_size")
    if learners.engine == "deepspeed":
        deepspeed_json(learners, config.training.max_grad_norm, False, group.size // config.nodes.ranks)
    return datasets


def open_run(
    config: UrbanConfig, group: ProcessGroup
) -> tuple[list[NodeDataset], Forecaster, list[tuple[Fitted, ...]], list[str]]:
    """A dataset for every stage, the first one's model, the data each one's result is fitted on, and notes for
    people."""
    datasets, notes, before = check(config, group), list[str](), tuple[Fitted, ...]()
    dataset = datasets[0]
    if not dataset.holds_weeks:
        until = next((f" until period {n}" for n, later in enumerate(datasets, 1) if later.holds_weeks), "")
        notes.append(f"{dataset.train.span} does not hold every weekday twice: to the model all days are one{until}")
    if config.few_shot:
        path = backbone_path(config)
        if path != config.few_shot.backbone:
            notes.append(f"{config.few_shot.backbone} is not there any more; its backbone is in {path}")
        backbone, fitted = load_backbone(path)
        assert isinstance(config.model, UrbanPGModelConfig)
        model: Forecaster = config.model.prompts_on(backbone, dataset, config.seed)
        if fitted is None:
            notes.append(f"nothing says which data the backbone {path} was trained on")
        before = fitted or ()
    else:
        model = config.model.build(dataset, config.seed)
    model.block_nodes = config.nodes.block_nodes
    return datasets, model, _fitted(config, datasets, before), notes


def _fitted(config: UrbanConfig, datasets: list[NodeDataset], before: tuple[Fitted, ...]) -> list[tuple[Fitted, ...]]:
    """The data each stage's result is fitted on, where the first one's model was on ``before``. Raises InputError where
    one is on days that it is tested on: nobody would score it."""
    fitted = []
    for name, dataset in zip(stage_names(config), datasets, strict=True):
        data = data_digest(dataset.store, config.data.channel)
        before = tuple(dict.fromkeys((*before, Fitted.on("weights", dataset.statistics.span, data))))
        if leaking := leaks(before, dataset.test.span, data):
            days = "continual.periods" if config.continual else "data.split"
            raise InputError(
                f"leak: {leak_line(leaking, dataset.test.span)}, the test days of stage {name}; choose others in {days}"
            )
        fitted.append(before)
    return fitted
