"""Reader of the Telecom Italia Big Data Challenge, Milan and Trentino (Harvard Dataverse, ODbL): a text file a day.

The data's facts: 62 files a city (2013-11-01 … 2014-01-01), 10-minute slots. Values are rescaled activity, not
counts. The text format is described in ``telecom_rows``.

- Milan: 20.8 GB, 319,896,289 rows, 100 x 100 squares of 235 m; 34,682 (square, slot) pairs have no row (0.04 %).
  Square ids run 1 … 10000 from the south-west corner eastward, then north: row (id − 1) // 100 counts from the
  south, as in the store.
- Trentino: 11.6 GB, 6,575 squares that are no rectangle. Rows and columns come from the geometry file
  (``trentino-grid.geojson``) and nothing else; cells of the rectangle around them are outside the city.

What is made of it: values are summed over country codes. An absent (square, slot) pair is missing; an empty
field in a pair that has a row is a measured zero; a slot without any row is a time step that does not exist; a day
without a file is a gap. A row of another day than its file's first one is an error, and so is a second row of
one square, slot and country. A last line without a line break is a row like others: published slices end so, and
that a file was cut within its last number cannot be seen.
"""

import gzip
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_prep.common import cell_ids, existing
from data_prep.geometry import read_geometry, require_orientation
from data_prep.preparation import Plan
from data_prep.reader import reader
from data_prep.telecom_rows import CHANNELS, COLUMNS, SLOT_MS, UTC_OFFSET_MINUTES, Squares, open_raw, read_day
from stdist.data import Day, GridSpec, Part
from stdist.errors import InputError

SIDE = 100
OUTSIDE = -1
"""Cell id of cells outside the city."""
CITIES = {"mi": "milan", "tn": "trentino"}
"""City by the tag of the file names."""
ENDINGS = (".txt", ".txt.gz")


@reader("telecom-italia")
def plan(sources: list[Path], *, city: str | None = None, geometry: Path | None = None) -> Plan:
    """Plan of all five channels from day files, or from folders that hold them: a part for every day.

    city: milan or trentino, by the file names where they say so (-mi-, -tn-); else any name, for squares of Milan.
    geometry: GeoJSON file of the squares, as trentino-grid.geojson; places Trentino's, proves Milan's orientation.
    Raises InputError for a file of another format, and naming both files where two hold the same day.
    """
    paths = _files(sources)
    name, squares_of = _city(paths, city)
    files = _by_day(paths)
    days = list(files)
    spec = _spec(name, squares_of, (days[0], days[-1]), geometry)
    inside = np.ones(spec.shape, bool) if spec.inside is None else spec.inside
    ids = spec.cell_ids[inside]
    place = np.full(int(ids.max()) + 2, -1, np.int64)
    place[ids] = np.flatnonzero(inside)
    label = f"{ids.min()} … {ids.max()}" if geometry is None else f"those of {geometry.name}"
    reader = _Reader(Squares(place, inside.size, label), spec.shape)
    parts = [Part(str(day), (int((day - days[0]).astype(int)),), (files[day], day)) for day in days]
    recipe = {"reader": "telecom-italia", "squares": squares_of}
    sources = [*files.values(), *([geometry] if geometry else [])]
    return Plan(spec, recipe, sources, None, parts, reader.read)


@dataclass(frozen=True, eq=False)
class _Reader:
    squares: Squares
    shape: tuple[int, int]

    def read(self, part: Part) -> Iterator[Day]:
        """payload: file and local day. Raises InputError naming file and line of a broken row."""
        path, day = part.payload
        values, present = read_day(path, day, self.squares)
        grids = values.reshape(len(CHANNELS), -1, *self.shape)
        yield Day(part.days[0], dict(zip(CHANNELS, grids, strict=True)), present)


def _spec(city: str, squares_of: str, days: tuple[np.datetime64, np.datetime64], path: Path | None) -> GridSpec:
    """The grid of ``squares_of``, milan or trentino; centres are known where there is a geometry."""
    geometry = None if path is None else read_geometry(path)
    milan = cell_ids(SIDE, SIDE, 0, 0, SIDE)
    if squares_of == "milan":
        if geometry:
            require_orientation(geometry, milan)
    elif geometry is None:
        raise InputError("the squares of Trentino are no rectangle; give --geometry trentino-grid.geojson")
    return GridSpec(
        city=city,
        channels=CHANNELS,
        first_day=days[0],
        last_day=days[1],
        cell_ids=milan if geometry is None else geometry.on_grid(geometry.ids, OUTSIDE),
        cadence_minutes=SLOT_MS // 60_000,
        utc_offset_minutes=UTC_OFFSET_MINUTES,
        units="rescaled activity",
        inside=None if geometry is None else geometry.on_grid(geometry.ids >= 0, False),
        latitude=None if geometry is None else geometry.on_grid(geometry.latitude, np.nan),
        longitude=None if geometry is None else geometry.on_grid(geometry.longitude, np.nan),
    )


def _city(paths: Sequence[Path], city: str | None) -> tuple[str, str]:
    """The city's name, and whose squares it has, milan or trentino."""
    tags = {match[1]: path for path in paths if (match := re.search(r"-(mi|tn)-", path.name))}
    if len(tags) > 1:
        raise InputError(f"{tags['mi']} is of Milan, {tags['tn']} of Trentino; prepare one store per city")
    paths_of = {CITIES[tag]: path for tag, path in tags.items()}
    named = city if city in CITIES.values() else None
    squares_of = next(iter(paths_of), named or "milan")
    if named and named != squares_of:
        raise InputError(f"{paths_of[squares_of]} is of {squares_of}, not of {named}; check --city")
    return city or squares_of, squares_of


def _files(sources: Sequence[Path]) -> list[Path]:
    paths: list[Path] = []
    for source in map(Path, sources):
        if source.is_dir():
            files = sorted(path for path in source.iterdir() if path.name.endswith(ENDINGS))
            # The re-release comes as CSV files, which are looked at so that it is recognised.
            paths += files or sorted(source.glob("*.csv"))
        else:
            paths.append(existing(source))
    if not paths:
        raise InputError("telecom-italia needs the day files, or a folder that holds them; none was found")
    return paths


def _by_day(paths: Sequence[Path]) -> dict[np.datetime64, Path]:
    """The file of every local day, by the stamp of its first row; days in order."""
    files: dict[np.datetime64, Path] = {}
    for path in paths:
        day = _first_day(path)
        if day in files:
            raise InputError(f"{files[day]} and {path} both hold {day}; give each day once")
        files[day] = path
    return dict(sorted(files.items()))


def _first_day(path: Path) -> np.datetime64:
    try:
        with open_raw(path) as file:
            line = file.readline(1000).decode(errors="replace").rstrip("\r\n")
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{path}, line 1: no gzip stream, or cut short ({error}); fetch the file again") from error
    if line.lower().startswith("datetime,"):
        raise InputError(
            f"{path} is the hourly re-release with a header (datetime,CellID,…); "
            "give the original tab-separated 10-minute files of Harvard Dataverse"
        )
    fields = line.split("\t")
    if len(fields) != COLUMNS or not re.fullmatch("[0-9]{13}", fields[1]):
        raise InputError(
            f"{path}, line 1: {line[:60]!r} is not a row of the raw format; "
            "it has 8 tab-separated columns: square, epoch ms, country, and five activities"
        )
    local = np.datetime64(int(fields[1]), "ms") + np.timedelta64(UTC_OFFSET_MINUTES, "m")
    return local.astype("datetime64[D]")
