"""Eq. 21-23 by hand, and sums and counts against one pass over everything."""

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stdist.errors import InputError
from stdist.evaluation import ErrorState

# Two windows, two horizons, one cell: errors 1, -3 | 2, 0 against truths 2, 6 | 4, 8.
TRUTH = np.array([[2.0, 6.0], [4.0, 8.0]])[..., None, None]
FORECAST = TRUTH + np.array([[1.0, -3.0], [2.0, 0.0]])[..., None, None]


def state_of(forecast, truth, observed=None):
    return ErrorState.of(forecast, truth, np.ones(truth.shape, bool) if observed is None else observed)


def random_batch(rng, n, k=3, h=2, w=2):
    truth = rng.gamma(2.0, 50.0, (n, k, h, w))
    forecast = truth + rng.normal(0, 20, truth.shape)
    truth[rng.random(truth.shape) < 0.1] = 0
    return forecast, truth, rng.random(truth.shape) < 0.8


def test_eq21_mae_by_hand():
    assert state_of(FORECAST, TRUTH).pooled()["mae"] == (1 + 3 + 2 + 0) / 4


def test_eq22_rmse_by_hand():
    assert state_of(FORECAST, TRUTH).pooled()["rmse"] == pytest.approx(math.sqrt((1 + 9 + 4 + 0) / 4))


def test_eq23_nrmse_by_hand():
    assert state_of(FORECAST, TRUTH).pooled()["nrmse"] == pytest.approx(math.sqrt(14 / 4) / 5.0)


def test_per_horizon_by_hand():
    first, second = state_of(FORECAST, TRUTH).summary()["per_horizon"]
    assert (first["step"], first["mae"], first["rmse"]) == (1, 1.5, pytest.approx(math.sqrt(2.5)))
    assert first["nrmse"] == pytest.approx(math.sqrt(2.5) / 3)
    assert (second["step"], second["mae"], second["rmse"]) == (2, 1.5, pytest.approx(math.sqrt(4.5)))
    assert second["nrmse"] == pytest.approx(math.sqrt(4.5) / 7)


def test_the_two_conventions_differ():
    summary = state_of(FORECAST, TRUTH).summary()
    assert summary["pooled"]["rmse"] == pytest.approx(math.sqrt(3.5))
    assert summary["mean_of_horizons"]["rmse"] == pytest.approx((math.sqrt(2.5) + math.sqrt(4.5)) / 2)
    mean_nrmse = (math.sqrt(2.5) / 3 + math.sqrt(4.5) / 7) / 2
    assert summary["mean_of_horizons"]["nrmse"] == pytest.approx(mean_nrmse)
    assert abs(summary["pooled"]["nrmse"] - mean_nrmse) > 0.01


def test_unobserved_points_count_nowhere():
    observed = np.array([[True, False], [True, True]])[..., None, None]
    wrong = np.where(observed, FORECAST, 1e9)
    truth = np.where(observed, TRUTH, np.nan)
    pooled = state_of(wrong, truth, observed).pooled()
    assert pooled == {
        "mae": 1.0,
        "rmse": pytest.approx(math.sqrt(5 / 3)),
        "mape": pytest.approx((1 / 2 + 2 / 4 + 0) / 3),
        "nrmse": pytest.approx(math.sqrt(5 / 3) / (14 / 3)),
        "points": 3,
    }


def test_true_zeros_are_scored_but_not_by_mape():
    truth = np.array([0.0, 10.0]).reshape(2, 1, 1, 1)
    expected = {"mae": 2.0, "rmse": 2.0, "mape": 0.2, "nrmse": 0.4, "points": 2}
    assert state_of(truth + 2, truth).pooled() == expected


def test_mape_by_hand():
    summary = state_of(FORECAST, TRUTH).summary()
    assert summary["pooled"]["mape"] == pytest.approx((1 / 2 + 3 / 6 + 2 / 4 + 0) / 4)
    assert [step["mape"] for step in summary["per_horizon"]] == pytest.approx([(1 / 2 + 2 / 4) / 2, (3 / 6) / 2])


def test_mape_counts_truths_beyond_5e_5_of_zero_as_basicts_does():
    """On both sides of zero; 5e-5 itself is zero."""
    truth = np.array([[[4.0, 5e-5, -5e-5, 6e-5, -6e-5]]])
    state = state_of(truth + np.array([1.0, 7, 7, 6e-5, 3e-5]), truth)
    assert state.nonzero_count == 3 and state.count == 5
    assert state.pooled()["mape"] == pytest.approx((1 / 4 + 1 + 1 / 2) / 3)


def test_a_horizon_of_zeros_has_no_mape_and_is_left_out_of_its_mean():
    truth = np.array([[[4.0], [0.0]]])
    summary = state_of(truth + 1, truth).summary()
    assert summary["per_horizon"][1]["mape"] is None and summary["per_horizon"][1]["mae"] == 1
    assert summary["mean_of_horizons"]["mape"] == 0.25


def test_truths_whose_mean_is_not_positive_have_no_nrmse():
    for truth in (0.0, -1.0):
        pooled = state_of(np.full((1, 1, 1), truth + 2), np.full((1, 1, 1), truth)).pooled()
        assert pooled["rmse"] == 2 and math.isnan(pooled["nrmse"]) and math.isnan(pooled["mape"]) == (truth == 0)


def test_horizon_without_observation_is_left_out_of_the_mean():
    observed = np.array([[True, False], [True, False]])[..., None, None]
    state = state_of(FORECAST, TRUTH, observed)
    assert state.mean_of_horizons()["mae"] == 1.5
    assert state.summary()["per_horizon"][1]["mae"] is None


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), cuts=st.lists(st.integers(0, 24), max_size=6), order=st.randoms())
def test_sum_of_any_split_is_the_single_pass(seed, cuts, order):
    forecast, truth, observed = random_batch(np.random.default_rng(seed), 24)
    edges = [0, *sorted(cuts), 24]
    parts = [slice(a, b) for a, b in pairwise(edges)]
    order.shuffle(parts)
    state = ErrorState.empty(3)
    for part in parts:
        state += state_of(forecast[part], truth[part], observed[part])
    whole = state_of(forecast, truth, observed)
    assert np.array_equal(state.count, whole.count) and np.array_equal(state.nonzero_count, whole.nonzero_count)
    for name in ("sum_absolute_error", "sum_squared_error", "sum_truth", "sum_relative_error"):
        np.testing.assert_allclose(getattr(state, name), getattr(whole, name), rtol=1e-12)


def test_masked_mean_is_not_the_mean_of_batch_means():
    """The trap: averaging batch means weighs a nearly empty batch like a full one."""
    forecast, truth, observed = random_batch(np.random.default_rng(0), 10)
    observed[:5] = False
    observed[0, :, 0, 0] = True
    halves = [state_of(forecast[s], truth[s], observed[s]) for s in (slice(0, 5), slice(5, 10))]
    error = np.abs(forecast - truth)[observed].mean()
    assert (halves[0] + halves[1]).pooled()["mae"] == pytest.approx(error)
    assert abs(np.mean([h.pooled()["mae"] for h in halves]) - error) > 0.1


def test_float32_inputs_are_summed_in_float64():
    truth = np.full((4000, 1, 10, 10), 1000.1, np.float32)
    state = state_of(truth, truth)
    assert state.sum_truth[0] == pytest.approx(float(np.float32(1000.1)) * 400_000, rel=1e-13)


def test_one_entry_per_cell():
    forecast, truth, observed = random_batch(np.random.default_rng(1), 6, k=4, h=2, w=3)
    by_cell = (array.reshape(-1, 2 * 3) for array in (forecast, truth, observed))
    rmse = state_of(*by_cell).errors()["rmse"].reshape(2, 3)
    error = (forecast - truth)[:, :, 1, 2][observed[:, :, 1, 2]]
    assert rmse[1, 2] == pytest.approx(np.sqrt(np.mean(error**2)))


def test_a_nan_forecast_is_refused_with_its_place():
    broken = FORECAST.copy()
    broken[1, 0] = np.nan
    with pytest.raises(InputError, match=r"forecast is not finite at 1 observed points.*\(1, 0, 0, 0\)"):
        state_of(broken, TRUTH)
    with pytest.raises(InputError, match="truth is not finite at 1 "):
        state_of(TRUTH, broken)


def test_other_shapes_are_refused():
    with pytest.raises(InputError, match="give one shape"):
        state_of(FORECAST[:1], TRUTH)
    with pytest.raises(InputError, match="2 and 3 horizons"):
        ErrorState.empty(2) + ErrorState.empty(3)
