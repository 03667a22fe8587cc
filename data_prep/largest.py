"""Reader of LargeST: five years of flow at 8,600 detectors of California's highways (Liu et al., 2023; CC BY-NC 4.0).

The data's facts: one file a year, ``ca_his_raw_YYYY.h5`` (2017 … 2021), a data frame that pandas wrote, 5 minutes
x 8,600 text ids, vehicles in 5 minutes, 105,120 rows (105,408 in 2020), 1.51 % of values missing as NaN;
``ca_meta.csv``, one row a detector: ID, Lat, Lng, District, County, Fwy, Lanes, Type, Direction, ID2;
``ca_rn_adj.npy`` (8600, 8600), weights of the road network, whose rows the column ID2 counts. Regions by
Caltrans district: San Diego (SD) 11, 716 detectors; Bay Area (GBA) 4, 2,352; Los Angeles (GLA) 7, 8 and 12,
3,834; CA all of them.

What is made of it: the authors' own steps (process_ca_his.ipynb, generate_sd_dataset.ipynb), but for one. The
three 5-minute values of a quarter of an hour are averaged, those that are there, and rounded to whole vehicles,
halves to even; where none is there the authors write 0, and here the value is missing. Files that went through
those steps (``ca_his_YYYY.h5``, ``sd_his_YYYY.h5``: 15 minutes) no longer tell a 0 that was measured
from one that was filled in: there zeros are missing, as in the authors' masked scores.

Stamps are the clock's local time in California as PeMS gives them: every day has 288, also those on which the
clock changes (the hour that is skipped in March is there, for PeMS without values; the one that comes twice in
November is there once). The store has one UTC offset, that of the winter (−8 h): its local times are the file's
own stamps, its UTC stamps are one hour late in summer.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from data_prep.arrays import array_file
from data_prep.common import PACIFIC, PACIFIC_CLOCK, city_of, files_in
from data_prep.graphs import Nodes, column_of, numbers, read_table, require_weights, rows_of
from data_prep.pandas_h5 import PandasFrame, open_frame
from data_prep.preparation import Plan
from data_prep.reader import reader
from data_prep.steps import cadence_of, minutes_of_day, require_traffic, slices_of_days
from stdist.data import Day, Part
from stdist.data.schema import MINUTES_PER_DAY
from stdist.errors import InputError

CADENCE = 15
RAW_CADENCE = 5
REGIONS = {"SD": (11,), "GBA": (4,), "GLA": (7, 8, 12), "CA": (3, 4, 5, 6, 7, 8, 10, 11, 12)}
"""Caltrans districts of the regions that the authors publish scores for."""


@reader("largest")
def plan(
    sources: list[Path],
    *,
    city: str | None = None,
    region: str | None = None,
    districts: str | None = None,
    meta: Path | None = None,
    adjacency: Path | None = None,
) -> Plan:
    """Plan of year files, or of all those in a folder, one part a local day.

    city: the region's name by default. region: SD, GBA, GLA or CA; all detectors of the files by default.
    districts: Caltrans' numbers in place of a region, ``11,4``. meta: the detectors' table, by default the one
    ``*_meta.csv`` beside the first file, none where there is none. adjacency: the road graph, by default the one
    ``*_rn_adj.npy`` beside the first file, none where there is none.
    Raises InputError where a file is no whole data frame, two hold one day, stamps are irregular, or detectors,
    metadata and graph do not fit each other.
    """
    files = files_in(sources, "*.h5")
    if not files:
        raise InputError("largest needs ca_his_raw_YYYY.h5, or a folder of such files; none was found")
    frames = [open_frame(path) for path in files]
    detectors = _detectors(files[0], frames[0].ids, region, districts, meta, adjacency)
    years = [Year.of(frame, detectors.ids) for frame in frames]
    days, parts = _parts(years)
    name = region.lower() if region else districts and f"ca-{districts.replace(',', '-')}"
    spec = detectors.spec(
        city or name or city_of(files[0]), ["flow"], days, CADENCE, PACIFIC, units="vehicles in 5 minutes"
    )
    recipe = {
        "reader": "largest",
        "region": region and region.upper(),
        "districts": districts,
        "zeros": ", ".join(sorted({year.zeros for year in years})),
        "clock": PACIFIC_CLOCK,
    }
    return Plan(spec, recipe, [*files, *detectors.files], None, parts, _read)


@dataclass(frozen=True, eq=False)
class Year:
    """One file: its frame, the frame's columns to take, int64 [N], and minutes between its rows."""

    frame: PandasFrame
    columns: np.ndarray
    cadence: int

    @classmethod
    def of(cls, frame: PandasFrame, ids: np.ndarray) -> "Year":
        """InputError where the rows are not 5 or 15 minutes apart, or the file lacks one of the detectors."""
        cadence = cadence_of(frame.path, frame.stamps())
        if cadence not in (RAW_CADENCE, CADENCE):
            raise InputError(f"{frame.path} has a row every {cadence} minutes; LargeST has 5, or 15 when processed")
        return cls(frame, rows_of(frame.path, list(map(str, frame.ids.tolist())), ids), cadence)

    @property
    def zeros(self) -> str:
        """The meaning of a 0."""
        return "measured" if self.cadence == RAW_CADENCE else "missing"


def _read(part: Part) -> Iterator[Day]:
    """payload: the year, and its rows [start, stop) that are the day's."""
    year, start, stop = part.payload
    stamps = year.frame.stamps(start, stop)
    flow = year.frame.values(start, stop)[:, year.columns]
    require_traffic(flow, f"{year.frame.path}: flow", stamps)
    if year.zeros == "missing":
        flow[flow == 0] = np.nan
    slots, rows = minutes_of_day(stamps) // year.cadence, CADENCE // year.cadence
    day = np.full((MINUTES_PER_DAY // year.cadence, flow.shape[1]), np.nan)
    day[slots] = flow
    present = np.isin(np.arange(MINUTES_PER_DAY // CADENCE), slots // rows)
    yield Day(part.days[0], {"flow": quarter_hours(day, rows)}, present)


def quarter_hours(day: np.ndarray, rows: int) -> np.ndarray:
    """Mean of the known values of every ``rows`` rows, rounded half to even, float32 [T / rows, N].

    pandas' ``resample("15min").mean().round(0)`` of float64 [T, N]; NaN where no value is known.
    """
    quarters = day.reshape(-1, rows, day.shape[1])
    seen = ~np.isnan(quarters)
    total, count = np.where(seen, quarters, 0).sum(axis=1), seen.sum(axis=1)
    return np.rint(np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)).astype(np.float32)


def _parts(years: list[Year]) -> tuple[np.ndarray, list[Part]]:
    """All local days from the first to the last, and a part for each that has rows."""
    owner: dict[np.datetime64, tuple[Year, int, int]] = {}
    for year in years:
        dates = year.frame.stamps().astype("datetime64[D]")
        for start, stop in slices_of_days(dates):
            if (day := dates[start]) in owner:
                other = owner[day][0].frame.path
                raise InputError(f"{other} and {year.frame.path} both hold {day}; give each day once")
            owner[day] = year, start, stop
    days = np.arange(min(owner), max(owner) + np.timedelta64(1, "D"))
    return days, [Part(str(day), (index,), owner[day]) for index, day in enumerate(days) if day in owner]


def _detectors(
    source: Path,
    columns: np.ndarray,
    region: str | None,
    districts: str | None,
    meta: Path | None,
    adjacency: Path | None,
) -> Nodes:
    """The detectors to take from ``source``, whose column ids are ``columns``, in the metadata's order.

    meta, adjacency: where None, the one ``*_meta.csv`` and ``*_rn_adj.npy`` beside the source, if there are any.
    static: ``district`` and ``lanes``, float32 [N]. Raises InputError where a region is unknown or asked for without
    metadata, where metadata and columns do not name the same detectors, and where the graph has another size.
    """
    chosen = _districts(region, districts)
    meta = meta or _beside(source, "*_meta.csv")
    adjacency = adjacency or _beside(source, "*_rn_adj.npy")
    graph = [adjacency] if adjacency else []
    if meta is None:
        if chosen:
            raise InputError(f"{source.parent} holds no *_meta.csv that tells the districts; give it with --meta")
        weights = _cut(adjacency, np.arange(len(columns)), len(columns)) if adjacency else None
        return Nodes(columns, adjacency=weights, files=graph)
    table = read_table(meta)
    sensor, *place = (column_of(meta, table, what) for what in ("ids", "the latitude", "the longitude"))
    district = numbers(meta, table.select(column_of(meta, table, "the district")))[:, 0]
    rows = np.flatnonzero(np.isin(district, chosen)) if chosen else np.arange(len(table))
    if not len(rows):
        raise InputError(f"{meta} has no detector in district {', '.join(map(str, chosen))}; check --districts")
    ids = np.array(table[sensor].to_list())
    rows_of(meta, ids.tolist(), columns)
    absent = np.setdiff1d(ids[rows], columns)
    if len(absent):
        raise InputError(
            f"{source} lacks detector {absent[0]} ({len(absent)} of {len(rows)} absent); choose its --region"
        )
    degrees = numbers(meta, table.select(place))[rows]
    static = {"district": district[rows].astype(np.float32)}
    if "Lanes" in table.columns:
        static["lanes"] = numbers(meta, table.select("Lanes"))[rows, 0].astype(np.float32)
    weights = _cut(adjacency, _positions(table, adjacency)[rows], len(table)) if adjacency else None
    return Nodes(ids[rows], degrees[:, 0], degrees[:, 1], weights, static, [meta, *graph])


def _districts(region: str | None, districts: str | None) -> tuple[int, ...]:
    if region and districts:
        raise InputError("--region and --districts both choose detectors; give one of them")
    if region and region.upper() not in REGIONS:
        raise InputError(f"--region {region!r} is unknown; choose {', '.join(REGIONS)}, or give --districts")
    if region:
        return REGIONS[region.upper()]
    try:
        return tuple(int(number) for number in districts.split(",")) if districts else ()
    except ValueError as error:
        raise InputError(f"--districts {districts!r} are no numbers; write 11 or 7,8,12") from error


def _beside(source: Path, pattern: str) -> Path | None:
    """The one file of that name in the source's folder, or None; InputError where there are several."""
    files = sorted(source.parent.glob(pattern))
    if len(files) > 1:
        option = "--meta" if pattern.endswith(".csv") else "--adjacency"
        raise InputError(f"{source.parent} holds {' and '.join(f.name for f in files)}; choose one with {option}")
    return files[0] if files else None


def _positions(table: pl.DataFrame, adjacency: Path) -> np.ndarray:
    """Row of the graph of each detector: the column ID2 where the graph is the whole state's, else its row."""
    size = array_file(adjacency, None, "N, N").shape[0]
    if size == len(table) or "ID2" not in table.columns:
        return np.arange(len(table))
    return numbers(adjacency, table.select("ID2"))[:, 0].astype(np.int64)


def _cut(adjacency: Path, rows: np.ndarray, listed: int) -> np.ndarray:
    """float32 [n, n]: the weights between the chosen rows of a graph, which stays on disk."""
    array = array_file(adjacency, None, "N, N")
    if array.shape[0] != array.shape[1] or rows.max() >= array.shape[0]:
        raise InputError(f"{adjacency} is {array.shape[0]} x {array.shape[1]}, there are {listed} detectors; check it")
    graph = array.load()
    weights = np.empty((len(rows), len(rows)), np.float32)
    for number, row in enumerate(rows):
        weights[number] = graph[row][rows]
    return require_weights(adjacency, weights, len(rows))
