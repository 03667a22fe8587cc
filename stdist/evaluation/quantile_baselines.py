"""Quantiles that a run's have to beat: last week's value with the quantiles of its own residuals, and ridge with
Gaussian ones. Both learn their residuals from the windows that the run was calibrated on."""

from collections.abc import Callable
from statistics import NormalDist
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from stdist.data import DaySpan, GridStore, Windows
from stdist.evaluation.baselines import forecast_baselines
from stdist.evaluation.conformal import ConformalQuantiles
from stdist.evaluation.levels import LEVELS
from stdist.evaluation.protocol import local_hours, read_targets
from stdist.evaluation.quantile_scores import QuantileErrors

LAST_WEEK, RIDGE = "same time last week", "ridge"
NAMES = {LAST_WEEK: "same time last week, its residuals by step", RIDGE: "ridge, Gaussian residuals by step"}
Quantiles = Callable[[Float[np.ndarray, "N K P"]], Float[np.ndarray, "levels N K P"]]


def score_baseline_quantiles(
    store: GridStore, train: DaySpan, calibrated: Windows, tested: Windows
) -> dict[str, dict[str, Any]]:
    """``QuantileErrors.summary`` of each of ``NAMES`` on the windows ``tested``; fitted on the days ``train``, their
    residuals on the windows ``calibrated``."""
    past, ahead = (_forecasts(store, train, windows) for windows in (calibrated, tested))
    truth, observed = past.pop("truth"), past.pop("observed")
    fits: dict[str, Quantiles] = {}
    conformal = ConformalQuantiles.fit(past[LAST_WEEK], truth, observed)
    everywhere = np.arange(truth.shape[2])
    fits[LAST_WEEK] = lambda forecast: conformal.quantiles(forecast, everywhere)
    fits[RIDGE] = gaussian(past[RIDGE], truth, observed, conformal.lowest)
    truth, observed = ahead.pop("truth"), ahead.pop("observed")
    hours = local_hours(store, tested.origins, tested.K)
    scores = {}
    for name, quantiles in fits.items():
        nothing = QuantileErrors.empty(LEVELS, tested.K, len(everywhere))
        errors = nothing.add(quantiles(ahead[name]), truth, observed, hours, everywhere)
        scores[NAMES[name]] = errors.summary()
    return scores


def gaussian(
    forecast: Float[np.ndarray, "N K P"],
    truth: Float[np.ndarray, "N K P"],
    observed: Bool[np.ndarray, "N K P"],
    lowest: float | None,
) -> Quantiles:
    """Normal quantiles around a forecast, with the root mean square of the observed residuals of each step and place
    (of the step, where a place has none)."""
    squares = np.where(observed, np.square(truth.astype(np.float64) - forecast), 0)
    counts = observed.sum(0)
    of_steps = (squares.sum((0, 2)) / np.maximum(1, counts.sum(1)))[:, None]
    sigma = np.sqrt(np.where(counts > 0, squares.sum(0) / np.maximum(1, counts), of_steps))
    z = np.array([NormalDist().inv_cdf(level) for level in LEVELS])

    def quantiles(ahead: Float[np.ndarray, "N K P"]) -> Float[np.ndarray, "levels N K P"]:
        found = ahead + z[:, None, None, None] * sigma
        return found if lowest is None else np.maximum(found, lowest)

    return quantiles


def _forecasts(store: GridStore, train: DaySpan, windows: Windows) -> dict[str, np.ndarray]:
    """Forecasts of ``NAMES``, ``truth`` and ``observed`` of all windows and cells, [N, K, P]."""
    shape = len(windows), windows.K, *windows.region.shape
    arrays = {name: np.empty(shape, np.float32) for name in (*NAMES, "truth")} | {"observed": np.empty(shape, bool)}
    corner = [axis.start for axis in windows.region.slices]
    for block, tile, forecasts in forecast_baselines(store, train, windows):
        cells = tuple(slice(t.start - c, t.stop - c) for t, c in zip(tile.slices, corner, strict=True))
        truth, observed = read_targets(windows, tile, windows.origins[block])
        values = {name: forecasts[name].values for name in NAMES} | {"truth": truth, "observed": observed}
        for name, array in values.items():
            arrays[name][block, :, *cells] = array
    return {name: array.reshape(*shape[:2], -1) for name, array in arrays.items()}
