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
DECIDED_BY = {
    **dict.fromkeys(BATCH_KEYS, "learners.num_workers; batches are the stages' own keys"),
    "bf16.enabled": "policy.dtype",
    "gradient_clipping": "the stage's max_grad_norm",
    "zero_optimization.stage": "learners.zero_stage",
    "zero_optimization.offload_optimizer.device": "learners.offload_optimizer",
}
"""The keys of the config that say the same as DeepSpeed's."""


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
    own["zero_optimization"]["offload_optimizer"] = {"device": "cpu" if learners.offload_optimizer else "none"}
    if learners.deepspeed is not None:
        own = _merged(own, _read(learners.deepspeed), learners.deepspeed, "")
    if learners.offload_optimizer:
        own["zero_optimization"]["offload_optimizer"].setdefault("pin_memory", True)
    else:
        # DeepSpeed 0.19 asks in places whether the section is there, not what it says.
        del own["zero_optimization"]["offload_optimizer"]
    return own


def _read(path: Path) -> dict[str, Any]:
    try:
        given = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"learners.deepspeed {path} cannot be read as JSON ({error})") from None
    if not isinstance(given, dict):
        raise InputError(f"learners.deepspeed {path} must be an object of DeepSpeed's keys")
    given = _without_auto(given)
    for key, decided in OWN_KEYS.items():
        section = given.pop(key, None)
        off = key == "fp16" and isinstance(section, dict) and not section.get("enabled")
        if section and not off:
            raise InputError(f"learners.deepspeed {path}: stdist decides {key} ({decided}); remove it there")
    return given


def _without_auto(given: dict[str, Any]) -> dict[str, Any]:
    """Without what is null or "auto": the config's own value stands there, or DeepSpeed's default."""
    return {
        key: _without_auto(value) if isinstance(value, dict) else value
        for key, value in given.items()
        if value not in ("auto", None)
    }


def _merged(own: dict[str, Any], given: dict[str, Any], path: Path, above: str) -> dict[str, Any]:
    """``given`` filled up with ``own``."""
    merged = dict(given)
    for key, value in own.items():
        name = f"{above}{key}"
        if isinstance(value, dict) and isinstance(merged.get(key), dict):
            merged[key] = _merged(value, merged[key], path, f"{name}.")
        elif merged.get(key, value) != value:
            theirs, ours = json.dumps(merged[key]), json.dumps(value)
            raise InputError(
                f"learners.deepspeed {path}: {name} is {theirs}, but {ours} by "
                f"{DECIDED_BY.get(name, 'what stdist does')}; change one of the two, or say auto there"
            )
        else:
            merged[key] = value
    return merged
