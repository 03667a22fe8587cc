"""What DeepSpeed is told: the config's own keys, a user's JSON under them, and one line where the two disagree."""

import json
from pathlib import Path
from typing import Any

import pytest

from stdist.config import LearnersConfig
from stdist.errors import InputError
from stdist.training.deepspeed_json import deepspeed_json


def _made(tmp_path: Path, given: Any = None, bf16: bool = False, world: int = 2, **learners: Any) -> dict[str, Any]:
    if given is not None:
        learners["deepspeed"] = tmp_path / "ds.json"
        learners["deepspeed"].write_text(given if isinstance(given, str) else json.dumps(given))
    config = LearnersConfig(engine="deepspeed", num_workers=world, **learners)
    return deepspeed_json(config, max_grad_norm=0.5, bf16=bf16, world_size=world)


def test_a_step_is_one_sample_of_each_learner(tmp_path):
    """However many backward passes it takes, and whatever the batch is: that is the loop's business."""
    made = _made(tmp_path, world=3)
    assert made["train_batch_size"] == 3
    assert made["train_micro_batch_size_per_gpu"] == made["gradient_accumulation_steps"] == 1
    assert made["gradient_clipping"] == 0.5 and made["bf16"] == {"enabled": False}


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_sharding_and_offload_follow_the_config(tmp_path, stage):
    made = _made(tmp_path, zero_stage=stage)["zero_optimization"]
    assert made["stage"] == stage and "offload_optimizer" not in made
    # A reduction beside a backward pass would read gradients that the next pass is adding to.
    assert made.get("overlap_comm") is (None if stage == 3 else False)
    made = _made(tmp_path, zero_stage=stage, offload_optimizer=True)["zero_optimization"]
    assert made["offload_optimizer"] == {"device": "cpu", "pin_memory": True}


def test_other_keys_of_the_users_json_stay(tmp_path):
    zero = {"stage3_param_persistence_threshold": 7, "offload_optimizer": {"device": "cpu", "pin_memory": False}}
    given = {"wall_clock_breakdown": True, "zero_optimization": zero, "comms_logger": {"enabled": True}}
    made = _made(tmp_path, given, zero_stage=3, offload_optimizer=True)
    assert made["wall_clock_breakdown"] is True and made["comms_logger"] == {"enabled": True}
    assert made["zero_optimization"] == {**zero, "stage": 3}


def test_the_same_said_twice_is_no_contradiction(tmp_path):
    given = {"zero_optimization": {"stage": 2, "overlap_comm": False}, "gradient_clipping": 0.5, "train_batch_size": 2}
    assert _made(tmp_path, given | {"bf16": {"enabled": True}}, bf16=True, zero_stage=2) == _made(
        tmp_path, bf16=True, zero_stage=2
    )


def test_auto_is_what_the_config_says_or_deepspeeds_default(tmp_path):
    """As transformers' users write it."""
    auto = {
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": "auto", "loss_scale": 0},
        "zero_optimization": {"stage": "auto", "reduce_bucket_size": "auto", "offload_optimizer": {"device": "auto"}},
        "flops_profiler": {"enabled": False, "profile_step": "auto"},
        "gradient_clipping": "auto",
        "gradient_accumulation_steps": "auto",
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "optimizer": "auto",
    }
    made = _made(tmp_path, auto, bf16=True)
    assert made == _made(tmp_path, bf16=True) | {"flops_profiler": {"enabled": False}}


CONTRADICTIONS: dict[str, tuple[dict[str, Any], str, str]] = {
    "stage": ({"zero_optimization": {"stage": 3}}, "zero_optimization.stage is 3, but 1", "learners.zero_stage"),
    "offload": (
        {"zero_optimization": {"offload_optimizer": {"device": "nvme"}}},
        'zero_optimization.offload_optimizer.device is "nvme", but "none"',
        "learners.offload_optimizer",
    ),
    "clipping": ({"gradient_clipping": 1.0}, "gradient_clipping is 1.0, but 0.5", "max_grad_norm"),
    "precision": ({"bf16": {"enabled": True}}, "bf16.enabled is true, but false", "policy.dtype"),
    "batch": ({"train_batch_size": 64}, "train_batch_size is 64, but 2", "learners.num_workers"),
    "accumulation": (
        {"gradient_accumulation_steps": 4},
        "gradient_accumulation_steps is 4, but 1",
        "the stages' own keys",
    ),
    "overlap": ({"zero_optimization": {"overlap_comm": True}}, "zero_optimization.overlap_comm is true, but", "stdist"),
    "section": ({"zero_optimization": 2}, "zero_optimization is 2, but {", "stdist"),
}


@pytest.mark.parametrize(("given", "said", "key"), CONTRADICTIONS.values(), ids=CONTRADICTIONS.keys())
def test_a_contradiction_names_both_keys_in_one_line(tmp_path, given, said, key):
    with pytest.raises(InputError) as caught:
        _made(tmp_path, given)
    message = str(caught.value)
    assert f"learners.deepspeed {tmp_path / 'ds.json'}: {said}" in message and key in message
    assert "\n" not in message and "change one of the two" in message


REFUSED: dict[str, Any] = {
    "optimizer": {"type": "AdamW", "params": {"lr": "auto"}},
    "scheduler": {"type": "WarmupLR"},
    "fp16": {"enabled": True},
}


@pytest.mark.parametrize("section", REFUSED)
def test_what_stdist_decides_is_refused_by_name(tmp_path, section):
    with pytest.raises(InputError, match=rf"ds\.json: stdist decides {section} \(.*\); remove it there$"):
        _made(tmp_path, {section: REFUSED[section]})


def test_what_is_switched_off_is_no_contradiction(tmp_path):
    assert _made(tmp_path, {"fp16": {"enabled": False, "loss_scale": 0}, "scheduler": None}) == _made(tmp_path)


@pytest.mark.parametrize(("text", "said"), [("{", "cannot be read as JSON"), ("[1]", "must be an object")])
def test_a_file_that_is_no_json_object_is_said(tmp_path, text, said):
    with pytest.raises(InputError, match=rf"ds\.json {said}"):
        _made(tmp_path, text)


def test_a_missing_file_is_said(tmp_path):
    config = LearnersConfig(engine="deepspeed", deepspeed=tmp_path / "none.json")
    with pytest.raises(InputError, match=r"none\.json cannot be read"):
        deepspeed_json(config, 1.0, False, 1)
