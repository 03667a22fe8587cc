"""Stage 3 and its loss (Vision-LLMs for Spatiotemporal Traffic Forecasting, Eq. 16)."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import Qwen2_5_VLForConditionalGeneration

from stdist.data import GridStore
from stdist.vision_llm.config import SFTConfig
from stdist.vision_llm.kernels.token_losses import head_logits, token_log_probs
from stdist.vision_llm.policy.adapters import train_only
from stdist.vision_llm.policy.city_windows import CityWindows, PolicyBatch
from stdist.vision_llm.policy.model import PolicyModel
from stdist.vision_llm.stages.sft import SFTStage, sft_loss, sft_tree
from stdist.vision_llm.tree import prefix_tree
from stdist.vision_llm.tree.prefix_tree import Tree

NO_CUT = [99, 99]


def loss_of(
    policy: PolicyModel, batch: PolicyBatch, blank: Tensor, backward: Callable[[Tensor], None] | None = None
) -> float:
    """Eq. 16 through the tree, and its gradient if asked for."""
    return prefix_tree.backward(
        policy, sft_tree(policy, batch, blank), sft_loss(policy, batch), backward or (lambda loss: None), NO_CUT
    )


def test_eq_16_by_hand() -> None:
    """−log P with logits (0, log 2, log 5): P = 1/8, 2/8, 5/8; the head's rows are unit vectors, in two blocks."""
    logits = torch.tensor([[0.0, math.log(2), math.log(5)]] * 3)
    blocks = torch.eye(3).split([1, 2])
    losses = -token_log_probs(logits, blocks, torch.tensor([0, 1, 2]))
    assert losses.tolist() == pytest.approx([math.log(8), math.log(4), math.log(8 / 5)])
    assert token_log_probs(logits.bfloat16(), blocks, torch.tensor([0, 1, 2])).dtype == torch.float32


def test_eq_16_equals_transformers_loss_with_everything_else_ignored(
    policy: PolicyModel,
    batch: PolicyBatch,
    plain_model: Callable[[PolicyModel], Qwen2_5_VLForConditionalGeneration],
    plain_inputs: Callable[..., dict[str, Tensor]],
) -> None:
    """Mean over K numerals and the end token of all cells; labels are −100 on the whole prompt."""
    ours = loss_of(policy, batch, torch.zeros(6, dtype=torch.bool))
    model = plain_model(policy)
    losses = []
    for child in range(6):
        inputs = plain_inputs(policy, batch, child, batch.answers[child])
        labels = inputs["input_ids"].clone()
        labels[:, : -batch.answers.shape[1]] = -100
        with torch.no_grad():
            losses.append(model(**inputs, labels=labels).loss.item())
    assert ours == pytest.approx(sum(losses) / 6, rel=1e-5)


def test_prompts_earn_no_loss(make_policy: Callable[..., PolicyModel], batch: PolicyBatch) -> None:
    """The head's gradient is softmax minus one-hot: below zero only in rows that are targets."""
    policy = make_policy()
    train_only(policy, "rows")
    loss_of(policy, batch, torch.zeros(6, dtype=torch.bool), torch.Tensor.backward)
    prefix = policy.prefix(batch.shared, batch.grids)
    hidden, _ = policy.branch(prefix, torch.cat([batch.prompts, batch.answers[:, :-1]], dim=1))
    predicting = hidden[:, batch.prompts.shape[1] - 1 :].flatten(0, 1).detach()
    error = head_logits(predicting, policy.full_head).softmax(-1)
    error[torch.arange(len(error)), batch.answers.flatten()] -= 1
    expected = error[:, policy.first_numeral_id :].T @ predicting / len(error)
    assert torch.allclose(policy.rows.output.grad, expected, atol=1e-6)


def test_blanked_sequences_do_not_read_their_previous_answers(policy: PolicyModel, batch: PolicyBatch) -> None:
    """docs/decisions.md, forecasts in one pass: inputs are blanks, targets stay."""
    everything, nothing = torch.ones(6, dtype=torch.bool), torch.zeros(6, dtype=torch.bool)
    changed = PolicyBatch(**vars(batch))
    changed.answers = batch.answers.clone()
    changed.answers[:, 0] = policy.first_numeral_id + 7

    def losses(of: PolicyBatch, blank: Tensor) -> Tensor:
        """Per position, from one forward, written out."""
        previous = torch.where(blank[:, None], torch.tensor(policy.blank_id), of.answers[:, :-1])
        hidden, _ = policy.branch(policy.prefix(of.shared, of.grids), torch.cat([of.prompts, previous], dim=1))
        logits = head_logits(hidden[:, of.prompts.shape[1] - 1 :].flatten(0, 1), policy.full_head)
        return cross_entropy(logits, of.answers.flatten(), reduction="none").view(6, -1)

    blanked = losses(batch, everything)
    assert loss_of(policy, batch, everything) == pytest.approx(blanked.mean().item(), rel=1e-5)
    # Other first answers change the loss of that position alone, since no later one reads them …
    assert torch.allclose(losses(changed, everything)[:, 1:], blanked[:, 1:], atol=1e-5)
    # … which they do without blanks.
    assert not torch.allclose(losses(changed, nothing)[:, 1:], losses(batch, nothing)[:, 1:], atol=1e-3)
    half = torch.tensor([True, False, False, True, True, False])
    mixed = torch.where(half[:, None], blanked, losses(batch, nothing))
    assert loss_of(policy, batch, half) == pytest.approx(mixed.mean().item(), rel=1e-5)


def stage_of(policy: PolicyModel, store: GridStore, **changes: object) -> SFTStage:
    cities = [CityWindows(policy, store.windows(name, 4, 3, channel="internet")) for name in ("train", "validation")]
    settings = {"trainable": "full", "windows_per_step": 4, "cells_per_window": 3, "eval_windows": 2} | changes
    return SFTStage(policy, cities[0], cities[1], SFTConfig(**settings), seed=5, decoding="median")


def test_micro_batches_add_up_to_the_whole_step(make_policy: Callable[..., PolicyModel], store: GridStore) -> None:
    """All activations in memory, or no more than one sequence's at a time: the same loss and the same gradient."""
    gradients, losses, calls = [], [], []
    for memory in (1.0, 1e-9):
        policy = make_policy()
        train_only(policy, "full")
        backwards: list[Tensor] = []

        def backward(loss: Tensor, backwards: list[Tensor] = backwards) -> None:
            backwards.append(loss.detach())
            loss.backward()

        scalars = stage_of(policy, store, activation_memory=memory).step(0, backward)
        gradients.append(torch.cat([p.grad.flatten() for p in policy.parameters()]))
        losses.append(scalars["loss"])
        calls.append(len(backwards))
    assert calls == [1 + 1, 4 * 3 + 4], "children's backwards, then their windows'"
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert (gradients[0] - gradients[1]).norm() / gradients[0].norm() < 1e-5


def test_a_step_reports_its_tokens_and_those_it_saved(policy: PolicyModel, store: GridStore) -> None:
    """A window's V tokens are computed once and not once for each of its three cells."""
    stage = stage_of(policy, store)
    scalars = stage.step(0, lambda loss: None)
    batch = stage.batches(0)
    v, own = batch.shared.shape[1], batch.prompts.shape[1] + batch.answers.shape[1] - 1
    assert scalars["tokens"] == 4 * (v + 3 * own) and scalars["tokens_saved"] == 4 * 2 * v


def test_a_step_depends_on_its_number_alone(policy: PolicyModel, store: GridStore) -> None:
    stage = stage_of(policy, store, blank_share=0.5)
    losses = [stage.step(step, lambda loss: None)["loss"] for step in (3, 4, 3)]
    assert losses[0] == losses[2] != losses[1]


def test_blank_share_is_a_share_of_sequences(
    policy: PolicyModel, store: GridStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    blanks: list[Tensor] = []

    def spy(policy: PolicyModel, batch: PolicyBatch, blank: Tensor) -> Tree:
        blanks.append(blank)
        return sft_tree(policy, batch, blank)

    monkeypatch.setattr("stdist.vision_llm.stages.sft.sft_tree", spy)
    monkeypatch.setattr("stdist.vision_llm.tree.prefix_tree.backward", lambda *_: 0.0)
    for share, low, high in ((0.0, 0, 0), (0.25, 0.15, 0.35), (1.0, 1, 1)):
        blanks.clear()
        stage = stage_of(policy, store, blank_share=share)
        for step in range(20):
            stage.step(step, lambda loss: None)
        mean = torch.cat(blanks).float().mean().item()
        assert len(torch.cat(blanks)) == 20 * 12 and low <= mean <= high


def test_half_the_memory_is_the_same_step(make_policy: Callable[..., PolicyModel], store: GridStore) -> None:
    """Made again behind an error, with smaller micro-batches: the same loss of the same windows."""
    policy = make_policy()
    train_only(policy, "full")
    stage = stage_of(policy, store, activation_memory=0.02)
    calls: list[Tensor] = []
    before = stage.step(3, calls.append)
    many = len(calls)
    policy.eval()  # as an error inside an evaluation's context might leave it
    for _ in range(6):
        assert stage.halve_memory()
    again = stage.step(3, calls.append)
    assert again == pytest.approx(before, rel=1e-5) and len(calls) - many > many and policy.training
