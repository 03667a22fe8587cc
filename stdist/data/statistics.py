"""Statistics of one channel over a span of days: mergeable, so that no more than a day is in memory."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from stdist.data.spans import DaySpan


@dataclass(frozen=True, eq=False)
class Statistics:
    """Over the observed values of one channel in ``span``, fitted on nothing else.

    mean, std (population), maximum: scalars in the data's units; count: observed values; cell_mean: float32
    [H, W], 0 for a cell without an observed value in the span.
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

    shape: tuple[int, int]
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
        """Take in values float32 [T, H, W], where observed bool [T, H, W]."""
        count = int(observed.sum())
        if count == 0:
            return
        total = np.where(observed, values, 0).astype(np.float64)
        self.cell_sum += total.sum(axis=0)
        self.cell_count += observed.sum(axis=0)
        mean = float(total.sum() / count)
        squares = float(np.where(observed, (total - mean) ** 2, 0).sum())
        delta, merged = mean - self.mean, self.count + count
        self.squares += squares + delta**2 * self.count * count / merged
        self.mean += delta * count / merged
        self.count = merged
        self.maximum = max(self.maximum, float(values[observed].max()))

    def result(self, span: DaySpan) -> Statistics:
        cell_mean = self.cell_sum / np.maximum(self.cell_count, 1)
        std = float(np.sqrt(self.squares / self.count))
        return Statistics(self.mean, std, self.maximum, self.count, cell_mean.astype(np.float32), span)
