"""ST-Vision-LLM from a configuration to a scored forecast: open, train the stages, forecast, evaluate, report.

Every step is skipped when its result is already in the run folder, so the same command run again resumes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from stdist.errors import InputError
from stdist.runs.recipes import ForecastRequest, Log, OnMetrics, Recipe
from stdist.runs.run_folder import begin_run_folder, open_together, refuse_foreign_folder
from stdist.training import engines
from stdist.training.deepspeed_json import deepspeed_json
from stdist.training.engine import Engine, ParameterGroup
from stdist.training.loop import LoopSettings, Stage, Trainer
from stdist.training.process_group import ProcessGroup
from stdist.vision_llm.config import AlignmentConfig, ForecastStageConfig, StageConfig, VisionLLMConfig
from stdist.vision_llm.numeral_range import find_unwritable
from stdist.vision_llm.policy.adapters import adapter_names, add_lora, begin_grpo, train_only
from stdist.vision_llm.policy.checkpoints import build_policy, load_weights, snapshot_policy
from stdist.vision_llm.policy.city_windows import CityWindows
from stdist.vision_llm.policy.model import PolicyModel
from stdist.vision_llm.rollout.sampler import Decoding
from stdist.vision_llm.scoring import forecast, forecast_and_score, stage_sentence
from stdist.vision_llm.stages.alignment import AlignmentStage
from stdist.vision_llm.stages.grpo import GRPOStage
from stdist.vision_llm.stages.sft import SFTStage
from stdist.vision_llm.task import Task, open_task, policy_spec, stage_config


def train(
    config: VisionLLMConfig,
    log: Callable[[str], None],
    on_metrics: Callable[[dict[str, float]], None] = lambda scalars: None,
) -> dict[str, Any]:
    """Runs or resumes everything ``config`` names. Returns the test metrics, the stages' summaries and paths.

    As one of several learners (torch.distributed is up) this process trains its share; the first one also writes the
    run folder, forecasts and scores, and only its result has the metrics. ``log`` is given a line for people at each
    milestone, by the first learner; ``on_metrics`` every logged step's scalars, on every learner.
    """
    group = ProcessGroup.current()
    log = log if group.is_main else lambda line: None
    run_dir = config.run_dir
    task, policy, clamped = open_together(group, partial(_open, config, group))
    if group.is_main:
        begin_run_folder(config, task.store.digest)
    log(f"run {run_dir}: {task.store.city}, {len(task.train)} training windows")
    log(f"attention: {policy.attention_choice.reason}")
    if clamped:
        log(clamped)
    summaries = train_stages(config, task, policy, log, on_metrics)
    if not group.is_main:
        return {"run": str(run_dir), "stages": summaries}
    result = forecast_and_score(config, task, policy, summaries, [clamped] if clamped else [], log)
    return {"run": str(run_dir), "stages": summaries, **result}


def _open(config: VisionLLMConfig, group: ProcessGroup) -> tuple[Task, PolicyModel, str | None]:
    """The run's data, its policy on the device, and what is to be said of values that were clamped. Raises InputError
    for whatever would stop the run later."""
    task = check(config, group)
    policy = build_policy(policy_spec(config, task), config.seed)
    policy.to("cuda" if torch.cuda.is_available() else "cpu")
    windows = (task.train, task.validation, task.test)
    return task, policy, find_unwritable(windows, policy.vocabulary, config.numerals.out_of_range == "clamp")


def check(config: VisionLLMConfig, group: ProcessGroup) -> Task:
    """The run's data. Raises InputError where ``group`` cannot train ``config`` on it, or its folder is another's."""
    check_learners(config, group)
    task = open_task(config)
    refuse_foreign_folder(config, task.store.digest)
    return task


def check_learners(config: VisionLLMConfig, group: ProcessGroup) -> None:
    """Raises InputError where ``group`` cannot share a stage's batch evenly, or its engine cannot train this policy."""
    learners = config.learners
    for name in config.stages:
        stage = stage_config(config, name)
        if isinstance(stage, AlignmentConfig):
            group.local_slice(stage.train_batch_size, f"{name}.train_batch_size")
        elif isinstance(stage, ForecastStageConfig):
            group.local_slice(stage.windows_per_step, f"{name}.windows_per_step")
        if learners.engine == "deepspeed":
            bf16 = config.policy.dtype == "bfloat16" and stage.trainable == "full"
            deepspeed_json(learners, stage.max_grad_norm, bf16, group.size)
    if learners.engine == "deepspeed" and learners.zero_stage == 3:
        reason = None
        if config.policy.load_in_4bit:
            reason = "policy.load_in_4bit packs, DeepSpeed cannot do both"
        elif "grpo" in config.stages:
            reason = "the stage grpo samples with, each learner as many tokens as its candidates are long"
        if reason:
            raise InputError(f"learners.zero_stage 3 shards the weights that {reason}; set zero_stage to 1 or 2")


@dataclass(frozen=True)
class PolicyFiles:
    """See :class:`stdist.training.loop.Model`."""

    policy: PolicyModel

    def snapshot(self) -> Callable[[Path], None]:
        return snapshot_policy(self.policy)

    def read(self, path: Path) -> None:
        load_weights(self.policy, path)


def train_stages(
    config: VisionLLMConfig,
    task: Task,
    policy: PolicyModel,
    log: Callable[[str], None],
    on_metrics: Callable[[dict[str, float]], None],
) -> dict[str, dict[str, Any]]:
    """All stages in order on one policy; finished ones are only loaded. Returns each stage's closing summary."""
    trainer = Trainer(config.run_dir, ProcessGroup.current(), log, on_metrics)
    group = trainer.group
    clamp = config.numerals.out_of_range == "clamp"
    cities = [CityWindows(policy, windows, clamp) for windows in (task.train, task.validation)]
    summaries: dict[str, dict[str, Any]] = {}
    for name in config.stages:
        settings = stage_config(config, name)
        stage = _build_stage(config, name, task, policy, group, *cities)
        summaries[name] = trainer.fit(
            stage,
            PolicyFiles(policy),
            partial(make_engine, config, settings, policy, group),
            LoopSettings(
                settings.max_steps,
                settings.logging_steps,
                settings.save_steps,
                settings.eval_steps,
                patience=getattr(settings, "patience", None),
            ),
            run_info={
                "device": str(policy.device),
                "attention": policy.attention_choice.reason,
                "learners": f"{group.size}, {engines.engine_name(config.learners)}",
            },
        )
        log(stage_sentence(summaries[name]))
    trainer.close()
    return summaries


def make_engine(config: VisionLLMConfig, settings: StageConfig, policy: PolicyModel, group: ProcessGroup) -> Engine:
    """The configured engine on what trains in the stage."""
    groups = parameter_groups(policy, settings)
    return engines.make_engine(
        config.learners, settings, settings.max_steps, policy, groups, group.size, policy.read_in_place
    )


def _build_stage(
    config: VisionLLMConfig,
    name: str,
    task: Task,
    policy: PolicyModel,
    group: ProcessGroup,
    train: CityWindows,
    validation: CityWindows,
) -> Stage:
    decoding = _validation_decoding(config)
    if name == "grpo":
        begin_grpo(policy, config.seed)
        region = task.train.region
        cell_mean = task.statistics.cell_mean[region.slices].ravel()
        return GRPOStage(policy, train, validation, cell_mean, config.grpo, config.seed, decoding, group)
    settings = stage_config(config, name)
    if settings.trainable == "lora" and not adapter_names(policy):
        add_lora(policy, seed=config.seed)
    train_only(policy, settings.trainable, frames=name == "sft")
    if name == "sft":
        return SFTStage(policy, train, validation, config.sft, config.seed, decoding, group)
    return AlignmentStage(name, policy, getattr(config, name), config.seed, group)


def _validation_decoding(config: VisionLLMConfig) -> Decoding:
    """What validation decodes with: the run's own decoding, the median where that one samples."""
    return "median" if config.forecast.decoding == "sample" else config.forecast.decoding


def parameter_groups(policy: PolicyModel, settings: StageConfig) -> list[ParameterGroup]:
    """Backbone or adapter matrices, their vectors (never decayed), and the numeral rows at their own rate."""
    trained = {name: p for name, p in policy.named_parameters() if p.requires_grad}
    backbone = {name: p for name, p in trained.items() if name.startswith("backbone.")}
    rows = {name: p for name, p in trained.items() if name.startswith("rows.")}
    rows_rate = settings.numeral_learning_rate or settings.learning_rate
    return [
        ParameterGroup(
            {n: p for n, p in backbone.items() if p.ndim > 1}, settings.learning_rate, settings.weight_decay
        ),
        ParameterGroup({n: p for n, p in backbone.items() if p.ndim <= 1}, settings.learning_rate, 0.0),
        ParameterGroup(rows, rows_rate, 0.0),
    ]


class VisionLLMRecipe(Recipe[VisionLLMConfig]):
    """``recipe: vision-llm``."""

    Config = VisionLLMConfig

    def stages(self, config: VisionLLMConfig) -> tuple[str, ...]:
        return config.stages

    def check(self, config: VisionLLMConfig, group: ProcessGroup) -> Task:
        return check(config, group)

    def train(self, config: VisionLLMConfig, log: Log, on_metrics: OnMetrics) -> dict[str, Any]:
        return train(config, log, on_metrics)

    def forecast(self, config: VisionLLMConfig, request: ForecastRequest, log: Log) -> dict[str, Any]:
        return forecast(request.run_dir, request.store, request.region, request.split, request.out, log)

    def plan(self, config: VisionLLMConfig, device_memory: int | None, device_flops: float) -> Any:
        from stdist.vision_llm.plan import plan_run

        return plan_run(config, device_memory, device_flops)
