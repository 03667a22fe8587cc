"""The engine that a configuration asks for."""

from collections.abc import Collection, Iterable

import torch
from torch import nn

from stdist.config import LearnersConfig, OptimizerConfig
from stdist.training.deepspeed_json import deepspeed_json
from stdist.training.engine import Engine, ParameterGroup, TorchEngine, cosine_schedule


def make_engine(
    learners: LearnersConfig,
    settings: OptimizerConfig,
    max_steps: int,
    module: nn.Module,
    groups: Iterable[ParameterGroup],
    data_ranks: int,
    persistent: Collection[nn.Parameter] = (),
) -> Engine:
    """Returns an engine on ``groups`` of ``module``'s weights; ``data_ranks`` learners share a batch. ``persistent``:
    see :class:`DeepSpeedEngine`."""
    groups, schedule = list(groups), cosine_schedule(settings.warmup_steps, max_steps)
    if learners.engine == "torch":
        return TorchEngine(groups, schedule, settings.max_grad_norm)
    # Seconds to import, and not installed everywhere.
    from stdist.training.deepspeed_engine import DeepSpeedEngine

    bf16 = any(p.dtype == torch.bfloat16 for group in groups for p in group.parameters.values())
    configuration = deepspeed_json(learners, settings.max_grad_norm, bf16, data_ranks)
    return DeepSpeedEngine(module, groups, schedule, configuration, persistent)


def engine_name(learners: LearnersConfig) -> str:
    """Returns the engine's name for people."""
    if learners.engine == "torch":
        return "torch"
    return f"DeepSpeed ZeRO-{learners.zero_stage}{', optimizer on the CPU' if learners.offload_optimizer else ''}"
