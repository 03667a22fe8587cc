"""Plans of wide tables, one row a frame and one column a cell or a node, which CSV and Parquet share."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from math import isqrt
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.common import city_of, grid_spec, only_source, utc_offset_of, with_spans
from data_prep.frames import frames_of, part_of, plan_of, slices_of_days
from data_prep.graphs import ids_of, sensors
from data_prep.plan import Plan
from stdist.data.schema import GridSpec, NodeSpec
from stdist.errors import InputError

CADENCE = 10
"""Minutes, where nothing else is told: Telecom Italia's."""


@dataclass(frozen=True, eq=False)
class Table:
    """What a file tells before its values are read.

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


def wide_reader(reader: str, read: Callable[[Path, str | None, int | None, int, bool], Table]) -> Callable[..., Plan]:
    """The ``plan`` of a reader; read: ``read(path, start, cadence, utc_offset, nodes)``."""

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
        meta: Path | None = None,
    ) -> Plan:
        """Plan of one file.

        city: first word of the file name by default. start: local ISO time of the first row, required where the file
        has no stamps of its own. cadence: minutes between rows, by default 10, or as the file's stamps say. utc_offset:
        minutes (Milan and Trentino +60, others 0). height, width: a square by default. row0, col0, id_width: where
        the grid lies in the data's own ids. nodes: columns are nodes, named by their ids. adjacency: weights or road
        distances between nodes (``graphs.read_graph``). meta: places of the nodes (``graphs.read_nodes``). Raises
        InputError where the file is no table of numbers, stamps are off the grid, or an option does not fit the file.
        """
        path = only_source(sources, reader)
        town = city or city_of(path)
        offset = utc_offset_of(town, utc_offset)
        table = read(path, start, cadence, offset, nodes)
        names, files = table.names, []
        recipe = {"reader": reader, "start": str(table.stamps[0]), **table.notes}
        spec: GridSpec | NodeSpec
        if nodes:
            known = sensors(ids_of(names), adjacency, meta)
            spec = known.spec(town, [channel], table.stamps, table.cadence, offset)
            recipe, files = recipe | known.notes, known.files
        else:
            if adjacency or meta:
                option = "--adjacency" if adjacency else "--meta"
                raise InputError(f"{option} is for nodes; give --nodes too where columns are nodes")
            spec = grid_spec(
                town,
                [channel],
                table.stamps,
                _shape(path, len(names), height, width),
                cadence=table.cadence,
                utc_offset=offset,
                row0=row0,
                col0=col0,
                id_width=id_width,
            )
            names = _row_by_row(path, names, spec.cell_ids.reshape(-1))
            recipe |= {"row0": row0, "col0": col0}
        frames = frames_of(path, spec, table.stamps)
        days_at_once = max(1, (table.rows_at_once or spec.frames) // spec.slots_per_day)
        parts = [
            part_of(spec, frames[a:b], partial(_load, channel, spec.shape, partial(table.load, names, a, b)), path)
            for a, b in slices_of_days(frames // spec.slots_per_day, days_at_once)
        ]
        return plan_of(spec, recipe, [path, *files], parts)

    return plan


def _load(channel: str, shape: tuple[int, ...], load: Callable[[], np.ndarray]) -> dict[str, np.ndarray]:
    return {channel: load().reshape(-1, *shape)}


def _shape(path: Path, columns: int, height: int | None, width: int | None) -> tuple[int, int]:
    """(H, W) of a grid, a square by default; InputError where the columns do not fit."""
    if height is None and width is None:
        height = width = isqrt(columns)
        if height * width != columns:
            raise InputError(f"{path} has {columns} columns, which is no square grid; give --height and --width")
    shape = (height or columns // (width or 1), width or columns // (height or 1))
    if shape[0] * shape[1] != columns:
        raise InputError(f"{path} has {columns} columns, not {shape[0]} x {shape[1]}; check --height and --width")
    return shape


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
