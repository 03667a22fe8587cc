"""Squares of a city from a GeoJSON file: where each lies on the grid, from the corners it shares with others.

The format is that of the Telecom Italia grids: one Polygon of four corners a square, in EPSG:4326 (longitude,
latitude), ids in ``properties.cellId``, features in any order. Rows and columns are followed from square to
square: the grid is regular in the survey's projection, not in degrees (Trentino's rows climb by several squares
from west to east), so that neither ids nor degrees can be divided into rows.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stdist.errors import InputError, is_damage

DECIMALS = 7
"""Corners that agree to these decimals of a degree, a centimetre, are one."""
CORNERS = ((0, 0), (0, 1), (1, 1), (1, 0))
"""(row, col) of the corners of a square at (0, 0): south-west, south-east, north-east, north-west."""


@dataclass(frozen=True, eq=False)
class Geometry:
    """N squares. ids: int64 [N], ascending. rows, cols: int64 [N], from 0 in the south and in the west.
    latitude, longitude: float64 [N], centres in degrees.
    """

    path: Path
    ids: np.ndarray
    rows: np.ndarray
    cols: np.ndarray
    latitude: np.ndarray
    longitude: np.ndarray

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the smallest grid that holds all squares."""
        return int(self.rows.max()) + 1, int(self.cols.max()) + 1

    def on_grid(self, values: np.ndarray, outside: float) -> np.ndarray:
        """Values [N] of the squares as [H, W], ``outside`` where no square is."""
        grid = np.full(self.shape, outside, values.dtype)
        grid[self.rows, self.cols] = values
        return grid


def read_geometry(path: Path) -> Geometry:
    """Read a GeoJSON file of squares.

    Raises InputError where it is none, is not in degrees, repeats an id, or where its squares do not join up
    to one grid.
    """
    features = _features(Path(path))
    corners = np.array([_corners(path, number, feature) for number, feature in features.items()])
    ids = np.array(list(features), np.int64)
    place = _places(path, ids, corners)
    place -= place.min(axis=0)
    together, counts = np.unique(place, axis=0, return_counts=True)
    if (counts > 1).any():
        twice = ids[(place == together[counts > 1][0]).all(axis=1)]
        raise InputError(f"{path}: squares {twice[0]} and {twice[1]} lie on one another; the file is damaged")
    order = np.argsort(ids)
    centre = corners.mean(axis=1)[order]
    rows, cols = place[order].T
    return Geometry(Path(path), ids[order], rows, cols, latitude=centre[:, 1], longitude=centre[:, 0])


def require_orientation(geometry: Geometry, ids: np.ndarray) -> None:
    """Raise InputError where the squares do not lie as ``ids`` (int64 [H, W], row 0 south, column 0 west) do.

    The line says what is flipped: rows, columns, both, or rows and columns exchanged.
    """
    drawn = geometry.on_grid(geometry.ids, -1)
    if np.array_equal(drawn, ids):
        return
    if not np.array_equal(geometry.ids, np.sort(ids, axis=None)):
        raise InputError(
            f"{geometry.path} has {len(geometry.ids)} squares, ids {geometry.ids[0]} … {geometry.ids[-1]}, not the "
            f"{ids.size} squares {ids.min()} … {ids.max()}; give the city's own geometry"
        )
    turned = {
        "row 0 lies in the north": ids[::-1],
        "column 0 lies in the east": ids[:, ::-1],
        "row 0 lies in the north and column 0 in the east": ids[::-1, ::-1],
        "rows and columns are exchanged": ids.T,
    }
    what = next((what for what, flipped in turned.items() if np.array_equal(drawn, flipped)), None)
    if what is None:
        rows, cols = np.unravel_index(np.argsort(ids, axis=None), ids.shape)
        wrong = np.flatnonzero((geometry.rows != rows) | (geometry.cols != cols))[0]
        what = f"square {geometry.ids[wrong]} lies in row {geometry.rows[wrong]}, column {geometry.cols[wrong]}"
    raise InputError(
        f"{geometry.path}: {what}, while ids run from the south-west eastward; give the city's own geometry"
    )


def _features(path: Path) -> dict[int, Any]:
    """Geometry objects by square id."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
        features = content["features"]
        named = content.get("crs", {}).get("properties", {}).get("name", "CRS84")
    except OSError as error:
        if not is_damage(error):
            raise
        raise InputError(f"{path} is not a file; give the GeoJSON file of the city's squares") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is no GeoJSON of features, or was cut short; fetch the file again") from error
    if not named.endswith(("4326", "CRS84")):
        raise InputError(f"{path} is in {named}; give longitude and latitude, EPSG:4326")
    squares: dict[int, Any] = {}
    for index, feature in enumerate(features):
        try:
            number, geometry = int(feature["properties"]["cellId"]), feature["geometry"]
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path}: feature {index} has no properties.cellId or no geometry") from error
        if number in squares or number < 0:
            what = "occurs twice" if number in squares else "is negative"
            raise InputError(f"{path}: square {number} {what}; the file is damaged")
        squares[number] = geometry
    if not squares:
        raise InputError(f"{path} holds no square; give the GeoJSON file of the city's squares")
    return squares


def _corners(path: Path, number: int, geometry: Any) -> np.ndarray:
    """float64 [4, 2], longitude and latitude, in the order of ``CORNERS``."""
    problem = f"{path}: square {number} is no polygon of four corners in degrees"
    try:
        ring = np.array(geometry["coordinates"][0], float)
        if geometry["type"] != "Polygon" or len(geometry["coordinates"]) != 1 or ring.shape != (5, 2):
            raise InputError(problem)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise InputError(problem) from error
    if not (np.abs(ring) <= (180, 90)).all():
        raise InputError(f"{problem}; coordinates are longitude and latitude, EPSG:4326")
    corners = ring[:4]
    east, north = ((corners - corners.mean(axis=0)) / np.maximum(np.ptp(corners, axis=0), 1e-12)).T
    order = [(east + north).argmin(), (east - north).argmax(), (east + north).argmax(), (east - north).argmin()]
    if sorted(order) != [0, 1, 2, 3]:
        raise InputError(problem)
    return corners[order]


def _places(path: Path, ids: np.ndarray, corners: np.ndarray) -> np.ndarray:
    """(row, col) of every square relative to the first, int64 [N, 2], from square to square by shared corners."""
    points = [[(x, y) for x, y in square] for square in np.round(corners, DECIMALS).tolist()]
    holders: dict[tuple[float, float], list[tuple[int, int]]] = {}
    for square, around in enumerate(points):
        for corner, point in enumerate(around):
            holders.setdefault(point, []).append((square, corner))
    place = {0: (0, 0)}
    left = [0]
    while left:
        square = left.pop()
        row, col = place[square]
        for point, (up, right) in zip(points[square], CORNERS, strict=True):
            for other, corner in holders[point]:
                shared = row + up - CORNERS[corner][0], col + right - CORNERS[corner][1]
                if other not in place:
                    left.append(other)
                if place.setdefault(other, shared) != shared:
                    raise InputError(
                        f"{path}: squares {ids[square]} and {ids[other]} do not fit one grid; the file is damaged"
                    )
    lost = np.setdiff1d(np.arange(len(ids)), list(place))
    if len(lost):
        raise InputError(
            f"{path}: squares {ids[0]} and {ids[lost[0]]} are not joined by squares that share corners, so their rows "
            "and columns are unknown; give the file of the whole city"
        )
    return np.array([place[square] for square in range(len(ids))], np.int64)
