"""What a grid store holds: its axes, its arrays and how they are sharded.

Time is regular at the cadence, from local midnight of the first day to the end of the last local day, so that
one shard is one local day. Frames that the source lacks are not written: fill values cost nothing.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from stdist.errors import InputError

FORMAT = "stdist grid store"
FORMAT_VERSION = 1
MINUTES_PER_DAY = 1440
TILE = 256
"""Grids above this many rows or columns are sharded in tiles of this side."""


@dataclass(frozen=True, eq=False)
class GridSpec:
    """Everything about a grid store that is known before the first value is.

    cell_ids: int64 [H, W], the data's own ids. rows, cols: the data's own row and column ids, int64 [H], [W];
    counted from 0 where None. inside: bool [H, W], False outside a city that is not a rectangle. latitude,
    longitude: float64 [H, W], cell centres. Raises InputError where cadence and days do not fit.
    """

    city: str
    channels: tuple[str, ...]
    first_day: np.datetime64
    last_day: np.datetime64
    cell_ids: np.ndarray
    cadence_minutes: int = 10
    utc_offset_minutes: int = 0
    units: str = "activity"
    rows: np.ndarray | None = None
    cols: np.ndarray | None = None
    inside: np.ndarray | None = None
    latitude: np.ndarray | None = None
    longitude: np.ndarray | None = None

    def __post_init__(self) -> None:
        if self.cadence_minutes <= 0 or MINUTES_PER_DAY % self.cadence_minutes:
            raise InputError(f"cadence {self.cadence_minutes} min does not divide a day; give whole minutes")
        if not self.channels:
            raise InputError(f"city {self.city!r} has no channel; name at least one")

    @property
    def shape(self) -> tuple[int, int]:
        return self.cell_ids.shape[0], self.cell_ids.shape[1]

    @property
    def slots_per_day(self) -> int:
        return MINUTES_PER_DAY // self.cadence_minutes

    @property
    def days(self) -> np.ndarray:
        """Local calendar days, datetime64[D]."""
        return np.arange(self.first_day, self.last_day + np.timedelta64(1, "D"), dtype="datetime64[D]")

    @property
    def frames(self) -> int:
        return len(self.days) * self.slots_per_day

    @property
    def minutes(self) -> np.ndarray:
        """UTC minutes since 1970-01-01 of every frame, int64 [T]."""
        midnight = self.first_day.astype("datetime64[m]").astype(np.int64) - self.utc_offset_minutes
        return midnight + np.arange(self.frames, dtype=np.int64) * self.cadence_minutes

    def attributes(self) -> dict[str, Any]:
        """The store's attributes that are known from the start."""
        return {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "city": self.city,
            "channels": list(self.channels),
            "units": self.units,
            "cadence_minutes": self.cadence_minutes,
            "utc_offset_minutes": self.utc_offset_minutes,
            "first_day": str(self.first_day),
            "last_day": str(self.last_day),
        }


def observed_name(channel: str) -> str:
    return f"observed_{channel}"


def train_mean_name(channel: str) -> str:
    return f"train_mean_{channel}"


def chunk_and_shard(slots_per_day: int, shape: tuple[int, int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Chunk and shard shapes of a (time, row, col) array.

    A chunk of at most 48 slots x 32 x 32 cells keeps a region's window small on disk, and still reads whole
    days at disk speed: smaller ones cost zarr more per chunk than they save (measured on a 100x100 grid:
    11 ms a day against 60 ms with 24 x 16 x 16). A shard is a whole number of chunks, so its side is rounded
    up.
    """
    slots = next(n for n in range(min(48, slots_per_day), 0, -1) if slots_per_day % n == 0)
    sides = [min(32, side) for side in shape]
    shard = [-(-min(TILE, side) // chunk) * chunk for side, chunk in zip(shape, sides, strict=True)]
    return (slots, *sides), (slots_per_day, *shard)


def fill_short_absences(present: np.ndarray, max_gap: int) -> np.ndarray:
    """Absent stretches of at most ``max_gap`` frames between present ones become present (bool [T]).

    Their values are then missing ones, which Eq. 20 imputes; a longer stretch is a gap that ends a run.
    """
    filled = present.copy()
    for start, stop in runs_of(~present):
        if start > 0 and stop < len(present) and stop - start <= max_gap:
            filled[start:stop] = True
    return filled


def runs_of(flags: np.ndarray) -> list[tuple[int, int]]:
    """Half-open [start, stop) of every run of True in bool [T]."""
    edges = np.diff(np.concatenate(([0], flags.astype(np.int8), [0])))
    return list(zip(np.flatnonzero(edges == 1).tolist(), np.flatnonzero(edges == -1).tolist(), strict=True))
