"""Forecasters of nodes from a configuration to a scored forecast, in UrbanPG's three paradigms: pre-training (or
training from scratch), few-shot (Eq. 8) and continual learning (Eq. 9–10). Baselines train in the same harness.

Every step is skipped when its result is already in the run folder, so the same command run again resumes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from stdist.data.audit import Fitted, data_digest, leak_line, leaks
from stdist.errors import InputError
from stdist.evaluation.run_files import Efficiency
from stdist.files import write_atomically
from stdist.nodes import efficiency
from stdist.nodes.checkpoints import ForecasterFiles, digest_of
from stdist.nodes.dataset import NodeDataset, open_dataset, open_period
from stdist.nodes.interface import Forecaster
from stdist.nodes.learners import NodeLearners, check_grid
from stdist.nodes.stage import ForecastStage, WindowForecasts
from stdist.runs.recipes import ForecastRequest, Log, OnMetrics, Recipe
from stdist.runs.run_folder import begin_run_folder, open_together, refuse_foreign_folder
from stdist.training.deepspeed_json import deepspeed_json
from stdist.training.engines import engine_name
from stdist.training.loop import LoopSettings, Trainer
from stdist.training.process_group import ProcessGroup
from stdist.urbanpg.checkpoints import backbone_path, load_backbone, require_same_frozen, stage_names
from stdist.urbanpg.config import UrbanConfig
from stdist.urbanpg.continual import expanded, period_row, require_gradients
from stdist.urbanpg.models import UrbanPGModelConfig
from stdist.urbanpg.scoring import EFFICIENCY, drop_forecasts, forecast, forecast_and_score, stage_sentence

Opened = tuple[list[NodeDataset], Forecaster, list[tuple[Fitted, ...]], list[str]]
"""A dataset for every stage, the first one's model, the data each one's result is fitted on, and lines for people."""


@dataclass
class Run:
    """A run in progress on one learner."""

    config: UrbanConfig
    learners: NodeLearners
    device: torch.device
    trainer: Trainer
    notes: list[str]
    model: Forecaster
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
    datasets, model, fitted, notes = open_together(group, partial(open_run, config, group))
    store = datasets[0].store
    if group.is_main:
        begin_run_folder(config, store.digest)
    sizes = f"{len(datasets[-1].nodes)} nodes, {len(datasets[0].train)} training windows"
    log(f"run {config.run_dir}: {store.city}, {sizes}")
    for note in notes:
        log(note)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    learners = NodeLearners.current(len(datasets[0].nodes), config.nodes.ranks)
    run = Run(config, learners, device, Trainer(config.run_dir, group, log, on_metrics), notes, model)
    del model
    summaries, rows = {}, []
    before: Forecaster | None = None
    for number, (name, dataset) in enumerate(zip(stage_names(config), datasets, strict=True)):
        if config.continual and number:
            before = run.model if group.is_main else None
            run.model = expanded(run.model, dataset, config.continual, config.seed)
        summaries[name] = fit(run, name, dataset, fitted[number])
        if config.continual and group.is_main:
            rows.append(period_row(number + 1, dataset, before, run.model, config.training.train_batch_size))
    run.trainer.close()
    if not group.is_main:
        return {"run": str(config.run_dir), "stages": summaries}
    result = forecast_and_score(config, datasets[-1], run.model, fitted[-1], summaries, rows, notes, log)
    return {"run": str(config.run_dir), "stages": summaries, **result}


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


def open_run(config: UrbanConfig, group: ProcessGroup) -> Opened:
    """The data and the untrained model of a run of ``group``. Raises InputError for whatever would stop it later."""
    datasets, notes = check(config, group), []
    dataset, seed = datasets[0], config.seed
    if not dataset.holds_weeks:
        until = next((f" until period {n}" for n, later in enumerate(datasets, 1) if later.holds_weeks), "")
        notes.append(f"{dataset.train.span} does not hold every weekday twice: to the model all days are one{until}")
    before: tuple[Fitted, ...] = ()
    if config.few_shot:
        path = backbone_path(config)
        if path != config.few_shot.backbone:
            notes.append(f"{config.few_shot.backbone} is not there any more; its backbone is in {path}")
        backbone, fitted = load_backbone(path)
        assert isinstance(config.model, UrbanPGModelConfig)
        model: Forecaster = config.model.prompts_on(backbone, dataset, seed)
        if fitted is None:
            notes.append(f"nothing says which data the backbone {path} was trained on")
        before = fitted or ()
    else:
        model = config.model.build(dataset, seed)
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


def fit(run: Run, name: str, dataset: NodeDataset, fitted: tuple[Fitted, ...]) -> dict[str, Any]:
    """Trains the run's model on the windows of ``dataset`` as the stage ``name``, or only loads what that left. Returns
    its closing summary; the run then has the whole city's model with its result, read from the checkpoint.

    Raises InputError where what is frozen is not what the stage once began with, RuntimeError where a byte of it
    changed.
    """
    config, settings, model = run.config, run.config.training, run.model
    learners = run.learners = run.learners.of_nodes(len(dataset.nodes))
    frozen = [weight for weight, parameter in model.named_parameters() if not parameter.requires_grad]
    before, counts = digest_of(model, frozen), (efficiency.count(model), efficiency.count(model, trained=True))
    if frozen:
        require_same_frozen(config, name, before, run.group)
    model = run.model = config.model.on_learner(model, learners)
    model.to(run.device).train()
    train, validation = (WindowForecasts(model, part, learners) for part in (dataset.train, dataset.validation))
    stage = ForecastStage(name, train, validation, settings, config.seed)
    epoch = stage.steps_per_epoch
    steps = settings.max_epochs * epoch
    checkpoints = run.trainer.checkpoints(name)
    if run.group.is_main and checkpoints.finished is None:
        drop_forecasts(config.run_dir)
    summary = run.trainer.fit(
        stage,
        ForecasterFiles(model, fitted),
        partial(config.model.make_engine, model, settings, steps, config.learners, learners.data_ranks),
        LoopSettings(steps, settings.logging_steps, epoch, epoch, settings.patience),
        run_info={"device": str(run.device), "learners": f"{run.group.size}, {engine_name(config.learners)}"},
    )
    result = config.model.load(checkpoints.folder / summary["checkpoint"])
    result.block_nodes = config.nodes.block_nodes
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
        size = sum(parameter.nbytes for weight, parameter in result.named_parameters() if weight in frozen)
        note = f"{name}: {size:,} bytes of frozen weights are in its result as they were (sha256 {before[:12]}…)"
        run.notes.append(note)
        run.trainer.log(note)
    for weight, parameter in result.named_parameters():
        parameter.requires_grad = weight not in frozen
    run.model = result.to(run.device)
    return summary


class UrbanPGRecipe(Recipe[UrbanConfig]):
    """``recipe: urbanpg-train``, ``few-shot`` and ``continual``."""

    Config = UrbanConfig

    def stages(self, config: UrbanConfig) -> tuple[str, ...]:
        return stage_names(config)

    def check(self, config: UrbanConfig, group: ProcessGroup) -> list[NodeDataset]:
        return check(config, group)

    def train(self, config: UrbanConfig, log: Log, on_metrics: OnMetrics) -> dict[str, Any]:
        return train(config, log, on_metrics)

    def forecast(self, config: UrbanConfig, request: ForecastRequest, log: Log) -> dict[str, Any]:
        return forecast(request.run_dir, request.store, request.region, request.split, request.out, log)

    def plan(self, config: UrbanConfig, device_memory: int | None, device_flops: float) -> Any:
        from stdist.urbanpg.plan import plan_run

        return plan_run(config, device_memory)
