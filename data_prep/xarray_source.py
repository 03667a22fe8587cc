"""Reader of NetCDF 4 files and Zarr stores through xarray: rasters (time, row, col) or sensors (time, node).

What is made of it, by the CF conventions: stamps are UTC; ``_FillValue`` and ``missing_value`` are missing, and so
is what lies outside ``valid_min``, ``valid_max`` or ``valid_range``, and what is in no chunk that was written (the fill
value 0 that Zarr 2 has by default is no ``_FillValue``, and masks nothing); ``scale_factor`` and ``add_offset`` are
applied; ``units`` go into the store. NaN is missing, 0 is measured. Traffic is never negative: a negative value is
refused, unless the variable's own valid range says that it may be. A stamp that is absent is a time step that does
not exist. Row 0 of the store is the SOUTH and column 0 the WEST: axes that run the other way, as the rows of most
rasters do, are reversed (recipe: ``reversed``). Cells are numbered row by row from there, from 1.

Memory is bounded by what a day's tile holds, not by the raster: a day is read whole where it fits ``BUDGET``, else
tile by tile.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xarray

from data_prep.common import STORE_NAMES, Clock, city_of
from data_prep.graphs import Nodes
from data_prep.preparation import Plan
from data_prep.reader import reader
from data_prep.steps import cadence_of, slices_of_days, whole_minutes
from data_prep.xarray_missing import may_lack_chunks
from data_prep.xarray_reading import (
    BUDGET,
    LATITUDE,
    LONGITUDE,
    Axes,
    AxisOptions,
    SourceReader,
    opened,
    place,
    reversal,
    runs_backwards,
)
from stdist.data import GridSpec, NodeSpec, Part
from stdist.data.schema import FORMAT, UNKNOWN_UNITS
from stdist.errors import InputError


@reader("xarray")
def plan(
    sources: list[Path],
    *,
    city: str | None = None,
    variable: str | None = None,
    clock: Clock,
    axis_names: AxisOptions,
) -> Plan:
    """Plan of one data set, or of several that follow one another in time; reads coordinates only.

    city: first word of the file name by default. variable: names, ``a,b``; all numeric ones by default.
    Stamps are in UTC.
    Raises InputError where a file is damaged, an axis or variable is not found, files do not fit each other, or
    stamps are repeated, irregular, or off the grid that begins at local midnight.
    """
    if not sources:
        raise InputError("xarray reads NetCDF files or Zarr stores, none given")
    files = [_inspect(Path(source), variable, axis_names) for source in sources]
    files.sort(key=lambda file: file.stamps[0])
    first = files[0]
    for file in files[1:]:
        if not file.fits(first):
            raise InputError(f"{file.path} has not the variables, axes and places of {first.path}; prepare it apart")
    utc = np.concatenate([file.stamps for file in files])
    town = city or city_of(first.path)
    # Without an offset UTC is the clock of any city.
    stamps, utc_offset = (clock if clock.timezone else Clock(clock.utc_offset or 0)).of_utc(town, utc)
    cadence = cadence_of(first.path if len(files) == 1 else first.path.parent, stamps)
    spec = _spec(first, town, stamps, cadence, utc_offset)
    recipe = {
        "reader": "xarray",
        "variables": list(first.variables),
        "axes": list(first.axes.dims),
        "reversed": [dim for dim, flipped in zip(first.axes.space, first.axes.flipped, strict=True) if flipped],
    }
    reader = SourceReader(
        files=tuple((file.path, len(file.stamps)) for file in files),
        axes=first.axes,
        variables=first.variables,
        channels=spec.channels,
        shape=spec.shape,
        tiles=tuple(spec.tiles()),
        cadence=cadence,
        lacking=frozenset((f.path, name) for f in files for name in f.variables if may_lack_chunks(f.path, name)),
    )
    return Plan(spec, recipe, [file.path for file in files], None, _parts(spec, stamps, first.chunk), reader.read)


@dataclass(frozen=True, eq=False)
class Source:
    """A file or store before its values are read.

    stamps: UTC, datetime64[m] [T]. latitude, longitude: of cells or nodes, or None. ids: of nodes or, per axis, of
    rows and columns, where they are whole numbers or text. chunk: time steps of a chunk on disk.
    """

    path: Path
    stamps: np.ndarray
    chunk: int
    variables: tuple[str, ...]
    axes: Axes
    shape: tuple[int, ...]
    units: str
    latitude: np.ndarray | None
    longitude: np.ndarray | None
    ids: tuple[np.ndarray | None, ...]

    def fits(self, other: "Source") -> bool:
        """True where the two are of one store."""
        ours, theirs = (
            (p.variables, p.axes.dims, p.axes.flipped, p.shape, p.units, p.latitude, p.longitude, *p.ids)
            for p in (self, other)
        )
        return all(np.array_equal(mine, their) for mine, their in zip(ours, theirs, strict=False))  # type: ignore[arg-type]


def _inspect(path: Path, variable: str | None, axis_names: AxisOptions) -> Source:
    with opened(path) as data:
        if data.attrs.get("format") == FORMAT:
            raise InputError(f"{path} is a grid store already; use it as it is")
        time = axis_names.find_time(path, data)
        arrays = _variables(path, data, time, variable)
        spaces = {axis_names.find_space(path, array, time): str(array.name) for array in arrays}
        if len(spaces) != 1:
            holds = " and ".join(f"{name} over ({', '.join(space)})" for space, name in spaces.items())
            raise InputError(f"{path} holds {holds}; choose those of one store with --variable")
        (space,) = spaces
        flipped: tuple[bool, ...] = (False,)
        if len(space) == 2:
            flipped = tuple(runs_backwards(data, dim, way) for dim, way in zip(space, ("Y", "X"), strict=True))
        axes = Axes(time, space, flipped)
        units = {str(array.name): str(array.attrs.get("units", UNKNOWN_UNITS)) for array in arrays}
        kinds = [*units.values()] if len({*units.values()}) == 1 else [f"{name}: {u}" for name, u in units.items()]
        return Source(
            path=path,
            stamps=whole_minutes(path, data[time].values),
            chunk=max(int(array.encoding.get("preferred_chunks", {}).get(time, 1)) for array in arrays),
            variables=tuple(units),
            axes=axes,
            shape=tuple(data.sizes[dim] for dim in space),
            units=", ".join(dict.fromkeys(kinds)),
            latitude=_degrees(data, LATITUDE, axes),
            longitude=_degrees(data, LONGITUDE, axes),
            ids=tuple(_ids(data, dim, back) for dim, back in zip(space, flipped, strict=True)),
        )


def _variables(path: Path, data: xarray.Dataset, time: str, variable: str | None) -> list[xarray.DataArray]:
    """The variables named, or all numeric ones along time and space that are no bounds of a coordinate."""
    bounds = {c.attrs.get("bounds", c.encoding.get("bounds")) for c in data.coords.values()}
    numeric = [
        str(name)
        for name, array in data.data_vars.items()
        if array.dtype.kind in "fiu" and time in array.dims and array.ndim > 1 and name not in bounds
    ]
    names = [name.strip() for name in variable.split(",")] if variable else numeric
    for name in names:
        if name not in numeric:
            raise InputError(f"{path} has no variable {name!r} of numbers over {time}; it has {', '.join(numeric)}")
    if not names:
        raise InputError(f"{path} holds no variable of numbers over {time} and space; check the file")
    return [data[name] for name in names]


def _degrees(data: xarray.Dataset, names: tuple[str, ...], axes: Axes) -> np.ndarray | None:
    """float64 [*shape] in the store's order."""
    degrees = place(data, names, axes.space)
    if degrees is None:
        return None
    space = xarray.DataArray(np.zeros([data.sizes[dim] for dim in axes.space]), dims=axes.space)
    cells, _ = xarray.broadcast(degrees, space)
    return np.asarray(cells.transpose(*axes.space).values, np.float64)[reversal(axes.flipped)]


def _ids(data: xarray.Dataset, dim: str, flipped: bool) -> np.ndarray | None:
    if dim not in data.coords:
        return None
    ids = np.asarray(data[dim].values)
    if ids.dtype.kind in "OSTU":
        ids = np.array([name.decode() if isinstance(name, bytes) else str(name) for name in ids.tolist()])
    elif ids.dtype.kind not in "iu":
        return None
    return ids[:: -1 if flipped else 1]


def _spec(file: Source, city: str, stamps: np.ndarray, cadence: int, utc_offset: int) -> GridSpec | NodeSpec:
    channels = tuple(re.sub(r"\W+", "_", name) for name in file.variables)
    if len(set(channels) - STORE_NAMES) != len(channels):
        raise InputError(f"{file.path}: variables {', '.join(file.variables)} clash with each other or the store's own")
    if len(file.shape) == 1:
        ids = np.arange(file.shape[0]) if file.ids[0] is None else file.ids[0]
        nodes = Nodes(ids, file.latitude, file.longitude)
        return nodes.spec(city, channels, stamps, cadence, utc_offset, file.units)
    rows, cols = (None if ids is None or ids.dtype.kind == "U" else ids.astype(np.int64) for ids in file.ids)
    return GridSpec(
        city=city,
        channels=channels,
        first_day=stamps[0].astype("datetime64[D]"),
        last_day=stamps[-1].astype("datetime64[D]"),
        cell_ids=1 + np.arange(np.prod(file.shape)).reshape(file.shape),
        cadence_minutes=cadence,
        utc_offset_minutes=utc_offset,
        units=file.units,
        rows=rows,
        cols=cols,
        latitude=file.latitude,
        longitude=file.longitude,
    )


def _parts(spec: GridSpec | NodeSpec, stamps: np.ndarray, chunk: int) -> list[Part]:
    """One part a day that has time steps; of more days where a chunk on disk holds several and they fit the budget.

    payload: the first row of all sources together, and the rows' stamps.
    """
    days = (stamps.astype("datetime64[D]") - spec.first_day).astype(int)
    tile = max(int(np.prod([s.stop - s.start for s in tile])) for tile in spec.tiles())
    most = BUDGET // (4 * tile * spec.slots_per_day * len(spec.channels))
    together = max(1, min(chunk // spec.slots_per_day, most))
    return [
        Part(str(spec.days[days[start]]), tuple(np.unique(days[start:stop]).tolist()), (start, stamps[start:stop]))
        for start, stop in slices_of_days(days, together)
    ]
