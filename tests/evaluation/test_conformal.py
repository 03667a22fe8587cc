"""Quantiles by split conformal calibration, against ranks counted by hand and against a known distribution."""

from statistics import NormalDist

import numpy as np
import pytest

from stdist.errors import InputError
from stdist.evaluation.conformal import ConformalQuantiles, conformal_quantiles
from stdist.evaluation.levels import LEVELS, cost_level, for_cost

EVERYTHING = np.arange(3)


def test_ranks_with_the_correction_for_their_number():
    """Of 1 … 39 in any order: (39 + 1) · 0.975 is 39, · 0.9 is 36, · 0.75 is 30; below the median the same from the
    other end; the median itself is 20."""
    residuals = np.random.default_rng(0).permutation(np.arange(1.0, 40))
    assert conformal_quantiles(residuals, LEVELS).tolist() == [1, 2, 4, 10, 20, 30, 36, 38, 39]
    # Of 1 … 50, 51 · 0.9 = 45.9 goes up to the 46th, 51 · 0.1 = 5.1 down to the 5th: outwards, both times.
    assert conformal_quantiles(np.arange(1.0, 51), (0.1, 0.5, 0.9)).tolist() == [5, 25.5, 46]
    assert np.isnan(conformal_quantiles(np.arange(38.0), (0.025, 0.975))).all()


def city(days: int, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    """Forecasts and truth [N, K, P] whose errors are normal, as large as a tenth of the forecast times the step: three
    places of unlike size, two steps."""
    forecast = rng.uniform(20, 100, (days * 24, 2, 3)) * np.array([1.0, 4, 0.2])
    sigma = 0.1 * forecast * np.array([1, 2])[:, None]
    truth = forecast + sigma * rng.normal(size=forecast.shape)
    return forecast.astype(np.float32), truth.astype(np.float32), sigma


def test_a_known_distribution_is_met_at_every_step_place_and_height():
    """Quantiles of normal errors, within what 400 days leave to chance; the fit saw other days."""
    rng = np.random.default_rng(1)
    forecast, truth, _ = city(400, rng)
    fit = ConformalQuantiles.fit(forecast, truth, np.ones(truth.shape, bool))
    assert fit.offsets.shape == (5, 2, 9) and fit.scales.shape == (3, 5)
    forecast, truth, sigma = city(400, rng)
    quantiles = fit.quantiles(forecast, EVERYTHING)
    for axes in ((1,), (1, 3), (1, 2)):  # pooled over windows; by step, by place, by both
        shares = (truth <= quantiles).mean(axes)
        assert np.abs(shares - np.array(LEVELS).reshape(9, *(1 for _ in shares.shape[1:]))).max() < 0.02
    upper = (quantiles[6] - forecast) / sigma
    assert np.median(upper) == pytest.approx(1.2816, abs=0.05)
    busy = forecast > np.quantile(forecast, 0.8, axis=(0, 1))
    assert (truth <= quantiles[6])[busy].mean() == pytest.approx(0.9, abs=0.02), "where it is busy too"


def test_scales_and_edges_by_hand():
    """One place, one step, forecasts 1 … 200 in turns of the five classes, so that each fifth of the windows has eight
    of each; errors of twice the class: edges at fifths, scales 2, 4, …, 10, whichever fifth is left out."""
    forecast = (np.arange(200) % 5 * 40 + np.arange(200) // 5 + 1).astype(np.float32).reshape(200, 1, 1)
    size = 2 * (1 + np.arange(200) % 5).reshape(200, 1, 1)
    sign = np.where(np.arange(200) // 5 % 2, 1, -1).reshape(200, 1, 1)
    truth = forecast + size * sign
    observed = np.ones(truth.shape, bool)
    truth[7], observed[7] = 1e9, False  # what was not observed teaches nothing
    fit = ConformalQuantiles.fit(forecast, truth, observed)
    np.testing.assert_allclose(fit.edges, [[40.8, 80.6, 120.4, 160.2]])
    np.testing.assert_allclose(fit.scales, [[2, 4, 6, 8, 10]])
    np.testing.assert_allclose(fit.offsets[:, 0, [0, -1]], [[-1, 1]] * 5)
    at = np.array([[[101.0]]])
    np.testing.assert_allclose(fit.quantiles(at, np.array([0]))[[0, -1], 0, 0, 0], [101 - 6, 101 + 6])


def test_a_residual_is_divided_by_the_mean_of_the_other_stretches():
    """Five stretches of 40 windows of one forecast, whose errors are ± 1, 2, 3, 4 and 5: the others' means are 3.5,
    3.25, 3, 2.75 and 2.5, so the largest is 5 / 2.5 and the outermost offset 2, on a scale of 3."""
    size = np.repeat([1.0, 2, 3, 4, 5], 40).reshape(200, 1, 1)
    forecast = np.full(size.shape, 100.0)
    truth = forecast + size * np.where(np.arange(200) % 2, 1, -1).reshape(200, 1, 1)
    fit = ConformalQuantiles.fit(forecast, truth, np.ones(size.shape, bool))
    np.testing.assert_allclose(fit.quantiles(forecast[:1], np.array([0]))[[0, -1], 0, 0, 0], [100 - 6, 100 + 6])


def test_quantiles_of_its_own_are_corrected_each_for_itself():
    """39 windows at 100 of one place, truth 1 … 39 above; its own quantiles lie at 100 and, the highest, at 200: the
    corrections are the ranks' values, of the highest 39 - 100. Later its own are 10 higher, and so is every one."""
    forecast = np.full((39, 1, 1), 100.0)
    truth = forecast + np.random.default_rng(4).permutation(np.arange(1.0, 40)).reshape(39, 1, 1)
    own = np.repeat(forecast[None], 9, axis=0)
    own[8] = 200
    fit = ConformalQuantiles.fit(forecast, truth, np.ones(truth.shape, bool), own)
    plain = ConformalQuantiles.fit(forecast, truth, np.ones(truth.shape, bool))
    np.testing.assert_allclose(fit.offsets[..., :8], plain.offsets[..., :8])
    assert fit.offsets[0, 0, 8] < 0 < plain.offsets[0, 0, 8]
    made = fit.quantiles(forecast[:1], np.array([0]), own[:, :1] + 10)
    expected = plain.quantiles(forecast[:1], np.array([0]))
    np.testing.assert_allclose(made[:8], expected[:8] + 10, rtol=1e-6)


def test_a_sharp_distribution_of_its_own_stays_sharp_and_becomes_honest():
    """Errors normal with a size that only the model knows, and that it takes for half of what it is."""
    rng = np.random.default_rng(5)
    z = np.array([NormalDist().inv_cdf(level) for level in LEVELS])[:, None, None, None]
    forecast = np.full((4000, 1, 1), 50.0)
    sigma = rng.uniform(1, 8, forecast.shape)
    truth = forecast + sigma * rng.normal(size=forecast.shape)
    own = forecast + z * sigma / 2
    seen = np.ones(truth.shape, bool)
    own_fit, fit = ConformalQuantiles.fit(forecast, truth, seen, own), ConformalQuantiles.fit(forecast, truth, seen)
    corrected, plain = own_fit.quantiles(forecast, np.array([0]), own), fit.quantiles(forecast, np.array([0]))
    assert np.abs((truth <= corrected).mean((1, 2, 3)) - LEVELS).max() < 0.01
    loss = [
        np.maximum(np.array(LEVELS)[:, None, None, None] * e, (np.array(LEVELS)[:, None, None, None] - 1) * e).mean()
        for e in (truth - corrected, truth - plain)
    ]
    assert loss[0] < loss[1]


def test_quantiles_rise_and_stay_above_what_never_was():
    rng = np.random.default_rng(2)
    forecast = rng.uniform(0, 3, (300, 2, 3)).astype(np.float32)
    truth = rng.poisson(forecast).astype(np.float32)
    fit = ConformalQuantiles.fit(forecast, truth, np.ones(truth.shape, bool))
    quantiles = fit.quantiles(forecast, EVERYTHING)
    assert (np.diff(quantiles, axis=0) >= 0).all() and quantiles.min() == 0 and np.isfinite(quantiles).all()
    below = ConformalQuantiles.fit(forecast, truth - 5, np.ones(truth.shape, bool))
    assert below.lowest is None and below.quantiles(forecast - 5, EVERYTHING).min() < -5
    some = fit.quantiles(forecast[:, :1, 1:], np.array([1, 2]))
    np.testing.assert_array_equal(some, quantiles[:, :, :1, 1:])
    holes = forecast.copy()
    holes[0, 0, 1] = np.nan
    assert np.isnan(fit.quantiles(holes, EVERYTHING)[:, 0, 0, 1]).all()


def test_few_days_have_fewer_classes_and_too_few_are_refused():
    """A step and class needs 39 residuals: 100 windows are two classes of 50, 38 are none."""
    forecast = np.arange(100, dtype=np.float32).reshape(100, 1, 1)
    truth, seen = forecast + 1, np.ones(forecast.shape, bool)
    assert len(ConformalQuantiles.fit(forecast, truth, seen).offsets) == 2
    assert len(ConformalQuantiles.fit(forecast[:39], truth[:39], seen[:39]).offsets) == 1
    with pytest.raises(InputError, match=r"38 observed points to calibrate .* they need 39; calibrate on more days"):
        ConformalQuantiles.fit(forecast[:38], truth[:38], seen[:38])


def test_a_place_that_was_never_observed_has_the_others_scale():
    rng = np.random.default_rng(3)
    forecast, truth, _ = city(10, rng)
    observed = np.ones(truth.shape, bool)
    observed[:, :, 2] = False
    fit = ConformalQuantiles.fit(forecast, truth, observed)
    assert np.isfinite(fit.quantiles(forecast, EVERYTHING)).all()
    mean = np.abs(truth - forecast)[:, :, :2].mean()
    np.testing.assert_allclose(fit.scales[2], mean, rtol=1e-5)


def test_the_quantile_that_costs_least():
    """3 / 4 is a level; 2 / 3 lies two thirds of the way from the median to it; 39 / 40 is the last."""
    quantiles = np.arange(9, dtype=np.float32)[:, None] * 10
    assert for_cost(quantiles, LEVELS, 3).tolist() == [50]
    assert for_cost(quantiles, LEVELS, 2) == pytest.approx([40 + 10 * (2 / 3 - 0.5) / 0.25])
    assert for_cost(quantiles, LEVELS, 39) == pytest.approx([80]) and for_cost(quantiles, LEVELS, 1 / 39)[0] == 0
    with pytest.raises(InputError, match=r"--cost-ratio 50 asks for the quantile 0.9804.* from 0\.0257 to 39$"):
        cost_level(50, LEVELS)
    for ratio in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(InputError, match="give a number above 0"):
            cost_level(ratio, LEVELS)
    with pytest.raises(InputError, match="needs quantiles"):
        cost_level(1, ())
