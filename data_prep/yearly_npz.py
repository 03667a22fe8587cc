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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_prep.arrays import ArrayFile, array_file, consecutive_days, parse_channels
from data_prep.common import existing, parse_split, parse_start, require_on_grid, utc_offset_of
from data_prep.node_frames import graph_of
from data_prep.plan import Day, Part, Plan
from stdist.data.schema import MINUTES_PER_DAY, NodeSpec
from stdist.errors import InputError


@dataclass(frozen=True)
class Year:
    """One period: its array (T, N_y), the local stamps of its first and last frame."""

    year: int
    array: ArrayFile
    first: np.datetime64
    last: np.datetime64


@dataclass(frozen=True, eq=False)
class YearReader:
    """Days of one year's file; a part's payload is its array and the index of its first frame."""

    spec: NodeSpec

    def __call__(self, part: Part) -> Iterator[Day]:
        array, first = part.payload
        return consecutive_days(self.spec, first, {self.spec.channels[0]: array.load()}, str(array.path))


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
    train: str | None = None,
    validation: str | None = None,
    test: str | None = None,
) -> Plan:
    """Plan of the files ``YYYY.npz``, or of folders that hold them; further options are those of ``pems_npz.plan``.

    city: required, since the files are named by year. start: local time of the first frame of the first year,
    required; every other year begins on the same day and time of its own. adjacency: graph of the last year.
    node_ids: ids of the last year's nodes. Raises InputError where years overlap or nodes become fewer.
    """
    if city is None:
        raise InputError("yearly-npz cannot tell the city from names as 2011.npz; give --city pems-stream")
    years = _years(_files(sources), start, cadence)
    count = years[-1].array.shape[1]
    nodes, weights, files, notes = graph_of(count, adjacency, node_ids)
    spec = NodeSpec(
        city=city,
        channels=parse_channels(channel, 1, {}, "a yearly file"),
        first_day=years[0].first.astype("datetime64[D]"),
        last_day=years[-1].last.astype("datetime64[D]"),
        node_ids=nodes.ids,
        cadence_minutes=cadence,
        utc_offset_minutes=utc_offset_of(city, utc_offset),
        latitude=nodes.latitude,
        longitude=nodes.longitude,
        adjacency=weights,
        since=_since(years),
    )
    midnight = spec.first_day.astype("datetime64[m]")
    parts = []
    for year in years:
        first, last = (int((s - midnight).astype(int)) for s in (year.first, year.last))
        days = tuple(range(first // MINUTES_PER_DAY, last // MINUTES_PER_DAY + 1))
        parts.append(Part(str(year.year), days, (year.array, first // cadence)))
    recipe = {"reader": "yearly-npz", "start": str(years[0].first), **notes}
    paths = [year.array.path for year in years]
    split = parse_split(train, validation, test, spec)
    return Plan(spec, recipe, [*paths, *files], split, parts, YearReader(spec))


def _files(sources: Sequence[Path]) -> dict[int, Path]:
    paths = [p for s in sources for p in (sorted(Path(s).glob("*.npz")) if Path(s).is_dir() else [existing(s)])]
    files: dict[int, Path] = {}
    for path in paths:
        if not re.fullmatch(r"\d{4}", path.stem):
            raise InputError(f"{path} is not named by its year, as 2011.npz; give the yearly files alone")
        if int(path.stem) in files:
            raise InputError(f"{files[int(path.stem)]} and {path} are both of {path.stem}; give each year once")
        files[int(path.stem)] = path
    if not files:
        raise InputError("yearly-npz needs the files YYYY.npz, or a folder that holds them; none was found")
    return dict(sorted(files.items()))


def _years(files: dict[int, Path], start: str | None, cadence: int) -> list[Year]:
    opening = min(files)
    if start is None:
        raise InputError(f"{files[opening]} has no time stamps; give its first frame's: --start {opening}-07-10")
    begin = parse_start(start)
    if begin.astype("datetime64[Y]").astype(int) + 1970 != opening:
        raise InputError(
            f"--start {start} is not in {opening}, the year of the first file; give its first frame's time"
        )
    years: list[Year] = []
    for year, path in files.items():
        array = array_file(path, "x", "T, N")
        first = parse_start(str(begin).replace(str(opening), str(year), 1))
        stamps = first + np.arange(array.shape[0]) * np.timedelta64(cadence, "m")
        require_on_grid(path, stamps, cadence)
        if years:
            before = years[-1]
            if array.shape[1] < before.array.shape[1]:
                raise InputError(
                    f"{path} has {array.shape[1]} nodes, {before.year} had {before.array.shape[1]}; "
                    "nodes only grow here, check the files"
                )
            if first.astype("datetime64[D]") <= before.last.astype("datetime64[D]"):
                raise InputError(
                    f"{before.array.path} runs until {before.last}, into {year}; check --start and --cadence"
                )
        years.append(Year(year, array, first, stamps[-1]))
    return years


def _since(years: Sequence[Year]) -> np.ndarray:
    """First local day of the period in which each node appears, datetime64[D] [N]."""
    known = [0, *(year.array.shape[1] for year in years)]
    days = [year.first.astype("datetime64[D]") for year in years]
    return np.repeat(days, np.diff(known))
