"""Reader of wide CSV files: one row a frame, one column a cell, one channel.

Columns are the cells row by row (column j is row j // W, column j % W of the grid); rows are consecutive
frames at the cadence. There is no header and no time column: the local stamp of the first row is given. A
blank field or NaN is a missing value; 0 is a measured zero; traffic is never negative. With ``--nodes`` columns
are nodes, which a header names.

An example is the public 5 x 5 block of the Telecom Italia grid of Milan: 4,320 rows x 25 columns, 10 minutes,
from 2013-11-01T00:00 local time, squares r * 100 + c + 1 with r and c in 41 … 45 (row 0 in the south).
One of nodes is the public week of METR-LA, los_speed.csv: 2,016 frames of 5 minutes from 2012-03-01 of 207 sensors,
mile/h, whose gaps were filled upstream, with los_adj.csv, weights (207, 207), and graph_sensor_locations.csv.
"""

from functools import partial
from pathlib import Path

import numpy as np

from data_prep.frames import stamps_from
from data_prep.text import read_numbers, require_columns
from data_prep.wide import CADENCE, Table, wide_reader
from stdist.errors import InputError


def _table(path: Path, start: str | None, cadence: int | None, _utc_offset: int, nodes: bool) -> Table:
    """The file is read whole. Raises InputError where rows differ in length, naming the first."""
    with path.open(encoding="utf-8", errors="replace") as file:
        names = [name.strip().strip('"') for name in file.readline().split(",")]
    rows = require_columns(path, len(names)) - nodes
    if not rows:
        raise InputError(f"{path} holds no frame below its header; give a file that holds data")
    step = CADENCE if cadence is None else cadence
    stamps = stamps_from(path, start, rows, step, "2013-11-01T00:00", "time column")
    if not nodes:
        # The first line is a frame.
        names = [f"column {number}" for number in range(1, len(names) + 1)]
    return Table(names, stamps, step, partial(_load, path, nodes), notes={"nodes": True} if nodes else {})


def _load(path: Path, nodes: bool, names: list[str], _first: int, _stop: int) -> np.ndarray:
    """Raises InputError naming the first bad field; of nodes negative ones are named later, by time and node."""
    values = read_numbers(path, len(names), header=nodes)
    negative = np.argwhere(values < 0)
    if len(negative) and not nodes:
        row, column = negative[0]
        raise InputError(
            f"{path}, row {row + 1}, column {column + 1}: traffic {values[row, column]} is negative "
            f"({len(negative)} such values); blank it if it means missing"
        )
    return values.astype(np.float32)


plan = wide_reader("wide-csv", _table)
