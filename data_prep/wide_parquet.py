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

from functools import partial
from pathlib import Path

import numpy as np
import polars as pl

from data_prep.common import city_of, only_source, utc_offset_of, with_spans
from data_prep.frames import cadence_of, frames_of, part_of, plan_of, slices_of_days, stamps_from
from data_prep.graphs import ids_of
from data_prep.plan import Plan
from data_prep.wide_columns import Columns
from stdist.data.schema import GridSpec
from stdist.errors import InputError

SLICE_BYTES = 1 << 27
CADENCE = 10


@with_spans
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
) -> Plan:
    """Plan of one file, a part for every slice of days; options that are not said here are those of ``wide_csv.plan``.

    start: local ISO time of the first row, only where the file has no column of stamps. cadence: minutes, the
    shortest step between stamps by default, 10 without stamps. nodes: columns are nodes, named by their ids.
    adjacency: graph of the nodes (``graphs.read_graph``). Raises InputError where a column holds no numbers, where
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
    columns = Columns(height, width, row0, col0, id_width, nodes, adjacency)
    spec, notes, files = columns.spec(path, names, stamps, town, channel, step, offset)
    if isinstance(spec, GridSpec):
        names = _row_by_row(path, names, spec.cell_ids.reshape(-1))
    frames = frames_of(path, spec, stamps)
    days_at_once = max(1, SLICE_BYTES // (4 * len(names) * spec.slots_per_day))
    parts = [
        part_of(spec, frames[first:stop], partial(_load, path, channel, names, spec.shape, first, stop), path)
        for first, stop in slices_of_days(frames // spec.slots_per_day, days_at_once)
    ]
    return plan_of(spec, {"reader": "wide-parquet", "start": str(stamps[0]), **notes}, [path, *files], parts)


def _load(
    path: Path, channel: str, names: list[str], shape: tuple[int, ...], first: int, stop: int
) -> dict[str, np.ndarray]:
    """Rows [first, stop) of the columns, in the order of the store's space."""
    cells = [pl.col(name).cast(pl.Float32) for name in names]
    table = _collect(path, pl.scan_parquet(path).select(cells).slice(first, stop - first))
    return {channel: table.to_numpy().reshape(-1, *shape)}


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
        rows = _collect(path, pl.scan_parquet(path).select(pl.len())).item()
        if rows == 0:
            raise InputError(f"{path} holds no row; give a file that holds data")
        return stamps_from(path, start, rows, cadence, "2013-11-01T00:00", "column of stamps")
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


def _collect(path: Path, frame: pl.LazyFrame) -> pl.DataFrame:
    try:
        return frame.collect()
    except (pl.exceptions.PolarsError, OSError) as error:
        raise InputError(f"{path} is damaged ({str(error).splitlines()[0]}); write it again") from error
