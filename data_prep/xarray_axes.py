"""Which axes of a NetCDF or Zarr data set are time and space, which way they run, and where the cells lie.

By the CF conventions where the coordinates carry their attributes (axis, standard_name, units), else by the usual
names. North-first rows and east-first columns are found by their coordinates.
"""

from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xarray

from stdist.errors import InputError

NAMES = {
    "T": ("time", "t", "datetime", "date"),
    "Y": ("lat", "latitude", "y", "row", "rows", "northing", "south_north", "nlat"),
    "X": ("lon", "long", "longitude", "lng", "x", "col", "cols", "column", "easting", "west_east", "nlon"),
}
STANDARD = {
    "T": ("time",),
    "Y": ("latitude", "projection_y_coordinate", "grid_latitude"),
    "X": ("longitude", "projection_x_coordinate", "grid_longitude"),
}
UNITS = {"degrees_north": "Y", "degree_north": "Y", "degrees_east": "X", "degree_east": "X"}
LATITUDE, LONGITUDE = NAMES["Y"][:2], NAMES["X"][:4]


@dataclass(frozen=True)
class Axes:
    """Names of the axes: time, then (row, col) or (node,). flipped: per axis of space, whether it is reversed."""

    time: str
    space: tuple[str, ...]
    flipped: tuple[bool, ...]

    @property
    def dims(self) -> tuple[str, ...]:
        return (self.time, *self.space)


def axis_of(data: xarray.Dataset | xarray.DataArray, dim: Hashable) -> str | None:
    """``T``, ``Y`` or ``X`` by the coordinate's CF attributes, else by the dimension's name; None where neither."""
    if dim in data.coords:
        coordinate = data[dim]
        if coordinate.attrs.get("axis") in NAMES:
            return coordinate.attrs["axis"]
        for axis, names in STANDARD.items():
            if coordinate.attrs.get("standard_name") in names:
                return axis
        if coordinate.dtype.kind == "M":
            return "T"
        if coordinate.attrs.get("units") in UNITS:
            return UNITS[coordinate.attrs["units"]]
    return next((axis for axis, names in NAMES.items() if str(dim).lower() in names), None)


def find_time(path: Path, data: xarray.Dataset, time_dim: str | None) -> str:
    """The axis of time; InputError where it is not told or its coordinate holds no plain dates."""
    dims = [str(dim) for dim in data.dims]
    _require_dim(path, data, "--time-dim", time_dim)
    found = [time_dim] if time_dim else [dim for dim in dims if axis_of(data, dim) == "T"]
    if len(found) != 1:
        raise InputError(f"{path} has axes {', '.join(dims) or 'none'}; say which is time with --time-dim")
    (time,) = found
    if time not in data.coords or data[time].dtype.kind != "M":
        kind = data[time].dtype if time in data.coords else "no coordinate"
        raise InputError(f"{path}: axis {time} has {kind} for stamps; give dates (CF units of time)")
    return time


def find_space(
    path: Path, array: xarray.DataArray, time: str, row_dim: str | None, col_dim: str | None, node_dim: str | None
) -> tuple[str, ...]:
    """(row, col) or (node,) of a variable; axes of length 1 are passed over. InputError where it is not told."""
    for option, dim in (("--row-dim", row_dim), ("--col-dim", col_dim), ("--node-dim", node_dim)):
        _require_dim(path, array, option, dim)
    if node_dim and (row_dim or col_dim):
        raise InputError("--node-dim is for sensors, --row-dim and --col-dim for a grid; give one kind")
    axes = {str(dim): axis_of(array, dim) for dim in array.dims if dim != time}
    dims = [d for d in axes if array.sizes[d] > 1 or d in (row_dim, col_dim, node_dim) or axes[d] in ("Y", "X")]
    space: tuple[str, ...]
    where = f"{path}: {array.name} has axes {', '.join(map(str, array.dims))}"
    if node_dim or (len(dims) == 1 and not (row_dim or col_dim)):
        space, what = (node_dim or dims[0],), "a node has one series"
    else:
        row = row_dim or _one(dims, axes, "Y", col_dim)
        col = col_dim or _one(dims, axes, "X", row_dim)
        if len(dims) == 2:
            row, col = row or _one(dims, {}, None, col), col or _one(dims, {}, None, row)
        if row is None or col is None or row == col:
            raise InputError(f"{where}; say which are rows and columns with --row-dim and --col-dim, or --node-dim")
        space, what = (row, col), "a grid has rows and columns only"
    if others := [dim for dim in dims if dim not in space]:
        raise InputError(f"{where}; choose one {others[0]} first, {what}")
    return space


def runs_backwards(data: xarray.Dataset, dim: str, axis: str) -> bool:
    """Whether an axis runs from north to south (``Y``) or from east to west (``X``), by its coordinates.

    Those of the dimension itself where they are numbers along a CF or usually named axis, else two-dimensional
    latitudes or longitudes. An axis that nothing tells runs as it should: rows from the south, columns from the
    west.
    """
    names = LATITUDE if axis == "Y" else LONGITUDE
    if dim in data.coords and axis_of(data, dim) == axis:
        coordinate = np.asarray(data[dim].values)
        if coordinate.dtype.kind in "fiu" and len(coordinate) > 1:
            return bool(coordinate[0] > coordinate[-1])
    degrees = place(data, names, None)
    if degrees is not None and degrees.ndim == 2 and dim in degrees.dims:
        steps = degrees.diff(dim).values
        return bool(np.nanmean(steps) < 0) if steps.size else False
    return False


def place(data: xarray.Dataset, names: tuple[str, ...], dims: tuple[str, ...] | None) -> xarray.DataArray | None:
    """The coordinate of latitude or longitude, by standard name or usual name, with exactly ``dims`` where given."""
    standard = "latitude" if names == LATITUDE else "longitude"
    for name, coordinate in data.coords.items():
        known = coordinate.attrs.get("standard_name") == standard or str(name).lower() in names
        if known and coordinate.dtype.kind in "fiu" and (dims is None or set(coordinate.dims) <= set(dims)):
            return coordinate
    return None


def _one(dims: list[str], axes: dict[str, str | None], axis: str | None, taken: str | None) -> str | None:
    """The only dimension along an axis that is not taken."""
    found = [dim for dim in dims if axes.get(dim) == axis and dim != taken]
    return found[0] if len(found) == 1 else None


def _require_dim(path: Path, data: xarray.Dataset | xarray.DataArray, option: str, dim: str | None) -> None:
    if dim and dim not in data.dims:
        raise InputError(f"{path} has no axis {dim!r} of {option}; it has {', '.join(map(str, data.dims))}")
