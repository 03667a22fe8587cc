"""Wide CSV files of nodes (``wide-csv --nodes``): the first line names the nodes, each further line is a frame.

An example is the public week of METR-LA, los_speed.csv: 2,016 frames of 5 minutes from 2012-03-01 of 207 sensors,
mile/h, whose gaps were filled upstream, with los_adj.csv, weights (207, 207), and graph_sensor_locations.csv beside
it. As in all of ``wide_csv`` blank or NaN is missing and 0 is measured.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from data_prep.arrays import consecutive_days
from data_prep.common import parse_split, parse_start, require_on_grid, utc_offset_of
from data_prep.graphs import ids_of
from data_prep.plan import Day, Part, Plan
from data_prep.sensors import read_graph, read_locations
from data_prep.text import require_columns
from stdist.data import NodeSpec
from stdist.errors import InputError

BLANKS = ["", "nan", "NaN", "NA"]


def plan_nodes(
    path: Path,
    city: str,
    channel: str,
    start: str,
    cadence: int,
    utc_offset: int | None,
    adjacency: Path | None,
    meta: Path | None,
    spans: tuple[str | None, str | None, str | None],
) -> Plan:
    """Plan of one file, read in one part; reads its first line and counts the others.

    start: local ISO time of the first frame. adjacency: ``sensors.read_graph``. meta: ``sensors.read_locations``.
    spans: train, validation, test. Raises InputError where lines differ in length, naming the first, the first
    line names a node twice, or graph and places do not fit the nodes.
    """
    with path.open(encoding="utf-8", errors="replace") as file:
        names = [name.strip().strip('"') for name in file.readline().split(",")]
    rows = require_columns(path, ",", len(names)) - 1
    ids = ids_of(names)
    if not rows:
        raise InputError(f"{path} holds no frame below its header; give a file that holds data")
    first = parse_start(start)
    stamps = first + np.arange(rows) * np.timedelta64(cadence, "m")
    latitude, longitude = read_locations(meta, ids) if meta else (None, None)
    weights, notes = read_graph(adjacency, ids) if adjacency else (None, {})
    spec = NodeSpec(
        city=city,
        channels=(channel,),
        first_day=first.astype("datetime64[D]"),
        last_day=stamps[-1].astype("datetime64[D]"),
        node_ids=ids,
        cadence_minutes=cadence,
        utc_offset_minutes=utc_offset_of(city, utc_offset),
        latitude=latitude,
        longitude=longitude,
        adjacency=weights,
    )
    require_on_grid(path, stamps, cadence)
    recipe = {"reader": "wide-csv", "nodes": True, "start": str(first), **notes}
    files = [path, *(Path(file) for file in (adjacency, meta) if file)]
    slot = int((first - spec.first_day).astype("timedelta64[m]").astype(int)) // cadence
    part = Part(path.name, tuple(range(len(spec.days))))
    return Plan(spec, recipe, files, parse_split(*spans, spec), [part], NodeReader(spec, path, slot).read)


@dataclass(frozen=True, eq=False)
class NodeReader:
    """Reads all frames; first: frame index of the first."""

    spec: NodeSpec
    path: Path
    first: int

    def read(self, part: Part) -> Iterator[Day]:
        frames = {self.spec.channels[0]: read_frames(self.path)}
        return consecutive_days(self.spec, self.first, frames, str(self.path))


def read_frames(path: Path) -> np.ndarray:
    """float32 [T, N] of a CSV with one header line, NaN = missing; InputError names the first bad field."""
    text = pl.read_csv(path, has_header=False, skip_rows=1, infer_schema=False, null_values=BLANKS)
    values = text.with_columns(pl.all().str.strip_chars()).cast(pl.Float64, strict=False).to_numpy()
    wrong = np.argwhere(~np.isfinite(values) & ~text.select(pl.all().is_null()).to_numpy())
    if len(wrong):
        row, column = wrong[0].tolist()
        raise InputError(
            f"{path}, line {row + 2}, column {column + 1}: {text[row, column]!r} is not a finite number; "
            "blank means missing"
        )
    return values.astype(np.float32)
