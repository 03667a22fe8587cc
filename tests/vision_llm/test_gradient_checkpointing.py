"""Gradient checkpointing: the decoder's layers run twice in a training step, and its gradients are the same."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from stdist.vision_llm.kernels.token_losses import head_logits
from stdist.vision_llm.policy.adapters import begin_grpo, train_only
from stdist.vision_llm.policy.checkpoints import load_policy, snapshot_policy
from stdist.vision_llm.policy.city_windows import PolicyBatch
from stdist.vision_llm.policy.model import PolicyModel

MakePolicy = Callable[..., PolicyModel]
CASES = {
    "preset, in full": {},
    "bfloat16 base with LoRA": {"base_is_trained": False, "dtype": "bfloat16"},
    "4-bit base with LoRA": {"base_is_trained": False, "load_in_4bit": True},
}


@pytest.fixture
def make_case(make_policy: MakePolicy, base: Path) -> MakePolicy:
    def make(case: str, gradient_checkpointing: bool) -> PolicyModel:
        changes = CASES[case] | ({} if case.startswith("preset") else {"base": str(base)})
        policy = make_policy(gradient_checkpointing=gradient_checkpointing, **changes).cpu()
        train_only(policy, "full" if case.startswith("preset") else "lora")
        return policy

    return make


def ids_of(policy: PolicyModel) -> Tensor:
    """Text followed by numerals, ``[2, 6]``."""
    return torch.cat([torch.arange(300, 306).view(2, 3), policy.first_numeral_id + torch.arange(6).view(2, 3)], dim=1)


def step(policy: PolicyModel) -> tuple[int, dict[str, Tensor]]:
    """Forward passes through the first layer's MLP in one forward and backward of the policy, and the gradients."""
    calls = []
    mlp = policy.base_model.model.language_model.layers[0].mlp
    # Before the call: a recomputation stops inside it, at the last tensor that the backward pass asks for.
    hook = mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    policy.zero_grad()
    head_logits(policy.hidden(ids_of(policy))[:, -1], policy.full_head).float().square().mean().backward()
    hook.remove()
    return len(calls), {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_the_same_and_layers_run_again(make_case: MakePolicy, case: str) -> None:
    plain, saving = (make_case(case, on).train() for on in (False, True))
    (once, expected), (twice, found) = step(plain), step(saving)
    assert (once, twice) == (1, 2)
    assert found.keys() == expected.keys() and "rows.input" in found
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("case", CASES)
def test_cells_still_read_their_windows_prefix(
    make_case: MakePolicy, make_batch: Callable[..., PolicyBatch], case: str
) -> None:
    """transformers drops ``past_key_values`` from checkpointed layers: a prefix must not travel there."""
    gradients = []
    for on in (False, True):
        policy = make_case(case, on).train()
        batch = make_batch(policy)
        hidden, _ = policy.branch(policy.prefix(batch.shared, batch.grids), batch.prompts)
        head_logits(hidden[:, -1], policy.full_head).float().square().mean().backward()
        gradients.append({name: p.grad for name, p in policy.named_parameters() if p.grad is not None})
    expected, found = gradients
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_evaluation_runs_layers_once(make_case: MakePolicy) -> None:
    assert step(make_case("preset, in full", True).eval())[0] == 1


def test_the_second_adapter_keeps_it(make_case: MakePolicy) -> None:
    policy = make_case("4-bit base with LoRA", True)
    begin_grpo(policy)
    assert step(policy.train())[0] == 2


def test_the_vision_tower_is_left_alone(make_case: MakePolicy) -> None:
    """It is frozen: without a graph there is nothing to save."""
    model = make_case("bfloat16 base with LoRA", True).base_model.model
    assert model.language_model.is_activation_checkpointing
    assert not model.visual.is_activation_checkpointing


def test_a_checkpoint_remembers_it(make_case: MakePolicy, folder: Path) -> None:
    snapshot_policy(make_case("preset, in full", True))(folder)
    loaded = load_policy(folder)
    train_only(loaded, "full")
    assert step(loaded.train())[0] == 2


def test_a_frozen_vision_tower_keeps_no_activations(make_case: MakePolicy) -> None:
    """peft makes inputs require gradients for reentrant checkpointing; the tower's would then be kept for nothing."""
    tower = make_case("bfloat16 base with LoRA", gradient_checkpointing=True).base_model.model.visual
    patches = torch.randn(16, tower.patch_embed.proj.weight[0].numel(), dtype=torch.bfloat16)
    assert not tower(patches, grid_thw=torch.tensor([[1, 4, 4]])).pooler_output.requires_grad
