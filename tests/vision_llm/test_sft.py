"""Stage 3 and its loss (Vision-LLMs for Spatiotemporal Traffic Forecasting, Eq. 16)."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import Qwen2_5_VLForConditionalGeneration

from stdist.config import SFTConfig
from stdist.data import GridStore
from stdist.vision_llm.city_windows import CityWindows, PolicyBatch
from stdist.vision_llm.policy import Policy
from stdist.vision_llm.sft import SFTStage, sft_loss
from stdist.vision_llm.token_losses import answer_logits, full_logits, target_cross_entropy


def test_eq_16_by_hand() -> None:
    """−log P with logits (0, log 2, log 5): P = 1/8, 2/8, 5/8."""
    logits = torch.tensor([[0.0, math.log(2), math.log(5)]] * 3)
    loss = target_cross_entropy(logits, torch.tensor([0, 1, 2]))
    assert loss.tolist() == pytest.approx([math.log(8), math.log(4), math.log(8 / 5)])
    assert target_cross_entropy(logits.bfloat16(), torch.tensor([0, 1, 2])).dtype == torch.float32


def test_head_rows_by_hand() -> None:
    hidden = torch.tensor([[1.0, 2.0]])
    text, numerals = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[3.0, 0.0], [0.0, -1.0], [1.0, 1.0]])
    assert full_logits(hidden, text, numerals).tolist() == [[1, 2, 3, -2, 3]]
    assert answer_logits(hidden, text[1], numerals).tolist() == [[3, -2, 3, 2]]


def test_eq_16_equals_transformers_loss_with_everything_else_ignored(
    policy: Policy,
    batch: PolicyBatch,
    plain_model: Callable[[Policy], Qwen2_5_VLForConditionalGeneration],
    plain_inputs: Callable[..., dict[str, Tensor]],
) -> None:
    """Mean over K numerals and the end token of all cells; labels are −100 on the whole prompt."""
    ours = sft_loss(policy, batch, torch.zeros(6, dtype=torch.bool))
    model = plain_model(policy)
    losses = []
    for child in range(6):
        inputs = plain_inputs(policy, batch, child, batch.answers[child])
        labels = inputs["input_ids"].clone()
        labels[:, : -batch.answers.shape[1]] = -100
        with torch.no_grad():
            losses.append(model(**inputs, labels=labels).loss.item())
    assert ours.item() == pytest.approx(sum(losses) / 6, rel=1e-5)


def test_prompts_earn_no_loss(make_policy: Callable[..., Policy], batch: PolicyBatch) -> None:
    """The head's gradient is softmax minus one-hot: below zero only in rows that are targets."""
    policy = make_policy()
    policy.train_only("rows")
    loss = sft_loss(policy, batch, torch.zeros(6, dtype=torch.bool))
    loss.backward()
    prefix = policy.prefix(batch.shared, batch.grids)
    hidden, _ = policy.branch(prefix, torch.cat([batch.prompts, batch.answers[:, :-1]], dim=1))
    predicting = hidden[:, batch.prompts.shape[1] - 1 :].flatten(0, 1).detach()
    error = policy.logits(predicting).softmax(-1)
    error[torch.arange(len(error)), batch.answers.flatten()] -= 1
    expected = error[:, policy.first_numeral_id :].T @ predicting / len(error)
    assert torch.allclose(policy.rows.output.grad, expected, atol=1e-6)


def test_blanked_sequences_do_not_read_their_previous_answers(policy: Policy, batch: PolicyBatch) -> None:
    """docs/decisions.md, forecasts in one pass: inputs are blanks, targets stay."""
    everything, nothing = torch.ones(6, dtype=torch.bool), torch.zeros(6, dtype=torch.bool)
    changed = PolicyBatch(**vars(batch))
    changed.answers = batch.answers.clone()
    changed.answers[:, 0] = policy.first_numeral_id + 7

    def losses(of: PolicyBatch, blank: Tensor) -> Tensor:
        """Per position, from the same forward as ``sft_loss`` but written out."""
        previous = torch.where(blank[:, None], torch.tensor(policy.blank_id), of.answers[:, :-1])
        hidden, _ = policy.branch(policy.prefix(of.shared, of.grids), torch.cat([of.prompts, previous], dim=1))
        logits = policy.logits(hidden[:, of.prompts.shape[1] - 1 :].flatten(0, 1))
        return target_cross_entropy(logits, of.answers.flatten()).view(6, -1)

    blanked = losses(batch, everything)
    assert sft_loss(policy, batch, everything).item() == pytest.approx(blanked.mean().item(), rel=1e-5)
    # Other first answers change the loss of that position alone, since no later one reads them …
    assert torch.allclose(losses(changed, everything)[:, 1:], blanked[:, 1:], atol=1e-5)
    # … which they do without blanks.
    assert not torch.allclose(losses(changed, nothing)[:, 1:], losses(batch, nothing)[:, 1:], atol=1e-3)
    half = torch.tensor([True, False, False, True, True, False])
    mixed = torch.where(half[:, None], blanked, losses(batch, nothing))
    assert sft_loss(policy, batch, half).item() == pytest.approx(mixed.mean().item(), rel=1e-5)


def stage_of(policy: Policy, store: GridStore, **changes: object) -> SFTStage:
    cities = [CityWindows(policy, store.windows(name, 4, 3, channel="internet")) for name in ("train", "validation")]
    settings = {"trainable": "full", "windows_per_step": 4, "cells_per_window": 3, "eval_windows": 2} | changes
    return SFTStage(policy, cities[0], cities[1], SFTConfig(**settings), seed=5, decoding="median")


def test_micro_batches_add_up_to_the_whole_step(make_policy: Callable[..., Policy], store: GridStore) -> None:
    """Four windows at once, or three and one: the same loss and the same gradient."""
    gradients, losses = [], []
    for size in (4, 3):
        policy = make_policy()
        policy.train_only("full")
        scalars = stage_of(policy, store, windows_per_micro_batch=size).step(0, torch.Tensor.backward)
        gradients.append(torch.cat([policy.rows.input.grad.flatten(), policy.base_model.lm_head.weight.grad.flatten()]))
        losses.append(scalars["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert (gradients[0] - gradients[1]).norm() / gradients[0].norm() < 1e-4


def test_a_step_depends_on_its_number_alone(policy: Policy, store: GridStore) -> None:
    stage = stage_of(policy, store, blank_share=0.5)
    losses = [stage.step(step, lambda loss: None)["loss"] for step in (3, 4, 3)]
    assert losses[0] == losses[2] != losses[1]


def test_blank_share_is_a_share_of_sequences(policy: Policy, store: GridStore, monkeypatch: pytest.MonkeyPatch) -> None:
    blanks: list[Tensor] = []

    def spy(policy: Policy, batch: PolicyBatch, blank: Tensor) -> Tensor:
        blanks.append(blank)
        return torch.zeros(())

    monkeypatch.setattr("stdist.vision_llm.sft.sft_loss", spy)
    for share, low, high in ((0.0, 0, 0), (0.25, 0.15, 0.35), (1.0, 1, 1)):
        blanks.clear()
        stage = stage_of(policy, store, blank_share=share)
        for step in range(20):
            stage.step(step, lambda loss: None)
        mean = torch.cat(blanks).float().mean().item()
        assert len(torch.cat(blanks)) == 20 * 12 and low <= mean <= high
