"""The header of a file of forecasts, and the blocks in which the values are read and written: cuts of windows and of
regions that bound what is in memory, however many there are."""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TypeVar

import numpy as np
from jaxtyping import Bool, Float, Shaped

from stdist.data.spans import AnyRegion, NodeRange, Region
from stdist.errors import InputError
from stdist.evaluation.contract import ForecastMetadata, parsed

QUANTILES = (0.1, 0.5, 0.9)
"""Levels of the quantiles that a forecaster's own candidates have."""
METADATA_KEY = "stdist"
RegionKind = TypeVar("RegionKind", bound=AnyRegion)
POINTS_IN_MEMORY = 2**20
"""Values (window, step, cell) that are read together, and written together unless one window has more."""

ReadWindows = Callable[[slice], Float[np.ndarray, "quantity n K *cells"]]
"""Returns n consecutive windows: the point forecast, then the quantiles if there are any."""

ReadBlock = Callable[[slice, AnyRegion, bool], Float[np.ndarray, "quantity n K *cells"]]
"""Returns n consecutive windows of a tile of the region: the point forecast, then, if asked for, the quantiles."""


@dataclass(frozen=True, eq=False)
class ForecastHeader:
    """All that a file of forecasts says beside the values, of N windows, K steps and the cells of one region.

    ``origins`` are the UTC stamps (datetime64[ns]) of the last history frames; step k (from 1) is the value k frames
    later. ``levels``, rising: of the quantiles beside the point forecast, none by default. ``local_targets``: the
    targets by the city's clock; a file that is read need not tell them. Values are in the data's units; cells nobody
    forecast (outside the city, or not asked for) are NaN.
    """

    metadata: ForecastMetadata
    origins: Shaped[np.ndarray, " N"]
    cell_ids: Shaped[np.ndarray, "*cells"]
    levels: tuple[float, ...] = ()
    local_targets: Shaped[np.ndarray, "N K"] | None = None

    @property
    def region(self) -> AnyRegion:
        edges = self.metadata.contract.region
        return NodeRange(*edges) if len(edges) == 2 else Region(*edges)

    @property
    def dims(self) -> tuple[str, ...]:
        """Names of the axes of ``shape``."""
        return ("origin", "step", *(("node",) if len(self.region.shape) == 1 else ("row", "col")))

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, K, h, w) of a grid, (N, K, n) of nodes."""
        return len(self.origins), self.metadata.contract.K, *self.region.shape

    @property
    def asked(self) -> Bool[np.ndarray, "*cells"]:
        """True for the places that were to be forecast: all, or those that the contract names."""
        places = self.metadata.contract.places
        return np.ones(self.cell_ids.shape, bool) if places is None else np.isin(self.cell_ids, places)

    @property
    def quantities(self) -> int:
        """Values a point in time and space has: the point forecast, and the quantiles."""
        return 1 + len(self.levels)

    @property
    def targets(self) -> Shaped[np.ndarray, "N K"]:
        """UTC stamps (datetime64[ns]) of what is forecast."""
        cadence = np.timedelta64(self.metadata.contract.cadence_seconds, "s")
        return self.origins.astype("datetime64[ns]")[:, None] + cadence * np.arange(1, self.shape[1] + 1)

    @property
    def block(self) -> tuple[int, ...]:
        """(n, K, rows, cols) or (n, K, nodes) in memory together: ``POINTS_IN_MEMORY`` at most, while K is not more."""
        windows, k, *cells = self.shape
        together = POINTS_IN_MEMORY // max(1, k * math.prod(cells))
        return max(1, min(windows, together)), k, *tile_shape(tuple(cells), POINTS_IN_MEMORY // k)

    def blocks(self) -> Iterator[tuple[slice, AnyRegion]]:
        """All windows and cells, block by block: every window of one tile, then of the next."""
        size, k, *_ = self.block
        for tile in tiles(self.region, POINTS_IN_MEMORY // k):
            yield from ((windows, tile) for windows in cut(self.shape[0], size))

    def place(self, windows: slice, tile: AnyRegion) -> tuple[slice, ...]:
        """The index of a block in an array of ``shape``."""
        pairs = zip(tile.slices, self.region.slices, strict=True)
        return windows, slice(None), *(slice(t.start - r.start, t.stop - r.start) for t, r in pairs)


def read_metadata(text: str | None, path: Path) -> ForecastMetadata:
    """The metadata that the file ``path`` carries under ``METADATA_KEY``. Raises InputError where there is none."""
    if text is None:
        raise InputError(f"{path}: carries no contract, so it was not written by stdist; it cannot be scored")
    try:
        content = json.loads(text)
    except ValueError as error:
        raise InputError(f"{path}: its contract is no JSON ({error}); make the forecasts again") from None
    return parsed(ForecastMetadata, content, f"{path}: its contract", "make the forecasts again")


def cut(length: int, size: int) -> list[slice]:
    """Consecutive stretches of ``size``; the last one may be shorter."""
    return [slice(first, min(first + size, length)) for first in range(0, length, size)]


def tile_shape(shape: tuple[int, ...], cells: int) -> tuple[int, ...]:
    """Sides of a tile of at most ``cells`` cells (at least one): of a grid about a square, all about alike."""
    if len(shape) == 1:
        return (_even(shape[0], cells),)
    height, width = shape
    rows = _even(height, max(math.isqrt(cells), cells // width))
    return rows, _even(width, cells // rows)


def tiles(region: RegionKind, cells: int) -> list[RegionKind]:
    """``region`` in tiles of at most ``cells`` cells, row by row."""
    sides = [
        [(axis.start + side_cut.start, axis.start + side_cut.stop) for side_cut in cut(axis.stop - axis.start, side)]
        for axis, side in zip(region.slices, tile_shape(region.shape, cells), strict=True)
    ]
    return [type(region)(*(edge for edges in tile for edge in edges)) for tile in product(*sides)]


def _even(length: int, most: int) -> int:
    """The size of as few parts of ``length`` as ``most`` allows, all about alike."""
    parts = -(-length // max(1, most))
    return -(-length // parts)
