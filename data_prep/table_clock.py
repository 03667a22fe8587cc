"""The columns of a table that tell its time: one of stamps, or a date and an hour, or year, month, day and hour."""

import re
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import polars as pl

from data_prep.table_times import (
    TimeColumns,
    cleaned,
    clock_format,
    epoch_unit,
    fitting,
    is_zoned,
    pairs,
    parse,
    plain,
    sample_of,
    whole_numbers,
    words_of,
)
from stdist.errors import InputError

TIMES = ("time", "timestamp", "datetime", "date", "ts", "epoch", "unixtime", "unix", "t", "ds", "utc")
HOURS = ("hour", "hr", "hourday", "hourofday", "time", "h", "stunde", "hora", "heure")
PARTS = (("year", "yr"), ("month", "mnth"), ("day", "dayofmonth", "mdate"), ("hour", "hr"), ("minute", "min"))


def clock_of(
    label: str, sample: pl.DataFrame, asked: Sequence[str], format: str | None, stampless: bool
) -> TimeColumns | None:
    """The columns of time of a table whose first rows are ``sample``; None where it has none.

    asked: those of --time. format: of --time-format. stampless: the user gives the stamp of the first row.
    Raises InputError where several columns tell different times, or those asked for tell none.
    """
    time = _asked(label, sample, asked, format) if asked else _found(label, sample, format)
    if time is not None and stampless:
        raise InputError(f"{label} has stamps of its own in column {time.columns[0]!r}; leave --start out")
    return time


def _found(label: str, sample: pl.DataFrame, format: str | None) -> TimeColumns | None:
    single = [time for name in sample.columns if (time := _column(sample, name, format))]
    if not single:
        return _parts(sample)
    time = single[0] if len(single) == 1 else _agreed(label, sample, single)
    return _with_hours(sample, time)


def _column(sample: pl.DataFrame, name: str, format: str | None) -> TimeColumns | None:
    """The column as one of time; None where it is none."""
    column = sample_of(sample[name])
    if column.dtype.is_temporal() and column.dtype not in (pl.Time, pl.Duration):
        zoned = getattr(column.dtype, "time_zone", None) is not None or _says_utc(name)
        return TimeColumns((name,), "typed", zoned=zoned)
    if not len(column):
        return None
    whole = whole_numbers(column)
    if whole is not None:
        unit = epoch_unit(whole)
        steps = np.diff(whole)
        rising = {*steps[steps > 0].tolist()} if (steps >= 0).all() else {0, 1}
        # So large a number is hardly a count, even where the first rows share it.
        runs = len(steps) > 1 and (len(rising) == 1 or (not rising and unit != "s"))
        if unit and (plain(name) in TIMES or "time" in plain(name) or runs):
            return TimeColumns((name,), "epoch", unit=unit, zoned=True)
        if column.dtype != pl.String and plain(name) not in TIMES:
            return None
        column = column.cast(pl.String)
    if column.dtype != pl.String:
        return None
    formats = (format,) if format and parse(cleaned(column), format).null_count() == 0 else fitting(column)
    return TimeColumns((name,), "text", formats, zoned=is_zoned(formats[0]) or _says_utc(name)) if formats else None


def _says_utc(name: str) -> bool:
    return bool({*words_of(name)} & {"utc", "gmt"})


def _agreed(label: str, sample: pl.DataFrame, times: list[TimeColumns]) -> TimeColumns:
    """One of several columns of time: the one of instants where all run alike, the first of a date and its hour."""
    days = [time for time in times if _is_of_days(sample, time)]
    if (finer := [time for time in times if time not in days]) and days:
        times = finer
    steps = []
    for time in times:
        read = next(iter(time.readings(sample.select(time.columns)).values()))
        steps.append(read.to_physical().diff().to_list())
    if all(step == steps[0] for step in steps):
        return next((time for time in times if time.zoned), times[0])
    names = ", ".join(repr(time.columns[0]) for time in times)
    raise InputError(f"{label} has {len(times)} columns of time ({names}), which differ; choose one with --time")


def _is_of_days(sample: pl.DataFrame, time: TimeColumns) -> bool:
    if sample[time.columns[0]].dtype == pl.Date:
        return True
    return time.kind == "text" and not re.search("%[HI]", time.formats[0])


def _are_midnights(sample: pl.DataFrame, time: TimeColumns) -> bool:
    """True of days that are written with a time of day and repeat, as 01/05/2023 00:00:00."""
    if time.kind not in ("text", "typed") or time.zoned:
        return False
    read = next(iter(time.readings(sample.select(time.columns)).values())).drop_nulls()
    return bool(len(read)) and 2 * read.n_unique() <= len(read) and bool((read == read.dt.truncate("1d")).all())


def tell_time_of_day(sample: pl.DataFrame) -> bool:
    """True where a column holds stamps other than midnights."""
    for name in sample.columns:
        if time := _column(sample, name, None):
            read = next(iter(time.readings(sample.select(name)).values())).drop_nulls()
            if (read != read.dt.truncate("1d")).any():
                return True
    return False


def have_several_rows_a_day(sample: pl.DataFrame) -> bool:
    """True where a column tells days, and each is that of several rows."""
    times = [time for name in sample.columns if (time := _column(sample, name, None))]
    return any(
        (_is_of_days(sample, time) or _are_midnights(sample, time)) and sample[time.columns[0]].n_unique() < len(sample)
        for time in times
    )


def _with_hours(sample: pl.DataFrame, time: TimeColumns) -> TimeColumns:
    """A column of days with the one of hours, or of times of day, beside it; itself where there is none."""
    days = _is_of_days(sample, time)
    if not days and not _are_midnights(sample, time):
        return time
    names = [name for usual in HOURS for name in pairs(sample.columns, (usual,))]
    if sample[time.columns[0]].n_unique() < len(sample):
        # Days that repeat have hours, however the column is called.
        names += [name for name in sample.columns if _of_day(sample_of(sample[name])) == "date+clock"]
        names += [name for name in sample.columns if days and {*words_of(name)} & {*HOURS}]
    for name in names:
        if name not in time.columns and (kind := _of_day(sample_of(sample[name]))):
            return replace(time, columns=(*time.columns, name), kind=kind)
    return time


def _of_day(column: pl.Series) -> str | None:
    """``date+hour`` of hours 0 … 24, ``date+clock`` of times as 17:24:00; None of others."""
    whole = whole_numbers(column)
    if whole is not None and len(whole):
        return "date+hour" if whole.min() >= 0 and whole.max() <= 24 else None
    if column.dtype == pl.Time:
        return "date+clock"
    if column.dtype == pl.String and len(column):
        fields = column.str.strip_chars().to_list()
        formats = {clock_format(field) for field in fields}
        return "date+clock" if len(formats) == 1 and None not in formats else None
    return None


def _parts(sample: pl.DataFrame) -> TimeColumns | None:
    """Columns of year, month, day, and hour and minute where there; None where one of the first three is absent."""
    columns = []
    for number, usual in enumerate(PARTS):
        name = next((name for known in usual for name in pairs(sample.columns, (known,))), None)
        whole = None if name is None else whole_numbers(sample_of(sample[name]))
        if name is None or whole is None or not len(whole):
            if number < 3:
                return None
            break
        columns.append(name)
    years = whole_numbers(sample_of(sample[columns[0]]))
    assert years is not None
    return TimeColumns(tuple(columns), "parts") if years.min() >= 1900 and years.max() < 2200 else None


def _asked(label: str, sample: pl.DataFrame, names: Sequence[str], format: str | None) -> TimeColumns:
    if len(names) == 1:
        time = _column(sample, names[0], format)
        if time is None and (whole := whole_numbers(sample_of(sample[names[0]]))) is not None:
            unit = epoch_unit(whole)
            time = TimeColumns((names[0],), "epoch", unit=unit, zoned=True) if unit else None
    elif len(names) == 2:
        day, kind = _column(sample, names[0], format), _of_day(sample_of(sample[names[1]]))
        time = replace(day, columns=tuple(names), kind=kind) if day and kind else None
    else:
        time = TimeColumns(tuple(names), "parts") if 3 <= len(names) <= 5 else None
    if time is None:
        field = sample_of(sample[names[0]])
        said = f"as {str(field[0])[:30]!r}" if len(field) else "which is blank"
        raise InputError(
            f"{label}: {', '.join(map(repr, names))} of --time, {said}, is no time known; say how it is written: "
            "--time-format '%d/%m/%Y %H:%M'"
        )
    return time
