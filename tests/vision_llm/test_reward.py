"""The GRPO mathematics (Vision-LLMs for Spatiotemporal Traffic Forecasting, Eq. 17–19)."""

import math

import pytest
import torch
from torch import Tensor

from stdist.vision_llm.stages.reward import advantages, grpo_loss, nrmse, reward

TRUTH = torch.tensor([[10.0, 20.0, 30.0, 40.0]])


def one_reward(
    predicted: list[float], decoded: bool = True, normalizer: float = 10.0, half_score: float = 0.2
) -> float:
    length = torch.tensor([len(predicted)])
    values = torch.tensor([predicted]) if predicted else torch.zeros(1, 0)
    scores = reward(values, length, TRUTH, torch.tensor([normalizer]), half_score, torch.tensor([decoded]))
    return scores.item()


def test_eq_19_by_hand() -> None:
    predicted = torch.tensor([[13.0, 20.0, 26.0, 40.0], [13.0, 20.0, 0.0, 0.0], [1.0, 2.0, 3.0, 4.0]])
    error = nrmse(predicted, TRUTH.expand(3, 4), torch.tensor([4, 2, 0]), torch.tensor([5.0, 2.0, 1.0]))
    assert error.tolist() == pytest.approx([math.sqrt((9 + 16) / 4) / 5, math.sqrt(9 / 2) / 2, 0.0])


def test_eq_18_half_score_earns_exactly_one_half() -> None:
    """x_h is the error that scores 0.5; twice that scores 0.25; none scores 1."""
    assert one_reward([12.0, 22.0, 32.0, 42.0]) == 0.5  # RMSE 2 over d = 10 is x_h = 0.2
    assert one_reward([14.0, 24.0, 34.0, 44.0]) == pytest.approx(0.25)
    assert one_reward([10.0, 20.0, 30.0, 40.0]) == 1.0
    assert one_reward([12.0, 22.0, 32.0, 42.0], half_score=0.1) == pytest.approx(0.25)
    assert one_reward([12.0, 22.0, 32.0, 42.0], normalizer=20.0) == pytest.approx(0.5**0.5)


def test_eq_17_shorter_and_longer_lose_half_the_relative_length_error() -> None:
    """Accuracy runs over the common prefix (docs/decisions.md, wrong length)."""
    assert one_reward([10.0, 20.0, 30.0]) == pytest.approx(1 - 0.5 * 1 / 4)
    assert one_reward([12.0]) == pytest.approx(0.5 - 0.5 * 3 / 4)
    assert one_reward([10.0, 20.0, 30.0, 40.0, 99.0, 99.0]) == pytest.approx(1 - 0.5 * 2 / 4)
    assert one_reward([12.0, 22.0, 32.0, 42.0, 99.0]) == pytest.approx(0.5 - 0.5 * 1 / 4)


def test_eq_17_nothing_written_and_nothing_decodable() -> None:
    """Accuracy 0, the whole length term, δ_dec = −0.5; a failed decoding keeps what its prefix earned."""
    assert one_reward([]) == pytest.approx(0 - 0.5 - 0.5)
    assert one_reward([10.0, 20.0], decoded=False) == pytest.approx(1 - 0.25 - 0.5)


def test_reward_reads_only_what_was_written() -> None:
    """Values behind ``lengths`` are padding, whatever they hold."""
    garbage = torch.tensor([[10.0, 20.0, 1e9, -1e9, 1e9]])
    scores = reward(garbage, torch.tensor([2]), TRUTH, torch.tensor([10.0]), 0.2)
    assert scores.item() == pytest.approx(1 - 0.25)


def test_advantages_have_mean_zero_and_group_scaling_unit_spread() -> None:
    rewards = torch.tensor([[0.1, 0.2, 0.6], [-1.0, -1.0, -1.0]])
    centred = advantages(rewards, "none")
    assert torch.allclose(centred, torch.tensor([[-0.2, -0.1, 0.3], [0.0, 0.0, 0.0]]))
    scaled = advantages(rewards, "group")
    assert scaled.mean(1).abs().max() < 1e-6
    std = math.sqrt((0.04 + 0.01 + 0.09) / 2)
    assert scaled[0].tolist() == pytest.approx([value / (std + 1e-4) for value in (-0.2, -0.1, 0.3)], rel=1e-5)
    assert scaled[1].tolist() == [0.0, 0.0, 0.0]  # a group of equals teaches nothing, and divides by nothing


def loss_of(
    ratio: list[list[float]], advantage: list[float], mask: list[list[bool]] | None = None, beta: float = 0.0
) -> tuple[float, dict[str, float]]:
    """Loss at given π/π_old, reference equal to the policy."""
    log_probs = torch.tensor(ratio).log() - 1.0
    old = torch.full_like(log_probs, -1.0)
    kept = torch.ones_like(log_probs, dtype=torch.bool) if mask is None else torch.tensor(mask)
    loss, details = grpo_loss(log_probs, old, log_probs, torch.tensor(advantage), kept, 0.2, beta)
    return loss.item(), details


@pytest.mark.parametrize(
    ("ratio", "advantage", "objective", "clips"),
    [
        (1.1, 2.0, 2.2, 0),
        (1.5, 2.0, 2.4, 1),  # raised enough: the gain ends at 1 + ε
        (0.5, 2.0, 1.0, 0),  # good but less likely than before: pulled back in full
        (0.9, -2.0, -1.8, 0),
        (0.5, -2.0, -1.6, 1),  # lowered enough: ends at 1 − ε
        (1.5, -2.0, -3.0, 0),  # bad and more likely than before: pushed down in full
    ],
)
def test_clipping_by_hand(ratio: float, advantage: float, objective: float, clips: float) -> None:
    loss, details = loss_of([[ratio]], [advantage])
    assert loss == pytest.approx(-objective, rel=1e-6)
    assert details["clip_ratio"] == clips


def test_every_candidate_weighs_the_same_whatever_its_length() -> None:
    """Mean over a candidate's written tokens, then over candidates; what is masked counts nowhere."""
    loss, details = loss_of(
        [[1.0, 1.1, 7.0], [1.5, 9.0, 9.0]],
        [1.0, 2.0],
        mask=[[True, True, False], [True, False, False]],
    )
    assert loss == pytest.approx(-((1.0 + 1.1) / 2 + 2.4) / 2, rel=1e-6)
    assert details["clip_ratio"] == pytest.approx((0 + 1) / 2)


def test_kl_estimate_is_zero_at_equality_and_never_negative() -> None:
    log_probs = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    mask, nothing = torch.ones(5, 7, dtype=torch.bool), torch.zeros(5)
    same, details = grpo_loss(log_probs, log_probs, log_probs, nothing, mask, 0.2, 0.5)
    assert same == 0 and details["kl"] == 0
    for shift in (-2.0, -0.1, 0.1, 2.0):
        loss, details = grpo_loss(log_probs, log_probs, log_probs + shift, nothing, mask, 0.2, 0.5)
        assert details["kl"] == pytest.approx(math.exp(shift) - shift - 1, rel=1e-4) and details["kl"] > 0
        assert loss.item() == pytest.approx(0.5 * details["kl"], rel=1e-5)


def test_kl_estimate_is_unbiased() -> None:
    """E_π[exp(r) − r − 1] is KL(π ‖ π_ref), summed exactly over a distribution of four tokens."""
    p, q = torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.tensor([0.4, 0.3, 0.2, 0.1])
    log_p, log_q, one = p.log()[:, None], q.log()[:, None], torch.ones(4, 1, dtype=torch.bool)
    estimates = [
        grpo_loss(log_p[i : i + 1], log_p[i : i + 1], log_q[i : i + 1], torch.zeros(1), one[:1], 0.2, 1.0)[1]["kl"]
        for i in range(4)
    ]
    expected = float((p * (p / q).log()).sum())
    assert sum(w * e for w, e in zip(p.tolist(), estimates, strict=True)) == pytest.approx(expected, rel=1e-5)


def test_gradient_at_ratio_one_is_the_policy_gradient() -> None:
    """−A / (tokens · candidates) at every written token, 0 elsewhere; the KL term has no slope at equality."""
    generator = torch.Generator().manual_seed(0)
    log_probs = torch.randn(2, 3, generator=generator).requires_grad_(True)
    mask = torch.tensor([[True, True, False], [True, True, True]])
    fixed = log_probs.detach()
    loss, _ = grpo_loss(log_probs, fixed, fixed, torch.tensor([0.8, -0.3]), mask, 0.2, 0.04)
    (gradient,) = torch.autograd.grad(loss, log_probs)
    expected: Tensor = -torch.tensor([[0.8 / 4, 0.8 / 4, 0.0], [-0.3 / 6, -0.3 / 6, -0.3 / 6]])
    assert torch.allclose(gradient, expected, atol=1e-7)


def test_a_clipped_token_has_no_gradient() -> None:
    log_probs = torch.tensor([[0.5, 0.0]]).requires_grad_(True)
    loss, _ = grpo_loss(
        log_probs, torch.zeros(1, 2), log_probs.detach(), torch.ones(1), torch.ones(1, 2, dtype=torch.bool), 0.2, 0.0
    )
    (gradient,) = torch.autograd.grad(loss, log_probs)
    assert gradient.tolist() == [[0.0, -0.5]]
