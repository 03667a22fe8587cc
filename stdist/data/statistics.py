"""Statistics of one channel over a span of days: mergeable, so that no more than a day of a tile is in memory."""

from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np

from stdist.data.parts import Tile
from stdist.data.schema import tiles_of
from stdist.data.spans import AnyRegion, DaySpan, parse_region
from stdist.data.stored_arrays import StoredArrays
from stdist.errors import InputError


@dataclass(frozen=True, eq=False)
class Statistics:
    """Over the observed values of one channel in ``span``, fitted on nothing else.

    mean, std (population), maximum: scalars in the data's units; count: observed values; cell_mean: float32
    [H, W] or [N], 0 for a cell without an observed value in the span.
    """

    mean: float
    std: float
    maximum: float
    count: int
    cell_mean: np.ndarray
    span: DaySpan

    def as_attribute(self) -> dict[str, Any]:
        """JSON form without ``cell_mean``, which is an array of the store."""
        scalars = {"mean": self.mean, "std": self.std, "maximum": self.maximum, "count": self.count}
        return {**scalars, "span": [str(self.span.first_day), str(self.span.last_day)]}


@dataclass
class StatisticsState:
    """Running count, mean and sum of squared deviations (Chan et al.), and per-cell sums."""

    shape: tuple[int, ...]
    count: int = 0
    mean: float = 0.0
    squares: float = 0.0
    maximum: float = -np.inf
    cell_sum: np.ndarray = field(init=False)
    cell_count: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.cell_sum = np.zeros(self.shape, np.float64)
        self.cell_count = np.zeros(self.shape, np.int64)

    def add(self, values: np.ndarray, observed: np.ndarray) -> None:
        """Take in values float32 [T, *shape], where observed (bool, same shape)."""
        count = int(observed.sum())
        if count == 0:
            return
        total = np.where(observed, values, 0).astype(np.float64)
        self.cell_sum += total.sum(axis=0)
        self.cell_count += observed.sum(axis=0)
        mean = float(total.sum() / count)
        squares = float(np.where(observed, (total - mean) ** 2, 0).sum())
        self._merge(count, mean, squares, float(values[observed].max()))

    def merge(self, other: "StatisticsState", tile: Tile) -> None:
        """Take in what was seen of the cells ``tile``. The order of tiles decides the last bits of the result."""
        self.cell_sum[tile] += other.cell_sum
        self.cell_count[tile] += other.cell_count
        if other.count:
            self._merge(other.count, other.mean, other.squares, other.maximum)

    def _merge(self, count: int, mean: float, squares: float, maximum: float) -> None:
        delta, merged = mean - self.mean, self.count + count
        self.squares += squares + delta**2 * self.count * count / merged
        # The first ones are taken as they are: mean * count / count is not always the mean.
        self.mean = self.mean + delta * count / merged if self.count else mean
        self.count, self.maximum = merged, max(self.maximum, maximum)

    def result(self, span: DaySpan) -> Statistics:
        cell_mean = self.cell_sum / np.maximum(self.cell_count, 1)
        std = float(np.sqrt(self.squares / self.count))
        return Statistics(self.mean, std, self.maximum, self.count, cell_mean.astype(np.float32), span)


def fit_statistics(store: StoredArrays, channel: str, span: DaySpan, region: AnyRegion) -> Statistics:
    """Reads ``span`` and ``region`` with a day of a tile in memory; InputError where there is no observed value."""
    first, stop = store.step_range(span)
    state = StatisticsState(region.shape)
    slots = store.slots_per_day
    # By the shards, which begin with the local days where clocks are not changed.
    days = [(max(day, first), min(day + slots, stop)) for day in range(first - first % slots, stop, slots)]
    present = [day for day in days if store.present[slice(*day)].any()]
    for tile in tiles_of(slots, region.shape):
        of_tile = StatisticsState(tuple(side.stop - side.start for side in tile))
        edges = [(a.start + side.start, a.start + side.stop) for a, side in zip(region.slices, tile, strict=True)]
        cells = parse_region(list(chain(*edges)))
        for day in present:
            of_tile.add(store.values(channel, *day, cells), store.observed(channel, *day, cells))
        state.merge(of_tile, tile)
    if state.count == 0:
        raise InputError(f"span {span} of {store.path} holds no observed value of {channel}; choose other days")
    return state.result(span)
