"""Some days' forecasts against what came, as ``stdist watch`` judges them."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
from jaxtyping import Bool, Float, Int

from stdist.data import GridStore, Windows
from stdist.errors import InputError
from stdist.evaluation import open_forecasts
from stdist.evaluation.baselines import DAYS_PER_WEEK, persistence, same_slot_before, slots_before
from stdist.evaluation.day_tally import HIGH, LOW, DayTally, each_once, windows_of_days
from stdist.evaluation.levels import LEVELS
from stdist.evaluation.unusual import DayScores, Reference, day_scores, mean_errors, unusual
from stdist.runs.calibration import read_all
from stdist.runs.calibration_file import Calibration
from stdist.runs.forecasting import local_targets
from stdist.runs.watch_table import place_table


@dataclass(frozen=True)
class UnusualPlace:
    """A place's values of the days watched: ``above`` and ``below`` its 95 % interval of ``points``, of which
    ``expected`` are usual; ``first`` and ``last`` of these (local times), and the means of what was observed and of the
    median forecasts at them. ``run``: whether the last K values all lie beyond one end. ``chance``: of as much where
    nothing has changed, before the number of places is taken into account."""

    place: int | str
    above: int
    below: int
    points: int
    expected: float
    first: str
    last: str
    observed: float
    forecast: float
    mae: float | None
    usual_mae: float | None
    run: bool
    chance: float


@dataclass(frozen=True)
class Comparison:
    """``unusual``: the worst first. ``silent``: places without a value that had some on the days calibrated on.
    ``drifting``: days whose coverage is none of a day like those. ``baselines``: mean absolute errors of what needs no
    training, on the same points. ``table``: of all places (:func:`stdist.runs.watch_table.place_table`)."""

    days: list[DayScores]
    unusual: list[UnusualPlace]
    silent: list[int | str]
    drifting: list[str]
    baselines: dict[str, float]
    table: pl.DataFrame


def compare(path: Path, windows: Windows, calibration: Calibration, reference: Reference) -> Comparison:
    """Compares the forecasts ``path`` of ``windows``, with ``calibration``'s quantiles. Raises InputError where no
    window lies in one day."""
    forecasts, store, K = open_forecasts(path), windows.store, windows.K
    assert isinstance(store, GridStore)
    values, quantiles, truth, observed = read_all(forecasts, windows)
    assert quantiles is not None
    ids = forecasts.header.cell_ids.ravel()
    known = np.flatnonzero(np.isin(ids, np.array(calibration.places)))
    places = known[np.argsort(calibration.numbers_of(ids[known]))]  # in the order of the calibration
    chosen, days = windows_of_days(local_targets(windows))
    if not len(chosen):
        raise InputError(
            f"no window of S = {windows.S} and K = {K} frames has all targets in one day of {windows.span} of "
            f"{store.path}; append what is missing before them"
        )
    values, truth, observed = (array[chosen][..., places] for array in (values, truth, observed))
    quantiles = quantiles[:, chosen][..., places]
    origins, once = windows.origins[chosen], each_once(windows.origins[chosen], days, K)
    tally = DayTally.empty(np.unique(days), len(places))
    tally.add(values, quantiles, truth, observed, days, once)
    above, below = observed & (truth > quantiles[HIGH]), observed & (truth < quantiles[LOW])
    runs = above[-1].all(0) | below[-1].all(0)
    named, chances = unusual(reference, tally, runs, K)
    usual, mae, stamps = reference.shares, mean_errors(tally), local_targets(windows)[chosen]
    entries = []
    for number in np.flatnonzero(named):
        out = once & (above | below)[..., number]
        entries.append(
            UnusualPlace(
                place=calibration.places[number],
                above=int((once & above[..., number]).sum()),
                below=int((once & below[..., number]).sum()),
                points=(points := int(tally.points[:, number].sum())),
                expected=float(points * usual[number]),
                first=str(stamps[out].min().astype("datetime64[m]")),
                last=str(stamps[out].max().astype("datetime64[m]")),
                observed=float(truth[..., number][out].mean()),
                forecast=float(quantiles[LEVELS.index(0.5), ..., number][out].mean()),
                mae=mae[number],
                usual_mae=reference.mae[number],
                run=bool(runs[number]),
                chance=float(chances[number]),
            )
        )
    first, stop = store.step_range(windows.span)
    seen = store.observed(windows.channel, first, stop, windows.region).reshape(stop - first, -1)[:, places].any(0)
    silent = (np.array(reference.points) > 0) & ~seen
    rows, ranges = day_scores(tally), reference.ranges()
    return Comparison(
        days=rows,
        unusual=sorted(entries, key=lambda entry: (entry.chance, -(entry.above + entry.below))),
        silent=[calibration.places[number] for number in np.flatnonzero(silent)],
        drifting=[row.day for row in rows if any(not a <= row.coverage[name] <= b for name, (a, b) in ranges.items())],
        baselines=_baselines(windows, origins, places, truth, observed) if rows else {},
        table=place_table(windows, places, values, quantiles, truth, observed, once, tally, chances, named, silent),
    )


def _baselines(
    windows: Windows,
    origins: Int[np.ndarray, " n"],
    places: Int[np.ndarray, " P"],
    truth: Float[np.ndarray, "n K P"],
    observed: Bool[np.ndarray, "n K P"],
) -> dict[str, float]:
    """Persistence takes the place of a value that is not there."""
    store, K = windows.store, windows.K
    first, stop = int(origins[0]) - (DAYS_PER_WEEK + 1) * store.slots_per_day, int(origins[-1]) + K + 1
    first = max(0, first)
    series = store.values(windows.channel, first, stop, windows.region).reshape(stop - first, -1)[:, places]
    last = persistence(series, K, origins - first)
    made = {"persistence": last}
    for name, days in (("same time yesterday", 1), ("same time last week", DAYS_PER_WEEK)):
        before = slots_before(store.local_slots[first:stop], days * store.slots_per_day)
        found = same_slot_before(series, K, before, origins - first)
        made[name] = np.where(np.isnan(found), last, found)
    return {name: float(np.abs(each - truth)[observed].mean()) for name, each in made.items()}
