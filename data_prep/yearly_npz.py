"""Reader of continual sets: a file ``YYYY.npz`` a year, whose nodes grow from year to year.

The layout is that of TrafficStream (Chen, Wang and Xie, IJCAI 2021) and EAC (Chen and Liang, ICLR 2025):
``RawData/YYYY.npz`` with array ``x`` (T, N_y), consecutive frames without stamps, and ``graph/YYYY_adj.npz`` with
array ``x`` (N_y, N_y). (``FastData/YYYY.npz`` holds windows scaled by their own mean: not read, no data.)

| | years | cadence | nodes by year |
|---|---|---|---|
| PEMS-Stream | 2011 … 2017 | 5 min | 655, 715, 786, 822, 834, 850, 871 |
| AIR-Stream | 2016 … 2019 | 60 min | 1,087 in the first year, 1,202 in the last |

The first N_y nodes of a year are those of the year before, in the same order: the published code takes nodes
N_y … of the next year as the new ones, and the station lists beside PEMS-Stream agree for all seven years.
Days: PEMS-Stream holds the same days of every year, of which the published code reads the first 31; its paper
says 10 July to 9 August. The files do not say, so that the first frame's stamp must be given.

What is made of it: one store over the nodes of the last year, ``since`` the first day of the period in which a
node appears; a part is one year. Years that do not touch are separate runs; where one ends at the midnight at
which the next begins, as full years do, they are one run. Zeros are measured, NaN is missing. The protocol of
the papers splits every year by itself, 6 : 2 : 2 in time: give its days as ``--train``, ``--validation``, ``--test``.
"""

import re
from functools import partial
from pathlib import Path

import numpy as np

from data_prep.arrays import ArrayFile, array_file, parse_channels
from data_prep.common import files_in, parse_start, with_spans
from data_prep.frames import frames_of, part_of, plan_of, require_on_grid, stamps_from
from data_prep.graphs import counted_nodes
from data_prep.plan import Plan
from stdist.errors import InputError


@with_spans
def plan(
    sources: list[Path],
    *,
    city: str | None = None,
    channel: str = "flow",
    start: str | None = None,
    cadence: int = 5,
    utc_offset: int | None = None,
    adjacency: Path | None = None,
    node_ids: Path | None = None,
) -> Plan:
    """Plan of the files ``YYYY.npz``, or of folders that hold them; further options are those of ``pems-npz``.

    city: required, since the files are named by year. start: local time of the first frame of the first year,
    required; every other year begins on the same day and time of its own. adjacency: graph of the last year.
    node_ids: ids of the last year's nodes. Raises InputError where years overlap or nodes become fewer.
    """
    if city is None:
        raise InputError("yearly-npz cannot tell the city from names as 2011.npz; give --city pems-stream")
    arrays = [array_file(path, "x", "T, N") for path in _files(sources)]
    years = _stamps(arrays, start, cadence)
    nodes = counted_nodes(arrays[-1].shape[1], adjacency, node_ids)
    (name,) = parse_channels(channel, 1, {}, "a yearly file")
    first_days = [stamps[0].astype("datetime64[D]") for stamps in years]
    since = np.repeat(first_days, np.diff([0, *(array.shape[1] for array in arrays)]))
    spec = nodes.spec(city, [name], np.concatenate(years), cadence, utc_offset, since=since)
    parts = [
        part_of(spec, frames_of(array.path, spec, stamps), partial(_load, array, name), array.path)
        for array, stamps in zip(arrays, years, strict=True)
    ]
    recipe = {"reader": "yearly-npz", "start": str(years[0][0]), **nodes.notes}
    return plan_of(spec, recipe, [*(array.path for array in arrays), *nodes.files], parts)


def _load(array: ArrayFile, name: str) -> dict[str, np.ndarray]:
    return {name: array.load()}


def _files(sources: list[Path]) -> list[Path]:
    """In order of their years."""
    files: dict[int, Path] = {}
    for path in files_in(sources, "*.npz"):
        if not re.fullmatch(r"\d{4}", path.stem):
            raise InputError(f"{path} is not named by its year, as 2011.npz; give the yearly files alone")
        if int(path.stem) in files:
            raise InputError(f"{files[int(path.stem)]} and {path} are both of {path.stem}; give each year once")
        files[int(path.stem)] = path
    if not files:
        raise InputError("yearly-npz needs the files YYYY.npz, or a folder that holds them; none was found")
    return [path for _, path in sorted(files.items())]


def _stamps(arrays: list[ArrayFile], start: str | None, cadence: int) -> list[np.ndarray]:
    """Local stamps of every year's frames, datetime64[m]."""
    opening = arrays[0].path.stem
    stamps: list[np.ndarray] = []
    for number, array in enumerate(arrays):
        path, year = array.path, array.path.stem
        begin = start and str(parse_start(start)).replace(opening, year, 1)
        stamps.append(stamps_from(path, begin, array.shape[0], cadence, f"{opening}-07-10"))
        if not str(stamps[-1][0]).startswith(year):
            raise InputError(
                f"--start {start} is not in {opening}, the year of the first file; give its first frame's time"
            )
        require_on_grid(path, stamps[-1], cadence)
        if number == 0:
            continue
        before, last = arrays[number - 1], stamps[number - 1][-1]
        if array.shape[1] < before.shape[1]:
            raise InputError(
                f"{path} has {array.shape[1]} nodes, {before.path.stem} had {before.shape[1]}; "
                "nodes only grow here, check the files"
            )
        if stamps[-1][0].astype("datetime64[D]") <= last.astype("datetime64[D]"):
            raise InputError(f"{before.path} runs until {last}, into {year}; check --start and --cadence")
    return stamps
