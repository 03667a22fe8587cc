"""Geometry files in the genuine format of the Telecom Italia grids."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

WEST, SOUTH = 10.45, 45.67
EAST_STEP, NORTH_STEP = 0.0129, 0.0090
CLIMB = 0.025
"""Rows climb northward, in squares per column, as Trentino's do: its projection's meridian lies west of it."""


def corner(row: float, col: float) -> tuple[float, float]:
    """Longitude and latitude of a point on a grid that is regular in its projection and oblique in degrees."""
    return WEST + EAST_STEP * (col - CLIMB * row), SOUTH + NORTH_STEP * (row + CLIMB * col + 1e-5 * col**2)


def write_geometry(path: Path, squares: Mapping[int, tuple[int, int]], crs: str = "urn:ogc:def:crs:EPSG::4326") -> Path:
    """Write squares, (row, col) by id, in the order given: rings run from the north-west clockwise."""
    features = [
        {
            "geometry": {
                "type": "Polygon",
                "coordinates": [
                    [corner(row + up, col + right) for up, right in ((1, 0), (1, 1), (0, 1), (0, 0), (1, 0))]
                ],
            },
            "type": "Feature",
            "id": index,
            "properties": {"cellId": number},
        }
        for index, (number, (row, col)) in enumerate(squares.items())
    ]
    named = {"type": "name", "properties": {"name": crs}}
    path.write_text(json.dumps({"crs": named, "type": "FeatureCollection", "features": features}))
    return path


def odd_city(seed: int = 0) -> dict[int, tuple[int, int]]:
    """24 squares of a 6 x 6 rectangle that no rule of their ids would place, in scrambled order.

    Ids skip, and run from the north; two squares hang on by a corner alone.
    """
    rng = np.random.default_rng(seed)
    inside = [(row, col) for row in range(1, 5) for col in range(1, 5)]
    inside += [(0, 0), (5, 5), (0, 1), (2, 0), (3, 5), (4, 5), (5, 2), (5, 3)]
    ids = np.sort(rng.choice(np.arange(38, 400), len(inside), replace=False))
    by_north = sorted(inside, key=lambda place: (-place[0], place[1]))
    squares = {int(number): place for number, place in zip(ids, by_north, strict=True)}
    return {int(number): squares[int(number)] for number in rng.permutation(ids)}
