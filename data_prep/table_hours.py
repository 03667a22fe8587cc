"""Tables with a row a day and a column an hour, read as ones with a row an hour."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import polars as pl

from data_prep.table_clock import have_several_rows_a_day, tell_time_of_day
from data_prep.table_reading import Source
from data_prep.table_times import clock_format, plain
from stdist.data.schema import MINUTES_PER_DAY

HOUR, VALUE = "hour", "value"
"""The columns that the ones of hours become."""
NUMBERED = re.compile(r"(?i)(?:h|hr|hour|hora?|ora|heure|stunde|std)[ _]?(\d{1,2})|(\d{1,2})[ _]?h")
TOTALS = ("total", "sum", "totals", "totaldia", "daily", "dailytotal", "mean", "average", "all")
COUNTED = re.compile(r"[A-Za-z]\d\d")
FEWEST = 3
"""Columns of times of day that make such a table; columns of numbered hours are all 24."""


@dataclass(frozen=True)
class HourColumns:
    """``table`` with a row an hour. hours: its columns of hours, and the hour or time of day of each."""

    table: Source
    hours: dict[str, str]

    @property
    def header(self) -> bool:
        return self.table.header

    @property
    def path(self) -> Path:
        return self.table.path

    @property
    def label(self) -> str:
        return self.table.label

    @property
    def stem(self) -> str:
        return self.table.stem

    @property
    def names(self) -> tuple[str, ...]:
        """Without the total of a day."""
        return (*(n for n in self.table.names if n not in self.hours and plain(n) not in TOTALS), HOUR, VALUE)

    @cached_property
    def sample(self) -> pl.DataFrame:
        return self._long(self.table.sample).select(self.names)

    @property
    def said(self) -> str:
        first, *_, last = self.hours
        late = any(re.fullmatch(r"24(\D00)*", hour) for hour in self.hours.values())
        ends = ", of which the last, hour 24, is stamped as the next midnight" if late else ""
        return f"columns {first} … {last} are hours of the day{ends}"

    def blocks(self, numeric: Sequence[str], text: Sequence[str]) -> Iterator[tuple[np.ndarray, pl.DataFrame]]:
        """The line of each row repeated for its hours, and columns as those of a table."""
        kept = {*numeric, *text} - {HOUR, VALUE}
        values = [name for name in numeric if name in kept], [name for name in text if name in kept]
        for lines, frame in self.table.blocks([*values[0], *self.hours], values[1]):
            yield np.repeat(lines, len(self.hours)), self._long(frame).select(*text, *numeric)

    def _long(self, frame: pl.DataFrame) -> pl.DataFrame:
        others = [name for name in frame.columns if name not in self.hours]
        rows = pl.int_range(pl.len(), dtype=pl.Int64)
        long = frame.with_columns(rows.alias("\0row")).unpivot(
            [*self.hours], index=[*others, "\0row"], variable_name=HOUR, value_name=VALUE
        )
        return long.sort("\0row", maintain_order=True).with_columns(pl.col(HOUR).replace_strict(self.hours))


def rows_of_hours(table: Source) -> Source:
    """The table with a row an hour where it has a row a day and a column an hour: H01 … H24, or times of day. Rows with
    a time of day of their own are not of days."""
    clocks = {name: name for name in table.names if clock_format(name)}
    spans = {
        name: span[1] for name in table.names if (span := re.fullmatch(r"(\d{1,2}:\d\d) ?[-–] ?\d{1,2}:\d\d", name))
    }
    numbered = {
        name: str(int(found[1] or found[2])) for name in table.names if (found := NUMBERED.fullmatch(name.strip()))
    }
    if [*map(int, numbered.values())] not in ([*range(24)], [*range(1, 25)]):
        numbered = {}
    hours = next((hours for hours in (clocks, spans, numbered) if len(hours) >= FEWEST), {}) or _counted(table)
    if not hours or {HOUR, VALUE} & ({*table.names} - {*hours}) or tell_time_of_day(table.sample):
        return table
    return HourColumns(table, hours)


def _counted(table: Source) -> dict[str, str]:
    """Columns V00 … V95 and their times of day, where a day has several rows: those are of places, the columns not."""
    names = [name for name in table.names if COUNTED.fullmatch(name)]
    alike = len({name[0] for name in names}) == 1 and [int(name[1:]) for name in names] == [*range(len(names))]
    if len(names) not in (48, 96) or not alike or not have_several_rows_a_day(table.sample):
        return {}
    minutes = [place * MINUTES_PER_DAY // len(names) for place in range(len(names))]
    return {name: f"{minute // 60:02}:{minute % 60:02}" for name, minute in zip(names, minutes, strict=True)}
