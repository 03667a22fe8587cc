"""Parts that most readers share: sources, cities, and the place of a grid in the data's own ids."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.table_zone import utc_of
from stdist.data import GridSpec
from stdist.data.schema import UNKNOWN_UNITS
from stdist.dates import parse_local_time
from stdist.errors import InputError
from stdist.zones import require_zone, standard_offset

UTC_OFFSETS = {"milan": 60, "trentino": 60}
"""Minutes; CET throughout the Telecom Italia data. Other cities default to UTC."""
MOST_AHEAD = 14 * 60
PACIFIC = -480
"""Pacific standard time, minutes: that of California's detectors in winter."""
PACIFIC_CLOCK = "local times are the source's, with daylight saving; UTC stamps are one hour late in summer"

STORE_NAMES = {
    "time",
    "row",
    "col",
    "node",
    "cell_id",
    "node_id",
    "inside",
    "present",
    "latitude",
    "longitude",
    "adjacency",
}
"""Names of the store's own arrays."""
PARTS_IN_TIME = {
    **dict.fromkeys(("train", "training"), 0),
    **dict.fromkeys(("val", "valid", "validation", "dev"), 1),
    **dict.fromkeys(("test", "testing"), 2),
}
"""Parts of a data set by the words in names of files, as they follow one another."""


def only_source(sources: Sequence[Path], reader: str) -> Path:
    """The one source of a reader that takes exactly one; InputError otherwise."""
    if len(sources) != 1:
        raise InputError(f"{reader} reads one file, {len(sources)} given; prepare one store per file")
    return existing(sources[0])


def existing(path: Path) -> Path:
    if not Path(path).is_file():
        raise InputError(f"{path} is not a file; give the raw file itself")
    with open(path, "rb"):  # libraries would call one that may not be read damaged
        return Path(path)


def files_in(sources: Sequence[Path], pattern: str) -> list[Path]:
    """The files given, and in place of a folder those of it that fit the pattern."""
    folders = [sorted(Path(s).glob(pattern)) if Path(s).is_dir() else [existing(s)] for s in sources]
    return [file for folder in folders for file in folder]


def in_time(paths: Sequence[Path]) -> tuple[list[Path], str]:
    """Files that tell no time themselves, in order of time as their names tell it, and a line that says so.

    Names that differ in train, validation and test alone come in this order, names that differ in numbers by these;
    others stay as they are given. The line is empty for one file.
    """
    if len(paths) < 2:
        return [*paths], ""
    words = [re.findall(r"[a-z]+|[0-9]+", path.name.lower()) for path in paths]
    parts = [next((PARTS_IN_TIME[word] for word in name if word in PARTS_IN_TIME), None) for name in words]
    others = {tuple(word for word in name if word not in PARTS_IN_TIME) for name in words}
    keys: list[Any] = []
    if None not in parts and len(set(parts)) == len(parts) and len(others) == 1:
        keys, how = parts, "train, validation, test"
    elif len({tuple("0" if word.isdigit() else word for word in name) for name in words}) == 1:
        keys, how = [[int(word) for word in name if word.isdigit()] for name in words], "the numbers in their names"
    if not keys:
        return [*paths], f"files taken one after the other as given: {', '.join(path.name for path in paths)}"
    ordered = [path for _, path in sorted(zip(keys, paths, strict=True), key=lambda pair: pair[0])]
    return ordered, f"files taken in the order of {how}: {', '.join(path.name for path in ordered)}"


def city_of(path: Path) -> str:
    """First word of a file name: ``milan`` of milan_grid_data.csv."""
    return re.split(r"[^a-z0-9]+", path.stem.lower())[0] or path.stem


def utc_offset_of(city: str, utc_offset: int | None) -> int:
    """Minutes that a city is ahead of UTC; InputError where no clock on Earth is."""
    if utc_offset is not None and abs(utc_offset) > MOST_AHEAD:
        raise InputError(f"--utc-offset {utc_offset} is no offset of a clock; give minutes ahead of UTC, as 60 or -480")
    return UTC_OFFSETS.get(city.lower(), 0) if utc_offset is None else utc_offset


@dataclass(frozen=True)
class Clock:
    """Options: the city's clock. utc_offset: minutes the city is ahead of UTC, all year. timezone: the city's
    zone in place of an offset, as Europe/Madrid, whose clock may be set forward and back."""

    utc_offset: int | None = None
    timezone: str | None = None

    def __post_init__(self) -> None:
        if self.timezone is None:
            return
        require_zone(self.timezone)
        if self.utc_offset is not None:
            raise InputError("--timezone and --utc-offset both tell the city's clock; give one of them")

    def of_utc(self, city: str, utc: np.ndarray) -> tuple[np.ndarray, int]:
        """Stamps of the store's days, datetime64[m] [T], and the minutes these are ahead of UTC, of stamps of UTC."""
        if self.timezone is None:
            offset = utc_offset_of(city, self.utc_offset)
        else:
            offset = standard_offset(self.timezone, utc[0])
        return utc + np.timedelta64(offset, "m"), offset

    def of_each(self, label: Path, city: str, stamps: np.ndarray) -> tuple[np.ndarray, int]:
        """The same of stamps of this clock, in order of time: of two that are equal the first is the earlier."""
        if self.timezone is None:
            return stamps, utc_offset_of(city, self.utc_offset)
        utc = utc_of(str(label), stamps, self.timezone, np.zeros(len(stamps), bool))
        return self.of_utc(city, utc.astype("datetime64[m]"))

    def of_first(self, label: Path | str, city: str, stamps: np.ndarray) -> tuple[np.ndarray, int]:
        """The same of stamps of which the first is this clock's, and others follow it in real time."""
        if self.timezone is None:
            return stamps, utc_offset_of(city, self.utc_offset)
        (first,) = utc_of(f"{label}: --start", stamps[:1], self.timezone, np.zeros(1, bool))
        return self.of_utc(city, first.astype("datetime64[m]") + (stamps - stamps[0]))


def parse_start(start: str) -> np.datetime64:
    """Local stamp of the first frame, datetime64[m]; see ``parse_local_time``."""
    return parse_local_time(start, "--start")


def cell_ids(height: int, width: int, row0: int, col0: int, id_width: int) -> np.ndarray:
    """int64 [H, W]: (row0 + r) · id_width + (col0 + c) + 1, rows from the south as in the Milan grid."""
    return (row0 + np.arange(height))[:, None] * id_width + col0 + np.arange(width)[None] + 1


@dataclass(frozen=True)
class GridPlace:
    """Options: the place of a rectangular grid in the data's own ids, which follow ``cell_ids``. id_width: columns
    that the ids count in, those of the grid by default."""

    row0: int = 0
    col0: int = 0
    id_width: int | None = None

    def spec(
        self,
        city: str,
        channels: Sequence[str],
        stamps: np.ndarray,
        shape: tuple[int, int],
        *,
        cadence: int,
        utc_offset: int | None,
        units: str = UNKNOWN_UNITS,
        static: Mapping[str, np.ndarray] | None = None,
    ) -> GridSpec:
        """Spec over the local days of ``stamps``."""
        height, width = shape
        last = self.col0 + width
        if self.id_width is not None and last > self.id_width:
            columns = f"{self.col0}:{last}"
            raise InputError(f"columns {columns} leave rows of {self.id_width} ids; check --col0 and --id-width")
        return GridSpec(
            city=city,
            channels=tuple(channels),
            first_day=stamps.min().astype("datetime64[D]"),
            last_day=stamps.max().astype("datetime64[D]"),
            cell_ids=cell_ids(height, width, self.row0, self.col0, self.id_width or width),
            cadence_minutes=cadence,
            utc_offset_minutes=utc_offset_of(city, utc_offset),
            units=units,
            rows=self.row0 + np.arange(height),
            cols=self.col0 + np.arange(width),
            static=static,
        )
