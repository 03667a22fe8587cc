"""Rewards and advantages (Vision-LLMs for Spatiotemporal Traffic Forecasting, Eq. 17–19)."""

import math

import pytest
import torch

from stdist.vision_llm.stages.reward import error_of_mean, group_advantages, nrmse, reward, reward_terms

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


def test_eq_17s_terms_are_told_apart() -> None:
    """Half right over a prefix of two of four, undecodable behind it."""
    values, d = torch.tensor([[12.0, 22.0]]), torch.tensor([10.0])
    terms = reward_terms(values, torch.tensor([2]), TRUTH, d, 0.2, torch.tensor([False]))
    assert [float(term) for term in terms] == pytest.approx([0.5, -0.25, -0.5])
    assert float(terms.reward) == pytest.approx(-0.25)


def test_squared_error_by_hand() -> None:
    """−MSE / d² over all K, what was not written read as 0, values behind K not at all; length and decoding as in
    Eq. 17. Twice the error costs four times as much, where Eq. 17 saturates."""
    values = torch.tensor(
        [[13.0, 20.0, 26.0, 40.0, 7.0], [16.0, 20.0, 22.0, 40.0, 7.0], [10.0, 20.0, 99.0, 99.0, 99.0], [9.0] * 5]
    )
    lengths = torch.tensor([4, 5, 2, 0])
    terms = reward_terms(values, lengths, TRUTH.expand(4, 4), torch.full((4,), 5.0), 0.2, kind="squared_error")
    errors = [(9 + 16) / 4, 4 * (9 + 16) / 4, (900 + 1600) / 4, (100 + 400 + 900 + 1600) / 4]
    assert terms.accuracy.tolist() == pytest.approx([-error / 25 for error in errors])
    assert terms.length.tolist() == pytest.approx([0, -0.125, -0.25, -0.5])
    assert terms.decoding.tolist() == [0, 0, 0, -0.5]


def test_squared_error_orders_groups_as_rmse_does() -> None:
    """One large error or the same sum of small ones: Eq. 17's root already sees the square, and then flattens it."""
    spread, single = [12.0, 22.0, 32.0, 42.0], [10.0, 20.0, 30.0, 44.0]
    far = [100.0, 20.0, 30.0, 40.0]

    def rewards(kind: str) -> torch.Tensor:
        predicted = torch.tensor([spread, single, far])
        return reward_terms(
            predicted, torch.full((3,), 4), TRUTH.expand(3, 4), torch.full((3,), 10.0), 0.2, kind=kind
        ).reward

    assert rewards("squared_error").tolist() == pytest.approx([-0.04, -0.04, -20.25])
    flat = rewards("eq17")
    assert flat[0] == flat[1] == 0.5 and flat[2] < 1e-6


def test_the_error_of_a_groups_mean_by_hand() -> None:
    """Two groups of two, K = 2, d = 2. The first: draws (1, 8) and (5, 4) of (2, 5); mean (3, 6), error (1 + 1) / 2;
    parts 2 (m − y)(x − m) with m the other draw: 2·3·(−4) and 2·(−1)·4, then 2·(−1)·4 and 2·3·(−4)."""
    values = torch.tensor([[1.0, 8.0], [5.0, 4.0], [7.0, 7.0], [7.0, 9.0]])
    truth = torch.tensor([[2.0, 5.0]] * 2 + [[7.0, 7.0]] * 2)
    terms = reward_terms(
        *(values, torch.tensor([2, 2, 2, 1]), truth, torch.full((4,), 2.0), 0.2),
        kind="error_of_mean",
        num_generations=2,
    )
    # What was not written is 0: the last draw is (7, 0), its group's mean (7, 3.5).
    last = [3.5**2 / 2 + 2 * (0 - 7) * (7 - 0) / 2, 3.5**2 / 2 + 2 * (7 - 7) * (0 - 7) / 2]
    expected = [1 + (-24 - 8) / 2, 1 + (-8 - 24) / 2, *last]
    assert terms.accuracy.tolist() == pytest.approx([-error / 4 for error in expected])
    assert terms.length.tolist() == [0, 0, 0, -0.25]


def test_a_candidates_part_in_the_error_of_the_mean_teaches_the_mean_alone() -> None:
    """All 27 draws of three of a distribution of three values, each with its probability: parts times scores add up to
    the gradient of (E[x] − y)², errors of single draws to that of E[(x − y)²], the spread included."""
    values, truth = torch.tensor([1.0, 4.0, 10.0], dtype=torch.float64), 6.0
    logits = torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64, requires_grad=True)
    p = logits.softmax(0)
    draws = torch.cartesian_prod(*[torch.arange(3)] * 3)
    drawn, probability = values[draws], p[draws].prod(1).detach()
    of_mean = error_of_mean(drawn[:, :, None], torch.full_like(drawn, truth)[:, :, None])
    parts = of_mean[:, :, 0] - (drawn.mean(1, keepdim=True) - truth) ** 2

    def taught(errors: torch.Tensor) -> torch.Tensor:
        loss = (probability[:, None] * errors * p.log()[draws]).sum() / 3
        return torch.autograd.grad(loss, logits, retain_graph=True)[0]

    def gradient_of(loss: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(loss, logits, retain_graph=True)[0]

    assert torch.allclose(taught(parts), gradient_of(((p * values).sum() - truth) ** 2))
    single = taught((drawn - truth) ** 2)
    assert torch.allclose(single, gradient_of((p * (values - truth) ** 2).sum()))
    assert not torch.allclose(single, taught(parts), rtol=0.2)


def test_reward_reads_only_what_was_written() -> None:
    """Values behind ``lengths`` are padding, whatever they hold."""
    garbage = torch.tensor([[10.0, 20.0, 1e9, -1e9, 1e9]])
    scores = reward(garbage, torch.tensor([2]), TRUTH, torch.tensor([10.0]), 0.2)
    assert scores.item() == pytest.approx(1 - 0.25)


def test_advantages_have_mean_zero_and_group_scaling_unit_spread() -> None:
    rewards = torch.tensor([[0.1, 0.2, 0.6], [-1.0, -1.0, -1.0]])
    centred = group_advantages(rewards, "none")
    assert torch.allclose(centred, torch.tensor([[-0.2, -0.1, 0.3], [0.0, 0.0, 0.0]]))
    scaled = group_advantages(rewards, "group")
    assert scaled.mean(1).abs().max() < 1e-6
    std = math.sqrt((0.04 + 0.01 + 0.09) / 2)
    assert scaled[0].tolist() == pytest.approx([value / (std + 1e-4) for value in (-0.2, -0.1, 0.3)], rel=1e-5)
    assert scaled[1].tolist() == [0.0, 0.0, 0.0]  # a group of equals teaches nothing, and divides by nothing
