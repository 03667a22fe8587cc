"""Reader of wide Parquet files: one row a frame, one column a cell or a node, one channel.

A column of stamps is the one column of type datetime (with a time zone it is turned to local time by the UTC
offset, else it is local); without one, rows are consecutive frames and the first stamp is given. Null or NaN is a
missing value, 0 a measured zero; traffic is never negative. Rows are in order of time; absent rows are gaps.

Cells of a grid: columns named by whole numbers are placed by these ids (``--row0``, ``--col0``, ``--id-width`` say
where the grid lies in them), or counted from 0; other names are taken row by row. Nodes (``--nodes``): the names are
the ids.

Rows are read in slices of whole days, at most ``SLICE_BYTES`` of values, each one part: memory is bounded by a slice
and the compressed row group it lies in, which every slice reads again, so write files with row groups of days.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from data_prep.arrays import local_times, require_traffic
from data_prep.common import (
    city_of,
    days_of_frames,
    grid_spec,
    only_source,
    parse_split,
    parse_start,
    require_on_grid,
    utc_offset_of,
)
from data_prep.graphs import ids_of
from data_prep.plan import Day, Part, Plan
from data_prep.sensors import read_graph
from data_prep.stamps import cadence_of, rows_of_days
from data_prep.wide_csv import grid_shape
from stdist.data.schema import GridSpec, NodeSpec
from stdist.errors import InputError

SLICE_BYTES = 1 << 27
CADENCE = 10


@dataclass(frozen=True, eq=False)
class SliceReader:
    """Days of a slice of rows; a part's payload is its first row and the frame index of each of its rows.

    ``columns``: names of the value columns, in the order of the store's space.
    """

    spec: GridSpec | NodeSpec
    path: Path
    columns: tuple[str, ...]

    def __call__(self, part: Part) -> Iterator[Day]:
        spec, (first_row, frames) = self.spec, part.payload
        cells = [pl.col(name).cast(pl.Float32) for name in self.columns]
        table = _collect(self.path, pl.scan_parquet(self.path).select(cells).slice(first_row, len(frames)))
        values = table.to_numpy().astype(np.float32, copy=False).reshape(len(frames), *spec.shape)
        times = local_times(spec, frames)
        require_traffic(values, f"{self.path}: {spec.channels[0]}", times)
        return days_of_frames(spec, times, {spec.channels[0]: values})


def plan(
    sources: list[Path],
    *,
    city: str | None = None,
    channel: str = "internet",
    start: str | None = None,
    cadence: int | None = None,
    utc_offset: int | None = None,
    height: int | None = None,
    width: int | None = None,
    row0: int = 0,
    col0: int = 0,
    id_width: int | None = None,
    nodes: bool = False,
    adjacency: Path | None = None,
    train: str | None = None,
    validation: str | None = None,
    test: str | None = None,
) -> Plan:
    """Plan of one file, a part for every slice of days; options that are not said here are those of ``wide_csv.plan``.

    start: local ISO time of the first row, only where the file has no column of stamps. cadence: minutes, the
    shortest step between stamps by default, 10 without stamps. nodes: columns are nodes, named by their ids.
    adjacency: graph of the nodes (``sensors.read_graph``). Raises InputError where a column holds no numbers, where
    stamps are off the grid or out of order, or an option does not fit.
    """
    path = only_source(sources, "wide-parquet")
    town = city or city_of(path)
    offset = utc_offset_of(town, utc_offset)
    time_column, names = _columns(path)
    stamps = _stamps(path, time_column, start, cadence or CADENCE, offset)
    step = cadence_of(path, stamps) if time_column else cadence or CADENCE
    if cadence not in (None, step):
        raise InputError(f"{path}: frames are {step} minutes apart, not {cadence}; check --cadence")
    require_on_grid(path, stamps, step)
    days = stamps[0].astype("datetime64[D]"), stamps[-1].astype("datetime64[D]")
    recipe: dict[str, Any] = {"reader": "wide-parquet", "start": str(stamps[0])}
    spec: GridSpec | NodeSpec
    if nodes:
        ids = ids_of(names)
        weights, notes = read_graph(adjacency, ids) if adjacency else (None, {})
        recipe |= notes
        spec = NodeSpec(town, (channel,), *days, ids, step, offset, adjacency=weights)
    else:
        if adjacency:
            raise InputError("--adjacency is for nodes; give --nodes too where columns are nodes")
        spec = grid_spec(
            town,
            [channel],
            days,
            grid_shape(path, len(names), height, width),
            cadence=step,
            utc_offset=offset,
            row0=row0,
            col0=col0,
            id_width=id_width,
        )
        names = _row_by_row(path, names, spec.cell_ids.reshape(-1))
        recipe |= {"row0": row0, "col0": col0}
    split = parse_split(train, validation, test, spec)
    files = [path, *([Path(adjacency)] if adjacency else [])]
    return Plan(spec, recipe, files, split, _parts(spec, stamps, len(names)), SliceReader(spec, path, tuple(names)))


def _columns(path: Path) -> tuple[str | None, list[str]]:
    """The column of stamps, None where there is none, and the columns of values."""
    try:
        schema = pl.scan_parquet(path).collect_schema()
    except (pl.exceptions.PolarsError, OSError) as error:
        raise InputError(f"{path} is no Parquet file, or was cut short; write it again") from error
    times = [name for name, kind in schema.items() if kind == pl.Datetime]
    if len(times) > 1:
        raise InputError(f"{path} has {len(times)} columns of stamps ({', '.join(times)}); keep one")
    names = [name for name in schema if name not in times]
    wrong = next((name for name in names if not schema[name].is_numeric()), None)
    if wrong is not None:
        raise InputError(f"{path}: column {wrong!r} is {schema[wrong]}, not numbers; drop it, or make it a datetime")
    if not names:
        raise InputError(f"{path} has no column of values; give a wide table, one column a cell")
    return (times[0] if times else None), names


def _stamps(path: Path, column: str | None, start: str | None, cadence: int, utc_offset: int) -> np.ndarray:
    """Local stamps of the rows, datetime64[m] [T]."""
    if column is None:
        if start is None:
            raise InputError(f"{path} has no column of stamps; give its first row's time: --start 2013-11-01T00:00")
        rows = _collect(path, pl.scan_parquet(path).select(pl.len())).item()
        if rows == 0:
            raise InputError(f"{path} holds no row; give a file that holds data")
        return parse_start(start) + np.arange(rows) * np.timedelta64(cadence, "m")
    if start is not None:
        raise InputError(f"{path} has stamps of its own in column {column!r}; leave --start out")
    series = _collect(path, pl.scan_parquet(path).select(column)).to_series()
    if series.null_count():
        raise InputError(f"{path}, row {int(series.is_null().arg_max() or 0) + 1}: no stamp; drop the row or fill it")
    zone = getattr(series.dtype, "time_zone", None)
    stamps = series.dt.convert_time_zone("UTC").dt.replace_time_zone(None) if zone else series
    exact = stamps.to_numpy()
    minutes = exact.astype("datetime64[m]")
    if (minutes != exact).any():
        raise InputError(f"{path}: stamp {exact[minutes != exact][0]} is not a whole minute; round the stamps")
    return minutes + np.timedelta64(utc_offset, "m") if zone else minutes


def _row_by_row(path: Path, names: list[str], ids: np.ndarray) -> list[str]:
    """The columns in the order of the grid's cells, whose ids are int64 [H * W]."""
    numbers = ids_of(names)
    if numbers.dtype.kind != "i":
        return names
    by_number = dict(zip(numbers.tolist(), names, strict=True))
    for expected in (ids.tolist(), list(range(len(names)))):
        if set(expected) == set(by_number):
            return [by_number[number] for number in expected]
    raise InputError(
        f"{path}: columns are named {names[0]} … {names[-1]}, the grid's ids are {ids[0]} … {ids[-1]}; "
        "check --row0, --col0, --id-width and --width"
    )


def _parts(spec: GridSpec | NodeSpec, stamps: np.ndarray, columns: int) -> list[Part]:
    """Slices of whole days, as many as ``SLICE_BYTES`` hold, at least one."""
    frames = (stamps - spec.first_day.astype("datetime64[m]")).astype(np.int64) // spec.cadence_minutes
    rows_at_once = SLICE_BYTES // (4 * columns)
    slices: list[list[tuple[int, int, int]]] = []
    for local_day, first, stop in rows_of_days(stamps):
        day = int((local_day - spec.first_day).astype(int))
        if not slices or stop - slices[-1][0][1] > rows_at_once:
            slices.append([])
        slices[-1].append((day, first, stop))
    return [
        Part(
            f"{spec.days[rows[0][0]]}",
            tuple(day for day, _, _ in rows),
            (rows[0][1], frames[rows[0][1] : rows[-1][2]]),
        )
        for rows in slices
    ]


def _collect(path: Path, frame: pl.LazyFrame) -> pl.DataFrame:
    try:
        return frame.collect()
    except (pl.exceptions.PolarsError, OSError) as error:
        raise InputError(f"{path} is damaged ({str(error).splitlines()[0]}); write it again") from error
