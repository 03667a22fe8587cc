"""A stage's learning: the learners that can share it, the parameters that train, and the engine that updates them."""

from importlib.util import find_spec

import torch

from stdist.errors import InputError
from stdist.training import engines
from stdist.training.deepspeed_json import deepspeed_json
from stdist.training.engine import Engine, ParameterGroup
from stdist.training.process_group import ProcessGroup
from stdist.vision_llm.config import AlignmentConfig, ForecastStageConfig, StageConfig, VisionLLMConfig
from stdist.vision_llm.dataset import stage_config
from stdist.vision_llm.policy.adapters import adapter_names, add_lora, begin_grpo, train_only
from stdist.vision_llm.policy.model import PolicyModel


def check_learners(config: VisionLLMConfig, group: ProcessGroup) -> None:
    """Raises InputError where ``group`` cannot share a stage's batch evenly, or its engine cannot train this policy."""
    learners = config.learners
    if config.backend == "trl":
        require_trl()
        if (gpus := torch.cuda.device_count()) > 1:
            raise InputError(
                f"backend trl trains on one device and {gpus} GPUs are visible; set CUDA_VISIBLE_DEVICES=0"
            )
    for name in config.stages:
        stage = stage_config(config, name)
        if isinstance(stage, AlignmentConfig):
            share = group.local_slice(stage.train_batch_size, f"{name}.train_batch_size")
            if (examples := share.stop - share.start) % stage.gradient_accumulation_steps:
                raise InputError(
                    f"{name}.gradient_accumulation_steps {stage.gradient_accumulation_steps} does not divide the "
                    f"{examples} examples of a learner; change it or {name}.train_batch_size"
                )
        elif isinstance(stage, ForecastStageConfig):
            group.local_slice(stage.windows_per_step, f"{name}.windows_per_step")
        engines.check_optim(learners, stage.optim, f"{name}.optim")
        if learners.engine == "deepspeed":
            bf16 = config.policy.dtype == "bfloat16" and stage.trainable == "full"
            deepspeed_json(learners, stage.max_grad_norm, bf16, group.size)
    if learners.engine == "deepspeed" and learners.zero_stage == 3:
        reason = None
        if config.policy.load_in_4bit:
            reason = "policy.load_in_4bit packs, DeepSpeed cannot do both"
        elif "grpo" in config.stages and not config.rollouts.num_workers:
            reason = (
                "the stage grpo samples with, each learner as many tokens as its candidates are long (or let workers "
                "sample: rollouts.num_workers)"
            )
        if reason:
            raise InputError(f"learners.zero_stage 3 shards the weights that {reason}; set zero_stage to 1 or 2")


def require_trl() -> None:
    """Raises InputError where TRL is not installed."""
    for name in ("trl", "datasets"):
        if find_spec(name) is None:
            raise InputError(f"TRL's trainers need {name}, which is not installed: pip install 'stdist[trl]'")


def begin_stage(policy: PolicyModel, name: str, trainable: str, seed: int) -> None:
    """Gives the policy what the stage trains, and freezes the rest."""
    if name == "grpo":
        begin_grpo(policy, seed)
        return
    if trainable == "lora" and not adapter_names(policy):
        add_lora(policy, seed=seed)
    train_only(policy, trainable, frames=name == "sft")


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


def make_engine(config: VisionLLMConfig, settings: StageConfig, policy: PolicyModel, group: ProcessGroup) -> Engine:
    """The configured engine on what trains in the stage."""
    groups = parameter_groups(policy, settings)
    return engines.make_engine(
        config.learners,
        settings,
        settings.max_steps,
        policy,
        groups,
        group.size,
        policy.read_in_place,
        settings.optim,
    )
