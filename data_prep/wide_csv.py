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

from data_prep.common import city_of, only_source, with_spans
from data_prep.frames import frames_of, part_of, plan_of, stamps_from
from data_prep.plan import Plan
from data_prep.text import read_numbers, require_columns
from data_prep.wide_columns import Columns
from stdist.errors import InputError


@with_spans
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
) -> Plan:
    """Plan of one file, read in one part.

    start: local ISO time of the first row, required. city: first word of the file name by default. cadence
    and utc_offset in minutes (Milan and Trentino +60, others 0). height, width: a square by default. row0,
    col0, id_width: where the grid lies in the data's own ids. nodes: columns are nodes, which the first line names.
    adjacency: weights or road distances between nodes (``graphs.read_graph``). meta: places of the nodes
    (``graphs.read_locations``).
    Raises InputError where rows differ in length, naming the first, or options do not fit the file.
    """
    path = only_source(sources, "wide-csv")
    with path.open(encoding="utf-8", errors="replace") as file:
        names = [name.strip().strip('"') for name in file.readline().split(",")]
    rows = require_columns(path, len(names)) - nodes
    if not rows:
        raise InputError(f"{path} holds no frame below its header; give a file that holds data")
    stamps = stamps_from(path, start, rows, cadence, "2013-11-01T00:00", "time column")
    columns = Columns(height, width, row0, col0, id_width, nodes, adjacency, meta)
    spec, notes, files = columns.spec(path, names, stamps, city or city_of(path), channel, cadence, utc_offset)
    load = partial(_load, path, channel, spec.shape, nodes)
    recipe = {"reader": "wide-csv", "start": str(stamps[0]), **({"nodes": True} if nodes else {}), **notes}
    return plan_of(spec, recipe, [path, *files], [part_of(spec, frames_of(path, spec, stamps), load, path)])


def _load(path: Path, channel: str, shape: tuple[int, ...], nodes: bool) -> dict[str, np.ndarray]:
    """Raises InputError naming the first bad field; of nodes negative ones are named later, by time and node."""
    values = read_numbers(path, int(np.prod(shape)), header=nodes)
    negative = np.argwhere(values < 0)
    if len(negative) and not nodes:
        row, column = negative[0]
        raise InputError(
            f"{path}, row {row + 1}, column {column + 1}: traffic {values[row, column]} is negative "
            f"({len(negative)} such values); blank it if it means missing"
        )
    return {channel: values.astype(np.float32).reshape(-1, *shape)}
