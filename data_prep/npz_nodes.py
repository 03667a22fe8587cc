"""Readers of npz files over nodes: PeMS, zones, and continual sets of a file a year."""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from data_prep.arrays import ArrayFile, array_file, parse_channels
from data_prep.common import Clock, city_of, files_in, only_source, parse_start
from data_prep.graphs import NodeFiles
from data_prep.preparation import Plan
from data_prep.reader import reader
from data_prep.steps import part_of, plan_of, require_on_grid, stamps_from, steps_of
from stdist.errors import InputError

PEMS = """Reader of PEMS03, PEMS04, PEMS07 and PEMS08: loop detectors of California's highways, one npz file each.

The data's facts: array ``data`` (T, N, C), 5 minutes, no time stamps and no ids. C = 3 is flow (vehicles in 5
minutes, over all lanes), occupancy (share of time, 0 … 1) and speed (mile/h); C = 1 is flow alone.

| | N | C | T | first day | days |
|---|---|---|---|---|---|
| PEMS03 | 358 | 1 | 26,208 | 2018-09-01 | 91 |
| PEMS04 | 307 | 3 | 16,992 | 2018-01-01 | 59 |
| PEMS07 | 883 | 1 | 28,224 | 2017-05-01 | 98 (papers say until 31 August, the file ends on 6 August) |
| PEMS08 | 170 | 3 | 17,856 | 2016-07-01 | 62 |

A CSV of edges (``from,to,cost``; PEMS03: ``from,to,distance``) names nodes by position, counted from 0; that
of PEMS03 names stations, whose ids in the data's order are the lines of PEMS03.txt (``--node-ids``).

What is made of it: a zero is a measured zero, since a flow of 0 is mostly a real night; the gaps of the
detectors were filled upstream and cannot be told from measurements any more. NaN is missing.
"""

ZONES = """Reader of flows by zone: one npz file with one array (T, N, C) over consecutive steps, no time stamps.

An example is the taxi traffic of 69 zones of Manhattan: ``arr_0`` (17544, 69, 2), hourly, 2019-01-01 to
2020-12-31 local time without change of clocks (731 x 24 steps), trips into and out of a zone as the file's
name says (``inoutflow``), no missing value. Its zones.csv (``zone_id,graph_id,zone_name``) is the table of
nodes, its adjacency.csv has a header of positions and weights 0 and 1. The collapse of traffic in March 2020
is real: a training span before it and a test span after it differ.

What is made of it: zeros are measured, NaN is missing.
"""

YEARS = """Reader of continual sets: a file ``YYYY.npz`` a year, whose nodes grow from year to year.

The layout is that of TrafficStream (Chen, Wang and Xie, IJCAI 2021) and EAC (Chen and Liang, ICLR 2025):
``RawData/YYYY.npz`` with array ``x`` (T, N_y), consecutive steps without stamps, and ``graph/YYYY_adj.npz`` with
array ``x`` (N_y, N_y). (``FastData/YYYY.npz`` holds windows scaled by their own mean: not read, no data.)

| | years | cadence | nodes by year |
|---|---|---|---|
| PEMS-Stream | 2011 … 2017 | 5 min | 655, 715, 786, 822, 834, 850, 871 |
| AIR-Stream | 2016 … 2019 | 60 min | 1,087 in the first year, 1,202 in the last |

The first N_y nodes of a year are those of the year before, in the same order: the published code takes nodes
N_y … of the next year as the new ones, and the station lists beside PEMS-Stream agree for all seven years.
Days: PEMS-Stream holds the same days of every year, of which the published code reads the first 31; its paper
says 10 July to 9 August. The files do not say, so that the first step's stamp must be given.

What is made of it: one store over the nodes of the last year, ``since`` the first day of the period in which a
node appears; a part is one year. Years that do not touch are separate segments; where one ends at the midnight at
which the next begins, as full years do, they are one segment. Zeros are measured, NaN is missing. The protocol of
the papers splits every year by itself, 6 : 2 : 2 in time: give its days as ``--train``, ``--validation``, ``--test``.
"""


def _reader_of_one_array(
    name: str,
    facts: str,
    key: str | None,
    known_channels: Mapping[int, Sequence[str]],
    *,
    minutes: int,
    units: str,
    example: str,
) -> Callable[..., Plan]:
    """A reader of one array (T, N, C), or (T, N), of consecutive time steps. key: the array, the only one where None.
    minutes: its usual cadence. known_channels: names by their number. example: of a start."""

    @reader(name, facts)
    def plan(
        sources: list[Path],
        *,
        city: str | None = None,
        channels: str | None = None,
        start: str | None = None,
        cadence: int = minutes,
        array: str | None = key,
        clock: Clock,
        files: NodeFiles,
    ) -> Plan:
        """Plan of one file.

        array: its name in a file that holds several. channels: names in order, ``a,b``; the usual ones of their number
        by default. start: local ISO time of the first frame, required. Raises InputError where a file or an option does
        not fit.
        """
        path = only_source(sources, name)
        values = array_file(path, array, "T, N", "T, N, C")
        steps, count, *more = values.shape
        names = parse_channels(channels, more[0] if more else 1, known_channels, str(path))
        town, following = city or city_of(path), stamps_from(path, start, steps, cadence, example)
        stamps, utc_offset = clock.of_first(path, town, following)
        nodes = files.nodes(count)
        spec = nodes.spec(town, names, stamps, cadence, utc_offset, units)
        part = part_of(spec, steps_of(path, spec, stamps), partial(_load_channels, values, names), path)
        recipe = {"reader": name, "start": str(following[0]), **nodes.notes}
        return plan_of(spec, recipe, [path, *nodes.files], [part])

    return plan


def _load_channels(array: ArrayFile, names: Sequence[str]) -> dict[str, np.ndarray]:
    values = array.load()
    values = values.reshape(*values.shape[:2], -1)
    return {name: values[:, :, index] for index, name in enumerate(names)}


_reader_of_one_array(
    "pems-npz",
    PEMS,
    "data",
    {1: ("flow",), 3: ("flow", "occupancy", "speed")},
    minutes=5,
    units="as measured by PeMS",
    example="2018-01-01 (PEMS04; 2018-09-01 PEMS03, 2017-05-01 PEMS07, 2016-07-01 PEMS08)",
)
ZONE_CHANNELS = {1: ("flow",), 2: ("flow_in", "flow_out")}
_reader_of_one_array("zones-npz", ZONES, None, ZONE_CHANNELS, minutes=60, units="trips", example="2019-01-01")


@reader("yearly-npz", YEARS)
def plan_years(
    sources: list[Path],
    *,
    city: str | None = None,
    channel: str = "flow",
    start: str | None = None,
    cadence: int = 5,
    utc_offset: int | None = None,
    files: NodeFiles,
) -> Plan:
    """Plan of the files ``YYYY.npz``, or of folders that hold them.

    city: required, since the files are named by year. start: local time of the first frame of the first year,
    required; every other year begins on the same day and time of its own. adjacency: graph of the last year.
    node_ids: ids of the last year's nodes. Raises InputError where years overlap or nodes become fewer.
    """
    if city is None:
        raise InputError("yearly-npz cannot tell the city from names as 2011.npz; give --city pems-stream")
    arrays = [array_file(path, "x", "T, N") for path in _files(sources)]
    years = _stamps(arrays, start, cadence)
    nodes = files.nodes(arrays[-1].shape[1])
    (name,) = parse_channels(channel, 1, {}, "a yearly file")
    first_days = [stamps[0].astype("datetime64[D]") for stamps in years]
    since = np.repeat(first_days, np.diff([0, *(array.shape[1] for array in arrays)]))
    spec = nodes.spec(city, [name], np.concatenate(years), cadence, utc_offset, since=since)
    parts = [
        part_of(spec, steps_of(array.path, spec, stamps), partial(_load_year, array, name), array.path)
        for array, stamps in zip(arrays, years, strict=True)
    ]
    recipe = {"reader": "yearly-npz", "start": str(years[0][0]), **nodes.notes}
    return plan_of(spec, recipe, [*(array.path for array in arrays), *nodes.files], parts)


def _load_year(array: ArrayFile, name: str) -> dict[str, np.ndarray]:
    return {name: array.load()}


def _files(sources: list[Path]) -> list[Path]:
    """The files in order of their years."""
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
    """Local stamps of every year's time steps, datetime64[m]."""
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
