"""Monash's .tsf: one line a series, its attributes and its values between colons, below a head of ``@`` lines."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from data_prep.table_text import text_blocks
from data_prep.table_times import formats_of, parse
from stdist.errors import InputError

CADENCES = {
    **{"minutely": 1, "half_hourly": 30, "hourly": 60, "daily": 1440, "quarter_hourly": 15},
    **dict.fromkeys(("weekly", "monthly", "quarterly", "yearly", "4_seconds", "10_seconds", "seconds"), 0),
}
"""Minutes by @frequency; 0 where steps are none of whole minutes that divide a day."""


@dataclass(frozen=True, eq=False)
class Series:
    """start: stamp of the first value, datetime64[s], or None. values: float64 [T], NaN where ``?``."""

    name: str
    start: np.datetime64 | None
    values: np.ndarray


def read_tsf(path: Path) -> tuple[list[Series], int | None]:
    """All series, and minutes between their values, None where the head does not say.

    Raises InputError naming the line that breaks the format, and where the frequency is none of minutes to a day.
    """
    attributes: list[tuple[str, str]] = []
    frequency: str | None = None
    series: list[Series] = []
    begun = False
    for number, line in _lines(path):
        if begun:
            series.append(_series(path, number, line, attributes))
        elif line.lower().startswith("@attribute"):
            _, name, kind, *_ = [*line.split(), "", ""]
            attributes.append((name, kind.lower()))
        elif line.lower().startswith("@frequency"):
            frequency = line.split()[1].lower() if len(line.split()) > 1 else None
        elif line.lower().startswith("@data"):
            begun = True
        elif not line.startswith("@"):
            raise InputError(f"{path}, line {number}: {line[:40]!r} stands above @data; it is no .tsf of Monash")
    if not series:
        raise InputError(f"{path} holds no series below @data; give a file that holds data")
    names = [one.name for one in series]
    if len(set(names)) < len(names):
        raise InputError(f"{path}: series {max(names, key=names.count)!r} occurs twice; give each once")
    return series, _cadence(path, frequency)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    lines = (line for block in text_blocks(path) for line in block.decode().split("\n")[:-1])
    for number, line in enumerate(lines, start=1):
        if (line := line.strip()) and not line.startswith("#"):
            yield number, line


def _cadence(path: Path, frequency: str | None) -> int | None:
    if frequency is None:
        return None
    if match := re.fullmatch(r"(\d+)_(minutes|minutely|hours|hourly)", frequency):
        minutes = int(match[1]) * (60 if match[2].startswith("hour") else 1)
    else:
        minutes = CADENCES.get(frequency, 0)
    if not minutes:
        raise InputError(f"{path} is {frequency}; stores take steps of whole minutes, up to a day")
    return minutes


def _series(path: Path, number: int, line: str, attributes: list[tuple[str, str]]) -> Series:
    *given, text = line.split(":")
    if len(given) != len(attributes):
        # Stamps may be written with colons: all that is too much belongs to the one of dates.
        dates = [place for place, (_, kind) in enumerate(attributes) if kind == "date"]
        extra = len(given) - len(attributes)
        if len(dates) != 1 or extra < 0:
            raise InputError(
                f"{path}, line {number}: {len(given)} attributes instead of {len(attributes)}; the line is broken"
            )
        at = dates[0]
        given[at : at + extra + 1] = [":".join(given[at : at + extra + 1])]
    told = dict(zip((name for name, _ in attributes), given, strict=True))
    kinds = dict(attributes)
    start = next((value for name, value in told.items() if kinds[name] == "date"), None)
    values = pl.Series(text.split(",")).str.strip_chars()
    numbers = values.cast(pl.Float64, strict=False)
    if (wrong := numbers.is_null() & ~values.is_in(["?", "NaN", ""])).any():
        raise InputError(f"{path}, line {number}: {values.filter(wrong)[0][:40]!r} is not a number; ? means missing")
    name = told.get("series_name") or next(iter(told.values()), f"T{number}")
    return Series(name, None if start is None else _stamp(path, number, start), numbers.fill_null(np.nan).to_numpy())


def _stamp(path: Path, number: int, text: str) -> np.datetime64:
    formats = formats_of(text)
    stamp = parse(pl.Series([text.strip()]), formats[0])[0] if formats else None
    if stamp is None:
        raise InputError(f"{path}, line {number}: {text[:40]!r} is no stamp; write 2012-01-01 00-00-00")
    return np.datetime64(stamp, "s")
