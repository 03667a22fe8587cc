"""Forecasters that a model has to beat: last value, yesterday, last week, weekly profile, ridge.

All of them see what the model sees of the past of a window, imputed where nothing was observed, and are fitted on what
was observed in the training span, and on nothing else.
Arrays are [T, C]: every frame of the store, the cells of one tile of the region flattened row by row, or its nodes.
NaN: a frame in a gap, a node that is not there yet, and, in what is fitted on, a value that was not observed.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy.lib.stride_tricks import sliding_window_view

from stdist.data import DaySpan, GridStore, Windows
from stdist.data.audit import Fitted, data_digest, refuse_leaks
from stdist.data.spans import AnyRegion
from stdist.evaluation import forecast_header
from stdist.evaluation.forecast_header import cut, tiles
from stdist.evaluation.metrics import ErrorState
from stdist.evaluation.protocol import read_targets

DAYS_PER_WEEK = 7
HARMONICS = 6
RIDGE_PENALTY = 1.0  # on lags scaled to unit variance; the Milan figures move by < 0.001 between 1 and 100
SERIES_IN_MEMORY = 2**22
"""Values (frame, cell) of a tile; one cell may have more."""

Forecaster = Callable[[Int[np.ndarray, " N"]], Float[np.ndarray, "N K C"]]
"""Forecasts of windows by their origins; NaN where it has no source."""


@dataclass(frozen=True, eq=False)
class BaselineForecasts:
    """Forecasts [n, K, h, w] or [n, K, nodes] in the data's units; those of ``fallback`` are persistence."""

    values: Float[np.ndarray, "n K *cells"]
    fallback: Bool[np.ndarray, "n K *cells"]


def forecast_baselines(
    store: GridStore, train: DaySpan | str, windows: Windows
) -> Iterator[tuple[slice, AnyRegion, dict[str, BaselineForecasts]]]:
    """Yields every baseline's forecasts of some of ``windows`` and a tile of their region, until all are forecast.

    Fitted on the observed values of the days ``train``, for every cell on its own. Keys: ``persistence``, ``same time
    yesterday``, ``same time last week``, ``mean by weekday and slot`` and ``ridge``. A value of the others that is
    missing (before the start of the data or of a node, in a gap, or of a cell or slot that training never observed) is
    replaced by persistence and marked. Raises InputError where no window fits ``train``.
    """
    S, K, channel, frames = windows.S, windows.K, windows.channel, len(store.times)
    fit = store.windows(train, S, K, channel=channel, region=windows.region, history_inside=True)
    fit_frames = slice(*store.step_range(fit.span))
    slots, days = week_slots(store), store.local_times.astype("datetime64[D]")
    first, last = store.local_slots[[fit_frames.start, fit_frames.stop - 1]]
    features = calendar(slots, store.slots_per_day, int(last) + 1 - int(first))
    day, week = (slots_before(store.local_slots, n * store.slots_per_day) for n in (1, DAYS_PER_WEEK))
    for tile in tiles(windows.region, SERIES_IN_MEMORY // frames):
        filled = store.values(channel, 0, frames, tile).reshape(frames, -1)
        late = False if store.since is None else days[:, None] < store.since[tile.slices]
        series = np.where(late, np.nan, filled).astype(np.float64)
        measured = np.where(store.observed(channel, 0, frames, tile).reshape(frames, -1), series, np.nan)
        cells = series.shape[1]
        forecasters: dict[str, Forecaster] = {
            "same time yesterday": partial(same_slot_before, series, K, day),
            "same time last week": partial(same_slot_before, series, K, week),
            "mean by weekday and slot": weekly_profile(measured, slots, fit_frames, K),
            "ridge": ridge(series, measured, features, fit.origins, S, K),
        }
        for block in cut(len(windows), max(1, forecast_header.POINTS_IN_MEMORY // (K * cells))):
            last = persistence(filled, K, windows.origins[block])
            shape = (*last.shape[:2], *tile.shape)
            made = last.reshape(shape).astype(np.float32)
            forecasts = {"persistence": BaselineForecasts(made, np.zeros(shape, bool))}
            for name, forecaster in forecasters.items():
                values = forecaster(windows.origins[block])
                missing = np.isnan(values)
                values[missing] = last[missing]
                forecasts[name] = BaselineForecasts(values.reshape(shape).astype(np.float32), missing.reshape(shape))
            yield block, tile, forecasts


def score_baselines(
    store: GridStore, train: DaySpan | str, windows: Windows, asked: Bool[np.ndarray, "*cells"] | None = None
) -> dict[str, dict[str, Any]]:
    """Returns for every baseline the ``ErrorState.summary`` of its forecasts, and its ``fallbacks``: how many of the
    scored points are persistence's. ``asked``: True for the cells of the windows' region that count, all if None.

    Raises InputError where the days of ``windows`` and of ``train`` overlap.
    """
    data = data_digest(store, windows.channel)
    fit = store.default_split.named(train) if isinstance(train, str) else train
    refuse_leaks([Fitted.on("baselines", fit, data)], windows.span, data)
    states: dict[str, ErrorState] = defaultdict(lambda: ErrorState.empty(windows.K))
    fallbacks: Counter[str] = Counter()
    for block, tile, forecasts in forecast_baselines(store, train, windows):
        truth, observed = read_targets(windows, tile, windows.origins[block])
        if asked is not None:
            whole = zip(tile.slices, windows.region.slices, strict=True)
            observed &= asked[tuple(slice(of.start - all_.start, of.stop - all_.start) for of, all_ in whole)]
        for name, baseline in forecasts.items():
            states[name] += ErrorState.of(baseline.values, truth, observed)
            fallbacks[name] += int((baseline.fallback & observed).sum())
    return {name: {**state.summary(), "fallbacks": fallbacks[name]} for name, state in states.items()}


def persistence(series: Float[np.ndarray, "T C"], K: int, origins: Int[np.ndarray, " N"]) -> Float[np.ndarray, "N K C"]:
    """The last history frame, K times."""
    return np.repeat(series[origins][:, None], K, axis=1)


def slots_before(local_slots: Int[np.ndarray, " T"], period: int) -> Int[np.ndarray, " T"]:
    """The frame of the same time of day one period (in slots of the wall clock) before each frame; -1 where the data
    begins after it.

    Where clocks skip that slot, the frame is another period back; where it comes twice, it is the later of the two.
    """
    order = np.argsort(local_slots, kind="stable")
    ordered, wanted = local_slots[order], local_slots - period
    before = np.full(len(local_slots), -1, np.int64)
    while (searched := (before < 0) & (wanted >= ordered[0])).any():
        place = np.maximum(np.searchsorted(ordered, wanted, side="right") - 1, 0)
        there = searched & (ordered[place] == wanted)
        before[there] = order[place[there]]
        wanted = wanted - period
    return before


def same_slot_before(
    series: Float[np.ndarray, "T C"], K: int, before: Int[np.ndarray, " T"], origins: Int[np.ndarray, " N"]
) -> Float[np.ndarray, "N K C"]:
    """The value one period before each target, by ``slots_before``; more periods where one would lie after the origin.

    NaN where that frame is missing or before the data's start.
    """
    source = before[origins[:, None] + np.arange(1, K + 1)]
    while (unknown := source > origins[:, None]).any():
        source = np.where(unknown, before[source], source)
    return np.where((source >= 0)[..., None], series[np.maximum(source, 0)], np.nan)


def weekly_profile(
    measured: Float[np.ndarray, "T C"],
    slot_of_week: Int[np.ndarray, " T"],
    fit_frames: slice,
    K: int,
) -> Forecaster:
    """The mean of the training frames of the same weekday and time of day; NaN where none was observed."""
    values, slots = measured[fit_frames], slot_of_week[fit_frames]
    present = ~np.isnan(values)
    totals, counts = np.zeros((2, int(slot_of_week.max()) + 1, measured.shape[1]))
    np.add.at(totals, slots, np.where(present, values, 0))
    np.add.at(counts, slots, present)
    with np.errstate(invalid="ignore"):
        profile = totals / counts
    return lambda origins: profile[slot_of_week[origins[:, None] + np.arange(1, K + 1)]]


def ridge(
    series: Float[np.ndarray, "T C"],
    measured: Float[np.ndarray, "T C"],
    calendar: Float[np.ndarray, "T F"],
    fit_origins: Int[np.ndarray, " M"],
    S: int,
    K: int,
) -> Forecaster:
    """Ridge regression of all K targets on S lags and the origin's calendar, in closed form per cell.

    Fitted on the training windows of ``measured`` without a missing value, by whose mean and deviation lags and targets
    are scaled; NaN where there is no such window. Forecasts are made of the lags of ``series``.
    """
    fits = []
    for cell in measured.T:
        history = sliding_window_view(cell, S)[fit_origins - S + 1]  # row i of the view: frames i .. i+S-1
        targets = sliding_window_view(cell, K)[fit_origins + 1]
        complete = ~np.isnan(history).any(axis=1) & ~np.isnan(targets).any(axis=1)
        if not complete.any():
            fits.append((np.nan, 1.0, np.zeros((S + calendar.shape[1], K))))
            continue
        history, targets = history[complete], targets[complete]
        mean, deviation = history.mean(), history.std() or 1.0
        x = np.concatenate([(history - mean) / deviation, calendar[fit_origins[complete]]], axis=1)
        gram = x.T @ x + RIDGE_PENALTY * np.eye(x.shape[1])
        fits.append((mean, deviation, np.linalg.solve(gram, x.T @ ((targets - mean) / deviation))))

    def forecast(origins: Int[np.ndarray, " N"]) -> Float[np.ndarray, "N K C"]:
        forecasts = np.empty((len(origins), K, len(fits)))
        for i, (mean, deviation, weights) in enumerate(fits):
            history = sliding_window_view(series[:, i], S)[origins - S + 1]
            x = np.concatenate([(history - mean) / deviation, calendar[origins]], axis=1)
            forecasts[:, :, i] = x @ weights * deviation + mean
        return forecasts

    return forecast


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
