"""ST-Vision-LLM as a recipe: its data and policy, its four stages, and what they may train on."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from stdist.errors import InputError
from stdist.runs.dataset import Dataset
from stdist.runs.forecasting import Predictor
from stdist.runs.recipes import Recipe
from stdist.runs.run import Run
from stdist.runs.run_folder import refuse_foreign_folder
from stdist.training import engines
from stdist.training.deepspeed_json import deepspeed_json
from stdist.training.engine import Engine, ParameterGroup
from stdist.training.loop import LoopSettings, Stage, Trainer
from stdist.training.process_group import ProcessGroup
from stdist.vision_llm.config import AlignmentConfig, ForecastStageConfig, StageConfig, VisionLLMConfig
from stdist.vision_llm.dataset import open_dataset, policy_spec, stage_config
from stdist.vision_llm.numeral_range import find_unwritable
from stdist.vision_llm.policy.adapters import adapter_names, add_lora, begin_grpo, train_only
from stdist.vision_llm.policy.checkpoints import build_policy, load_policy, load_weights, snapshot_policy
from stdist.vision_llm.policy.city_windows import CityWindows
from stdist.vision_llm.policy.model import PolicyModel
from stdist.vision_llm.predictor import PolicyPredictor
from stdist.vision_llm.rollout.sampler import Decoding
from stdist.vision_llm.stages.alignment import AlignmentStage
from stdist.vision_llm.stages.grpo import GRPOStage
from stdist.vision_llm.stages.sft import SFTStage


class VisionLLMRecipe(Recipe[VisionLLMConfig]):
    """``recipe: vision-llm``."""

    Config = VisionLLMConfig

    def stages(self, config: VisionLLMConfig) -> tuple[str, ...]:
        return config.stages

    def check(self, config: VisionLLMConfig, group: ProcessGroup) -> Dataset:
        """The run's data. Raises InputError where ``group`` cannot train on it, or the folder is another run's."""
        check_learners(config, group)
        dataset = open_dataset(config)
        refuse_foreign_folder(config, dataset.store.digest)
        return dataset

    def open(self, config: VisionLLMConfig, group: ProcessGroup) -> "VisionLLMRun":
        return VisionLLMRun(config, self.check(config, group))

    def load(self, config: VisionLLMConfig, checkpoint: Path) -> Predictor:
        return PolicyPredictor(_on_device(load_policy(checkpoint)), config)

    def plan(self, config: VisionLLMConfig, device_memory: int | None, device_flops: float) -> Any:
        from stdist.vision_llm.plan import plan_run

        return plan_run(config, device_memory, device_flops)


class VisionLLMRun(Run):
    """One policy that every stage trains further. Raises InputError for values that no numeral can write."""

    metric = "nrmse"
    config: VisionLLMConfig

    def __init__(self, config: VisionLLMConfig, dataset: Dataset):
        self.config, self.dataset = config, dataset
        self.store, self.train, self.test = dataset.store, dataset.train, dataset.test
        self.policy = _on_device(build_policy(policy_spec(config, dataset), config.seed))
        clamp = config.numerals.out_of_range == "clamp"
        clamped = find_unwritable((dataset.train, dataset.validation, dataset.test), self.policy.vocabulary, clamp)
        self.notes = [clamped] if clamped else []
        self._train, self._validation = (
            CityWindows(self.policy, windows, clamp) for windows in (dataset.train, dataset.validation)
        )

    @property
    def summary(self) -> str:
        return f"{len(self._train.cells)} cells"

    def fit(self, stage: str, trainer: Trainer) -> dict[str, Any]:
        policy, settings = self.policy, stage_config(self.config, stage)
        return trainer.fit(
            self._stage(stage, trainer.group),
            PolicyFiles(policy),
            partial(make_engine, self.config, settings, policy, trainer.group),
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
                "learners": f"{trainer.group.size}, {engines.engine_name(self.config.learners)}",
            },
        )

    def predictor(self) -> Predictor:
        return PolicyPredictor(self.policy, self.config)

    def _stage(self, name: str, group: ProcessGroup) -> Stage:
        config, policy, decoding = self.config, self.policy, _validation_decoding(self.config)
        if name == "grpo":
            begin_grpo(policy, config.seed)
            cell_mean = self.dataset.statistics.cell_mean[self.dataset.train.region.slices].ravel()
            return GRPOStage(
                policy, self._train, self._validation, cell_mean, config.grpo, config.seed, decoding, group
            )
        settings = stage_config(config, name)
        if settings.trainable == "lora" and not adapter_names(policy):
            add_lora(policy, seed=config.seed)
        train_only(policy, settings.trainable, frames=name == "sft")
        if name == "sft":
            return SFTStage(policy, self._train, self._validation, config.sft, config.seed, decoding, group)
        return AlignmentStage(name, policy, getattr(config, name), config.seed, group)


def _on_device(policy: PolicyModel) -> PolicyModel:
    return policy.to("cuda" if torch.cuda.is_available() else "cpu")


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


def make_engine(config: VisionLLMConfig, settings: StageConfig, policy: PolicyModel, group: ProcessGroup) -> Engine:
    """The configured engine on what trains in the stage."""
    groups = parameter_groups(policy, settings)
    return engines.make_engine(
        config.learners, settings, settings.max_steps, policy, groups, group.size, policy.read_in_place
    )


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
