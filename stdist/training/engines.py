"""The engine that a configuration asks for."""

from collections.abc import Collection, Iterable

import torch
from torch import nn

from stdist.config import LearnersConfig, OptimizerConfig
from stdist.errors import InputError
from stdist.training.deepspeed_json import deepspeed_json
from stdist.training.eight_bit_engine import EightBitEngine, require_bitsandbytes
from stdist.training.engine import Engine, ParameterGroup, TorchEngine, cosine_schedule


def make_engine(
    learners: LearnersConfig,
    settings: OptimizerConfig,
    max_steps: int,
    module: nn.Module,
    groups: Iterable[ParameterGroup],
    data_ranks: int,
    persistent: Collection[nn.Parameter] = (),
    optim: str = "adamw_torch",
) -> Engine:
    """Returns an engine on ``groups`` of ``module``'s weights; ``data_ranks`` learners share a batch. ``persistent``:
    see :class:`DeepSpeedEngine`. ``optim``: of plain torch, see :func:`check_optim`."""
    groups, schedule = list(groups), cosine_schedule(settings.warmup_steps, max_steps)
    if learners.engine == "torch":
        if optim == "adamw_torch":
            return TorchEngine(groups, schedule, settings.max_grad_norm)
        return EightBitEngine(groups, schedule, settings.max_grad_norm, paged=optim == "paged_adamw_8bit")
    # Seconds to import, and not installed everywhere.
    from stdist.training.deepspeed_engine import DeepSpeedEngine

    bf16 = any(p.dtype == torch.bfloat16 for group in groups for p in group.parameters.values())
    configuration = deepspeed_json(learners, settings.max_grad_norm, bf16, data_ranks)
    return DeepSpeedEngine(module, groups, schedule, configuration, persistent)


def check_optim(learners: LearnersConfig, optim: str, key: str) -> None:
    """Raises InputError, naming the configuration's ``key``, where the engine has no such optimizer.

    ``optim``, in transformers' names: ``adamw_torch``, or with moments of eight bits ``adamw_8bit`` and
    ``paged_adamw_8bit``.
    """
    if optim == "adamw_torch":
        return
    if learners.engine == "deepspeed":
        raise InputError(
            f"{key} {optim} is of engine torch: DeepSpeed shards or offloads moments of its own; set {key} to "
            "adamw_torch, or learners.engine to torch"
        )
    require_bitsandbytes(f"{key} {optim}")


def engine_name(learners: LearnersConfig) -> str:
    """Returns the engine's name for people."""
    if learners.engine == "torch":
        return "torch"
    return f"DeepSpeed ZeRO-{learners.zero_stage}{', optimizer on the CPU' if learners.offload_optimizer else ''}"
