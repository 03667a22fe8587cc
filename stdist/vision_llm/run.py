"""A run of ST-Vision-LLM: one policy, its stages, and the files of a checkpoint."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from stdist.runs.dataset import Dataset
from stdist.runs.forecasting import Predictor, Written, finished_stage
from stdist.runs.run import Run
from stdist.training import engines
from stdist.training.engine import Engine
from stdist.training.loop import LoopSettings, Stage, Trainer
from stdist.training.process_group import ProcessGroup
from stdist.vision_llm.config import VisionLLMConfig
from stdist.vision_llm.dataset import check_values, open_dataset, policy_spec, stage_config
from stdist.vision_llm.learning import begin_stage, make_engine
from stdist.vision_llm.policy.checkpoints import build_policy, load_weights, snapshot_policy
from stdist.vision_llm.policy.city_windows import CityWindows
from stdist.vision_llm.policy.model import PolicyModel
from stdist.vision_llm.predictor import PolicyPredictor
from stdist.vision_llm.reuse import take_over
from stdist.vision_llm.rollout.pool import PoolRollouts, RolloutProgram
from stdist.vision_llm.rollout.sampler import Decoding
from stdist.vision_llm.rollout_table import rollout_table
from stdist.vision_llm.stages.alignment import AlignmentStage
from stdist.vision_llm.stages.grpo import GRPOStage
from stdist.vision_llm.stages.sft import SFTStage
from stdist.vision_llm.warm_start import begin_from, initial_checkpoint, note_source, what_it_took

NOTHING_GAINED = (
    "GRPO did not lower the validation error, so the fine-tuned policy is kept: what a reward sees of a single draw is "
    "mostly variance, which a forecast does not have (docs/decisions.md, GRPO)"
)


class VisionLLMRun(Run):
    """One policy that every stage trains further. Raises InputError for values that no numeral can write."""

    metric = "nrmse"
    config: VisionLLMConfig

    def __init__(self, config: VisionLLMConfig, dataset: Dataset):
        self.config, self.dataset = config, dataset
        self.store, self.train, self.test = dataset.store, dataset.train, dataset.test
        self.notes = check_values(config, dataset)
        self.policy, self.source = _first_policy(config, dataset)
        if self.source is not None:
            self.notes.append(what_it_took(self.policy, self.source))
        if config.backend == "trl":
            self.notes.append(f"steps of sft and grpo by the trainers of TRL {version('trl')} (docs/trl.md)")
        clamp = config.numerals.out_of_range == "clamp"
        self._train, self._validation = (
            CityWindows(self.policy, windows, clamp) for windows in (dataset.train, dataset.validation)
        )

    @property
    def summary(self) -> str:
        return f"{len(self._train.cells)} cells"

    def fit(self, stage: str, trainer: Trainer) -> dict[str, Any]:
        policy, settings = self.policy, stage_config(self.config, stage)
        if trainer.group.is_main and self.source is not None:
            note_source(self.config, self.source)
        if trainer.group.is_main and (line := take_over(self.config, policy.spec, stage, trainer.checkpoints(stage))):
            trainer.log(line)
        training, engine = self._stage(stage, trainer.group), engines.engine_name(self.config.learners)
        new_engine: Callable[[], Engine] = partial(make_engine, self.config, settings, policy, trainer.group)
        make_steps = None
        if self.config.backend == "trl" and isinstance(training, SFTStage | GRPOStage):
            # Seconds to import, and not installed everywhere.
            from stdist.vision_llm.trl import steps

            new_engine, engine = partial(steps.make_trl_engine, policy, settings), f"TRL {version('trl')}"
            make_steps = partial(steps.make_steps, training, self.config.seed)
        summary = trainer.fit(
            training,
            PolicyFiles(policy),
            new_engine,
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
                "learners": f"{trainer.group.size}, {engine}",
            },
            make_steps=make_steps,
        )
        if stage == "grpo" and summary["checkpoint"] == "step-0":
            self.notes.append(NOTHING_GAINED)
        return summary

    def predictor(self) -> Predictor:
        return PolicyPredictor(self.policy, self.config)

    def report_extras(self, written: Written) -> dict[str, Any]:
        tables = [rollout_table(self.config.run_dir)] if "grpo" in self.config.stages else []
        return {"tables": [table for table in tables if table]}

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


def rollout_program(config: VisionLLMConfig) -> RolloutProgram:
    """A worker with the policy as GRPO's learners begin with it; the stages before are finished."""
    policy, _ = _first_policy(config, open_dataset(config))
    for stage in config.stages:
        begin_stage(policy, stage, stage_config(config, stage).trainable, config.seed)
        if stage != "grpo":
            checkpoint, _ = finished_stage(config.run_dir, stage)
            load_weights(policy, checkpoint)
    return RolloutProgram(policy.eval(), config.grpo, config.seed)


def _first_policy(config: VisionLLMConfig, dataset: Dataset) -> tuple[PolicyModel, Path | None]:
    """The policy that the first stage trains, and the checkpoint that it begins with, if any."""
    spec = policy_spec(config, dataset)
    policy, checkpoint = build_policy(spec, config.seed), initial_checkpoint(config, spec)
    if checkpoint is not None:
        begin_from(policy, checkpoint)
    return on_device(policy), checkpoint


def on_device(policy: PolicyModel) -> PolicyModel:
    """The policy on this learner's GPU, where it has one."""
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
