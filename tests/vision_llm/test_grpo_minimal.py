"""GRPOStage against the whole algorithm in one plain file: the same candidates in, the same loss and gradient out."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from stdist.data import GridStore
from stdist.vision_llm.config import GRPOConfig
from stdist.vision_llm.policy.adapters import as_reference, begin_grpo
from stdist.vision_llm.policy.city_windows import CityWindows, PolicyBatch
from stdist.vision_llm.policy.model import PolicyModel
from stdist.vision_llm.rollout.rollouts import Candidates, LocalRollouts
from stdist.vision_llm.stages.grpo import GRPOStage


@pytest.fixture(scope="module")
def minimal() -> ModuleType:
    path = Path(__file__).parents[2] / "examples" / "grpo_minimal.py"
    spec = importlib.util.spec_from_file_location("grpo_minimal", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Recorded(LocalRollouts):
    """Sampled candidates of several lengths; old log-probabilities on both sides of those that the policy now gives."""

    def generate(self, step: int, batch: PolicyBatch) -> list[Candidates]:
        self.batch, self.records = batch, super().generate(step, batch)
        rng = np.random.default_rng(3)
        for record in self.records:
            shift = rng.normal(0, 0.3, record.log_probs.shape) * (record.log_probs != 0)
            record.log_probs[:] += shift.astype(np.float32)
        return self.records


def test_the_stage_is_the_minimal_algorithm(
    make_policy: Callable[..., PolicyModel],
    store: GridStore,
    batch: PolicyBatch,
    lean_towards_end: Callable[..., None],
    minimal: ModuleType,
) -> None:
    policy = make_policy()
    lean_towards_end(policy, batch, 6.0)
    begin_grpo(policy)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in policy.named_parameters():
        if "lora_B.grpo" in name or name.startswith("rows."):  # away from the reference
            parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
    config = GRPOConfig(
        windows_per_step=2, cells_per_window=2, num_generations=4, epsilon=minimal.EPSILON, beta=minimal.BETA,
        half_score=minimal.HALF_SCORE, temperature=minimal.TEMPERATURE,
    )  # fmt: skip
    cities = [CityWindows(policy, store.windows(name, 4, 3, channel="internet")) for name in ("train", "validation")]
    cell_mean = np.linspace(10.0, 190.0, 20)
    rollouts = Recorded(policy, config, seed=5)
    stage = GRPOStage(policy, *cities, cell_mean, config, seed=5, decoding="median", rollouts=rollouts)
    stage.on_weights_changed(0)
    scalars = stage.step(0, torch.Tensor.backward)

    batch, records = rollouts.batch, rollouts.records
    answer_ids, old = (
        torch.from_numpy(np.concatenate([getattr(r, n) for r in records])) for n in ("answer_ids", "log_probs")
    )
    prompts = minimal.Prompts.of(policy, batch, 4)
    model = minimal.plain_model(policy)
    with as_reference(policy):
        reference_model = minimal.plain_model(policy)
    mask = minimal.written(answer_ids, len(policy.vocabulary))
    rewards = minimal.rewards_of(policy, answer_ids, batch.truth.reshape(-1, 3), np.tile(cell_mean[batch.cells], 2))
    new = minimal.log_probs(model, prompts, answer_ids)
    with torch.no_grad():
        reference = minimal.log_probs(reference_model, prompts, answer_ids)
    loss = minimal.grpo_loss(new, old, reference, rewards, mask)
    loss.backward()

    assert len(mask.sum(1).unique()) > 1 and rewards.std(1).min() > 0
    assert scalars["loss"] == pytest.approx(loss.item(), abs=1e-5) and abs(loss.item()) > 1e-3
    assert scalars["reward"] == pytest.approx(rewards.mean().item(), abs=1e-5)
    first = policy.first_numeral_id
    theirs = {
        "rows.input": model.get_input_embeddings().weight.grad[first:],
        "rows.output": model.lm_head.weight.grad[first:],
    }
    theirs |= {name: p.grad for name, p in model.named_parameters() if "lora_" in name and ".grpo." in name}
    ours = {
        name.removeprefix("backbone.base_model.model."): p.grad
        for name, p in policy.named_parameters()
        if p.requires_grad
    }
    assert ours.keys() == theirs.keys() and len(ours) == 2 + 4 * 7 * 2
    for name, gradient in ours.items():
        assert torch.allclose(gradient, theirs[name], rtol=1e-3, atol=1e-5), name
    norm = torch.cat([g.flatten() for g in theirs.values()]).norm()
    assert torch.cat([(ours[n] - theirs[n]).flatten() for n in ours]).norm() / norm < 1e-5
