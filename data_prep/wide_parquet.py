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

from data_prep.frames import cadence_of, stamps_from
from data_prep.wide import CADENCE, Table, wide_reader
from stdist.errors import InputError

SLICE_BYTES = 1 << 27


def _table(path: Path, start: str | None, cadence: int | None, utc_offset: int, _nodes: bool) -> Table:
    """Raises InputError where a column holds no numbers, or stamps are off the grid or out of order."""
    time_column, names = _columns(path)
    stamps = _stamps(path, time_column, start, cadence or CADENCE, utc_offset)
    step = cadence_of(path, stamps) if time_column else cadence or CADENCE
    if cadence not in (None, step):
        raise InputError(f"{path}: frames are {step} minutes apart, not {cadence}; check --cadence")
    return Table(names, stamps, step, partial(_load, path), max(1, SLICE_BYTES // (4 * len(names))))


def _load(path: Path, names: list[str], first: int, stop: int) -> np.ndarray:
    cells = [pl.col(name).cast(pl.Float32) for name in names]
    return _collect(path, pl.scan_parquet(path).select(cells).slice(first, stop - first)).to_numpy()


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


def _collect(path: Path, frame: pl.LazyFrame) -> pl.DataFrame:
    try:
        return frame.collect()
    except (pl.exceptions.PolarsError, OSError) as error:
        raise InputError(f"{path} is damaged ({str(error).splitlines()[0]}); write it again") from error


plan = wide_reader("wide-parquet", _table)
