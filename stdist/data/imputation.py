"""Linear interpolation of missing values, "Vision-LLMs for Spatiotemporal Traffic Forecasting", Eq. 20.

    d̃_t = d_start + (t − t_start) / (t_end − t_start) · (d_end − d_start)

The paper interpolates between two known values. Departures, needed so that every input is a number: at the
edges of a gap-free segment the nearest known value is carried, and a cell never seen in a segment is 0. Segments
are imputed alone: nothing is interpolated across a gap.
"""

from dataclasses import dataclass

import numpy as np

CELLS_AT_ONCE = 8192
"""Cells that lack values are filled by so many; interpolation needs some ten times their memory."""


@dataclass
class Nearest:
    """The nearest observed value per cell: its time step ``time`` int64 [...] (-1: none), ``value`` float32 [...]."""

    time: np.ndarray
    value: np.ndarray

    @classmethod
    def none(cls, shape: tuple[int, ...]) -> "Nearest":
        return cls(np.full(shape, -1, np.int64), np.zeros(shape, np.float32))

    def at(self, cells: np.ndarray) -> "Nearest":
        """Returns the nearest values of some cells, by their numbers; arrays are [n]."""
        return Nearest(self.time[cells], self.value[cells])

    def updated(self, other: "Nearest") -> "Nearest":
        """``other`` where it has a value, else self."""
        newer = other.time >= 0
        return Nearest(np.where(newer, other.time, self.time), np.where(newer, other.value, self.value))


def first_observed(values: np.ndarray, observed: np.ndarray, start: int) -> Nearest:
    """First observed value per cell of values [T, ...], whose first is time step ``start``."""
    index = observed.argmax(axis=0)
    return _take(values, observed, index, start)


def last_observed(values: np.ndarray, observed: np.ndarray, start: int) -> Nearest:
    """Last observed value per cell of values [T, ...], whose first is time step ``start``."""
    index = len(observed) - 1 - observed[::-1].argmax(axis=0)
    return _take(values, observed, index, start)


def _take(values: np.ndarray, observed: np.ndarray, index: np.ndarray, start: int) -> Nearest:
    value = np.take_along_axis(values, index[None], axis=0)[0]
    seen = observed.any(axis=0)
    return Nearest(np.where(seen, index + start, -1), np.where(seen, value, 0).astype(np.float32))


def interpolate(
    values: np.ndarray,
    observed: np.ndarray,
    start: int = 0,
    before: Nearest | None = None,
    after: Nearest | None = None,
) -> np.ndarray:
    """Eq. 20 on one stretch of a segment: float32 [T, ...] with every missing value filled.

    values: float32 [T, ...], read where ``observed`` (bool, same shape) only; ``start`` is the first time
    step. before, after: the last value seen before the stretch and the first one after it, within the same segment.
    """
    if observed.all():
        return values
    shape = values.shape
    flat, seen = values.reshape(shape[0], -1), observed.reshape(shape[0], -1)
    none = Nearest.none((flat.shape[1],))
    left, right = ((k or none) for k in (_flat(before), _flat(after)))
    lacking = np.flatnonzero(~seen.all(axis=0))
    result = flat.copy()
    for first in range(0, len(lacking), CELLS_AT_ONCE):
        cells = lacking[first : first + CELLS_AT_ONCE]
        result[:, cells] = _interpolate(flat[:, cells], seen[:, cells], start, left.at(cells), right.at(cells))
    return result.reshape(shape)


def _interpolate(values: np.ndarray, seen: np.ndarray, start: int, left: Nearest, right: Nearest) -> np.ndarray:
    """values [T, n], with known neighbours [n] on either side."""
    # Positions of the neighbours on an axis widened by one step at either end: `left` and `right`.
    length = len(values)
    steps = np.arange(1, length + 1)[:, None]
    previous = np.maximum.accumulate(np.where(seen, steps, 0), axis=0)
    following = np.minimum.accumulate(np.where(seen, steps, length + 1)[::-1], axis=0)[::-1]
    wide = np.concatenate((left.value[None], values, right.value[None])).astype(np.float64)
    times = np.broadcast_to(np.arange(start - 1, start + length + 1)[:, None], wide.shape).copy()
    times[0], times[-1] = left.time, right.time

    t_start, t_end = np.take_along_axis(times, previous, 0), np.take_along_axis(times, following, 0)
    d_start, d_end = np.take_along_axis(wide, previous, 0), np.take_along_axis(wide, following, 0)
    t = steps - 1 + start
    share = (t - t_start) / np.maximum(t_end - t_start, 1)
    linear = d_start + share * (d_end - d_start)
    nearest = np.where(t_start >= 0, d_start, np.where(t_end >= 0, d_end, 0.0))
    filled = np.where((t_start >= 0) & (t_end >= 0), linear, nearest)
    return np.where(seen, values, filled)


def _flat(nearest: Nearest | None) -> Nearest | None:
    return None if nearest is None else Nearest(nearest.time.reshape(-1), nearest.value.reshape(-1))
