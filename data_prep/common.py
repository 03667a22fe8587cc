"""What every reader shares: sources, spans, cell ids, and the days of frames that are in memory."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from data_prep.plan import Day
from stdist.data import GridSpec, NodeSpec, Split
from stdist.errors import InputError

KNOWN_UTC_OFFSETS = {"milan": 60, "trentino": 60}
"""Minutes; CET throughout the Telecom Italia data. Other cities default to UTC."""


def only_source(sources: Sequence[Path], reader: str) -> Path:
    """The one source of a reader that takes exactly one; InputError otherwise."""
    if len(sources) != 1:
        raise InputError(f"{reader} reads one file, {len(sources)} given; prepare one store per file")
    return existing(sources[0])


def existing(path: Path) -> Path:
    if not Path(path).is_file():
        raise InputError(f"{path} is not a file; give the raw file itself")
    return Path(path)


def city_of(path: Path) -> str:
    """First word of a file name: ``milan`` of milan_grid_data.csv."""
    return re.split(r"[^a-z0-9]+", path.stem.lower())[0] or path.stem


def utc_offset_of(city: str, utc_offset: int | None) -> int:
    return KNOWN_UTC_OFFSETS.get(city.lower(), 0) if utc_offset is None else utc_offset


def parse_start(start: str) -> np.datetime64:
    """Local stamp of the first frame, datetime64[m], from ISO text such as 2013-11-01T00:00."""
    try:
        stamp = np.datetime64(start, "m")
    except ValueError as error:
        raise InputError(f"--start {start!r} is not a local ISO time; write 2013-11-01T00:00") from error
    return stamp


def cell_ids(height: int, width: int, row0: int, col0: int, id_width: int) -> np.ndarray:
    """int64 [H, W]: (row0 + r) · id_width + (col0 + c) + 1, rows from the south as in the Milan grid."""
    return (row0 + np.arange(height))[:, None] * id_width + col0 + np.arange(width)[None] + 1


def grid_spec(
    city: str,
    channels: Sequence[str],
    days: tuple[np.datetime64, np.datetime64],
    shape: tuple[int, int],
    *,
    cadence: int,
    utc_offset: int | None,
    row0: int = 0,
    col0: int = 0,
    id_width: int | None = None,
    units: str = "activity",
) -> GridSpec:
    """Spec of a rectangular grid whose ids follow ``cell_ids``; ``id_width`` defaults to the width."""
    height, width = shape
    if id_width is not None and col0 + width > id_width:
        raise InputError(f"columns {col0}:{col0 + width} leave rows of {id_width} ids; check --col0 and --id-width")
    return GridSpec(
        city=city,
        channels=tuple(channels),
        first_day=days[0],
        last_day=days[1],
        cell_ids=cell_ids(height, width, row0, col0, id_width or width),
        cadence_minutes=cadence,
        utc_offset_minutes=utc_offset_of(city, utc_offset),
        units=units,
        rows=row0 + np.arange(height),
        cols=col0 + np.arange(width),
    )


def parse_split(train: str | None, validation: str | None, test: str | None, spec: GridSpec | NodeSpec) -> Split | None:
    """Split from local dates ``A:B``; None where none is given, so that the store chooses its default.

    Raises InputError where a span leaves the data's days, before any work is done.
    """
    if train is validation is test is None:
        return None
    split = Split.parse(train, validation, test)
    for span in (split.train, split.validation, split.test):
        if span and (span.first_day < spec.first_day or span.last_day > spec.last_day):
            raise InputError(f"span {span} leaves the data's days {spec.first_day}:{spec.last_day}; choose days within")
    return split


def require_on_grid(path: Path, stamps: np.ndarray, cadence: int) -> None:
    """Raise InputError for a local stamp (datetime64[m] [n]) that is repeated or off the cadence's grid."""
    since_midnight = (stamps - stamps.astype("datetime64[D]")).astype(np.int64)
    if (since_midnight % cadence).any():
        stamp = stamps[(since_midnight % cadence) != 0][0]
        raise InputError(
            f"{path}: stamp {stamp} is off the {cadence}-minute grid that begins at midnight; check --cadence"
        )
    unique, counts = np.unique(stamps, return_counts=True)
    if (counts > 1).any():
        raise InputError(f"{path}: stamp {unique[counts > 1][0]} occurs twice; give each frame once")


def days_of_frames(spec: GridSpec | NodeSpec, stamps: np.ndarray, channels: dict[str, np.ndarray]) -> Iterator[Day]:
    """The days of frames that are all in memory; slots without a frame are not present.

    stamps: local, datetime64[m] [n], any order, on the spec's axis. channels: float32 [n, *shape], NaN =
    missing.
    """
    frames = (stamps - spec.first_day.astype("datetime64[m]")).astype(np.int64) // spec.cadence_minutes
    for day in np.unique(frames // spec.slots_per_day).tolist():
        chosen = np.flatnonzero(frames // spec.slots_per_day == day)
        slots = frames[chosen] % spec.slots_per_day
        present = np.zeros(spec.slots_per_day, bool)
        present[slots] = True
        values = {}
        for name, data in channels.items():
            values[name] = np.full((spec.slots_per_day, *spec.shape), np.nan, np.float32)
            values[name][slots] = data[chosen]
        yield Day(day, values, present)
