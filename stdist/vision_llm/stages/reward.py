"""Rewards and advantages as pure functions (Vision-LLMs for Spatiotemporal Traffic Forecasting, Eq. 17–19).

``squared_error`` and ``error_of_mean`` are no rewards of the paper: Eq. 17 saturates, so that it tells typical errors
apart and large ones hardly, where RMSE is made of the large ones; and both judge one draw, where a forecast in one pass
is a mean of all.
"""

import math
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def nrmse(
    predicted: Float[Tensor, "candidates K"],
    truth: Float[Tensor, "candidates K"],
    steps: Int[Tensor, " candidates"],
    normalizer: Float[Tensor, " candidates"],
) -> Float[Tensor, " candidates"]:
    """Eq. 19 over each candidate's first ``steps`` values; 0 where ``steps`` is 0. ``normalizer`` is d, in units."""
    inside = torch.arange(truth.shape[1], device=truth.device) < steps[:, None]
    squared = ((predicted - truth) ** 2 * inside).sum(1) / steps.clamp(min=1)
    return squared.sqrt() / normalizer


RewardKind = Literal["eq17", "squared_error", "error_of_mean"]
Normalizer = Literal["cell_mean", "window_mean", "city_mean"]
# d of Eq. 19 never falls below this share of the city's mean: a cell at rest would make any error enormous.
NORMALIZER_FLOOR = 0.05


def normalizers(
    kind: Normalizer, truth: Float[Tensor, "sequences K"], cell_mean: Float[Tensor, " sequences"], city_mean: float
) -> Float[Tensor, " sequences"]:
    """d of Eq. 19: the mean of the sequence's cell over the training days, of its truth, or of the whole city."""
    chosen = {
        "cell_mean": cell_mean,
        "window_mean": truth.mean(1),
        "city_mean": torch.full_like(cell_mean, city_mean),
    }[kind]
    return chosen.clamp(min=NORMALIZER_FLOOR * city_mean)


class RewardTerms(NamedTuple):
    """The three terms of Eq. 17, or of the reward in its place; their sum is the reward."""

    accuracy: Float[Tensor, " candidates"]
    length: Float[Tensor, " candidates"]
    decoding: Float[Tensor, " candidates"]

    @property
    def reward(self) -> Float[Tensor, " candidates"]:
        return self.accuracy + self.length + self.decoding


def reward(
    predicted: Float[Tensor, "candidates tokens"],
    lengths: Int[Tensor, " candidates"],
    truth: Float[Tensor, "candidates K"],
    normalizer: Float[Tensor, " candidates"],
    half_score: float,
    decoded: Bool[Tensor, " candidates"] | None = None,
) -> Float[Tensor, " candidates"]:
    """Eq. 17 with Eq. 18 and 19, see :func:`reward_terms`."""
    return reward_terms(predicted, lengths, truth, normalizer, half_score, decoded).reward


def reward_terms(
    predicted: Float[Tensor, "candidates tokens"],
    lengths: Int[Tensor, " candidates"],
    truth: Float[Tensor, "candidates K"],
    normalizer: Float[Tensor, " candidates"],
    half_score: float,
    decoded: Bool[Tensor, " candidates"] | None = None,
    kind: RewardKind = "eq17",
    num_generations: int = 1,
) -> RewardTerms:
    """Accuracy, minus half the relative length error, minus 0.5 if undecodable.

    ``eq17``: accuracy in [0, 1] of the common prefix. ``squared_error``: minus the mean squared error of all K values
    over d², at most 0; what was not written counts as 0, or few values would be better than many. ``error_of_mean``:
    the same of the mean of a group, ``num_generations`` consecutive candidates, with each one's part in it
    (:func:`error_of_mean`).

    Args:
        predicted: decoded values in units; only the first ``lengths`` count.
        lengths: L_out, values written. May differ from K = L_gt: the error runs over the common prefix.
        truth: ground truth in units.
        normalizer: d of Eq. 19, in units.
        half_score: x_h, the error that earns an accuracy of 0.5 (``eq17``).
        decoded: False where something else than numerals was written (default: nowhere). Nothing decodable at all
            (length 0) is a decoding failure with an accuracy of 0.
    """
    k = truth.shape[1]
    if predicted.shape[1] < k:
        predicted = torch.nn.functional.pad(predicted, (0, k - predicted.shape[1]))
    common = lengths.clamp(max=k)
    written = predicted[:, :k].where(torch.arange(k, device=truth.device) < common[:, None], 0)
    if kind == "squared_error":
        accuracy = -nrmse(written, truth, torch.full_like(common, k), normalizer).square()
    elif kind == "error_of_mean":
        groups = (x.view(-1, num_generations, k) for x in (written, truth))
        accuracy = -error_of_mean(*groups).mean(2).flatten() / normalizer.square()
    else:
        error = nrmse(predicted[:, :k], truth, common, normalizer)
        accuracy = torch.exp(-math.log(2) / half_score * error) * (common > 0)
    failed = lengths == 0 if decoded is None else (lengths == 0) | ~decoded
    return RewardTerms(accuracy, -0.5 * (lengths - k).abs() / k, -0.5 * failed.float())


def error_of_mean(
    predicted: Float[Tensor, "groups G K"], truth: Float[Tensor, "groups G K"]
) -> Float[Tensor, "groups G K"]:
    """Squared error of the group's mean at each step, and each candidate's part in it: with m the mean of the others,
    (x̄ − y)² + 2 (m − y)(x − m).

    The first term is a whole group's, and falls out of its advantages. The second one, its part, does not know x in m:
    times the score of x it is on average the gradient of (E[x] − y)², where the squared error of x itself also has that
    of the spread, which no mean has.
    """
    g = predicted.shape[1]
    mean = predicted.mean(1, keepdim=True)
    others = (g * mean - predicted) / (g - 1)
    return (mean - truth) ** 2 + 2 * (others - truth) * (predicted - others)


def group_advantages(rewards: Float[Tensor, "groups G"], scale_rewards: str) -> Float[Tensor, "groups G"]:
    """Reward minus its group's mean; with ``scale_rewards="group"`` divided by the group's standard deviation."""
    centred = rewards - rewards.mean(1, keepdim=True)
    return centred / (rewards.std(1, keepdim=True) + 1e-4) if scale_rewards == "group" else centred
