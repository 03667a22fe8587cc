"""A run is one trajectory: the same seed gives the same losses to the last bit, and they fall."""

from collections.abc import Callable

import pytest
import torch

from stdist.data import GridStore
from stdist.training.engine import TorchEngine, cosine_schedule
from stdist.training.loop import Stage
from stdist.vision_llm.config import AlignmentConfig, GRPOConfig, SFTConfig
from stdist.vision_llm.learning import parameter_groups
from stdist.vision_llm.policy.adapters import begin_grpo, train_only
from stdist.vision_llm.policy.city_windows import CityWindows
from stdist.vision_llm.policy.model import PolicyModel
from stdist.vision_llm.stages.alignment import AlignmentStage
from stdist.vision_llm.stages.grpo import GRPOStage
from stdist.vision_llm.stages.sft import SFTStage

ALIGNMENT = AlignmentConfig(trainable="full", train_batch_size=8, values_per_example=2, learning_rate=1e-3)
FEW = {"windows_per_step": 4, "cells_per_window": 4, "eval_windows": 4}
SFT = SFTConfig(trainable="full", learning_rate=2e-3, warmup_steps=3, blank_share=0.5, **FEW)
GRPO = GRPOConfig(num_generations=3, learning_rate=1e-3, **FEW)


def losses(make_policy: Callable[..., PolicyModel], store: GridStore, name: str, steps: int) -> list[float]:
    policy = make_policy(seed=11)
    train, validation = (
        CityWindows(policy, store.windows(part, 4, 3, channel="internet")) for part in ("train", "validation")
    )
    settings = {"alignment": ALIGNMENT, "arithmetic": ALIGNMENT, "sft": SFT, "grpo": GRPO}[name]
    stage: Stage
    if name == "grpo":
        begin_grpo(policy, seed=11)
        cell_mean = store.statistics("internet", store.default_split.train).cell_mean.ravel()
        stage = GRPOStage(policy, train, validation, cell_mean, GRPO, seed=11, decoding="median")
    elif name == "sft":
        train_only(policy, "full")
        stage = SFTStage(policy, train, validation, SFT, seed=11, decoding="direct")
    else:
        train_only(policy, "full")
        stage = AlignmentStage(name, policy, ALIGNMENT, seed=11)
    engine = TorchEngine(parameter_groups(policy, settings), cosine_schedule(settings.warmup_steps, steps), 1.0)
    trajectory = []
    for step in range(steps):
        stage.on_weights_changed(step)
        trajectory.append(stage.step(step, engine.backward)["loss"])
        engine.step()
    return trajectory


@pytest.mark.parametrize(("name", "steps"), [("alignment", 5), ("arithmetic", 5), ("sft", 5), ("grpo", 3)])
def test_same_seed_same_losses_to_the_last_bit(
    make_policy: Callable[..., PolicyModel], store: GridStore, name: str, steps: int
) -> None:
    first = losses(make_policy, store, name, steps)
    torch.rand(17)  # what else was drawn in the process is no part of the run
    assert losses(make_policy, store, name, steps) == first
    assert len(set(first)) == steps, "every step learned from something else"


def test_loss_falls_over_thirty_steps_of_fine_tuning(make_policy: Callable[..., PolicyModel], store: GridStore) -> None:
    """Far below a uniform guess over numerals (log 1802 = 7.5), from above it."""
    trajectory = losses(make_policy, store, "sft", steps=30)
    assert trajectory[0] > 6.0
    assert sum(trajectory[-5:]) / 5 < 0.75 * trajectory[0]
