"""DeepSpeed's configuration: made of the one config tree, over a JSON of the user's if there is one."""

import json
from pathlib import Path
from typing import Any

from stdist.config import LearnersConfig
from stdist.errors import InputError

BATCH_KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
DECIDED_SECTIONS = {
    "optimizer": "AdamW, with the stage's learning rates and weight_decay",
    "scheduler": "a warm-up and a cosine over the stage's steps",
    "fp16": "policy.dtype says the precision, bfloat16 or float32",
}
"""DeepSpeed's sections that stdist decides, and its decision."""
DECIDED_BY = {
    **dict.fromkeys(BATCH_KEYS, "learners.num_workers; batches are the stages' own keys"),
    "bf16.enabled": "policy.dtype",
    "gradient_clipping": "the stage's max_grad_norm",
    "zero_optimization.stage": "learners.zero_stage",
    "zero_optimization.offload_optimizer.device": "learners.offload_optimizer",
}
"""DeepSpeed's keys, and those of the configuration that say the same."""


def deepspeed_json(learners: LearnersConfig, max_grad_norm: float, bf16: bool, world_size: int) -> dict[str, Any]:
    """Returns DeepSpeed's configuration for one stage.

    ``bf16``: true where the trained weights are bfloat16, so that the optimizer keeps float32 masters. Batches are the
    loop's business: to DeepSpeed a step is one sample a learner, and takes any number of backward passes
    (deepspeedai/DeepSpeed#8183). Raises InputError where the user's JSON says otherwise than the config, naming both.
    """
    ours: dict[str, Any] = {
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
        # A reduction beside the backward pass reads gradients that a second one adds to (deepspeedai/DeepSpeed#5545).
        ours["zero_optimization"]["overlap_comm"] = False
    ours["zero_optimization"]["offload_optimizer"] = {"device": "cpu" if learners.offload_optimizer else "none"}
    if learners.deepspeed is not None:
        ours = _merged(ours, _read(learners.deepspeed), learners.deepspeed, "")
    if learners.offload_optimizer:
        ours["zero_optimization"]["offload_optimizer"].setdefault("pin_memory", True)
    else:
        # DeepSpeed 0.19 asks in places whether the section is there, not what it says.
        del ours["zero_optimization"]["offload_optimizer"]
    return ours


def _read(path: Path) -> dict[str, Any]:
    try:
        theirs = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"learners.deepspeed {path} cannot be read as JSON ({error})") from None
    if not isinstance(theirs, dict):
        raise InputError(f"learners.deepspeed {path} must be an object of DeepSpeed's keys")
    theirs = _without_auto(theirs)
    for key, decided in DECIDED_SECTIONS.items():
        section = theirs.pop(key, None)
        off = key == "fp16" and isinstance(section, dict) and not section.get("enabled")
        if section and not off:
            raise InputError(f"learners.deepspeed {path}: stdist decides {key} ({decided}); remove it there")
    return theirs


def _without_auto(theirs: dict[str, Any]) -> dict[str, Any]:
    """Leaves out all that is null or "auto": the configuration's value stands there, or DeepSpeed's default."""
    return {
        key: _without_auto(value) if isinstance(value, dict) else value
        for key, value in theirs.items()
        if value not in ("auto", None)
    }


def _merged(ours: dict[str, Any], theirs: dict[str, Any], path: Path, above: str) -> dict[str, Any]:
    """Returns ``theirs`` filled up with ``ours``."""
    merged = dict(theirs)
    for key, value in ours.items():
        name = f"{above}{key}"
        if isinstance(value, dict) and isinstance(merged.get(key), dict):
            merged[key] = _merged(value, merged[key], path, f"{name}.")
        elif merged.get(key, value) != value:
            raise InputError(
                f"learners.deepspeed {path}: {name} is {json.dumps(merged[key])}, but {json.dumps(value)} by "
                f"{DECIDED_BY.get(name, 'what stdist does')}; change one of the two, or say auto there"
            )
        else:
            merged[key] = value
    return merged
