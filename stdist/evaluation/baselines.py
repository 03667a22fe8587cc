"""Forecasters that a model has to beat: last value, yesterday, last week, weekly profile, ridge.

All of them see what the model sees of the past of a window and of the training span, and nothing else.
Arrays are [T, C]: every frame of the store, the cells of the region flattened row by row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from numpy.lib.stride_tricks import sliding_window_view

from stdist.data import DaySpan, GridStore, Windows
from stdist.data.audit import Fitted, data_digest, refuse_leaks
from stdist.evaluation.metrics import ErrorState
from stdist.evaluation.protocol import read_targets

DAYS_PER_WEEK = 7
HARMONICS = 6
RIDGE_PENALTY = 1.0  # on lags scaled to unit variance; the Milan figures move by < 0.001 between 1 and 100


@dataclass(frozen=True, eq=False)
class BaselineForecasts:
    """Forecasts [N, K, h, w] in the data's units; ``fallbacks`` of the city's are persistence."""

    values: Float[np.ndarray, "N K h w"]
    fallbacks: int


def forecast_baselines(store: GridStore, train: DaySpan | str, windows: Windows) -> dict[str, BaselineForecasts]:
    """Every baseline's forecasts of ``windows``, fitted on the windows that lie wholly in the days ``train``.

    Keys: ``persistence``, ``same time yesterday``, ``same time last week``, ``mean by weekday and slot``
    and ``ridge``. A value of the others that is missing (before the data's start, in a gap, never seen in
    training) is replaced by persistence and counted. Raises InputError where no window fits ``train``.
    """
    S, K, channel, region, origins = windows.S, windows.K, windows.channel, windows.region, windows.origins
    fit = store.windows(train, S, K, channel=channel, region=region, history_inside=True)
    fit_frames = slice(*store.frames_of(fit.span))
    grid = store.values(channel, 0, len(store.times), region)
    series = grid.reshape(len(grid), -1).astype(np.float64)
    slots = week_slots(store)
    features = calendar(slots, store.slots_per_day, fit_frames.stop - fit_frames.start)
    forecasts = {
        "persistence": persistence(series, origins, K),
        "same time yesterday": same_slot_before(series, origins, K, store.slots_per_day),
        "same time last week": same_slot_before(series, origins, K, DAYS_PER_WEEK * store.slots_per_day),
        "mean by weekday and slot": weekly_profile(series, slots, fit_frames, origins, K),
        "ridge": ridge(series, features, fit.origins, origins, S, K),
    }
    last = forecasts["persistence"]
    inside = store.inside[region.slices].ravel()
    shape = (len(origins), K, *grid.shape[1:])
    result = {}
    for name, values in forecasts.items():
        missing = np.isnan(values)
        filled = np.where(missing, last, values).astype(np.float32)
        result[name] = BaselineForecasts(filled.reshape(shape), int(missing[:, :, inside].sum()))
    return result


def score_baselines(store: GridStore, train: DaySpan | str, windows: Windows) -> dict[str, dict[str, Any]]:
    """For every baseline the ``ErrorState.summary`` of its forecasts, and its ``fallbacks``.

    Raises InputError where the days of ``windows`` and of ``train`` overlap.
    """
    data = data_digest(store, windows.channel)
    fit = store.default_split.named(train) if isinstance(train, str) else train
    refuse_leaks([Fitted.on("baselines", fit, data)], windows.span, data)
    truth, observed = read_targets(store, windows.channel, windows.region, windows.K, windows.origins)
    return {
        name: {
            **ErrorState.of(baseline.values, truth, observed).summary(),
            "fallbacks": baseline.fallbacks,
        }
        for name, baseline in forecast_baselines(store, train, windows).items()
    }


def persistence(series: Float[np.ndarray, "T C"], origins: Int[np.ndarray, " N"], K: int) -> Float[np.ndarray, "N K C"]:
    """The last history frame, K times."""
    return np.repeat(series[origins][:, None], K, axis=1)


def same_slot_before(
    series: Float[np.ndarray, "T C"], origins: Int[np.ndarray, " N"], K: int, period: int
) -> Float[np.ndarray, "N K C"]:
    """The value one period (in frames) before each target; more periods where one would lie after the origin.

    NaN where that frame is missing or before the data's start.
    """
    steps = np.arange(1, K + 1)
    back = period * -(-steps // period)
    source = origins[:, None] + (steps - back)
    return np.where((source >= 0)[..., None], series[np.maximum(source, 0)], np.nan)


def weekly_profile(
    series: Float[np.ndarray, "T C"],
    slot_of_week: Int[np.ndarray, " T"],
    fit_frames: slice,
    origins: Int[np.ndarray, " N"],
    K: int,
) -> Float[np.ndarray, "N K C"]:
    """The mean of the training frames of the same weekday and time of day; NaN where there is none."""
    values, slots = series[fit_frames], slot_of_week[fit_frames]
    known = ~np.isnan(values)
    sums, counts = np.zeros((2, int(slot_of_week.max()) + 1, series.shape[1]))
    np.add.at(sums, slots, np.where(known, values, 0))
    np.add.at(counts, slots, known)
    with np.errstate(invalid="ignore"):
        profile = sums / counts
    return profile[slot_of_week[origins[:, None] + np.arange(1, K + 1)]]


def ridge(
    series: Float[np.ndarray, "T C"],
    calendar: Float[np.ndarray, "T F"],
    fit_origins: Int[np.ndarray, " M"],
    origins: Int[np.ndarray, " N"],
    S: int,
    K: int,
) -> Float[np.ndarray, "N K C"]:
    """Ridge regression of all K targets on S lags and the origin's calendar, in closed form per cell.

    Lags and targets are scaled by the mean and deviation of the cell over the training windows.
    """
    forecasts = np.empty((len(origins), K, series.shape[1]))
    for cell in range(series.shape[1]):
        history = sliding_window_view(series[:, cell], S)  # row i: frames i .. i+S-1
        targets = sliding_window_view(series[:, cell], K)[fit_origins + 1]
        fit_history = history[fit_origins - S + 1]
        mean, deviation = fit_history.mean(), fit_history.std() or 1.0
        x = np.concatenate([(fit_history - mean) / deviation, calendar[fit_origins]], axis=1)
        gram = x.T @ x + RIDGE_PENALTY * np.eye(x.shape[1])
        weights = np.linalg.solve(gram, x.T @ ((targets - mean) / deviation))
        x = np.concatenate([(history[origins - S + 1] - mean) / deviation, calendar[origins]], axis=1)
        forecasts[:, :, cell] = x @ weights * deviation + mean
    return forecasts


def calendar(slot_of_week: Int[np.ndarray, " T"], slots_per_day: int, fit_length: int) -> Float[np.ndarray, "T F"]:
    """A constant and the harmonics 1 to 6 of the local day and week.

    A cycle that the ``fit_length`` training frames do not hold twice is left out: its harmonics could
    follow anything.
    """
    columns = [np.ones(len(slot_of_week))]
    for period in (slots_per_day, DAYS_PER_WEEK * slots_per_day):
        if fit_length < 2 * period:
            continue
        for harmonic in range(1, HARMONICS + 1):
            angle = 2 * np.pi * harmonic * slot_of_week / period
            columns += [np.sin(angle), np.cos(angle)]
    return np.stack(columns, axis=1)


def week_slots(store: GridStore) -> Int[np.ndarray, " T"]:
    """The slot of each frame within its local week, from Monday 00:00."""
    local = store.local_times
    monday = np.datetime64("1970-01-05T00:00", "ns")
    return ((local - monday) % np.timedelta64(DAYS_PER_WEEK, "D") // store.cadence).astype(np.int64)
