"""Forecasters of nodes as recipes, in UrbanPG's three paradigms: pre-training (or training from scratch), few-shot
(Eq. 8) and continual learning (Eq. 9–10). Baselines train in the same harness."""

from functools import partial
from pathlib import Path
from typing import Any

import torch

from stdist.data import NodeRange
from stdist.data.audit import Fitted, data_digest, leak_line, leaks
from stdist.errors import InputError
from stdist.evaluation import Efficiency, Table, write_embeddings
from stdist.files import write_atomically
from stdist.nodes import efficiency
from stdist.nodes.learners import NodeLearners, check_grid
from stdist.nodes.stage import ForecastStage, WindowForecasts
from stdist.nodes.task import Task, open_period, open_task
from stdist.runs.forecasting import Predictor, Written
from stdist.runs.recipes import Recipe
from stdist.runs.run import Run
from stdist.runs.run_folder import refuse_foreign_folder
from stdist.training.deepspeed_json import deepspeed_json
from stdist.training.engine import Engine, ParameterGroup, cosine_schedule
from stdist.training.engines import engine_name, make_engine
from stdist.training.loop import LoopSettings, Trainer
from stdist.training.process_group import ProcessGroup
from stdist.urbanpg.checkpoints import (
    ForecasterFiles,
    Model,
    backbone_path,
    digest_of,
    load_backbone,
    load_fitted,
    load_forecaster,
    require_same_frozen,
    stage_names,
)
from stdist.urbanpg.config import UrbanConfig
from stdist.urbanpg.continual import COLUMNS, TITLE, expanded, period_row, require_gradients
from stdist.urbanpg.embeddings import project_embeddings
from stdist.urbanpg.model import UrbanPG
from stdist.urbanpg.models import new_baseline, new_urbanpg, prompts_on
from stdist.urbanpg.node_parallel import NodeParallel
from stdist.urbanpg.predictor import NodesPredictor

EFFICIENCY = "efficiency.json"
"""Beside a stage's checkpoints: the cost of its training."""


class UrbanPGRecipe(Recipe[UrbanConfig]):
    """``recipe: urbanpg-train``, ``few-shot`` and ``continual``."""

    Config = UrbanConfig

    def stages(self, config: UrbanConfig) -> tuple[str, ...]:
        return stage_names(config)

    def check(self, config: UrbanConfig, group: ProcessGroup) -> list[Task]:
        return check(config, group)

    def open(self, config: UrbanConfig, group: ProcessGroup) -> "NodesRun":
        return NodesRun(config, *open_run(config, group))

    def load(self, config: UrbanConfig, checkpoint: Path) -> Predictor:
        model = load_forecaster(checkpoint)
        model.to(_device())
        return NodesPredictor(model, config, load_fitted(checkpoint) or ())

    def plan(self, config: UrbanConfig, device_memory: int | None, device_flops: float) -> Any:
        from stdist.urbanpg.plan import plan_run

        return plan_run(config, device_memory)


class NodesRun(Run):
    """One model that every stage trains further. Nothing else holds it: a learner with some of the nodes lets go of the
    whole city's rows.

    Args:
        tasks: the data of every stage. model: as the first stage begins. fitted: of each stage's result.
    """

    metric = "mae"
    config: UrbanConfig

    def __init__(
        self,
        config: UrbanConfig,
        tasks: list[Task],
        model: Model,
        fitted: list[tuple[Fitted, ...]],
        notes: list[str],
    ):
        self.config, self.tasks, self.model, self.notes = config, tasks, model, notes
        self.store, self.train, self.test = tasks[-1].store, tasks[-1].train, tasks[-1].test
        self._fitted, self._periods = fitted, list[list[str | float | None]]()
        self._learners: NodeLearners | None = None
        self._device = _device()

    @property
    def summary(self) -> str:
        return f"{self.tasks[-1].nodes.shape[0]} nodes"

    def fit(self, stage: str, trainer: Trainer) -> dict[str, Any]:
        config, number = self.config, stage_names(self.config).index(stage)
        task, before = self.tasks[number], None
        if config.continual and number:
            before = self.model if trainer.group.is_main else None
            self.model = expanded(self.model, task, config.continual, config.seed)
        summary = self._fit(stage, task, self._fitted[number], trainer)
        if config.continual and trainer.group.is_main:
            batch_size, block_nodes = config.training.train_batch_size, config.nodes.block_nodes
            self._periods.append(period_row(number + 1, task, before, self.model, batch_size, block_nodes))
        return summary

    def predictor(self) -> Predictor:
        return NodesPredictor(self.model, self.config, self._fitted[-1])

    def report_extras(self, written: Written) -> dict[str, Any]:
        config, task = self.config, self.tasks[-1]
        if isinstance(self.model, UrbanPG):
            projections = project_embeddings(self.model.prompts, task.statistics.cell_mean, config.seed)
            write_embeddings(config.run_dir, projections)
        tables = [Table(title=TITLE, columns=COLUMNS, rows=self._periods)] if self._periods else []
        return {"efficiency": self._costs(written.windows_per_second), "tables": tables}

    def _costs(self, windows_per_second: float | None) -> list[Efficiency]:
        paths = [self.config.run_dir / "checkpoints" / stage / EFFICIENCY for stage in stage_names(self.config)]
        costs = [Efficiency.model_validate_json(path.read_text()) for path in paths if path.exists()]
        if costs:
            costs[-1] = costs[-1].model_copy(update={"inference_samples_per_second": windows_per_second})
        return costs

    def _fit(self, name: str, task: Task, fitted: tuple[Fitted, ...], trainer: Trainer) -> dict[str, Any]:
        """Trains the model on the windows of ``task``, or only loads what that left; the run then has the whole city's
        model with the stage's result, read from the checkpoint.

        Raises InputError where frozen weights are other ones than the stage once began with, RuntimeError where a byte
        of them changed.
        """
        config, settings, model, group = self.config, self.config.training, self.model, trainer.group
        if self._learners is None:
            self._learners = NodeLearners.current(task.nodes.shape[0], config.nodes.ranks)
        learners = self._learners = self._learners.of_nodes(task.nodes.shape[0])
        frozen = [each for each, parameter in model.named_parameters() if not parameter.requires_grad]
        before, counts = digest_of(model, frozen), (efficiency.count(model), efficiency.count(model, trained=True))
        if frozen:
            require_same_frozen(config, name, before, group)
        if isinstance(model, UrbanPG) and learners.node_ranks > 1:
            model = self.model = NodeParallel(model.backbone, model.prompts, learners)
        model.to(self._device).train()
        here = NodeRange(task.nodes.n0 + learners.here.start, task.nodes.n0 + learners.here.stop)
        train, validation = (
            WindowForecasts(model, windows.of_region(here), learners, config.nodes.block_nodes)
            for windows in (task.train, task.validation)
        )
        stage = ForecastStage(name, train, validation, settings, config.seed)
        epoch = stage.steps_per_epoch
        steps = settings.max_epochs * epoch
        checkpoints = trainer.checkpoints(name)
        summary = trainer.fit(
            stage,
            ForecasterFiles(model, fitted),
            partial(_engine, config, learners.data_ranks, steps, model),
            LoopSettings(steps, settings.logging_steps, epoch, epoch, settings.patience),
            run_info={"device": str(self._device), "learners": f"{group.size}, {engine_name(config.learners)}"},
        )
        result = load_forecaster(checkpoints.folder / summary["checkpoint"])
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
            size = sum(parameter.nbytes for each, parameter in result.named_parameters() if each in frozen)
            note = f"{name}: {size:,} bytes of frozen weights are in its result as they were (sha256 {before[:12]}…)"
            self.notes.append(note)
            trainer.log(note)
        for each, parameter in result.named_parameters():
            parameter.requires_grad = each not in frozen
        self.model = result.to(self._device)
        return summary


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def check(config: UrbanConfig, group: ProcessGroup) -> list[Task]:
    """What the run reads, a task for every stage. Raises InputError where ``group`` cannot train ``config`` on it, or
    its folder is another run's."""
    learners = config.learners
    periods = config.continual.periods if config.continual else ()
    tasks = [open_period(config.data, period) for period in periods] or [open_task(config.data)]
    batch_size = config.training.train_batch_size
    for task in tasks:
        if len(task.train) < batch_size:
            raise InputError(
                f"{len(task.train)} windows of the training days {task.train.span} make no batch of "
                f"training.train_batch_size {batch_size}; lower it, or train on more days"
            )
    refuse_foreign_folder(config, tasks[0].store.digest)
    require_gradients(config, stage_names(config), tasks)
    if config.model.kind == "graph_wavenet" and group.size > 1:
        # Each learner would normalise with the statistics of its own windows.
        raise InputError(
            f"model.kind graph_wavenet has batch normalisation, which {group.size} learners do not share; set "
            "learners.num_workers to 1, or choose another kind"
        )
    zero_stage = learners.zero_stage if learners.engine == "deepspeed" else 1
    check_grid(group.size, config.nodes.ranks, tasks[0].nodes.shape[0], zero_stage, config.nodes.block_nodes)
    ProcessGroup(0, group.size // config.nodes.ranks).local_slice(batch_size, "training.train_batch_size")
    if learners.engine == "deepspeed":
        deepspeed_json(learners, config.training.max_grad_norm, False, group.size // config.nodes.ranks)
    return tasks


def open_run(config: UrbanConfig, group: ProcessGroup) -> tuple[list[Task], Model, list[tuple[Fitted, ...]], list[str]]:
    """A task for every stage, the first one's model, what each one's result is fitted on, and notes for people."""
    tasks, notes = check(config, group), []
    task, model_config, seed = tasks[0], config.model, config.seed
    if not task.holds_weeks:
        until = next((f" until period {n}" for n, each in enumerate(tasks, 1) if each.holds_weeks), "")
        notes.append(f"{task.train.span} does not hold every weekday twice: to the model all days are one{until}")
    if config.few_shot:
        path = backbone_path(config)
        if path != config.few_shot.backbone:
            notes.append(f"{config.few_shot.backbone} is not there any more; its backbone is in {path}")
        backbone, fitted = load_backbone(path)
        model: Model = prompts_on(backbone, model_config, task, seed)
        if fitted is None:
            notes.append(f"nothing says which data the backbone {path} was trained on")
        return tasks, model, _fitted(config, tasks, fitted or ()), notes
    new = new_urbanpg if model_config.kind == "urbanpg" else new_baseline
    return tasks, new(model_config, task, seed), _fitted(config, tasks, ()), notes


def _fitted(config: UrbanConfig, tasks: list[Task], before: tuple[Fitted, ...]) -> list[tuple[Fitted, ...]]:
    """What each stage's result is fitted on, where the first one's model was on ``before``. Raises InputError where
    one is on days that it is tested on: nobody would score it."""
    fitted = []
    for name, task in zip(stage_names(config), tasks, strict=True):
        data = data_digest(task.store, config.data.channel)
        before = tuple(dict.fromkeys((*before, Fitted.on("weights", task.statistics.span, data))))
        if found := leaks(before, task.test.span, data):
            days = "continual.periods" if config.continual else "data.split"
            raise InputError(
                f"leak: {leak_line(found, task.test.span)}, the test days of stage {name}; choose others in {days}"
            )
        fitted.append(before)
    return fitted


def _engine(config: UrbanConfig, data_ranks: int, steps: int, model: Model) -> Engine:
    learners, settings = config.learners, config.training
    if isinstance(model, NodeParallel):
        # Imports DeepSpeed, which is not installed everywhere.
        from stdist.urbanpg.node_engine import NodeEngine

        weights = ParameterGroup(model.trained_parameters(), settings.learning_rate, settings.weight_decay)
        schedule = cosine_schedule(settings.warmup_steps, steps)
        configuration = deepspeed_json(learners, settings.max_grad_norm, False, data_ranks)
        return NodeEngine(model, [weights], schedule, configuration)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    weights = ParameterGroup(trained, settings.learning_rate, settings.weight_decay)
    return make_engine(learners, settings, steps, model, [weights], data_ranks)
