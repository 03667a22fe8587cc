"""Scores of quantiles as sums and counts: pinball losses, CRPS, coverage and width of intervals, reliability.

CRPS is twice the mean pinball loss of the levels there are (Gneiting and Ranjan 2011), so it is always named with their
number: figures of other levels are not comparable. Only observed points are scored, as in ``metrics``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from stdist.errors import InputError
from stdist.evaluation.levels import INTERVALS
from stdist.scalars import defined


@dataclass(frozen=True, eq=False)
class QuantileState:
    """Sums over observed points of G groups, as horizon steps or places. States add with ``+``.

    ``pinball``: losses in the data's units. ``below``: points no larger than the quantile. ``inside``, ``width``: of
    those ``INTERVALS`` whose ends are among the levels, points between them and sums of their widths.
    """

    levels: tuple[float, ...]
    count: Int[np.ndarray, " G"]
    pinball: Float[np.ndarray, "levels G"]
    below: Float[np.ndarray, "levels G"]
    inside: Float[np.ndarray, "intervals G"]
    width: Float[np.ndarray, "intervals G"]

    @classmethod
    def empty(cls, levels: tuple[float, ...], groups: int) -> QuantileState:
        intervals = len(intervals_of(levels))
        sizes = (len(levels), len(levels), intervals, intervals)
        return cls(levels, np.zeros(groups, np.int64), *(np.zeros((size, groups)) for size in sizes))

    @classmethod
    def of(
        cls,
        levels: tuple[float, ...],
        quantiles: Float[np.ndarray, "levels n"],
        truth: Float[np.ndarray, " n"],
        group: Int[np.ndarray, " n"],
        groups: int,
    ) -> QuantileState:
        """The state of n observed points; ``group``: the number of each one's group."""

        def total(values: np.ndarray) -> np.ndarray:
            return np.bincount(group, values, groups)

        quantiles, truth = quantiles.astype(np.float64), truth.astype(np.float64)
        errors = truth - quantiles
        losses = (np.maximum(level * e, (level - 1) * e) for level, e in zip(levels, errors, strict=True))
        ends = [(quantiles[low], quantiles[high]) for low, high in intervals_of(levels).values()]

        def stacked(rows: Any) -> np.ndarray:
            return np.array([total(row) for row in rows]).reshape(-1, groups)

        return cls(
            levels,
            np.bincount(group, minlength=groups),
            stacked(losses),
            stacked(errors <= 0),
            stacked((low <= truth) & (truth <= high) for low, high in ends),
            stacked(high - low for low, high in ends),
        )

    def __add__(self, other: QuantileState) -> QuantileState:
        assert self.levels == other.levels
        sums = (getattr(self, f.name) + getattr(other, f.name) for f in fields(self)[1:])
        return QuantileState(self.levels, *sums)

    def merged(self, groups: list[Int[np.ndarray, " n"]]) -> QuantileState:
        """The state of groups of these groups."""
        parts = (
            np.stack([getattr(self, f.name)[..., numbers].sum(-1) for numbers in groups], -1) for f in fields(self)[1:]
        )
        return QuantileState(self.levels, *parts)

    def rows(self) -> list[dict[str, Any]]:
        """The figures of each group: None where nothing was observed."""
        return [self._row(group) for group in range(len(self.count))]

    def _row(self, group: int) -> dict[str, Any]:
        points = int(self.count[group])

        def mean(sums: np.ndarray) -> list[float]:
            return [float(value) / points if points else math.nan for value in sums[:, group]]

        names = [f"{level:g}" for level in self.levels]
        pinball, inside, width = mean(self.pinball), mean(self.inside), mean(self.width)
        return {
            "points": points,
            **defined({"crps": 2 * sum(pinball) / len(pinball)}),
            "pinball": defined(dict(zip(names, pinball, strict=True))),
            "below": defined(dict(zip(names, mean(self.below), strict=True))),
            "intervals": {
                name: defined({"coverage": inside[i], "width": width[i]})
                for i, name in enumerate(intervals_of(self.levels))
            },
        }


def intervals_of(levels: tuple[float, ...]) -> dict[str, tuple[int, int]]:
    """Returns the ``INTERVALS`` whose ends are among ``levels``, as numbers of these."""
    return {
        name: (levels.index(low), levels.index(high))
        for name, (low, high) in INTERVALS.items()
        if low in levels and high in levels
    }


HOURS = 24
GROUPS = ("quietest quarter of places", "second quarter", "third quarter", "busiest quarter of places")


@dataclass(frozen=True, eq=False)
class QuantileErrors:
    """Scores of one set of forecasts by horizon step, by local hour of the target and by place. ``truth``: the sum of
    the observed truth of each place."""

    steps: QuantileState
    hours: QuantileState
    places: QuantileState
    truth: Float[np.ndarray, " P"]

    @classmethod
    def empty(cls, levels: tuple[float, ...], K: int, places: int) -> QuantileErrors:
        steps, hours, each = (QuantileState.empty(levels, groups) for groups in (K, HOURS, places))
        return cls(steps, hours, each, np.zeros(places))

    def add(
        self,
        quantiles: Float[np.ndarray, "levels n K *cells"],
        truth: Float[np.ndarray, "n K *cells"],
        observed: Bool[np.ndarray, "n K *cells"],
        hours: Int[np.ndarray, "n K"],
        places: Int[np.ndarray, "*cells"],
    ) -> QuantileErrors:
        """These and the scores of a block; ``places``: the number of each cell. Raises InputError for a quantile of an
        observed point that is not finite."""
        if not np.isfinite(quantiles[:, observed]).all():
            raise InputError("a quantile is not finite at an observed point; make the forecasts again")
        levels, (_, k) = self.steps.levels, observed.shape[:2]
        q, y = quantiles[:, observed], truth[observed]
        step = np.broadcast_to(np.arange(k).reshape(1, k, *(1 for _ in places.shape)), observed.shape)[observed]
        hour = np.broadcast_to(hours.reshape(*hours.shape, *(1 for _ in places.shape)), observed.shape)[observed]
        place = np.broadcast_to(places, observed.shape)[observed]
        size = len(self.truth)
        return QuantileErrors(
            self.steps + QuantileState.of(levels, q, y, step, k),
            self.hours + QuantileState.of(levels, q, y, hour, HOURS),
            self.places + QuantileState.of(levels, q, y, place, size),
            self.truth + np.bincount(place, y.astype(np.float64), size),
        )

    def summary(self) -> dict[str, Any]:
        """``pooled``, ``per_horizon`` (``step`` from 1), ``per_hour`` (local, of the target) and ``per_place_group``:
        places by the mean of their scored truth. Each row has ``points``, ``crps`` (by this many quantiles),
        ``pinball`` and ``below`` by level, and ``intervals`` with their coverage and mean width; None for what no
        point defines."""
        everything = [np.arange(len(self.steps.count))]
        seen = np.flatnonzero(self.places.count)
        ranked = seen[np.argsort(self.truth[seen] / self.places.count[seen], kind="stable")]
        quarters = np.array_split(ranked, len(GROUPS))
        return {
            "crps_is": f"by {len(self.steps.levels)} quantiles: twice their mean pinball loss",
            "pooled": self.steps.merged(everything).rows()[0],
            "per_horizon": [{"step": k + 1, **row} for k, row in enumerate(self.steps.rows())],
            "per_hour": [{"hour": hour, **row} for hour, row in enumerate(self.hours.rows())],
            "per_place_group": [
                {"group": name, "places": len(quarters[i]), **row}
                for i, (name, row) in enumerate(zip(GROUPS, self.places.merged(quarters).rows(), strict=True))
            ],
        }
