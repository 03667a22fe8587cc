"""Forecasters of nodes from a configuration to a scored forecast, in UrbanPG's three paradigms: pre-training (or
training from scratch), few-shot (Eq. 8) and continual learning (Eq. 9–10). Baselines train in the same harness.

Every step is skipped when its result is already in the run folder, so the same command run again resumes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from stdist.data import NodeRange
from stdist.data.audit import Fitted, data_digest, leak_line, leaks
from stdist.errors import InputError
from stdist.evaluation.run_files import Efficiency
from stdist.files import write_atomically
from stdist.nodes import efficiency
from stdist.nodes.config import EpochsConfig
from stdist.nodes.learners import NodeLearners, check_grid
from stdist.nodes.stage import ForecastStage, WindowForecasts
from stdist.nodes.task import Task, open_period, open_task
from stdist.runs.recipes import ForecastRequest, Log, OnMetrics, Recipe
from stdist.runs.run_folder import begin_run_folder, open_together, refuse_foreign_folder
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
    load_forecaster,
    require_same_frozen,
    stage_names,
)
from stdist.urbanpg.config import UrbanConfig
from stdist.urbanpg.continual import expanded, period_row, require_gradients
from stdist.urbanpg.model import UrbanPG
from stdist.urbanpg.models import new_baseline, new_urbanpg, prompts_on
from stdist.urbanpg.node_parallel import NodeParallel
from stdist.urbanpg.scoring import EFFICIENCY, drop_forecasts, forecast, forecast_and_score, stage_sentence

Opened = tuple[list[Task], Model, list[tuple[Fitted, ...]], list[str]]
"""A task for every stage, the first one's model, what each one's result is fitted on, and what is to be said."""


@dataclass
class Run:
    """A run in progress on one learner."""

    config: UrbanConfig
    learners: NodeLearners
    device: torch.device
    trainer: Trainer
    notes: list[str]
    model: Model
    """To be trained next, then its result. Nothing else holds it: a learner with some of the nodes lets go of the
    whole city's rows."""

    @property
    def group(self) -> ProcessGroup:
        return self.learners.group


def train(
    config: UrbanConfig,
    log: Callable[[str], None],
    on_metrics: Callable[[dict[str, float]], None] = lambda scalars: None,
) -> dict[str, Any]:
    """Runs or resumes everything ``config`` names. Returns the test metrics, the stages' summaries and paths.

    As one of several learners (torch.distributed is up) this process trains its share; the first one also writes the
    run folder, forecasts and scores, and only its result has the metrics. See :meth:`stdist.runs.recipes.Recipe.train`.
    """
    group = ProcessGroup.current()
    log = log if group.is_main else lambda line: None
    tasks, model, fitted, notes = open_together(group, partial(open_run, config, group))
    store = tasks[0].store
    if group.is_main:
        begin_run_folder(config, store.digest)
    log(f"run {config.run_dir}: {store.city}, {tasks[-1].nodes.shape[0]} nodes, {len(tasks[0].train)} training windows")
    for note in notes:
        log(note)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    learners = NodeLearners.current(tasks[0].nodes.shape[0], config.nodes.ranks)
    run = Run(config, learners, device, Trainer(config.run_dir, group, log, on_metrics), notes, model)
    del model
    summaries, rows = {}, []
    before: Model | None = None
    for number, (name, task) in enumerate(zip(stage_names(config), tasks, strict=True)):
        if config.continual and number:
            before = run.model if group.is_main else None
            run.model = expanded(run.model, task, config.continual, config.seed)
        summaries[name] = fit(run, name, task, fitted[number])
        if config.continual and group.is_main:
            batch_size = config.training.train_batch_size
            rows.append(period_row(number + 1, task, before, run.model, batch_size, config.nodes.block_nodes))
    run.trainer.close()
    if not group.is_main:
        return {"run": str(config.run_dir), "stages": summaries}
    result = forecast_and_score(config, tasks[-1], run.model, fitted[-1], summaries, rows, notes, log)
    return {"run": str(config.run_dir), "stages": summaries, **result}


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


def open_run(config: UrbanConfig, group: ProcessGroup) -> Opened:
    """What ``group`` is to train on. Raises InputError for whatever would stop the run later."""
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


def fit(run: Run, name: str, task: Task, fitted: tuple[Fitted, ...]) -> dict[str, Any]:
    """Trains the run's model on the windows of ``task`` as the stage ``name``, or only loads what that left. Returns
    its closing summary; the run then has the whole city's model with its result, read from the checkpoint.

    Raises InputError where what is frozen is not what the stage once began with, RuntimeError where a byte of it
    changed.
    """
    config, settings, model = run.config, run.config.training, run.model
    learners = run.learners = run.learners.of_nodes(task.nodes.shape[0])
    frozen = [each for each, parameter in model.named_parameters() if not parameter.requires_grad]
    before, counts = digest_of(model, frozen), (efficiency.count(model), efficiency.count(model, trained=True))
    if frozen:
        require_same_frozen(config, name, before, run.group)
    if isinstance(model, UrbanPG) and learners.node_ranks > 1:
        model = run.model = NodeParallel(model.backbone, model.prompts, learners)
    model.to(run.device).train()
    here = NodeRange(task.nodes.n0 + learners.here.start, task.nodes.n0 + learners.here.stop)
    train, validation = (
        WindowForecasts(model, windows.of_region(here), learners, config.nodes.block_nodes)
        for windows in (task.train, task.validation)
    )
    stage = ForecastStage(name, train, validation, settings, config.seed)
    epoch = stage.steps_per_epoch
    steps = settings.max_epochs * epoch
    checkpoints = run.trainer.checkpoints(name)
    if run.group.is_main and checkpoints.finished is None:
        drop_forecasts(config.run_dir)
    summary = run.trainer.fit(
        stage,
        ForecasterFiles(model, fitted),
        partial(_engine, run, settings, steps, model),
        LoopSettings(steps, settings.logging_steps, epoch, epoch, settings.patience),
        run_info={"device": str(run.device), "learners": f"{run.group.size}, {engine_name(config.learners)}"},
    )
    result = load_forecaster(checkpoints.folder / summary["checkpoint"])
    if digest_of(result, frozen) != before:
        raise RuntimeError(f"weights that {name} froze are not in {checkpoints.folder} as they were; this is a bug")
    if run.group.is_main and stage.seconds_per_epoch is not None:
        cost = Efficiency(
            name=name,
            parameters=counts[0],
            trained_parameters=counts[1],
            batch_size=settings.train_batch_size,
            hardware=efficiency.hardware(run.device, run.group.size),
            seconds_per_epoch=stage.seconds_per_epoch,
            samples_per_second=epoch * settings.train_batch_size / stage.seconds_per_epoch,
            peak_memory_bytes=efficiency.peak_memory(run.device),
        )
        write_atomically(checkpoints.folder / EFFICIENCY, cost.model_dump_json(indent=1))
    run.trainer.log(stage_sentence(summary))
    if frozen:
        size = sum(parameter.nbytes for each, parameter in result.named_parameters() if each in frozen)
        note = f"{name}: {size:,} bytes of frozen weights are in its result as they were (sha256 {before[:12]}…)"
        run.notes.append(note)
        run.trainer.log(note)
    for each, parameter in result.named_parameters():
        parameter.requires_grad = each not in frozen
    run.model = result.to(run.device)
    return summary


def _engine(run: Run, settings: EpochsConfig, steps: int, model: Model) -> Engine:
    learners, data_ranks = run.config.learners, run.learners.data_ranks
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


class UrbanPGRecipe(Recipe[UrbanConfig]):
    """``recipe: urbanpg-train``, ``few-shot`` and ``continual``."""

    Config = UrbanConfig

    def stages(self, config: UrbanConfig) -> tuple[str, ...]:
        return stage_names(config)

    def check(self, config: UrbanConfig, group: ProcessGroup) -> list[Task]:
        return check(config, group)

    def train(self, config: UrbanConfig, log: Log, on_metrics: OnMetrics) -> dict[str, Any]:
        return train(config, log, on_metrics)

    def forecast(self, config: UrbanConfig, request: ForecastRequest, log: Log) -> dict[str, Any]:
        return forecast(request.run_dir, request.store, request.region, request.split, request.out, log)

    def plan(self, config: UrbanConfig, device_memory: int | None, device_flops: float) -> Any:
        from stdist.urbanpg.plan import plan_run

        return plan_run(config, device_memory)
