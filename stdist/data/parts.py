"""Units of work of a preparation, the days that a reader yields of them, and their results."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Tile = tuple[slice, ...]
"""One slice per axis of space, with start and stop: the cells that one shard of a day holds."""


@dataclass(frozen=True, eq=False)
class Day:
    """One local day, of the whole space or of one tile of it.

    index: days since the store's first. values: per channel float32 [slots_per_day, *shape], NaN = missing;
    ``shape`` is the tile's where there is one. present: bool [slots_per_day], time steps that the source has; all
    of them by default. tile: one of ``spec.tiles()``, so that a large raster never is in memory as a whole.
    """

    index: int
    values: dict[str, np.ndarray]
    present: np.ndarray | None = None
    tile: Tile | None = None


@dataclass(frozen=True)
class Part:
    """Whole shards that no other part touches: a unit of work for one process. Picklable.

    name: unlike any other part's. days: indices of the local days it may yield; one that it does not yield
    holds no frame. payload: for its reader. tiles: the tiles it writes, all of them by
    default.
    """

    name: str
    days: tuple[int, ...]
    payload: Any = None
    tiles: tuple[Tile, ...] | None = None


@dataclass(frozen=True, eq=False)
class PartResult:
    """The result of a finished part.

    name: the part's. files: bytes and sha256 of every file it wrote, by name within the store. result: for
    whoever asked for the part.
    """

    name: str
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    result: Any = None


RunPart = Callable[[Part], PartResult]
"""Picklable."""

Executor = Callable[[RunPart, list[Part]], Iterator[PartResult]]
"""Runs every part once, anywhere, and yields the results in order of completion."""
