"""The part of ``stdist check`` that reads every value: ranges, coverage, statistics, imputation."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from math import isclose
from typing import Any

import numpy as np

from stdist.data.check_report import CheckReport, Severity, listed
from stdist.data.imputation import interpolate
from stdist.data.parts import Tile
from stdist.data.rhythm import rhythm_of
from stdist.data.schema import CHUNK, observed_name, tiles_of, true_segments
from stdist.data.statistics import StatisticsState
from stdist.data.store import GridStore
from stdist.progress import Progress

LARGEST = 999_950.0
"""Magnitudes from here on have no numeral (docs/decisions.md, 1)."""
SMALLEST = 5e-5
"""Magnitudes below this have the numeral of 0."""
SAMPLED_DAYS = 16
"""Days of each channel and tile whose imputed values are computed again."""
MOSTLY = 0.5
"""Cells that miss more than this share of their values are named."""


def check_channels(store: GridStore, report: CheckReport, tell: Progress) -> None:
    """Read every channel once and add what is found to the report."""
    tiles = tiles_of(store.slots_per_day, store.shape)
    slots = store.slots_per_day
    days = [day for day in range(len(store.present) // slots) if store.present[day * slots : (day + 1) * slots].any()]
    done, total = 0, len(store.channels) * len(tiles) * len(days)
    for channel in store.channels:
        check = _Channel(store, channel)
        for tile in tiles:
            sampled = set(days[:: -(-len(days) // SAMPLED_DAYS)])
            part = StatisticsState(store.inside[tile].shape)
            for day in days:
                tell(done, total)
                check.day(day, tile, part)
                if day in sampled:
                    for strip in _strips(tile):
                        check.imputation(day, strip)
                done += 1
            check.state.merge(part, tile)
        check.conclude(report)


def _strips(tile: Tile) -> Iterator[Tile]:
    """A tile cut along its first axis as its chunks are: of imputation three days are in memory, some of them twice."""
    first, *rest = tile
    step = CHUNK if rest else CHUNK**2
    for start in range(first.start, first.stop, step):
        yield slice(start, min(start + step, first.stop)), *rest


@dataclass
class _Channel:
    """Counts and extremes of a channel so far. Counts are by cell, int64 [H, W] or [N]; ``sums`` and ``counts_of`` of
    measured values by time step, float64 [T]."""

    store: GridStore
    channel: str
    state: StatisticsState = field(init=False)
    expected: np.ndarray = field(init=False)
    seen: np.ndarray = field(init=False)
    zeros: np.ndarray = field(init=False)
    scored: np.ndarray = field(init=False)
    """Cells that were observed in validation or test days, bool."""
    lowest: float = np.inf
    highest: float = -np.inf
    sums: np.ndarray = field(init=False)
    counts_of: np.ndarray = field(init=False)
    counts: Counter[tuple[Severity, str]] = field(default_factory=Counter)
    first: dict[tuple[Severity, str], str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.state = StatisticsState(self.store.shape)
        self.expected, self.seen, self.zeros = np.zeros((3, *self.store.shape), np.int64)
        self.scored = np.zeros(self.store.shape, bool)
        split = self.store.default_split
        self._train, nowhere = split.train, np.zeros(len(self.store.present), bool)
        train, *scoring = (
            nowhere if span is None else self.store.within(span) for span in (split.train, split.validation, split.test)
        )
        self._trained, self._scoring = train, np.logical_or(*scoring)
        self.sums, self.counts_of = np.zeros((2, len(self.store.present)))

    def day(self, day: int, tile: Tile, part: StatisticsState) -> None:
        """Look at one day of a tile; ``part`` takes in what of it lies in the training span."""
        store, start = self.store, day * self.store.slots_per_day
        values, observed = self._read(start, start + store.slots_per_day, tile)
        present = store.present[start : start + store.slots_per_day].reshape(-1, *(1 for _ in tile))
        inside, exists = store.inside[tile], self._exists(day, tile)
        measured = observed & present
        place = self._place(start, tile)
        self._note("error", "values are not finite", present & ~np.isfinite(values), place)
        self._note("error", "values where there is no frame", ~present & ~np.isnan(values), place)
        self._note("error", "observed where there is no frame", observed & ~present, place)
        self._note("error", "observed before the node exists", observed & ~exists, place)
        self._note("warning", "observed outside the city", observed & ~inside, place)
        self._note("warning", "values are negative", measured & (values < 0), place)
        beyond = measured & (abs(values) >= LARGEST)
        self._note("warning", f"values from {LARGEST:,.0f} on have no numeral", beyond, place)
        self.expected[tile] += (present & inside & exists).sum(axis=0)
        self.seen[tile] += (measured & inside & exists).sum(axis=0)
        self.zeros[tile] += (measured & (values == 0)).sum(axis=0)
        steps, of_cells = slice(start, start + store.slots_per_day), tuple(range(1, measured.ndim))
        self.sums[steps] += np.where(measured & inside, values, 0).sum(axis=of_cells, dtype=np.float64)
        self.counts_of[steps] += (measured & inside).sum(axis=of_cells)
        if measured.any():
            self.lowest = min(self.lowest, float(values[measured].min()))
            self.highest = max(self.highest, float(values[measured].max()))
        trained, scoring = self._trained[steps], self._scoring[steps]
        part.add(values[trained], observed[trained])
        self.scored[tile] |= (measured & inside & exists)[scoring].any(axis=0)

    def imputation(self, day: int, tile: Tile) -> None:
        """Eq. 20 again on a day and its neighbours, wherever these hold all that it needs."""
        store, slots = self.store, self.store.slots_per_day
        low, high = max(0, (day - 1) * slots), min(len(store.present), (day + 2) * slots)
        values, observed = self._read(low, high, tile)
        wrong = np.zeros(observed.shape, bool)
        for start, stop in true_segments(store.present[low:high]):
            begins = low + start == 0 or not store.present[low + start - 1]
            ends = low + stop == len(store.present) or not store.present[low + stop]
            measured, stored = observed[start:stop], values[start:stop]
            left = np.logical_or.accumulate(measured, axis=0) | begins
            right = np.logical_or.accumulate(measured[::-1], axis=0)[::-1] | ends
            same = np.isclose(stored, interpolate(stored, measured), rtol=1e-5, atol=1e-6)
            wrong[start:stop] = ~measured & left & right & ~same
        wrong = wrong[day * slots - low : (day + 1) * slots - low] & self._exists(day, tile)
        self._note("error", "imputed values are not those of Eq. 20", wrong, self._place(day * slots, tile))

    def conclude(self, report: CheckReport) -> None:
        for (severity, what), count in self.counts.items():
            report.add(severity, f"{what} ({count})", f"{self.channel}, first {self.first[severity, what]}")
        missing, zeros = int((self.expected - self.seen).sum()), int(self.zeros.sum())
        coverage = {"missing": missing, "true_zeros": zeros}
        if coverage != self.store.coverage[self.channel]:
            report.add("error", f"coverage is {coverage}, recorded {self.store.coverage[self.channel]}", self.channel)
        if 0 < self.highest < SMALLEST:
            report.add("warning", f"all values are below {SMALLEST}, which numerals read as 0: --scale", self.channel)
        self._statistics(report)
        share = (self.expected - self.seen) / np.maximum(self.expected, 1)
        never, dead = (self.expected > 0) & (self.seen == 0), (self.seen > 0) & (self.zeros == self.seen)
        groups = {
            "never observed": never,
            "scored but never observed in training": self.scored & (self.state.cell_count == 0),
            f"missing more than {MOSTLY:.0%} of the time": (share > MOSTLY) & ~never,
            "zero all the time": dead,
        }
        for what, cells in groups.items():
            if cells.any():
                ids = [str(i) for i in self.store.cell_ids[cells]]
                report.add("warning", f"cells {what} ({len(ids)})", f"{self.channel}, cells {listed(ids)}")
        worst = np.argsort(-share, axis=None, kind="stable")[:5]
        worst_ids, shares = self.store.cell_ids.ravel()[worst], share.ravel()[worst]
        report.channels[self.channel] = {
            **coverage,
            "missing_share": missing / max(1, int(self.expected.sum())),
            "zero_share": zeros / max(1, int(self.seen.sum())),
            "lowest": self.lowest if np.isfinite(self.lowest) else None,
            "highest": self.highest if np.isfinite(self.highest) else None,
            **self._rhythm(report),
            "cells": {what: int(cells.sum()) for what, cells in groups.items()},
            "worst_cells": {str(i): float(s) for i, s in zip(worst_ids, shares, strict=True) if s > 0},
        }

    def _rhythm(self, report: CheckReport) -> dict[str, Any]:
        """The period and the hours of peak and trough; a warning where the period is neither a day nor a week."""
        seen = self.counts_of > 0
        means = np.divide(self.sums, self.counts_of, out=np.full(len(self.sums), np.nan), where=seen)
        rhythm = rhythm_of(means, self.store.slots_per_day, self.store.local_slots)
        if rhythm is None:
            return {}
        told = rhythm.as_dict()
        if not rhythm.is_of_days:
            what = (
                f"values repeat after {told['period_hours']:g} hours, neither a day nor a week: is the cadence right?"
            )
            report.add("warning", what, self.channel)
        return told

    def _statistics(self, report: CheckReport) -> None:
        stored = self.store.attributes["train_statistics"].get(self.channel)
        if (stored is None) != (self.state.count == 0):
            report.add("error", f"{self.state.count} observed training values, statistics {stored}", self.channel)
        if stored is None or self._train is None or self.state.count == 0:
            return
        fitted = self.state.result(self._train)
        kept = self.store.statistics(self.channel, self._train)
        exact = {name: (getattr(fitted, name), getattr(kept, name)) for name in ("count", "maximum")}
        close = {name: (getattr(fitted, name), getattr(kept, name)) for name in ("mean", "std")}
        wrong = {name: pair for name, pair in exact.items() if pair[0] != pair[1]}
        wrong |= {name: pair for name, pair in close.items() if not isclose(*pair, rel_tol=1e-6, abs_tol=1e-12)}
        for name, (computed, recorded) in wrong.items():
            report.add("error", f"{name} of the training span is {computed}, stored {recorded}", self.channel)
        if not np.allclose(fitted.cell_mean, kept.cell_mean, rtol=1e-5, atol=1e-9):
            report.add("error", "means of cells are not those of the training span", self.channel)

    def _read(self, start: int, stop: int, tile: Tile) -> tuple[np.ndarray, np.ndarray]:
        names = (self.channel, observed_name(self.channel))
        values, observed = (self.store.dataset[name][(slice(start, stop), *tile)].values for name in names)
        return values, observed.astype(bool)

    def _exists(self, day: int, tile: Tile) -> np.ndarray:
        date = self.store.axis_days.first_day + np.timedelta64(day, "D")
        return np.ones(1, bool) if self.store.since is None else self.store.since[tile] <= date

    def _place(self, start: int, tile: Tile) -> Callable[[np.ndarray], str]:
        """Names the time step and cell of an index into a day of a tile."""

        def name(index: np.ndarray) -> str:
            cell = tuple(int(i) + part.start for i, part in zip(index[1:], tile, strict=True))
            stamp = self.store.local_times[start + int(index[0])].astype("datetime64[m]")
            return f"{stamp} local time, cell {self.store.cell_ids[cell]}"

        return name

    def _note(self, severity: Severity, what: str, where: np.ndarray, place: Callable[[np.ndarray], Any]) -> None:
        count = int(where.sum())
        if count:
            self.first.setdefault((severity, what), place(np.argwhere(where)[0]))
            self.counts[severity, what] += count
