"""Readers of wide tables in CSV and Parquet: one row a time step, one column a cell or a node."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from math import isqrt
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from data_prep.common import GridPlace, city_of, only_source, utc_offset_of
from data_prep.graphs import SensorFiles, ids_of
from data_prep.preparation import Plan
from data_prep.reader import reader
from data_prep.steps import cadence_of, part_of, plan_of, slices_of_days, stamps_from, steps_of
from stdist.data import GridSpec, NodeSpec
from stdist.errors import InputError

CSV = """Reader of wide CSV files: one row a frame, one column a cell, one channel.

Columns are the cells row by row (column j is row j // W, column j % W of the grid); rows are consecutive
steps at the cadence. There is no header and no time column: the local stamp of the first row is given. A
blank field or NaN is a missing value; 0 is a measured zero; traffic is never negative. With ``--nodes`` columns
are nodes, which a header names.

An example is the public 5 x 5 block of the Telecom Italia grid of Milan: 4,320 rows x 25 columns, 10 minutes,
from 2013-11-01T00:00 local time, squares r * 100 + c + 1 with r and c in 41 … 45 (row 0 in the south).
One of nodes is the public week of METR-LA, los_speed.csv: 2,016 steps of 5 minutes from 2012-03-01 of 207 sensors,
mile/h, whose gaps were filled upstream, with los_adj.csv, weights (207, 207), and graph_sensor_locations.csv.
"""

PARQUET = """Reader of wide Parquet files: one row a frame, one column a cell or a node, one channel.

A column of stamps is the one column of type datetime (with a time zone it is turned to local time by the UTC
offset, else it is local); without one, rows are consecutive steps and the first stamp is given. Null or NaN is a
missing value, 0 a measured zero; traffic is never negative. Rows are in order of time; absent rows are gaps.

Cells of a grid: columns named by whole numbers are placed by these ids (``--row0``, ``--col0``, ``--id-width`` say
where the grid lies in them), or counted from 0; other names are taken row by row. Nodes (``--nodes``): the names are
the ids.

Rows are read in slices of whole days, at most ``SLICE_BYTES`` of values, each one part: memory is bounded by a slice
and the compressed row group it lies in, which every slice reads again, so write files with row groups of days.
"""

CADENCE = 10
"""Minutes, where nothing else is told: Telecom Italia's."""
SLICE_BYTES = 1 << 27
BLOCK_BYTES = 1 << 24
BLANKS = ["", "nan", "NaN", "NA"]


@dataclass(frozen=True, eq=False)
class Table:
    """A file before its values are read.

    names: of the columns of values. stamps: of the rows, local, datetime64[m] [T]. cadence: minutes. load:
    ``load(names, first, stop)``, numbers [stop - first, columns]. rows_at_once: how many may be read together;
    all of them where None. notes: for the recipe.
    """

    names: list[str]
    stamps: np.ndarray
    cadence: int
    load: Callable[[list[str], int, int], np.ndarray]
    rows_at_once: int | None = None
    notes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ColumnGrid(GridPlace):
    """Options: the grid whose cells the columns are. height, width: a square by default. row0, col0, id_width: where
    the grid lies in the data's own ids."""

    height: int | None = None
    width: int | None = None

    def shape(self, path: Path, columns: int) -> tuple[int, int]:
        """(H, W); InputError where the columns do not fit."""
        height, width = self.height, self.width
        if height is None and width is None:
            height = width = isqrt(columns)
            if height * width != columns:
                raise InputError(f"{path} has {columns} columns, which is no square grid; give --height and --width")
        shape = (height or columns // (width or 1), width or columns // (height or 1))
        if shape[0] * shape[1] != columns:
            raise InputError(f"{path} has {columns} columns, not {shape[0]} x {shape[1]}; check --height and --width")
        return shape


def _wide_reader(name: str, facts: str, open_table: Callable[[Path, str | None, int | None, int, bool], Table]) -> None:
    """Registers a reader. open_table: ``open_table(path, start, cadence, utc_offset, nodes)``."""

    @reader(name, facts)
    def plan(
        sources: list[Path],
        *,
        city: str | None = None,
        channel: str = "internet",
        start: str | None = None,
        cadence: int | None = None,
        utc_offset: int | None = None,
        nodes: bool = False,
        grid: ColumnGrid,
        sensors: SensorFiles,
    ) -> Plan:
        """Plan of one file.

        city: first word of the file name by default. start: local ISO time of the first row, required where the file
        has no stamps of its own. cadence: minutes between rows, by default 10, or as the file's stamps say. utc_offset:
        minutes (Milan and Trentino +60, others 0). nodes: columns are nodes, named by their ids. Raises
        InputError where the file is no table of numbers, stamps are off the grid, or an option does not fit the file.
        """
        path = only_source(sources, name)
        town = city or city_of(path)
        offset = utc_offset_of(town, utc_offset)
        table = open_table(path, start, cadence, offset, nodes)
        recipe = {"reader": name, "start": str(table.stamps[0]), **table.notes}
        names, files = table.names, list[Path]()
        spec: GridSpec | NodeSpec
        if nodes:
            described = sensors.nodes(ids_of(names))
            spec = described.spec(town, [channel], table.stamps, table.cadence, offset)
            recipe, files = recipe | described.notes, described.files
        elif sensors.adjacency or sensors.meta:
            option = "--adjacency" if sensors.adjacency else "--meta"
            raise InputError(f"{option} is for nodes; give --nodes too where columns are nodes")
        else:
            shape = grid.shape(path, len(names))
            cells = grid.spec(town, [channel], table.stamps, shape, cadence=table.cadence, utc_offset=offset)
            names, spec = _row_by_row(path, names, cells.cell_ids.reshape(-1)), cells
            recipe |= {"row0": grid.row0, "col0": grid.col0}
        steps = steps_of(path, spec, table.stamps)
        days_at_once = max(1, (table.rows_at_once or spec.steps) // spec.slots_per_day)
        parts = [
            part_of(spec, steps[a:b], partial(_load, channel, spec.shape, partial(table.load, names, a, b)), path)
            for a, b in slices_of_days(steps // spec.slots_per_day, days_at_once)
        ]
        return plan_of(spec, recipe, [path, *files], parts)


def _load(channel: str, shape: tuple[int, ...], load: Callable[[], np.ndarray]) -> dict[str, np.ndarray]:
    return {channel: load().reshape(-1, *shape)}


def _row_by_row(path: Path, names: list[str], ids: np.ndarray) -> list[str]:
    """The columns in the order of the grid's cells, whose ids are int64 [H * W]; names that are no numbers stay."""
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


def _open_csv(path: Path, start: str | None, cadence: int | None, _utc_offset: int, nodes: bool) -> Table:
    """The file is read at once. Raises InputError where rows differ in length, naming the first."""
    with path.open(encoding="utf-8", errors="replace") as file:
        names = [name.strip().strip('"') for name in file.readline().split(",")]
    rows = _require_columns(path, len(names)) - nodes
    if not rows:
        raise InputError(f"{path} holds no frame below its header; give a file that holds data")
    step = CADENCE if cadence is None else cadence
    stamps = stamps_from(path, start, rows, step, "2013-11-01T00:00", "time column")
    if not nodes:
        # The first line is a frame.
        names = [f"column {number}" for number in range(1, len(names) + 1)]
    return Table(names, stamps, step, partial(_load_csv, path, nodes), notes={"nodes": True} if nodes else {})


def _load_csv(path: Path, nodes: bool, names: list[str], _first: int, _stop: int) -> np.ndarray:
    """Raises InputError naming the first bad field; of nodes negative ones are named later, by time and node."""
    values = _read_numbers(path, len(names), header=nodes)
    negative = np.argwhere(values < 0)
    if len(negative) and not nodes:
        row, column = negative[0]
        raise InputError(
            f"{path}, row {row + 1}, column {column + 1}: traffic {values[row, column]} is negative "
            f"({len(negative)} such values); blank it if it means missing"
        )
    return values.astype(np.float32)


def _require_columns(path: Path, columns: int) -> int:
    """Number of lines; InputError naming the first line of a CSV file that has not ``columns`` fields.

    polars pads short rows silently. Whole blocks are counted first (330 MB in well under a second); only
    a file that fails is looked at line by line.
    """
    commas = lines = 0
    last = b"\n"
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            commas += block.count(b",")
            lines += block.count(b"\n")
            last = block[-1:]
    lines += last != b"\n"
    if lines == 0:
        raise InputError(f"{path} is empty; give a file that holds data")
    if commas != lines * (columns - 1):
        _require_even_lines(path, columns)
    return lines


def _require_even_lines(path: Path, columns: int) -> None:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if (fields := line.count(b",") + 1) != columns:
                raise InputError(
                    f"{path}, line {number}: {fields} columns instead of {columns}; "
                    "the row is broken or the file was cut short"
                )


def _read_numbers(path: Path, columns: int, header: bool) -> np.ndarray:
    """float64 [rows, columns] of a CSV, NaN where a field is blank; InputError names the first other that is no
    finite number. header: the first line is passed over."""
    schema = {f"column_{column}": pl.Float64 for column in range(1, columns + 1)}
    read = partial(pl.read_csv, path, has_header=False, skip_rows=int(header), null_values=BLANKS)
    try:
        values = read(schema=schema).to_numpy().astype(np.float64, copy=False)
        if not np.isinf(values).any():
            return values
    except pl.exceptions.PolarsError:
        _require_even_lines(path, columns)
    # As text, which costs more, but says what is wrong and where.
    text = read(infer_schema=False, encoding="utf8-lossy", quote_char=None).with_columns(pl.all().str.strip_chars())
    values = text.cast(pl.Float64, strict=False).to_numpy()
    wrong = np.argwhere(~np.isfinite(values) & ~text.select(pl.all().is_null() | pl.all().is_in(BLANKS)).to_numpy())
    if not len(wrong):
        return values
    row, column = wrong[0].tolist()
    line = row + 1 + header
    hint = "remove the header line" if line == 1 else "blank means missing"
    raise InputError(
        f"{path}, line {line}, column {column + 1}: {text[row, column][:40]!r} is not a finite number; {hint}"
    )


def _open_parquet(path: Path, start: str | None, cadence: int | None, utc_offset: int, _nodes: bool) -> Table:
    """Raises InputError where a column holds no numbers, or stamps are off the grid or out of order."""
    time_column, names = _columns(path)
    stamps = _stamps(path, time_column, start, cadence or CADENCE, utc_offset)
    step = cadence_of(path, stamps) if time_column else cadence or CADENCE
    if cadence not in (None, step):
        raise InputError(f"{path}: frames are {step} minutes apart, not {cadence}; check --cadence")
    return Table(names, stamps, step, partial(_load_parquet, path), max(1, SLICE_BYTES // (4 * len(names))))


def _load_parquet(path: Path, names: list[str], first: int, stop: int) -> np.ndarray:
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


_wide_reader("wide-csv", CSV, _open_csv)
_wide_reader("wide-parquet", PARQUET, _open_parquet)
