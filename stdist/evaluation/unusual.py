"""Statistics that tell an unusual place or day from those of the days calibrated on. docs/intervals.md says what they
promise.

A place: by how many of its values lie outside the 95 % interval, with a beta-binomial tail (Skellam 1948), since values
of one day come together; by the last K values all beyond one end, with the share of windows for which that was so. Of
all places together no more than ``LEVEL`` of those named are false (Benjamini and Hochberg 1995). The whole: by the
day's coverage, with Student's prediction interval of the calibrated days' coverages.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped
from pydantic import BaseModel
from scipy import stats

from stdist.errors import InputError
from stdist.evaluation.conformal import FOLDS, ConformalQuantiles
from stdist.evaluation.day_tally import DayTally, each_once, windows_of_days
from stdist.evaluation.levels import INTERVALS
from stdist.evaluation.quantile_scores import intervals_of

LEVEL = 0.01
"""Share of the places named that may be false, and of ordinary days that are called a drift."""
OUTSIDE = 0.05
"""Share of values outside the 95 % interval; no place is expected to have fewer."""
SMALLEST_DRIFT = 0.02
"""Coverage that a drift is away from the calibrated days' mean at least: less than that matters to nobody."""


class DayScores(BaseModel, extra="forbid", frozen=True):
    """``points`` of a local day (ISO), their errors, and ``coverage`` by the name of the interval."""

    day: str
    points: int
    mae: float
    rmse: float
    crps: float
    coverage: dict[str, float]


class Reference(BaseModel, extra="forbid", frozen=True):
    """Scores of the days calibrated on, by intervals that were made without them.

    By place, in the calibration's order: ``points``, ``outside`` the 95 % interval, mean absolute error ``mae`` (NaN
    as None). ``correlation``: of two values of one place and day as to being outside. ``one_sided``: stretches of K
    values beyond one end, of ``stretches``.
    """

    days: list[DayScores]
    points: list[int]
    outside: list[int]
    mae: list[float | None]
    correlation: float
    one_sided: int
    stretches: int

    @classmethod
    def of(cls, tally: DayTally) -> Reference:
        outside = tally.above + tally.below
        return cls(
            days=day_scores(tally),
            points=tally.points.sum(0).tolist(),
            outside=outside.sum(0).tolist(),
            mae=mean_errors(tally),
            correlation=intra_day_correlation(outside, tally.points),
            one_sided=tally.one_sided,
            stretches=tally.stretches,
        )

    @property
    def shares(self) -> Float[np.ndarray, " P"]:
        """The share of values outside that is expected of a place: its own, drawn to ``OUTSIDE`` as by 20 more values,
        and no less than that."""
        points, outside = np.array(self.points), np.array(self.outside)
        return np.maximum(OUTSIDE, (outside + 1) / (points + 1 / OUTSIDE))

    def chance_of_run(self, K: int) -> float:
        """Returns how often K values all lie beyond one end: windows share their values, so K of them count as one."""
        return min(1.0, (self.one_sided + 1) / (self.stretches / K + 1))

    def ranges(self) -> dict[str, tuple[float, float]]:
        """The lowest and highest coverage of a day like these, by interval: beyond either end of any of them lies
        ``LEVEL`` of such days. None where fewer than three days tell how they differ."""
        found: dict[str, tuple[float, float]] = {}
        if (n := len(self.days)) < 3:
            return found
        t = float(stats.t.ppf(1 - LEVEL / 2 / len(INTERVALS), n - 1))
        for name in INTERVALS:
            coverages = np.array([day.coverage[name] for day in self.days])
            half = max(SMALLEST_DRIFT, t * float(coverages.std(ddof=1)) * math.sqrt(1 + 1 / n))
            mean = float(coverages.mean())
            found[name] = mean - half, mean + half
        return found


def fit_reference(
    conformal: ConformalQuantiles,
    targets: Shaped[np.ndarray, "N K"],
    origins: Int[np.ndarray, " N"],
    values: Float[np.ndarray, "N K P"],
    truth: Float[np.ndarray, "N K P"],
    observed: Bool[np.ndarray, "N K P"],
    own: Float[np.ndarray, "levels N K P"] | None = None,
) -> Reference | None:
    """Scores the forecasts that ``conformal`` was fitted on; ``targets`` in local time, ``origins`` as frame indices.
    None where no window lies in one day.

    The intervals of each fifth of the windows are fitted on the others alone, as a new day's are: by its own they cover
    too well. Where the others are too few for that they are those of all.
    """
    chosen, days = windows_of_days(targets)
    if not len(chosen):
        return None
    tally = DayTally.empty(np.unique(days), values.shape[2])
    once = each_once(origins[chosen], days, values.shape[1])
    places, numbers = np.arange(values.shape[2]), np.arange(len(values))
    for fold in np.array_split(numbers, FOLDS):
        others = np.setdiff1d(numbers, fold)
        try:
            without = None if own is None else own[:, others]
            fit = ConformalQuantiles.fit(values[others], truth[others], observed[others], without)
        except InputError:
            fit = conformal
        in_fold = np.isin(chosen, fold)
        part = chosen[in_fold]
        quantiles = fit.quantiles(values[part], places, None if own is None else own[:, part])
        tally.add(values[part], quantiles, truth[part], observed[part], days[in_fold], once[in_fold])
    return Reference.of(tally)


def pooled(rows: list[DayScores]) -> dict[str, Any] | None:
    """The scores of all points of some days; None where there is none."""
    if not rows:
        return None
    weights = np.array([row.points for row in rows], np.float64)

    def over_days(values: list[float]) -> float:
        return float(np.average(values, weights=weights))

    return {
        "days": len(rows),
        "points": int(weights.sum()),
        "mae": over_days([row.mae for row in rows]),
        "rmse": math.sqrt(over_days([row.rmse**2 for row in rows])),
        "crps": over_days([row.crps for row in rows]),
        "coverage": {name: over_days([row.coverage[name] for row in rows]) for name in INTERVALS},
    }


def day_scores(tally: DayTally) -> list[DayScores]:
    """Returns the scores of each day that has an observed point."""
    names, levels = intervals_of(tally.scores.levels), len(tally.scores.levels)
    rows = []
    for number, day in enumerate(tally.days):
        if not (points := int(tally.scores.count[number])):
            continue
        rows.append(
            DayScores(
                day=str(day),
                points=points,
                mae=float(tally.absolute[number] / points),
                rmse=math.sqrt(tally.squared[number] / points),
                crps=float(2 * tally.scores.pinball[:, number].sum() / levels / points),
                coverage={name: float(tally.scores.inside[i, number] / points) for i, name in enumerate(names)},
            )
        )
    return rows


def mean_errors(tally: DayTally) -> list[float | None]:
    """The mean absolute error of each place; None where nothing was observed."""
    pairs = zip(tally.errors.tolist(), tally.counted.tolist(), strict=True)
    return [error / count if count else None for error, count in pairs]


def intra_day_correlation(outside: Int[np.ndarray, "D P"], points: Int[np.ndarray, "D P"]) -> float:
    """The correlation of two values of one place and day as to being outside, by moments around the share of all
    places and days: what places differ by is in it too, so it is rather too high. From 0 on, below 1."""
    total = points.sum()
    share = outside.sum() / total if total else 0.0
    pairs = (points * (points - 1.0)).sum() * share * (1 - share)
    if pairs <= 0:
        return 0.0
    excess = (np.square(outside - points * share) - points * share * (1 - share)).sum()
    return float(np.clip(excess / pairs, 0, 0.99))


def outside_tail(
    outside: Int[np.ndarray, " P"],
    points: Int[np.ndarray, " P"],
    shares: Float[np.ndarray, " P"],
    correlation: float,
) -> Float[np.ndarray, " P"]:
    """The chance of at least ``outside`` of ``points`` where ``shares`` are expected: beta-binomial, and binomial where
    the values of a day are independent."""
    if correlation <= 0:
        return stats.binom.sf(outside - 1, points, shares)
    size = (1 - correlation) / correlation
    return stats.betabinom.sf(outside - 1, points, shares * size, (1 - shares) * size)


def unusual(
    reference: Reference, tally: DayTally, one_sided: Bool[np.ndarray, " P"], K: int
) -> tuple[Bool[np.ndarray, " P"], Float[np.ndarray, " P"]]:
    """The places that are named, and the chance of each place's days where nothing has changed. ``one_sided``: whose
    last K values all lie beyond one end."""
    outside, points = (tally.above + tally.below).sum(0), tally.points.sum(0)
    by_count = outside_tail(outside, points, reference.shares, reference.correlation)
    by_run = np.where(one_sided, reference.chance_of_run(K), 1.0)
    chances = np.minimum(1.0, 2 * np.minimum(by_count, by_run))
    named, seen = np.zeros(len(points), bool), points > 0
    if seen.any():
        named[seen] = stats.false_discovery_control(chances[seen]) <= LEVEL
    return named, chances
