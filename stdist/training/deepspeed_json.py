"""What DeepSpeed is configured with: made of the one config tree, over a JSON of the user's own if there is one."""

import json
from pathlib import Path
from typing import Any

from stdist.config import LearnersConfig
from stdist.errors import InputError

BATCH_KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
OWN_KEYS = {
    "optimizer": "AdamW, with the stage's learning rates and weight_decay",
    "scheduler": "a warm-up and a cosine over the stage's steps",
    "fp16": "policy.dtype says the precision, bfloat16 or float32",
}
"""Sections that stdist decides, and what it decides."""


def deepspeed_json(learners: LearnersConfig, max_grad_norm: float, bf16: bool, world_size: int) -> dict[str, Any]:
    """DeepSpeed's configuration for one stage.

    ``bf16``: whether what trains is bfloat16, so that the optimizer keeps float32 masters. Batches are the loop's
    business: to DeepSpeed a step is one sample a learner, and however many backward passes it takes are one step.
    Raises InputError where the user's JSON says otherwise than the config, naming both.
    """
    own: dict[str, Any] = {
        **dict(zip(BATCH_KEYS, (world_size, 1, 1), strict=True)),
        "managed_gradient_accumulation": False,
        "gradient_clipping": max_grad_norm,
        "bf16": {"enabled": bf16},
        "zero_optimization": {"stage": learners.zero_stage},
        # The optimizer is torch's own AdamW, also where its state is in CPU memory.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    if learners.zero_stage != 3:
        # A reduction beside the backward pass reads gradients that a second backward pass is adding to.
        own["zero_optimization"]["overlap_comm"] = False
    if learners.offload_optimizer:
        own["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    return own if learners.deepspeed is None else _merged(own, _read(learners.deepspeed), learners.deepspeed, "")


def _read(path: Path) -> dict[str, Any]:
    try:
        given = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"learners.deepspeed {path} cannot be read as JSON ({error})") from None
    if not isinstance(given, dict):
        raise InputError(f"learners.deepspeed {path} must be an object of DeepSpeed's keys")
    for key, decided in OWN_KEYS.items():
        if given.get(key) and given[key] != {"enabled": False}:
            raise InputError(f"learners.deepspeed {path}: stdist decides {key} ({decided}); remove it there")
    return {key: value for key, value in given.items() if key not in OWN_KEYS}


def _merged(own: dict[str, Any], given: dict[str, Any], path: Path, above: str) -> dict[str, Any]:
    """``given`` filled up with ``own``; "auto" stands for what ``own`` says, or for DeepSpeed's default."""
    merged = {key: value for key, value in given.items() if value != "auto"}
    for key, value in own.items():
        name = f"{above}{key}"
        if isinstance(value, dict) and isinstance(merged.get(key), dict):
            merged[key] = _merged(value, merged[key], path, f"{name}.")
        elif merged.get(key, value) != value:
            theirs, ours = json.dumps(merged[key]), json.dumps(value)
            hint = "leave batches to the stages' own keys" if key in BATCH_KEYS else "change one of the two"
            raise InputError(
                f"learners.deepspeed {path}: {name} is {theirs}, this run's is {ours}; {hint}, or say auto"
            )
        else:
            merged[key] = value
    return merged
