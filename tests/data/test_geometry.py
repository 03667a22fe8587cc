"""Squares of a city from their polygons: rows and columns, orientation, and files that are broken."""

import json

import numpy as np
import pytest

from data_prep.common import cell_ids
from data_prep.geometry import read_geometry, require_orientation
from stdist.errors import InputError


def test_rows_and_columns_come_from_the_polygons(geometry_files, tmp_path):
    """No rectangle, ids that skip, features in any order, and rows that climb by more than a square."""
    squares = geometry_files.odd_city()
    geometry = read_geometry(geometry_files.write_geometry(tmp_path / "grid.geojson", squares))
    assert geometry.shape == (6, 6) and geometry.ids.tolist() == sorted(squares)
    assert list(zip(geometry.rows.tolist(), geometry.cols.tolist(), strict=True)) == [squares[i] for i in geometry.ids]
    centres = np.array([geometry_files.corner(row + 0.5, col + 0.5) for row, col in (squares[i] for i in geometry.ids)])
    np.testing.assert_allclose(np.stack((geometry.longitude, geometry.latitude), 1), centres, atol=1e-6)
    assert (geometry.on_grid(geometry.ids, -1) >= 0).sum() == 24


def test_a_wide_oblique_grid_is_followed_and_not_rounded(geometry_files, tmp_path):
    """Over 120 columns rows climb by more than three squares, as in Trentino: no threshold of latitude is a row."""
    squares = {r * 120 + c: (r, c) for r in range(4) for c in range(120)}
    geometry = read_geometry(geometry_files.write_geometry(tmp_path / "grid.geojson", squares))
    assert geometry_files.corner(0, 120)[1] > geometry_files.corner(3, 0)[1]
    assert np.array_equal(geometry.on_grid(geometry.ids, -1), np.arange(480).reshape(4, 120))


@pytest.mark.parametrize(
    ("place", "what"),
    [
        (lambda r, c: (3 - r, c), "row 0 lies in the north, while"),
        (lambda r, c: (r, 4 - c), "column 0 lies in the east"),
        (lambda r, c: (3 - r, 4 - c), "row 0 lies in the north and column 0 in the east"),
        (lambda r, c: (c, r), "rows and columns are exchanged"),
        (lambda r, c: (r, (c + r) % 5), r"square 6 lies in row 1, column 1"),
    ],
)
def test_what_is_flipped_is_said(geometry_files, tmp_path, place, what):
    ids = cell_ids(4, 5, 0, 0, 5)
    right = {int(ids[r, c]): (r, c) for r in range(4) for c in range(5)}
    require_orientation(read_geometry(geometry_files.write_geometry(tmp_path / "right.geojson", right)), ids)
    turned = {number: place(*at) for number, at in right.items()}
    geometry = read_geometry(geometry_files.write_geometry(tmp_path / "turned.geojson", turned))
    with pytest.raises(InputError, match=what) as error:
        require_orientation(geometry, ids)
    assert "turned.geojson" in str(error.value) and "\n" not in str(error.value)


def test_squares_of_another_city_are_no_orientation(geometry_files, tmp_path):
    geometry = read_geometry(geometry_files.write_geometry(tmp_path / "grid.geojson", geometry_files.odd_city()))
    with pytest.raises(InputError, match=r"24 squares, ids \d+ … \d+, not the 20 squares 1 … 20"):
        require_orientation(geometry, cell_ids(4, 5, 0, 0, 5))


def _edited(path, edit):
    content = json.loads(path.read_text())
    edit(content["features"])
    path.write_text(json.dumps(content))


def _move(feature, by):
    ring = feature["geometry"]["coordinates"][0]
    feature["geometry"]["coordinates"] = [[[x + by, y] for x, y in ring]]


@pytest.mark.parametrize(
    ("edit", "line"),
    [
        (lambda f: f.append(f[0]), "square 1 occurs twice"),
        (lambda f: f[0]["properties"].clear(), "feature 0 has no properties.cellId"),
        (lambda f: f.clear(), "holds no square"),
        (lambda f: _move(f[0], 3.0), "squares 1 and 2 are not joined"),
        (lambda f: _move(f[0], 400.0), "square 1 .*longitude and latitude"),
        (lambda f: f[0]["geometry"]["coordinates"][0].pop(1), "square 1 is no polygon of four corners"),
        (lambda f: f[0].update(geometry=None), "square 1 is no polygon of four corners"),
        (lambda f: f[1].update(geometry=f[0]["geometry"]), "squares 1 and 2 lie on one another"),
        # A corner that two squares claim for different places.
        (
            lambda f: f[3]["geometry"]["coordinates"][0].__setitem__(1, f[0]["geometry"]["coordinates"][0][3]),
            "square 4 is no polygon of four corners|do not fit one grid",
        ),
    ],
)
def test_broken_geometries_are_one_line(geometry_files, tmp_path, edit, line):
    path = geometry_files.write_geometry(tmp_path / "grid.geojson", {i + 1: divmod(i, 2) for i in range(4)})
    _edited(path, edit)
    with pytest.raises(InputError, match=line) as error:
        read_geometry(path)
    assert "grid.geojson" in str(error.value) and "\n" not in str(error.value)


def test_other_files_are_refused(geometry_files, tmp_path):
    path = geometry_files.write_geometry(tmp_path / "grid.geojson", geometry_files.odd_city())
    cut = tmp_path / "cut.geojson"
    cut.write_text(path.read_text()[:500])
    projected = geometry_files.write_geometry(
        tmp_path / "utm.geojson", geometry_files.odd_city(), crs="urn:ogc:def:crs:EPSG::32632"
    )
    for source, line in (
        (cut, "cut short"),
        (projected, "EPSG::32632"),
        (tmp_path / "absent.geojson", "is not a file"),
    ):
        with pytest.raises(InputError, match=line):
            read_geometry(source)
