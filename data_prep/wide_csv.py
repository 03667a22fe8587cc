"""Reader of wide CSV files: one row a frame, one column a cell, one channel.

Columns are the cells row by row (column j is row j // W, column j % W of the grid); rows are consecutive
frames at the cadence. There is no header and no time column: the local stamp of the first row is given. A
blank field or NaN is a missing value; 0 is a measured zero; traffic is never negative. With ``--nodes`` columns
are nodes, which a header names (``wide_nodes``).

An example is the public 5 x 5 block of the Telecom Italia grid of Milan: 4,320 rows x 25 columns, 10 minutes,
from 2013-11-01T00:00 local time, squares r * 100 + c + 1 with r and c in 41 … 45 (row 0 in the south).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import isqrt
from pathlib import Path

import numpy as np
import polars as pl

from data_prep.arrays import consecutive_days
from data_prep.common import city_of, grid_spec, only_source, parse_split, parse_start, require_on_grid
from data_prep.plan import Day, Part, Plan
from data_prep.text import explain_failure, require_columns
from data_prep.wide_nodes import plan_nodes
from stdist.data import GridSpec
from stdist.errors import InputError

BLANKS = ("", "nan", "NaN", "NA")


def plan(
    sources: list[Path],
    *,
    city: str | None = None,
    channel: str = "internet",
    start: str | None = None,
    cadence: int = 10,
    utc_offset: int | None = None,
    height: int | None = None,
    width: int | None = None,
    row0: int = 0,
    col0: int = 0,
    id_width: int | None = None,
    nodes: bool = False,
    adjacency: Path | None = None,
    meta: Path | None = None,
    train: str | None = None,
    validation: str | None = None,
    test: str | None = None,
) -> Plan:
    """Plan of one file, read in one part.

    start: local ISO time of the first row, required. city: first word of the file name by default. cadence
    and utc_offset in minutes (Milan and Trentino +60, others 0). height, width: a square by default. row0,
    col0, id_width: where the grid lies in the data's own ids. nodes: columns are nodes, which the first line names.
    adjacency: weights or road distances between nodes (``sensors.read_graph``). meta: places of the nodes
    (``sensors.read_locations``). train, validation, test: local days ``A:B``.
    Raises InputError where rows differ in length, naming the first, or options do not fit the file.
    """
    path = only_source(sources, "wide-csv")
    if start is None:
        raise InputError(f"{path} has no time column; give the local time of its first row: --start 2013-11-01T00:00")
    if nodes:
        spans = train, validation, test
        return plan_nodes(path, city or city_of(path), channel, start, cadence, utc_offset, adjacency, meta, spans)
    if adjacency or meta:
        raise InputError("--adjacency and --meta are for nodes; give --nodes too where columns are nodes")
    columns = _columns(path)
    rows = require_columns(path, ",", columns)
    shape = grid_shape(path, columns, height, width)
    first = parse_start(start)
    stamps = first + np.arange(rows) * np.timedelta64(cadence, "m")
    spec = grid_spec(
        city or city_of(path),
        [channel],
        (first.astype("datetime64[D]"), stamps[-1].astype("datetime64[D]")),
        shape,
        cadence=cadence,
        utc_offset=utc_offset,
        row0=row0,
        col0=col0,
        id_width=id_width,
    )
    require_on_grid(path, stamps, cadence)
    recipe = {"reader": "wide-csv", "start": str(first), "row0": row0, "col0": col0}
    split = parse_split(train, validation, test, spec)
    slot = int((first - spec.first_day).astype("timedelta64[m]").astype(int)) // cadence
    part = Part(path.name, tuple(range(len(spec.days))))
    return Plan(spec, recipe, [path], split, [part], _Reader(spec, path, slot))


@dataclass(frozen=True, eq=False)
class _Reader:
    """first: frame index of the first row."""

    spec: GridSpec
    path: Path
    first: int

    def __call__(self, part: Part) -> Iterator[Day]:
        values = read_values(self.path).reshape(-1, *self.spec.shape)
        return consecutive_days(self.spec, self.first, {self.spec.channels[0]: values}, str(self.path))


def _columns(path: Path) -> int:
    with path.open("rb") as file:
        return file.readline().count(b",") + 1


def read_values(path: Path) -> np.ndarray:
    """float32 [rows, columns] of a headerless CSV, NaN = missing; InputError names the first bad field."""
    columns = _columns(path)
    require_columns(path, ",", columns)
    schema = {f"column_{i + 1}": pl.Float64 for i in range(columns)}
    try:
        frame = pl.read_csv(path, has_header=False, schema=schema, null_values=list(BLANKS))
    except pl.exceptions.PolarsError as error:
        explain_failure(path, ",", columns, range(1, columns + 1), BLANKS, error)
    values = frame.to_numpy().astype(np.float64)
    if np.isinf(values).any():
        explain_failure(path, ",", columns, range(1, columns + 1), BLANKS)
    negative = np.argwhere(values < 0)
    if len(negative):
        row, column = negative[0]
        raise InputError(
            f"{path}, row {row + 1}, column {column + 1}: traffic {values[row, column]} is negative "
            f"({len(negative)} such values); blank it if it means missing"
        )
    return values.astype(np.float32)


def grid_shape(path: Path, columns: int, height: int | None, width: int | None) -> tuple[int, int]:
    """(H, W) of a file with one column a cell, a square by default; InputError where the columns do not fit."""
    if height is None and width is None:
        side = isqrt(columns)
        if side * side != columns:
            raise InputError(f"{path} has {columns} columns, which is no square grid; give --height and --width")
        return side, side
    shape = (height or columns // (width or 1), width or columns // (height or 1))
    if shape[0] * shape[1] != columns:
        raise InputError(f"{path} has {columns} columns, not {shape[0]} x {shape[1]}; check --height and --width")
    return shape
