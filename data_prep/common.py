"""What every reader shares: sources, the options that most of them take, and the axes of a store."""

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import wraps
from inspect import signature
from pathlib import Path

import numpy as np

from data_prep.plan import Plan
from stdist.data import GridSpec, NodeSpec, Split
from stdist.errors import InputError

KNOWN_UTC_OFFSETS = {"milan": 60, "trentino": 60}
"""Minutes; CET throughout the Telecom Italia data. Other cities default to UTC."""
PACIFIC = -480
"""Pacific standard time, minutes: that of California's detectors in winter."""
PACIFIC_CLOCK = "local times are the source's, with daylight saving; UTC stamps are one hour late in summer"


def only_source(sources: Sequence[Path], reader: str) -> Path:
    """The one source of a reader that takes exactly one; InputError otherwise."""
    if len(sources) != 1:
        raise InputError(f"{reader} reads one file, {len(sources)} given; prepare one store per file")
    return existing(sources[0])


def existing(path: Path) -> Path:
    if not Path(path).is_file():
        raise InputError(f"{path} is not a file; give the raw file itself")
    return Path(path)


def files_in(sources: Sequence[Path], pattern: str) -> list[Path]:
    """The files given, and in place of a folder those of it that fit the pattern."""
    folders = [sorted(Path(s).glob(pattern)) if Path(s).is_dir() else [existing(s)] for s in sources]
    return [file for folder in folders for file in folder]


def city_of(path: Path) -> str:
    """First word of a file name: ``milan`` of milan_grid_data.csv."""
    return re.split(r"[^a-z0-9]+", path.stem.lower())[0] or path.stem


def utc_offset_of(city: str, utc_offset: int | None) -> int:
    return KNOWN_UTC_OFFSETS.get(city.lower(), 0) if utc_offset is None else utc_offset


def parse_start(start: str) -> np.datetime64:
    """Local stamp of the first frame, datetime64[m], from ISO text such as 2013-11-01T00:00."""
    try:
        return np.datetime64(start, "m")
    except ValueError as error:
        raise InputError(f"--start {start!r} is not a local ISO time; write 2013-11-01T00:00") from error


def cell_ids(height: int, width: int, row0: int, col0: int, id_width: int) -> np.ndarray:
    """int64 [H, W]: (row0 + r) · id_width + (col0 + c) + 1, rows from the south as in the Milan grid."""
    return (row0 + np.arange(height))[:, None] * id_width + col0 + np.arange(width)[None] + 1


def grid_spec(
    city: str,
    channels: Sequence[str],
    stamps: np.ndarray,
    shape: tuple[int, int],
    *,
    cadence: int,
    utc_offset: int | None,
    row0: int = 0,
    col0: int = 0,
    id_width: int | None = None,
    units: str = "activity",
    static: dict[str, np.ndarray] | None = None,
) -> GridSpec:
    """Spec of a rectangular grid over the local days of ``stamps``, whose ids follow ``cell_ids``; ``id_width``
    defaults to the width."""
    height, width = shape
    if id_width is not None and col0 + width > id_width:
        raise InputError(f"columns {col0}:{col0 + width} leave rows of {id_width} ids; check --col0 and --id-width")
    return GridSpec(
        city=city,
        channels=tuple(channels),
        first_day=stamps.min().astype("datetime64[D]"),
        last_day=stamps.max().astype("datetime64[D]"),
        cell_ids=cell_ids(height, width, row0, col0, id_width or width),
        cadence_minutes=cadence,
        utc_offset_minutes=utc_offset_of(city, utc_offset),
        units=units,
        rows=row0 + np.arange(height),
        cols=col0 + np.arange(width),
        static=static,
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


def with_spans(plan: Callable[..., Plan]) -> Callable[..., Plan]:
    """Gives a reader the options ``train``, ``validation`` and ``test`` of ``parse_split``."""

    @wraps(plan)
    def planned(
        sources: list[Path],
        *,
        train: str | None = None,
        validation: str | None = None,
        test: str | None = None,
        **options: object,
    ) -> Plan:
        made = plan(sources, **options)
        return replace(made, split=parse_split(train, validation, test, made.spec))

    own, added = signature(plan), signature(planned, follow_wrapped=False).parameters
    spans = [added[name] for name in ("train", "validation", "test")]
    planned.__signature__ = own.replace(parameters=[*own.parameters.values(), *spans])  # type: ignore[attr-defined]
    return planned
