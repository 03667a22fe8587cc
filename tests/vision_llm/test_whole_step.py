"""A whole step on shapes alone, all its micro-batches, its gradients from nothing and AdamW's update, against the plan,
which measures one micro-batch of each depth and adds the rest on paper."""

from typing import Any

import pytest
from torch.optim import optimizer

from stdist.runs.meter import metered
from stdist.runs.recipes import parse_config
from stdist.training.engine import TorchEngine, cosine_schedule
from stdist.training.fused_accumulation import set_fused_accumulation
from stdist.vision_llm.config import AlignmentConfig, VisionLLMConfig
from stdist.vision_llm.dataset import stage_config
from stdist.vision_llm.learning import parameter_groups
from stdist.vision_llm.plan import plan_stage, starting_point
from stdist.vision_llm.stage_costs import _stage_tree, shape_policy
from stdist.vision_llm.stages.alignment import AlignmentStage
from stdist.vision_llm.tree import prefix_tree

WINDOWS, CELLS, CANDIDATES = 2, 12, 4


def run(base: str, digits: int) -> VisionLLMConfig:
    """The paper's setting in small steps: two steps of a window's cells at once."""
    windows = {"windows_per_step": WINDOWS, "cells_per_window": CELLS}
    tree: dict[str, Any] = {
        "name": "shapes",
        "data": {"store": "not-there.zarr", "history": 12, "horizon": 12, "region": "44:55,44:55"},
        "numerals": {"mantissa_digits": digits},
        "policy": {"base": base, "dtype": "bfloat16", "gradient_checkpointing": True},
        "alignment": {"trainable": "rows", "train_batch_size": 16, "gradient_accumulation_steps": 4},
        "sft": {**windows, "activation_memory": 0.5 if base != "tiny" else 0.003},
        "grpo": {**windows, "activation_memory": 0.2 if base != "tiny" else 0.003, "num_generations": CANDIDATES},
    }
    config = parse_config(tree, "test")
    assert isinstance(config, VisionLLMConfig)
    return config


@pytest.fixture(autouse=True)
def fused_on_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's fused AdamW, which a GPU has, knows shapes too, but is not asked for them."""
    devices = optimizer._get_fused_kernels_supported_devices
    monkeypatch.setattr(optimizer, "_get_fused_kernels_supported_devices", lambda: [*devices(), "meta"])


def bytes_of_a_step(config: VisionLLMConfig, name: str, at_once: list[int]) -> int:
    """The most that is alive in the second step of a stage, its weights and states included."""
    policy, settings = shape_policy(*starting_point(config, name)), stage_config(config, name)
    weights = {id(p): p for p in policy.parameters()}.values()
    with metered(policy) as meter:
        policy.zero_grad(set_to_none=True)
        engine = TorchEngine(parameter_groups(policy, settings), cosine_schedule(1, 3), 1.0)
        for step in range(2):
            if isinstance(settings, AlignmentConfig):
                AlignmentStage(name, policy, settings, seed=0).step(step, engine.backward)
            else:
                families = (WINDOWS, CELLS, CANDIDATES if name == "grpo" else 1)
                tree, visit = _stage_tree(policy, name, families, 0)
                prefix_tree.backward(policy, tree, visit, engine.backward, at_once)
            engine.step()
        engine.close()
        peak = meter.peak
    set_fused_accumulation(policy.parameters(), False)
    return peak + sum(p.numel() * p.element_size() for p in weights)


@pytest.mark.parametrize("stage", ["alignment", "sft", "grpo"])
@pytest.mark.parametrize(
    ("base", "digits", "least", "most"),
    [("tiny", 2, 0.99, 1.15), pytest.param("Qwen/Qwen2.5-VL-7B-Instruct", 4, 0.99, 1.05, marks=pytest.mark.slow)],
)
def test_a_whole_step_takes_the_bytes_that_are_planned(base, digits, least, most, stage):
    """Of the preset nearly all are activations, which the plan takes as if those of all depths were there at once."""
    config = run(base, digits)
    plan = plan_stage(config, stage)
    phases = {name: held for name, held in plan.phases.items() if name in ("training", "update")}
    planned = sum(state.device for state in plan.states.values()) + max(sum(held.values()) for held in phases.values())
    took = bytes_of_a_step(config, stage, plan.counts["micro_batches"])
    assert least <= planned / took <= most, f"{planned / 2**30:.4f} GiB planned, {took / 2**30:.4f} taken"


def test_the_count_itself_sees_what_is_there(monkeypatch):
    """Gradients that were added by autograd would be seen: twice the numerals' rows of the head and of the look-up."""
    config = run("tiny", 3)
    rows = next(w for w in plan_stage(config, "sft").weights if w.kind == "numeral rows").bytes
    at_once = plan_stage(config, "sft").counts["micro_batches"]
    fused = bytes_of_a_step(config, "sft", at_once)
    monkeypatch.setattr("stdist.training.engine.set_fused_accumulation", lambda parameters, fused: None)
    assert bytes_of_a_step(config, "sft", at_once) - fused > 0.3 * rows
