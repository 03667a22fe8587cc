"""Values of tables on one axis of time and one of places: rows held or left on disk, gathered, put in order, merged."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from data_prep.table_zone import REPEATED, clock_change
from stdist.errors import InputError

ONCE = "give each time once; --place names the column of places of a long table"
PLACED = (
    "give each place and time once, name the column of places with --place, several as site,direction, or say "
    "--duplicates sum or mean, or count where rows are events"
)


class Rows(Protocol):
    """Rows of values. Picklable."""

    def take(self, rows: np.ndarray) -> np.ndarray:
        """float32 [n, N] of the rows int64 [n], NaN = missing."""
        ...


@dataclass(frozen=True, eq=False)
class Held:
    """Rows in memory, in the blocks they were read in, float32 [n, N] each."""

    blocks: list[np.ndarray]

    def take(self, rows: np.ndarray) -> np.ndarray:
        if len(self.blocks) == 1:
            return self.blocks[0][rows]
        starts = np.cumsum([0, *map(len, self.blocks)])
        of = np.searchsorted(starts, rows, side="right") - 1
        out = np.empty((len(rows), self.blocks[0].shape[1]), np.float32)
        for block in np.unique(of):
            here = of == block
            out[here] = self.blocks[block][rows[here] - starts[block]]
        return out


@dataclass(frozen=True, eq=False)
class Slice:
    """Some of the rows. In another process only these go along where the rows are in memory."""

    rows: Rows
    which: np.ndarray

    def take(self) -> np.ndarray:
        return self.rows.take(self.which)

    def __reduce__(self) -> tuple[type, tuple[Rows, np.ndarray]]:
        if isinstance(self.rows, Held):
            return Slice, (Held([self.take()]), np.arange(len(self.which)))
        return Slice, (self.rows, self.which)


@dataclass(frozen=True)
class Measure:
    """Options of values. missing: numbers that mean missing, as -1 or -1,0. scale: what values are multiplied by, as
    1e-6."""

    missing: str | None = None
    scale: float = 1.0

    def __post_init__(self) -> None:
        self.codes()
        if not (np.isfinite(self.scale) and self.scale > 0):
            raise InputError(f"--scale {self.scale} is not a positive number; give one, as 1e-6")

    def codes(self) -> list[float]:
        try:
            return [float(code) for code in self.missing.split(",")] if self.missing else []
        except ValueError as error:
            raise InputError(f"--missing {self.missing!r} are no numbers; write -1 or -1,0") from error

    def of(self, values: np.ndarray) -> np.ndarray:
        """float32 of measured values, NaN where missing."""
        if codes := self.codes():
            values = np.where(np.isin(values, codes), np.nan, values)
        if self.scale != 1:
            values = values * self.scale
        with np.errstate(over="ignore"):
            return values.astype(np.float32, copy=False)


def in_order(
    label: str, stamps: np.ndarray, rows: dict[str, Rows], places: Sequence[str]
) -> tuple[np.ndarray, np.ndarray, int]:
    """Stamps in ascending order, each once, the row of each, and how many rows repeated another.

    Rows of one stamp are merged where they are equal, or one lacks what the other has. Raises InputError naming stamp,
    place and values where they differ.
    """
    order = np.arange(len(stamps))
    if (stamps[1:] > stamps[:-1]).all():
        return stamps, order, 0
    order = np.argsort(stamps, kind="stable")
    ranked = stamps[order]
    first = np.append(True, ranked[1:] != ranked[:-1])
    owner = np.maximum.accumulate(np.where(first, np.arange(len(ranked)), 0))
    for row in np.flatnonzero(~first):
        for channel, source in rows.items():
            kept, again = source.take(order[[owner[row], row]])
            merged = merge(kept, again)
            if merged is None:
                place = int(np.flatnonzero(~np.isnan(kept) & ~np.isnan(again) & (kept != again))[0])
                raise conflict(label, ranked[row], places[place], channel, kept[place], again[place], ONCE)
            if not np.array_equal(merged, kept, equal_nan=True):
                _set(source, int(order[owner[row]]), merged)
    return ranked[first], order[first], int((~first).sum())


def merge(one: np.ndarray, other: np.ndarray) -> np.ndarray | None:
    """Each value that either has; None where both have one and they differ."""
    merged = np.where(np.isnan(one), other, one)
    return merged if ((merged == other) | np.isnan(other)).all() else None


def _set(rows: Rows, row: int, values: np.ndarray) -> None:
    if not isinstance(rows, Held):
        raise TypeError("rows that are left on disk cannot be merged")
    for block in rows.blocks:
        if row < len(block):
            block[row] = values
            return
        row -= len(block)


def conflict(
    label: str, stamp: np.datetime64, place: str, channel: str, one: float, other: float, advice: str
) -> InputError:
    if clock_change(stamp):
        advice = REPEATED
    values = f"{channel} of {place}: {one:g} and {other:g}"
    return InputError(
        f"{label}: {stamp.astype('datetime64[s]')} occurs twice with different values ({values}); {advice}"
    )


@dataclass(frozen=True, eq=False)
class Records:
    """Rows of a long table: stamps datetime64[us] [n], places int32 [n] as positions in a list, values float32 [n] per
    channel."""

    label: str
    stamps: np.ndarray
    places: np.ndarray
    values: dict[str, np.ndarray]


def dense(
    records: Records, axis: np.ndarray, places: Sequence[str], duplicates: str
) -> tuple[dict[str, np.ndarray], int]:
    """Values float32 [T, N] per channel on an axis of stamps, and how many rows repeated another.

    duplicates: ``refuse`` (equal ones are merged), ``sum`` or ``mean``. Raises InputError naming the first two rows
    that differ.
    """
    steps, count = np.searchsorted(axis, records.stamps), len(places)
    where = steps * count + records.places
    owner = np.full(len(axis) * count, -1, np.int64)
    # The first row of each place and time is its owner.
    owner[where[::-1]] = np.arange(len(where))[::-1]
    again = np.flatnonzero(owner[where] != np.arange(len(where)))
    filled = {}
    for channel, values in records.values.items():
        if len(again) and duplicates != "refuse":
            seen = ~np.isnan(values)
            totals = np.bincount(where[seen], values[seen].astype(np.float64), len(owner))
            counts = np.bincount(where[seen], minlength=len(owner))
            divisor = np.maximum(counts, 1) if duplicates == "mean" else 1
            grid = np.where(counts > 0, totals / divisor, np.nan).astype(np.float32)
        else:
            grid = np.full(len(owner), np.nan, np.float32)
            grid[where[::-1]] = values[::-1]
            for row in _differing(grid, where, values, again):
                if not np.isnan(grid[where[row]]):
                    stamp, place = records.stamps[row], places[records.places[row]]
                    raise conflict(records.label, stamp, place, channel, grid[where[row]], values[row], PLACED)
                grid[where[row]] = values[row]
        filled[channel] = grid.reshape(len(axis), count)
    return filled, len(again)


def _differing(grid: np.ndarray, where: np.ndarray, values: np.ndarray, again: np.ndarray) -> Iterable[int]:
    """Rows that hold a value, and another one than the row before them."""
    return again[~np.isnan(values[again]) & (grid[where[again]] != values[again])]


def union(
    pieces: Sequence[tuple[str, np.ndarray, Sequence[str], dict[str, Rows], np.ndarray]],
) -> tuple[np.ndarray, list[str], dict[str, np.ndarray]]:
    """Several tables on one axis of time and one of places: stamps [T], ids, and values float32 [T, N] per channel.

    pieces: label, stamps, ids, rows and their order of each. Raises InputError where two tables hold different values
    of one place and time.
    """
    axis = np.unique(np.concatenate([stamps for _, stamps, *_ in pieces]))
    position: dict[str, int] = {}
    for _, _, ids, *_ in pieces:
        for name in ids:
            position.setdefault(name, len(position))
    channels = dict.fromkeys(channel for *_, rows, _ in pieces for channel in rows)
    out = {channel: np.full((len(axis), len(position)), np.nan, np.float32) for channel in channels}
    for label, stamps, ids, rows, order in pieces:
        columns, steps = np.array([position[name] for name in ids]), np.searchsorted(axis, stamps)
        for channel, source in rows.items():
            values, there = source.take(order), out[channel][np.ix_(steps, columns)]
            both = ~np.isnan(values) & ~np.isnan(there) & (values != there)
            if both.any():
                row, column = np.argwhere(both)[0]
                raise conflict(label, stamps[row], ids[column], channel, there[row, column], values[row, column], ONCE)
            out[channel][np.ix_(steps, columns)] = np.where(np.isnan(there), values, there)
    return axis, list(position), out
