"""NetCDF files and Zarr stores: their axes, which way they run, and their days, read in blocks of bounded size.

Axes are found by the CF conventions where the coordinates carry their attributes (axis, standard_name, units), else by
the usual names. North-first rows and east-first columns are found by their coordinates.
"""

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xarray

from data_prep.kinds import kind_of, refuse_kind
from data_prep.steps import require_traffic, slices_of_days, slots_filled
from data_prep.xarray_missing import never_written, open_decoded
from stdist.data import Day, Part
from stdist.data.parts import Tile
from stdist.data.schema import MINUTES_PER_DAY
from stdist.errors import InputError, is_damage

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


@dataclass(frozen=True)
class AxisOptions:
    """Options: names of the axes. time_dim, row_dim, col_dim: names of the axes; found by CF attributes and usual names
    by default. node_dim: axis of sensors, where the data is no grid."""

    time_dim: str | None = None
    row_dim: str | None = None
    col_dim: str | None = None
    node_dim: str | None = None

    def find_time(self, path: Path, data: xarray.Dataset) -> str:
        """The axis of time; InputError where it is not told or its coordinate holds no plain dates."""
        dims = [str(dim) for dim in data.dims]
        _require_dim(path, data, "--time-dim", self.time_dim)
        times = [self.time_dim] if self.time_dim else [dim for dim in dims if axis_of(data, dim) == "T"]
        if len(times) != 1:
            raise InputError(f"{path} has axes {', '.join(dims) or 'none'}; say which is time with --time-dim")
        (time,) = times
        if time not in data.coords or data[time].dtype.kind != "M":
            kind = data[time].dtype if time in data.coords else "no coordinate"
            raise InputError(f"{path}: axis {time} has {kind} for stamps; give dates (CF units of time)")
        return time

    def find_space(self, path: Path, array: xarray.DataArray, time: str) -> tuple[str, ...]:
        """(row, col) or (node,) of a variable; axes of length 1 are passed over. InputError where it is not told."""
        row_dim, col_dim, node_dim = self.row_dim, self.col_dim, self.node_dim
        for option, dim in (("--row-dim", row_dim), ("--col-dim", col_dim), ("--node-dim", node_dim)):
            _require_dim(path, array, option, dim)
        if node_dim and (row_dim or col_dim):
            raise InputError("--node-dim is for sensors, --row-dim and --col-dim for a grid; give one kind")
        axes = {str(dim): axis_of(array, dim) for dim in array.dims if dim != time}
        dims = [d for d in axes if array.sizes[d] > 1 or d in (row_dim, col_dim, node_dim) or axes[d] in ("Y", "X")]
        space: tuple[str, ...]
        message = f"{path}: {array.name} has axes {', '.join(map(str, array.dims))}"
        if node_dim or (len(dims) == 1 and not (row_dim or col_dim)):
            space, what = (node_dim or dims[0],), "a node has one series"
        else:
            row = row_dim or _only(dims, axes, "Y", col_dim)
            col = col_dim or _only(dims, axes, "X", row_dim)
            if len(dims) == 2:
                row, col = row or _only(dims, {}, None, col), col or _only(dims, {}, None, row)
            if row is None or col is None or row == col:
                raise InputError(
                    f"{message}; say which are rows and columns with --row-dim and --col-dim, or --node-dim"
                )
            space, what = (row, col), "a grid has rows and columns only"
        if others := [dim for dim in dims if dim not in space]:
            raise InputError(f"{message}; choose one {others[0]} first, {what}")
        return space


def runs_backwards(data: xarray.Dataset, dim: str, axis: str) -> bool:
    """True where an axis runs from north to south (``Y``) or from east to west (``X``), by its coordinates.

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
        is_place = coordinate.attrs.get("standard_name") == standard or str(name).lower() in names
        if is_place and coordinate.dtype.kind in "fiu" and (dims is None or set(coordinate.dims) <= set(dims)):
            return coordinate
    return None


def _only(dims: list[str], axes: dict[str, str | None], axis: str | None, taken: str | None) -> str | None:
    """The only dimension along an axis that is not taken."""
    free = [dim for dim in dims if axes.get(dim) == axis and dim != taken]
    return free[0] if len(free) == 1 else None


def _require_dim(path: Path, data: xarray.Dataset | xarray.DataArray, option: str, dim: str | None) -> None:
    if dim and dim not in data.dims:
        raise InputError(f"{path} has no axis {dim!r} of {option}; it has {', '.join(map(str, data.dims))}")


BUDGET = 192 << 20
"""Bytes of values held at once, as float32, where a tile does not need more."""


@dataclass(frozen=True, eq=False)
class SourceReader:
    """Reads the days of a part, all of space where that fits the budget, else tile by tile.

    files: path and number of time steps, in order of time. lacking: path and variable, of those that may lack chunks. A
    part's payload: its first row of all files together, and the local stamps of its rows, datetime64[m] [n].
    """

    files: tuple[tuple[Path, int], ...]
    axes: Axes
    variables: tuple[str, ...]
    channels: tuple[str, ...]
    shape: tuple[int, ...]
    tiles: tuple[Tile, ...]
    cadence: int
    lacking: frozenset[tuple[Path, str]] = frozenset()

    def read(self, part: Part) -> Iterator[Day]:
        start, stamps = part.payload
        slots = MINUTES_PER_DAY // self.cadence
        space = tuple(slice(0, side) for side in self.shape)
        size = 4 * len(self.channels) * len(part.days) * slots * np.prod(self.shape)
        for box in [space] if size <= BUDGET else self.tiles:
            block = self._read(start, stamps, box)
            days = slices_of_days(stamps.astype("datetime64[D]"))
            for day, (first, last) in zip(part.days, days, strict=True):
                for tile in self.tiles if box == space else [box]:
                    inner = tuple(slice(t.start - b.start, t.stop - b.start) for t, b in zip(tile, box, strict=True))
                    cuts = {channel: values[(slice(first, last), *inner)] for channel, values in block.items()}
                    yield Day(
                        day, *slots_filled(cuts, stamps[first:last], slots), tile if len(self.tiles) > 1 else None
                    )

    def _read(self, start: int, stamps: np.ndarray, box: Tile) -> dict[str, np.ndarray]:
        """Per channel float32 [n, *box] of the rows from ``start`` on of all files together."""
        values: dict[str, list[np.ndarray]] = {channel: [] for channel in self.channels}
        before, stop = 0, start + len(stamps)
        for path, steps in self.files:
            first, last = max(start - before, 0), min(stop - before, steps)
            if first < last:
                of_file = stamps[before + first - start : before + last - start]
                with opened(path) as data:
                    for channel, variable in zip(self.channels, self.variables, strict=True):
                        values[channel].append(self._cut(path, data[variable], slice(first, last), box, of_file))
            before += steps
        return {name: blocks[0] if len(blocks) == 1 else np.concatenate(blocks) for name, blocks in values.items()}

    def _cut(self, path: Path, array: xarray.DataArray, time: slice, box: Tile, stamps: np.ndarray) -> np.ndarray:
        """float32 [n, *box] in the store's order, NaN outside the valid range."""
        axes = self.axes
        where: dict[str, slice | int] = {str(dim): 0 for dim in array.dims} | {axes.time: time}
        for dim, length, side, flipped in zip(axes.space, self.shape, box, axes.flipped, strict=True):
            where[dim] = slice(length - side.stop, length - side.start) if flipped else side
        try:
            cut = array.isel(where).astype(np.float32)
            if (path, array.name) in self.lacking:
                unwritten = never_written(path, str(array.name), [where[str(dim)] for dim in array.dims])
                cut = cut if unwritten is None else cut.where(~unwritten)
            read = cut.transpose(*axes.dims).values
        except (OSError, RuntimeError, ValueError) as error:
            if not is_damage(error):
                raise
            raise InputError(f"{path}: {array.name} is damaged ({_first_line(error)}); fetch the file again") from error
        read = read[(slice(None), *reversal(axes.flipped))]
        low, high = valid_range(array)
        if np.isfinite([low, high]).any():
            read = np.where((read < low) | (read > high), np.float32(np.nan), read)
        if low >= 0 or np.isneginf(low):
            corner = ", ".join(str(side.start) for side in box)
            require_traffic(read, f"{path}: {array.name}, counted from cell {corner} of the store,", stamps)
        return read


def valid_range(array: xarray.DataArray) -> tuple[float, float]:
    """Bounds outside of which a value is missing (CF 2.5.1); infinite where not told.

    Of packed variables the attributes are packed too, unless they are fractions where the file has whole numbers.
    """
    low, high = array.attrs.get("valid_range", (-np.inf, np.inf))
    low, high = array.attrs.get("valid_min", low), array.attrs.get("valid_max", high)
    scale, offset = array.encoding.get("scale_factor", 1), array.encoding.get("add_offset", 0)
    packed = np.dtype(array.encoding.get("dtype", float)).kind in "iu"
    bounds = [
        float(value) if packed and np.asarray(value).dtype.kind == "f" else float(value) * scale + offset
        for value in (low, high)
    ]
    return min(bounds), max(bounds)


@contextmanager
def opened(path: Path) -> Iterator[xarray.Dataset]:
    """A NetCDF 4 file or a Zarr store, lazily; InputError where it is neither, or damaged."""
    if not path.exists():
        raise InputError(f"{path} does not exist; give a NetCDF file or a Zarr store")
    if path.is_file() and (kind := kind_of(path)) not in ("hdf5", "text"):
        refuse_kind(path, kind)
    try:
        data = open_decoded(path)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        if not is_damage(error):
            raise
        kind = "Zarr store" if path.is_dir() else "NetCDF 4 file"
        raise InputError(f"{path} is no {kind}, or is damaged ({_first_line(error)}); check it") from error
    with data:
        yield data


def reversal(flipped: Sequence[bool]) -> tuple[slice, ...]:
    return tuple(slice(None, None, -1 if back else None) for back in flipped)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:120]
