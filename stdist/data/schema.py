"""The layout of a grid store: its axes, its arrays and how they are sharded.

Time is regular at the cadence, from local midnight of the first day to the end of the last local day, so that
one shard is one local day. Time steps that the source lacks are not written: fill values cost nothing.

A shard has 24 hours. Where the store has a time zone its days are those of the zone's standard time, which is what
``utc_offset_minutes`` is then; local dates and times of day are the wall clock's (``stored_arrays``), and days of it
may have 23 or 25 hours.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any, ClassVar

import numpy as np

from stdist.data.parts import Tile
from stdist.data.spans import DaySpan
from stdist.dates import parse_day
from stdist.errors import InputError
from stdist.zones import require_zone, wall_clock

FORMAT = "stdist grid store"
FORMAT_VERSION = 1
MINUTES_PER_DAY = 1440
UNKNOWN_UNITS = "unknown units"
"""The units of data that does not name them."""
LONGEST_NAME = 100
"""Characters of a channel's name at most: names of its arrays are longer, and a file system takes 255 bytes."""
CHUNK = 32
"""Side of a chunk, in cells."""
TILE = 256
"""Grids above this many rows or columns are sharded in tiles of this side, nodes above its square in as many."""


class _Axes:
    """Regular time, and space cut into the tiles of the shards, as grids and node sets have them."""

    city: str
    channels: tuple[str, ...]
    first_day: np.datetime64
    last_day: np.datetime64
    cadence_minutes: int
    utc_offset_minutes: int
    units: str
    timezone: str | None
    static: Mapping[str, np.ndarray] | None
    dims: ClassVar[tuple[str, ...]]
    """Names of the axes of space."""

    def __post_init__(self) -> None:
        if self.cadence_minutes <= 0 or MINUTES_PER_DAY % self.cadence_minutes:
            raise InputError(f"cadence {self.cadence_minutes} min does not divide a day; give whole minutes")
        for day in (self.first_day, self.last_day):
            parse_day(day)
        if self.timezone is not None:
            require_zone(self.timezone)
        if not self.channels:
            raise InputError(f"city {self.city!r} has no channel; name at least one")
        for channel in self.channels:  # each is a folder of the store
            if not re.fullmatch(r"[^\W_][\w .+()-]*", channel) or len(channel) > LONGEST_NAME:
                raise InputError(
                    f"channel {channel!r} is no name of an array; begin with a letter or digit, go on with these, _, "
                    f"-, dots or spaces, {LONGEST_NAME} characters at most"
                )
        for name in ("inside", "since", "latitude", "longitude"):
            self._require_shape(name, getattr(self, name, None), self.shape)
        for name, values in (self.static or {}).items():
            self._require_shape(f"static {name!r}", values, self.shape)

    def _require_shape(self, what: str, array: np.ndarray | None, shape: tuple[int, ...]) -> None:
        if array is not None and array.shape != shape:
            raise InputError(f"{what} of {self.city} has shape {array.shape}, its {' x '.join(self.dims)} is {shape}")

    @property
    def shape(self) -> tuple[int, ...]:
        raise NotImplementedError

    def tiles(self) -> list[Tile]:
        """The cells that each shard of a day holds, in order."""
        return tiles_of(self.slots_per_day, self.shape)

    @property
    def slots_per_day(self) -> int:
        return MINUTES_PER_DAY // self.cadence_minutes

    @property
    def days(self) -> np.ndarray:
        """Local calendar days, datetime64[D]; of the standard time where there is a time zone."""
        return np.arange(self.first_day, self.last_day + np.timedelta64(1, "D"), dtype="datetime64[D]")

    @property
    def steps(self) -> int:
        return len(self.days) * self.slots_per_day

    @property
    def minutes(self) -> np.ndarray:
        """UTC minutes since 1970-01-01 of every time step, int64 [T]."""
        midnight = self.first_day.astype("datetime64[m]").astype(np.int64) - self.utc_offset_minutes
        return midnight + np.arange(self.steps, dtype=np.int64) * self.cadence_minutes

    @property
    def local_days(self) -> DaySpan:
        """Local days of the wall clock, of which the first and the last may be there in part."""
        if self.timezone is None:
            return DaySpan(self.first_day, self.last_day)
        ends = self.minutes[[0, -1]].astype("datetime64[m]")
        return DaySpan(*wall_clock(ends, self.timezone).astype("datetime64[D]"))

    def attributes(self) -> dict[str, Any]:
        """The store's attributes that are known from the start."""
        known = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "city": self.city,
            "dims": list(self.dims),
            "channels": list(self.channels),
            "units": self.units,
            "cadence_minutes": self.cadence_minutes,
            "utc_offset_minutes": self.utc_offset_minutes,
            "first_day": str(self.first_day),
            "last_day": str(self.last_day),
        }
        return known if self.timezone is None else known | {"timezone": self.timezone}


@dataclass(frozen=True, eq=False)
class GridSpec(_Axes):
    """The axes and places of a grid, all that is known of its store before the first value.

    cell_ids: int64 [H, W], the data's own ids. rows, cols: the data's own row and column ids, int64 [H], [W];
    counted from 0 where None. inside: bool [H, W], False outside a city that is not a rectangle. latitude,
    longitude: float64 [H, W], cell centres. static: float32 [H, W] by name, what does not change with time
    (points of interest). timezone: IANA name; ``utc_offset_minutes`` is then that of its standard time, and days are
    of this. Raises InputError where cadence and days do not fit, or there is no such zone.
    """

    city: str
    channels: tuple[str, ...]
    first_day: np.datetime64
    last_day: np.datetime64
    cell_ids: np.ndarray
    cadence_minutes: int = 10
    utc_offset_minutes: int = 0
    units: str = UNKNOWN_UNITS
    rows: np.ndarray | None = None
    cols: np.ndarray | None = None
    inside: np.ndarray | None = None
    latitude: np.ndarray | None = None
    longitude: np.ndarray | None = None
    static: Mapping[str, np.ndarray] | None = None
    timezone: str | None = None

    dims = ("row", "col")

    @property
    def shape(self) -> tuple[int, int]:
        """(H, W)."""
        return self.cell_ids.shape[0], self.cell_ids.shape[1]


@dataclass(frozen=True, eq=False)
class NodeSpec(_Axes):
    """The axes, places and graph of N sensors or zones, all that is known of their store before the first value.

    node_ids: int64 or str [N], the data's own. latitude, longitude: float64 [N]. adjacency: float32 [N, N],
    weight from a node (row) to its neighbour. static: float32 [N] by name. since: datetime64[D] [N], first
    local day a node exists; what lies before is neither observed nor missing. timezone: as a grid's. Raises
    InputError where ids are repeated, shapes differ, or nodes that join would join by a clock that is changed.
    """

    city: str
    channels: tuple[str, ...]
    first_day: np.datetime64
    last_day: np.datetime64
    node_ids: np.ndarray
    cadence_minutes: int = 10
    utc_offset_minutes: int = 0
    units: str = UNKNOWN_UNITS
    latitude: np.ndarray | None = None
    longitude: np.ndarray | None = None
    adjacency: np.ndarray | None = None
    static: Mapping[str, np.ndarray] | None = None
    since: np.ndarray | None = None
    timezone: str | None = None

    def __post_init__(self) -> None:
        if self.node_ids.ndim != 1 or not len(self.node_ids):
            raise InputError(f"node ids of {self.city} have shape {self.node_ids.shape}; give one id a node")
        if self.node_ids.dtype.kind not in "iuU":
            raise ValueError(f"node ids of {self.city} are {self.node_ids.dtype}; make them int64 or str")
        super().__post_init__()
        unique, counts = np.unique(self.node_ids, return_counts=True)
        if (counts > 1).any():
            raise InputError(f"node id {unique[counts > 1][0]} of {self.city} occurs twice; give each node once")
        self._require_shape("adjacency", self.adjacency, (*self.shape, *self.shape))
        if self.since is not None and self.timezone is not None:
            raise InputError(f"nodes of {self.city} join on days of one clock; give an offset from UTC, not a timezone")

    dims = ("node",)

    @property
    def shape(self) -> tuple[int]:
        """(N,)."""
        return (len(self.node_ids),)


def observed_name(channel: str) -> str:
    return f"observed_{channel}"


def train_mean_name(channel: str) -> str:
    return f"train_mean_{channel}"


def chunk_and_shard(slots_per_day: int, shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Chunk and shard shapes of a (time, row, col) or (time, node) array.

    A chunk of at most 48 slots x 32 x 32 cells keeps a region's window small on disk, and still reads whole
    days at disk speed: smaller ones cost zarr more per chunk than they save (measured on a 100x100 grid:
    11 ms a day against 60 ms with 24 x 16 x 16). A shard is a whole number of chunks, so its side is rounded
    up. Along nodes both are as large as a grid's, 1024 and 65,536.
    """
    slots = next(n for n in range(min(48, slots_per_day), 0, -1) if slots_per_day % n == 0)
    chunk_side, tile_side = (CHUNK, TILE) if len(shape) == 2 else (CHUNK**2, TILE**2)
    sides = [min(chunk_side, side) for side in shape]
    shard = [-(-min(tile_side, side) // chunk) * chunk for side, chunk in zip(shape, sides, strict=True)]
    return (slots, *sides), (slots_per_day, *shard)


def tiles_of(slots_per_day: int, shape: tuple[int, ...]) -> list[Tile]:
    """The cells that each shard of a day holds, cut at the edge of space, in order."""
    _, shard = chunk_and_shard(slots_per_day, shape)
    axes = [
        [slice(start, min(start + step, side)) for start in range(0, side, step)]
        for side, step in zip(shape, shard[1:], strict=True)
    ]
    return list(product(*axes))


def fill_short_absences(present: np.ndarray, max_gap: int) -> np.ndarray:
    """Makes absent stretches of at most ``max_gap`` steps between present ones present (bool [T]).

    Their values are then missing ones, which Eq. 20 imputes; a longer stretch is a gap that ends a segment.
    """
    filled = present.copy()
    for start, stop in true_segments(~present):
        if start > 0 and stop < len(present) and stop - start <= max_gap:
            filled[start:stop] = True
    return filled


def true_segments(flags: np.ndarray) -> list[tuple[int, int]]:
    """Half-open [start, stop) of every stretch of True in bool [T]."""
    edges = np.diff(np.concatenate(([0], flags.astype(np.int8), [0])))
    return list(zip(np.flatnonzero(edges == 1).tolist(), np.flatnonzero(edges == -1).tolist(), strict=True))
