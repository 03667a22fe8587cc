"""Imputation of a store that has grown: fills only the days whose imputed values depend on what is new.

A missing value is interpolated between its nearest observed ones (``imputation``), so that a day depends on others only
through the cells that are missing across a midnight, and on these only as far as they stay missing.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stdist.data.finalise import DaySegment, coverage_of, day_segments, fill_days
from stdist.data.imputation import Nearest, first_observed, last_observed
from stdist.data.parts import Tile
from stdist.data.recorded_shards import RecordedShards
from stdist.data.schema import observed_name
from stdist.data.spans import Split


@dataclass(frozen=True, eq=False)
class Version:
    """A channel's tile before or after it grew: its shards, and its pieces of gap-free segments by day."""

    shards: RecordedShards
    days: Mapping[int, list[DaySegment]]
    channel: str
    tile: Tile

    @classmethod
    def of(cls, shards: RecordedShards, present: np.ndarray, channel: str, tile: Tile) -> "Version":
        return cls(shards, day_segments(present, shards.slots_per_day), channel, tile)

    def values(self, day: int) -> np.ndarray:
        return self.shards.read(self.channel, day, self.tile)

    def observed(self, day: int) -> np.ndarray:
        return self.shards.read(observed_name(self.channel), day, self.tile)

    def coverage(self, days: Iterable[int]) -> dict[str, int]:
        """``missing`` and ``true_zeros`` of these days together."""
        total = {"missing": 0, "true_zeros": 0}
        for day in days:
            if day in self.days:
                values, observed = self.values(day), self.observed(day)
                of_day = coverage_of(self.shards, values, observed, day, self.tile, self.days[day])
                total = {name: total[name] + of_day[name] for name in total}
        return total

    def crosses(self, day: int) -> bool:
        """True where a gap-free segment goes on from the day before into ``day``."""
        return day in self.days and self.days[day][0][2]

    def nearest(self, midnight: int, cells: np.ndarray, forward: bool) -> Nearest:
        """The first values seen from the midnight that begins day ``midnight`` on, or the last ones before it, within
        the segment that crosses it, for ``cells`` (bool of the tile's shape)."""
        found, left = Nearest.none(cells.shape), cells
        day, step = (midnight, 1) if forward else (midnight - 1, -1)
        goes_on = self.crosses(midnight)
        while goes_on and left.any():
            start, stop, goes_back, goes_forward = self.days[day][0 if forward else -1]
            first = self.shards.slots(day).start
            observed = self.observed(day)[start - first : stop - first] & left
            if observed.any():
                values = self.values(day)[start - first : stop - first]
                found = found.updated((first_observed if forward else last_observed)(values, observed, start))
                left = left & ~observed.any(axis=0)
            goes_on = goes_forward if forward else goes_back
            day += step
        return found


def days_to_fill(old: Version, new: Version, changed: set[int]) -> list[int]:
    """``changed`` days (frames or observed values) and those around them whose imputed values depend on these."""
    affected = {day for day in changed if day in new.days}
    for day in sorted(changed):
        if day - 1 not in changed:
            affected |= _reached(old, new, day, forward=False)
        if day + 1 not in changed:
            affected |= _reached(old, new, day + 1, forward=True)
    return sorted(affected)


def _reached(old: Version, new: Version, midnight: int, forward: bool) -> set[int]:
    """Days on the unchanged side of a midnight, the later one where ``forward``, that hold values imputed from another
    neighbour than before on its other side."""
    reached = set[int]()
    if not new.crosses(midnight):
        return reached
    day, step = (midnight, 1) if forward else (midnight - 1, -1)
    lacking = ~new.observed(day)[0 if forward else -1]
    after, before = (version.nearest(midnight, lacking, not forward) for version in (new, old))
    lacking &= (after.time != before.time) | (after.value != before.value)
    goes_on = True
    while goes_on and lacking.any():
        reached.add(day)
        start, stop, goes_back, goes_forward = new.days[day][0 if forward else -1]
        first = new.shards.slots(day).start
        lacking &= ~new.observed(day)[start - first : stop - first].any(axis=0)
        goes_on = goes_forward if forward else goes_back
        day += step
    return reached


def refill(version: Version, days: list[int], split: Split, scratch: Path) -> dict[str, int]:
    """Imputes these days of a grown store, each run of them with its neighbours' values at either side; returns their
    coverage."""
    total = {"missing": 0, "true_zeros": 0}
    for run in _runs(days):
        first, last = run[0], run[-1]
        before = after = None
        if version.crosses(first):
            before = version.nearest(first, ~version.observed(first)[0], forward=False)
        if version.crosses(last + 1):
            after = version.nearest(last + 1, ~version.observed(last)[-1], forward=True)
        pieces = {day: version.days[day] for day in run}
        note: Callable[[dict[str, Any]], None] = lambda _: None  # noqa: E731
        _, counts = fill_days(
            version.shards, version.channel, version.tile, pieces, split, scratch / f"{first}", note, before, after
        )
        total = {name: total[name] + counts[name] for name in total}
    return total


def _runs(days: list[int]) -> list[list[int]]:
    """Stretches of days that follow one another."""
    runs: list[list[int]] = []
    for day in days:
        if runs and runs[-1][-1] == day - 1:
            runs[-1].append(day)
        else:
            runs.append([day])
    return runs
