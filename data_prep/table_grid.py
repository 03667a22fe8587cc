"""Places of a table as cells of a grid: by their ids, by a geometry, or row by row."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import isqrt
from pathlib import Path

import numpy as np

from data_prep.common import GridPlace, utc_offset_of
from data_prep.geometry import read_geometry
from data_prep.graphs import ids_of
from stdist.data import GridSpec
from stdist.errors import InputError

OUTSIDE = -1
CELL = ","
"""Between row and column of a cell that a table names so."""
GRID_CELL = rf"-?\d+{CELL}-?\d+"


@dataclass(frozen=True, eq=False)
class Contents:
    """The contents of a table that a grid is made of: ids of its places, channels, and local stamps, datetime64[m] [T],
    ``cadence`` minutes apart. ``label`` names the table in errors."""

    label: str
    places: Sequence[str]
    city: str
    channels: Sequence[str]
    stamps: np.ndarray
    cadence: int
    utc_offset: int
    units: str


@dataclass(frozen=True)
class PlacedGrid(GridPlace):
    """Options: a grid whose cells the places are; one of these options makes a grid of them. height, width: its rows
    and columns, a square by default. row0, col0, id_width: where the grid lies in the data's own ids. geometry: GeoJSON
    file of the squares, as milano-grid.geojson, which places them by their ids."""

    height: int | None = None
    width: int | None = None
    geometry: Path | None = None

    @property
    def asked(self) -> bool:
        return self != PlacedGrid()

    def placed(self, table: Contents) -> tuple[GridSpec, np.ndarray]:
        """The spec, and the place of each cell as a position in ``table.places``, -1 where it has none, int64 [H · W].

        Raises InputError where places are no cells of the grid.
        """
        if self.geometry is not None:
            if self != PlacedGrid(geometry=self.geometry):
                raise InputError("--geometry tells rows and columns itself; leave the other options of a grid out")
            return self._by_geometry(table)
        if all(re.fullmatch(GRID_CELL, name) for name in table.places):
            around, numbers = self._by_row_and_column([*table.places])
            return around.placed(replace(table, places=numbers))
        shape = self._shape(table.label, len(table.places))
        spec = self.spec(
            *(table.city, table.channels, table.stamps, shape),
            cadence=table.cadence,
            utc_offset=table.utc_offset,
            units=table.units,
        )
        return spec, self._cells(table.label, table.places, spec.cell_ids.reshape(-1))

    def _by_row_and_column(self, names: list[str]) -> tuple["PlacedGrid", list[str]]:
        """The grid around cells that are named by row and column, and their numbers in it, counted from 0."""
        cells = np.array([[int(part) for part in name.split(CELL)] for name in names])
        (row0, col0), (rows, cols) = cells.min(axis=0), np.ptp(cells, axis=0) + 1
        height, width = self.height or int(rows), self.width or int(cols)
        grid = replace(self, row0=int(row0), col0=int(col0), height=height, width=width)
        if width < cols or height < rows:
            raise InputError(f"cells span {rows} rows and {cols} columns, not {height} x {width}; check both")
        return grid, [str(number) for number in ((cells - cells.min(axis=0)) @ (width, 1)).tolist()]

    def _shape(self, path: Path | str, places: int) -> tuple[int, int]:
        """(H, W); InputError where the places are too many, or too few to be told."""
        height, width = self.height, self.width
        if any(side is not None and side < 1 for side in (height, width)):
            raise InputError(f"a grid of {height} x {width} has no cell; check --height and --width")
        if height is None and width is None:
            height = width = isqrt(places)
            if height * width != places:
                raise InputError(f"{path} has {places} columns, which is no square grid; give --height and --width")
        shape = (height or places // (width or 1), width or places // (height or 1))
        if places > shape[0] * shape[1] or (None in (self.height, self.width) and places != shape[0] * shape[1]):
            raise InputError(f"{path} has {places} columns, not {shape[0]} x {shape[1]}; check --height and --width")
        return shape

    def _cells(self, path: Path | str, names: Sequence[str], ids: np.ndarray) -> np.ndarray:
        """By ids where names are whole numbers, counted as the grid's ids or from 0; else as they stand."""
        numbers = ids_of([*names])
        if numbers.dtype.kind == "i":
            position = {number: place for place, number in enumerate(numbers.tolist())}
            counted = len(names) != len(ids) and sorted(position) == list(range(len(names)))
            for expected in (ids.tolist(), [] if counted else list(range(len(ids)))):
                if set(position) <= set(expected):
                    return np.array([position.get(number, -1) for number in expected])
        if len(names) != len(ids):
            raise InputError(
                f"{path}: {len(names)} places for {len(ids)} cells, and their ids ({names[0]} … {names[-1]}) do not "
                "say which; check --height and --width"
            )
        if numbers.dtype.kind == "i":
            raise InputError(
                f"{path}: columns are named {names[0]} … {names[-1]}, the grid's ids are {ids[0]} … {ids[-1]}; "
                "check --row0, --col0, --id-width and --width"
            )
        return np.arange(len(names))

    def _by_geometry(self, table: Contents) -> tuple[GridSpec, np.ndarray]:
        assert self.geometry is not None
        squares = read_geometry(self.geometry)
        position = {name: place for place, name in enumerate(table.places)}
        known = set(map(str, squares.ids.tolist()))
        if stranger := next((name for name in table.places if name not in known), None):
            raise InputError(
                f"{table.label}: place {stranger!r} is no square of {self.geometry}; give the city's own geometry"
            )
        ids = squares.on_grid(squares.ids, OUTSIDE)
        spec = GridSpec(
            city=table.city,
            channels=tuple(table.channels),
            first_day=table.stamps.min().astype("datetime64[D]"),
            last_day=table.stamps.max().astype("datetime64[D]"),
            cell_ids=ids,
            cadence_minutes=table.cadence,
            utc_offset_minutes=utc_offset_of(table.city, table.utc_offset),
            units=table.units,
            inside=squares.on_grid(squares.ids >= 0, False),
            latitude=squares.on_grid(squares.latitude, np.nan),
            longitude=squares.on_grid(squares.longitude, np.nan),
        )
        return spec, np.array([position.get(str(number), -1) for number in ids.reshape(-1).tolist()])
