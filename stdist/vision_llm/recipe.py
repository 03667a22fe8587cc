"""ST-Vision-LLM as a recipe: its data and policy, its four stages, and what they may train on."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from stdist.config.base import WorkersConfig
from stdist.runs.dataset import Dataset
from stdist.runs.forecasting import Predictor, finished_stage
from stdist.runs.plan import RunPlan
from stdist.runs.recipes import Recipe
from stdist.runs.run import Run
from stdist.runs.run_folder import refuse_foreign_folder
from stdist.runs.workers import WorkerProgram
from stdist.training import engines
from stdist.training.loop import LoopSettings, Stage, Trainer
from stdist.training.process_group import ProcessGroup
from stdist.vision_llm.config import VisionLLMConfig
from stdist.vision_llm.dataset import open_dataset, policy_spec, stage_config
from stdist.vision_llm.learning import begin_stage, check_learners, make_engine
from stdist.vision_llm.numeral_range import find_unwritable
from stdist.vision_llm.plan import plan_run
from stdist.vision_llm.policy.checkpoints import build_policy, load_policy, load_weights, snapshot_policy
from stdist.vision_llm.policy.city_windows import CityWindows
from stdist.vision_llm.policy.model import PolicyModel
from stdist.vision_llm.predictor import PolicyPredictor
from stdist.vision_llm.rollout.pool import PoolRollouts, RolloutProgram
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

    def workers(self, config: VisionLLMConfig) -> WorkersConfig | None:
        return config.rollouts if config.rollouts.num_workers and "grpo" in config.stages else None

    def worker_program(self, config: VisionLLMConfig) -> WorkerProgram:
        """The policy as GRPO's learners begin with it: the stages before are finished."""
        policy = _on_device(build_policy(policy_spec(config, open_dataset(config)), config.seed))
        for stage in config.stages:
            begin_stage(policy, stage, stage_config(config, stage).trainable, config.seed)
            if stage == "grpo":
                break
            checkpoint, _ = finished_stage(config.run_dir, stage)
            load_weights(policy, checkpoint)
        return RolloutProgram(policy.eval(), config.grpo, config.seed)

    def plan(self, config: VisionLLMConfig, device_memory: int | None, device_flops: float) -> RunPlan:
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
        begin_stage(policy, name, stage_config(config, name).trainable, config.seed)
        if name == "grpo":
            cell_mean = self.dataset.statistics.cell_mean[self.dataset.train.region.slices].ravel()
            rollouts = None
            if self.pool is not None:
                rollouts = PoolRollouts(policy, config.grpo, config.rollouts.max_staleness, self.pool, group)
            return GRPOStage(
                policy, self._train, self._validation, cell_mean, config.grpo, config.seed, decoding, group, rollouts
            )
        if name == "sft":
            return SFTStage(policy, self._train, self._validation, config.sft, config.seed, decoding, group)
        return AlignmentStage(name, policy, getattr(config, name), config.seed, group)


def _on_device(policy: PolicyModel) -> PolicyModel:
    return policy.to("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class PolicyFiles:
    """See :class:`stdist.training.loop.Model`."""

    policy: PolicyModel

    def snapshot(self) -> Callable[[Path], None]:
        return snapshot_policy(self.policy)

    def read(self, path: Path) -> None:
        load_weights(self.policy, path)


def _validation_decoding(config: VisionLLMConfig) -> Decoding:
    """The run's own decoding; the median where that one samples."""
    return "median" if config.forecast.decoding == "sample" else config.forecast.decoding
