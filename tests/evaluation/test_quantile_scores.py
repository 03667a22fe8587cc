"""Pinball losses, CRPS, coverage and widths against naive loops over observed points."""

import numpy as np
import pytest

from stdist.data import Region
from stdist.errors import InputError
from stdist.evaluation import evaluate
from stdist.evaluation.quantile_baselines import gaussian
from stdist.evaluation.quantile_scores import QuantileErrors, QuantileState

from .conftest import make_forecasts, write_forecasts

LEVELS = (0.1, 0.5, 0.9)


def test_three_points_by_hand():
    """Quantiles 1, 2, 5 against truths 2, 6 and 1: losses 0.1·1, 0, 0.1·3; 0.1·5, 0.5·4, 0.9·1; 0, 0.5·1, 0.1·4."""
    quantiles = np.array([1.0, 2, 5])[:, None] * np.ones((3, 3))
    state = QuantileState.of(LEVELS, quantiles, np.array([2.0, 6, 1]), np.array([0, 0, 1]), 3)
    first, second, none = state.rows()
    assert first["pinball"] == pytest.approx({"0.1": 0.3, "0.5": 1.0, "0.9": 0.6})
    assert first["crps"] == pytest.approx(2 * 1.9 / 3) and first["points"] == 2
    assert first["below"] == {"0.1": 0.0, "0.5": 0.5, "0.9": 0.5}
    assert first["intervals"] == {"80 %": {"coverage": 0.5, "width": 4.0}}
    assert second["intervals"]["80 %"]["coverage"] == 1.0, "an end belongs to the interval"
    assert second["pinball"] == pytest.approx({"0.1": 0.0, "0.5": 0.5, "0.9": 0.4}) and second["below"]["0.1"] == 1
    assert none["crps"] is None and none["intervals"]["80 %"] == {"coverage": None, "width": None}
    whole = (state + state).merged([np.arange(3)]).rows()[0]
    assert whole["points"] == 6 and whole["pinball"]["0.5"] == pytest.approx((0 + 2 + 0.5) / 3)


def test_a_file_against_a_naive_loop(store, tmp_path):
    windows = store.windows("test", 6, 4, channel="flow", region=Region(0, 3, 0, 3))
    made = make_forecasts(windows, quantiles=True)
    scores = evaluate(write_forecasts(made, tmp_path / "made.parquet"), store).to_json()["quantiles"]
    values, observed = store.values("flow", 0, len(store.times)), store.observed("flow")
    rows = []
    for n, origin in enumerate(windows.origins):
        for k in range(4):
            for row in range(3):
                for col in range(3):
                    t = origin + 1 + k
                    if observed[t, row, col]:
                        hour = int(str(store.local_times[t])[11:13])
                        rows.append((k, hour, row * 3 + col, values[t, row, col], *made.quantiles[:, n, k, row, col]))
    step, hour, place, truth, low, mid, high = np.array(rows).T

    def crps(chosen):
        losses = [
            max(level * (y - q), (level - 1) * (y - q))
            for level, column in zip(LEVELS, (low, mid, high), strict=True)
            for y, q in zip(truth[chosen], column[chosen], strict=True)
        ]
        return 2 * np.mean(losses)

    everything = truth == truth
    inside = (low <= truth) & (truth <= high)
    assert scores["pooled"]["crps"] == pytest.approx(crps(everything), rel=1e-6)
    assert scores["pooled"]["points"] == len(rows)
    assert scores["pooled"]["intervals"]["80 %"] == pytest.approx(
        {"coverage": inside.mean(), "width": (high - low).mean()}, rel=1e-6
    )
    assert scores["crps_is"] == "by 3 quantiles: twice their mean pinball loss"
    for k, each in enumerate(scores["per_horizon"]):
        assert each["step"] == k + 1 and each["crps"] == pytest.approx(crps(step == k), rel=1e-6)
    for h, each in enumerate(scores["per_hour"]):
        assert each["hour"] == h and each["points"] == (hour == h).sum()
        assert each["intervals"]["80 %"]["coverage"] == pytest.approx(inside[hour == h].mean())
    seen = sorted({*place}, key=lambda p: truth[place == p].mean())
    groups = [seen[:2], seen[2:4], seen[4:6], seen[6:]]
    assert len(seen) == 8, "one cell lies outside the city"
    for names, each in zip(groups, scores["per_place_group"], strict=True):
        assert each["places"] == 2 and each["crps"] == pytest.approx(crps(np.isin(place, names)), rel=1e-6)


def test_a_quantile_of_an_observed_point_that_is_no_number_is_refused():
    nothing = QuantileErrors.empty(LEVELS, 1, 1)
    arrays = np.full((3, 2, 1, 1), np.nan), np.ones((2, 1, 1)), np.zeros((2, 1, 1), bool)
    hours, places = np.zeros((2, 1), int), np.array([0])
    assert nothing.add(*arrays, hours, places).summary()["pooled"]["crps"] is None
    arrays[2][1] = True
    with pytest.raises(InputError, match="a quantile is not finite at an observed point"):
        nothing.add(*arrays, hours, places)


def test_gaussian_residuals_by_step_and_place():
    """Residuals 3 and -4 of the first place, 1 where the second was seen; 1.959964 is the normal's 0.975 quantile."""
    truth = np.array([[[3.0, 1]], [[-4, 9]]])
    observed = np.array([[[True, True]], [[True, False]]])
    quantiles = gaussian(np.zeros((2, 1, 2)), truth, observed, None)(np.full((1, 1, 2), 10.0))
    sigma = np.array([np.sqrt(12.5), 1])
    np.testing.assert_allclose(quantiles[-1, 0, 0], 10 + 1.959964 * sigma, rtol=1e-6)
    np.testing.assert_allclose(quantiles[4, 0, 0], 10)
    assert gaussian(np.zeros((2, 1, 2)), truth, observed, 0.0)(np.zeros((1, 1, 2))).min() == 0
