"""Quantiles of any forecast by split conformal calibration: signed residuals of days with truth, by step and by class
of the forecast, divided by the place's usual residual in that class. Of a model that has quantiles of its own they are
corrections of these, as in conformalized quantile regression (Romano et al. 2019, Eq. 6-8, each end for itself).

Split conformal prediction with a scale per point (Lei et al., Distribution-free predictive inference for regression,
2018, section 5.2), and by class of the forecast (Mondrian; Vovk et al., Algorithmic Learning in a Random World, 2005):
a place's forecasts are cut into ``CLASSES`` of equal size, quiet to busy, so that neither a busy place nor a busy hour
has the band of a quiet one. docs/intervals.md says what is promised and measured.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from stdist.errors import InputError
from stdist.evaluation.levels import LEVELS

CLASSES = 5
FEWEST = round(1 / LEVELS[0]) - 1
"""Residuals below which the outermost quantile would lie beyond all of them."""
FOLDS = 5
"""Stretches of the days calibrated on: a residual is divided by the mean of the others' residuals, as a new day's will
be. By its own it would be too small: 1 point of coverage for a week of New York."""
SMALLEST_SHARE = 0.05
"""Share of a place's mean residual that each of its classes has at least: a class of nothing but zeros still has a
band."""


def conformal_quantiles(residuals: Float[np.ndarray, " n"], levels: Sequence[float]) -> Float[np.ndarray, " levels"]:
    """Quantiles with split conformal prediction's correction for n residuals: above the median the ⌈(n + 1) level⌉-th
    smallest, below it the ⌊(n + 1) level⌋-th, so that a new one, exchangeable with them, lies beyond it no more often
    than the level says. NaN where that is none of them."""
    ordered, n = np.sort(residuals), len(residuals)
    found = []
    for level in levels:
        rank = round((n + 1) * level, 9)
        number = math.ceil(rank) if level > 0.5 else math.floor(rank)
        if level == 0.5:
            found.append(float(np.median(ordered)) if n else math.nan)
        else:
            found.append(float(ordered[number - 1]) if 1 <= number <= n else math.nan)
    return np.array(found)


@dataclass(frozen=True, eq=False)
class ConformalQuantiles:
    """``LEVELS`` of P places and K steps from their point forecasts.

    ``edges``: forecasts that a place's C classes meet at, in units. ``scales``: mean absolute residual of a place and
    class, in units. ``offsets``: quantiles of residuals divided by these. ``lowest``: 0 where no truth was below it,
    which no quantile then is; None elsewhere.
    """

    edges: Float[np.ndarray, "P C-1"]
    scales: Float[np.ndarray, "P C"]
    offsets: Float[np.ndarray, "C K levels"]
    lowest: float | None

    @classmethod
    def fit(
        cls,
        forecast: Float[np.ndarray, "N K P"],
        truth: Float[np.ndarray, "N K P"],
        observed: Bool[np.ndarray, "N K P"],
        own: Float[np.ndarray, "levels N K P"] | None = None,
    ) -> ConformalQuantiles:
        """Fits forecasts whose truth was observed where ``observed``. ``own``: the model's own quantiles, which are
        then what residuals are of, each level for itself. Fewer classes where a class would have too few residuals of a
        step. Raises InputError where one class has."""
        forecast = forecast.astype(np.float64)
        residuals = np.where(observed, truth - forecast, np.nan)
        lowest = 0.0 if observed.any() and truth[observed].min() >= 0 else None
        for classes in range(CLASSES, 0, -1):
            shares = np.linspace(0, 1, classes + 1)[1:-1]
            edges = np.quantile(forecast, shares, axis=(0, 1)).T.reshape(forecast.shape[2], -1)
            members = _classes(forecast, edges)
            counts, sums = _sums(np.abs(residuals), members, classes)
            usual = np.empty_like(residuals)
            for fold in np.array_split(np.arange(len(residuals)), FOLDS):
                inside = _sums(np.abs(residuals[fold]), members[fold], classes)
                usual[fold] = _of(_scales(counts - inside[0], sums - inside[1]), members[fold])
            parts = _parts(residuals / usual, members, classes)
            fewest = min(len(part) for steps in parts for part in steps)
            if fewest >= FEWEST:
                break
        else:
            raise InputError(
                f"a step has {fewest} observed points to calibrate {LEVELS[0]:g} to {LEVELS[-1]:g} by, and "
                f"they need {FEWEST}; calibrate on more days"
            )
        if own is None:
            offsets = np.array([[conformal_quantiles(part, LEVELS) for part in steps] for steps in parts])
        else:
            of_levels = []
            for level, quantile in zip(LEVELS, own, strict=True):
                parts = _parts(
                    np.where(observed, truth - quantile.astype(np.float64), np.nan) / usual, members, classes
                )
                of_levels.append([[conformal_quantiles(part, (level,))[0] for part in steps] for steps in parts])
            offsets = np.moveaxis(np.array(of_levels), 0, -1)
        return cls(edges, _scales(counts, sums), offsets, lowest)

    def quantiles(
        self,
        forecast: Float[np.ndarray, "N K p"],
        places: Int[np.ndarray, " p"],
        own: Float[np.ndarray, "levels N K p"] | None = None,
    ) -> Float[np.ndarray, "levels N K p"]:
        """Returns quantiles of point forecasts of these ``places``, of the first K steps, with the model's ``own`` if
        it was fitted with such; rising with the level, NaN where the forecast is."""
        exact = forecast.astype(np.float64)
        members = _classes(exact, self.edges[places])
        scales = _of(self.scales[places], members)
        steps = np.arange(exact.shape[1])[:, None]
        spread = np.moveaxis(self.offsets[members, steps], -1, 0)
        quantiles = np.sort((exact if own is None else own) + scales * spread, axis=0)
        if self.lowest is not None:
            quantiles = np.maximum(quantiles, self.lowest)
        return quantiles.astype(np.float32)


def _classes(forecast: Float[np.ndarray, "N K p"], edges: Float[np.ndarray, "p edges"]) -> Int[np.ndarray, "N K p"]:
    members = np.zeros(forecast.shape, np.int64)
    for edge in edges.T:
        members += forecast > edge
    return members


def _of(scales: Float[np.ndarray, "p classes"], members: Int[np.ndarray, "N K p"]) -> Float[np.ndarray, "N K p"]:
    return scales[np.arange(len(scales)), members]


def _sums(
    sizes: Float[np.ndarray, "N K P"], members: Int[np.ndarray, "N K P"], classes: int
) -> tuple[Float[np.ndarray, "P classes"], Float[np.ndarray, "P classes"]]:
    """Returns the number of ``sizes`` by place and class, and their sums."""
    seen = ~np.isnan(sizes)
    counts, sums = np.zeros((2, sizes.shape[2], classes))
    for c in range(classes):
        chosen = seen & (members == c)
        counts[:, c], sums[:, c] = chosen.sum((0, 1)), np.where(chosen, sizes, 0).sum((0, 1))
    return counts, sums


def _scales(
    counts: Float[np.ndarray, "P classes"], sums: Float[np.ndarray, "P classes"]
) -> Float[np.ndarray, "P classes"]:
    """Means by place and class; the place's where a class has none, all places' where the place has none."""
    overall = float(sums.sum() / max(1.0, counts.sum())) or 1.0
    of_places = np.divide(sums.sum(1), counts.sum(1), out=np.full(len(sums), overall), where=counts.sum(1) > 0)[:, None]
    of_classes = np.divide(sums, counts, out=np.broadcast_to(of_places, sums.shape).copy(), where=counts > 0)
    return np.maximum(of_classes, SMALLEST_SHARE * np.maximum(of_places, SMALLEST_SHARE * overall))


def _parts(
    scaled: Float[np.ndarray, "N K P"], members: Int[np.ndarray, "N K P"], classes: int
) -> list[list[Float[np.ndarray, " n"]]]:
    """The observed ones by class and step."""
    seen = ~np.isnan(scaled)
    steps = range(scaled.shape[1])
    return [[scaled[:, k][seen[:, k] & (members[:, k] == c)] for k in steps] for c in range(classes)]
