"""Forecasts with intervals against what came, by local day and place: what a day is compared with, and the day itself.

A window counts to a day if all its targets lie in it. Errors, coverage and CRPS of a day are of all steps of these
windows. What is said of a place rests on each of its values once, in windows that do not overlap (:func:`each_once`):
neighbouring ones repeat nearly all of each other, and the nearest forecast of each value would follow a place that has
changed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from stdist.evaluation.levels import LEVELS
from stdist.evaluation.quantile_scores import QuantileState

LOW, HIGH = 0, -1
"""The 95 % interval's ends among the levels."""


def windows_of_days(
    targets: Shaped[np.ndarray, "N K"],
) -> tuple[Int[np.ndarray, " n"], Shaped[np.ndarray, " n"]]:
    """The numbers of those windows whose targets (local times) lie in one day, and this day, datetime64[D]."""
    days = targets.astype("datetime64[D]")
    chosen = np.flatnonzero((days == days[:, :1]).all(axis=1))
    return chosen, days[chosen, 0]


def each_once(origins: Int[np.ndarray, " n"], days: Shaped[np.ndarray, " n"], K: int) -> Bool[np.ndarray, "n K"]:
    """True for one forecast of each target of a day: of windows that do not overlap, back from the last one of each
    stretch; of a stretch's first window the steps before these. ``origins``: frame indices, rising."""
    once = np.zeros((len(origins), K), bool)
    free = 0  # the frames before this one have no forecast yet
    for number in range(len(origins) - 1, -1, -1):
        origin, day = origins[number], days[number]
        if number == len(origins) - 1 or days[number + 1] != day:
            free = origin + K + 1
        is_first = number == 0 or days[number - 1] != day or origins[number - 1] + 1 < origin
        steps = min(K, free - 1 - origin)
        if steps == K or (is_first and steps > 0):
            once[number, :steps] = True
            free = origin + 1
    return once


@dataclass(eq=False)
class DayTally:
    """Sums and counts of D days and P places, observed points only; ``add`` takes in windows.

    ``scores``, ``absolute``, ``squared``: of days, all steps. ``points``, ``above``, ``below``: values of a day and
    place, each once, and those beyond either end of the 95 % interval. ``errors``, ``counted``: sums of the absolute
    errors of a place and their number. ``stretches``, ``one_sided``: windows of all places whose K values were all
    observed, and those of them that lie all above or all below.
    """

    days: Shaped[np.ndarray, " D"]
    scores: QuantileState
    absolute: Float[np.ndarray, " D"]
    squared: Float[np.ndarray, " D"]
    points: Int[np.ndarray, "D P"]
    above: Int[np.ndarray, "D P"]
    below: Int[np.ndarray, "D P"]
    errors: Float[np.ndarray, " P"]
    counted: Int[np.ndarray, " P"]
    stretches: int = 0
    one_sided: int = 0

    @classmethod
    def empty(cls, days: Shaped[np.ndarray, " D"], places: int) -> DayTally:
        absolute, squared = np.zeros((2, len(days)))
        points, above, below = np.zeros((3, len(days), places), np.int64)
        scores = QuantileState.empty(LEVELS, len(days))
        return cls(days, scores, absolute, squared, points, above, below, np.zeros(places), np.zeros(places, np.int64))

    def add(
        self,
        point: Float[np.ndarray, "n K P"],
        quantiles: Float[np.ndarray, "levels n K P"],
        truth: Float[np.ndarray, "n K P"],
        observed: Bool[np.ndarray, "n K P"],
        days: Shaped[np.ndarray, " n"],
        once: Bool[np.ndarray, "n K"],
    ) -> None:
        """``days``: of the windows, each one of the tally's; ``once``: by :func:`each_once`."""
        size, number = len(self.days), np.searchsorted(self.days, days)
        of_day = np.broadcast_to(number[:, None, None], observed.shape)[observed]
        errors = np.where(observed, truth.astype(np.float64) - point, 0)
        self.scores += QuantileState.of(LEVELS, quantiles[:, observed], truth[observed], of_day, size)
        self.absolute += np.bincount(number, np.abs(errors).sum((1, 2)), size)
        self.squared += np.bincount(number, np.square(errors).sum((1, 2)), size)
        self.errors += np.abs(errors).sum((0, 1))
        self.counted += observed.sum((0, 1))
        above, below = observed & (truth > quantiles[HIGH]), observed & (truth < quantiles[LOW])
        for counts, where in ((self.points, observed), (self.above, above), (self.below, below)):
            np.add.at(counts, number, (where & once[..., None]).sum(1))
        self.stretches += int(observed.all(1).sum())
        self.one_sided += int((above.all(1) | below.all(1)).sum())
