"""Columns of time in tables: how they are written, and the stamps they hold."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from stdist.errors import InputError

PLACE = re.compile(r"\((?:CET|CEST|UTC|GMT|WET|WEST|EET|EEST|CET/CEST|WET/WEST|EET/EEST)\)")
"""Names of zones behind a stamp, as ENTSO-E writes them."""
SPAN = r"^(.*\S) - \S.*$"
DATES = {
    r"\d{4}-\d{1,2}-\d{1,2}": ("%Y-%m-%d",),
    r"\d{4}/\d{1,2}/\d{1,2}": ("%Y/%m/%d",),
    r"\d{4}\.\d{1,2}\.\d{1,2}": ("%Y.%m.%d",),
    r"\d{1,2}\.\d{1,2}\.\d{4}": ("%d.%m.%Y",),
    r"\d{1,2}\.\d{1,2}\.\d{2}": ("%d.%m.%y",),
    r"\d{1,2}/\d{1,2}/\d{4}": ("%d/%m/%Y", "%m/%d/%Y"),
    r"\d{1,2}-\d{1,2}-\d{4}": ("%d-%m-%Y", "%m-%d-%Y"),
    r"\d{1,2}/\d{1,2}/\d{2}": ("%d/%m/%y", "%m/%d/%y"),
    r"\d{1,2}-[A-Za-z]{3}-\d{4}": ("%d-%b-%Y",),
    r"\d{1,2}-[A-Za-z]{3}-\d{2}": ("%d-%b-%y",),
    r"\d{1,2} [A-Za-z]{3,9} \d{4}": ("%d %B %Y",),
    r"[A-Za-z]{3,9} \d{1,2}, \d{4}": ("%B %d, %Y",),
    r"[A-Za-z]{3,9} \d{1,2} \d{4}": ("%B %d %Y",),
}
CLOCKS = {
    r"\d{1,2}:\d{2}:\d{2}(?:\.\d+)?": "%H:%M:%S%.f",
    r"\d{1,2}:\d{2}": "%H:%M",
    r"\d{1,2}-\d{2}-\d{2}": "%H-%M-%S",
    r"\d{1,2}\.\d{2}\.\d{2}": "%H.%M.%S",
}
COMPACT = {r"\d{12}": "%Y%m%d%H%M", r"\d{14}": "%Y%m%d%H%M%S", r"\d{8}T\d{6}": "%Y%m%dT%H%M%S"}
MIDNIGHT = r"(^|[T ,])24([:.-]00)"
"""The end of a day, 24:00."""
DAY = 86_400_000_000
"""Microseconds."""
YEARS = ("1970", "2101")
EPOCHS = {"s": 1, "ms": 1_000, "us": 1_000_000, "ns": 1_000_000_000}
SINCE, UNTIL = 946_684_800, 4_102_444_800
"""The years 2000 to 2099 in seconds: numbers between are read as epochs."""


def formats_of(stamp: str) -> tuple[str, ...]:
    """Returns the formats of strptime that a stamp may be written in: none where it is no time, two where day and month
    cannot be told apart."""
    stamp = stamp.strip()
    for pattern, format in COMPACT.items():
        if re.fullmatch(pattern, stamp) and YEARS[0] <= stamp[:4] < YEARS[1]:
            return (format,)
    if re.fullmatch(r"\d{8}", stamp) and YEARS[0] <= stamp[:4] < YEARS[1]:
        return ("%Y%m%d",)
    for pattern, dates in DATES.items():
        if not (match := re.match(pattern + r"(?![\d/])", stamp)):
            continue
        rest = stamp[match.end() :]
        if not rest:
            return dates
        for clock, format in CLOCKS.items():
            found = re.fullmatch(rf"(T|, | +|:)({clock})( ?[AaPp][Mm])?( ?Z| ?UTC| ?GMT| ?[+-]\d\d(?::?\d\d)?)?", rest)
            if found:
                half, zone = found[3], found[4]
                if half:
                    format = format.replace("%H", "%I") + half[:-2] + "%p"
                if zone:
                    blank = " " if zone[0] == " " else ""
                    offset = "%z" if len(zone.strip()) > 3 else "%#z"
                    format += blank + (offset if zone.strip()[0] in "+-" else zone.strip())
                return tuple(date + found[1] + format for date in dates)
    return ()


def clock_format(field: str) -> str | None:
    """The format that a time of day is written in; None where it is none."""
    for clock, format in CLOCKS.items():
        if found := re.fullmatch(rf"{clock}( ?[AaPp][Mm])?", field):
            half = found[1]
            return format.replace("%H", "%I") + half[:-2] + "%p" if half else format
    return None


def cleaned(text: pl.Series) -> pl.Series:
    """Text of stamps without the ends of spans (``a - b``) and the names of zones in brackets."""
    text = text.cast(pl.String).str.strip_chars()
    if text.str.contains(" - ", literal=True).any():
        text = text.str.replace(SPAN, "$1")
    return text.str.replace(PLACE.pattern, "").str.strip_chars() if text.str.contains("(", literal=True).any() else text


def parse(text: pl.Series, format: str) -> pl.Series:
    """Datetime[us] without a zone, UTC where the format tells a zone; null where a stamp is not written so.

    A date alone among stamps with a time of day is its midnight: so Excel writes it.
    """
    if text.str.contains(MIDNIGHT).any():
        return parse(text.str.replace(MIDNIGHT, "${1}00$2"), format) + _days_later(text)
    if not re.search("%[HI]", format):
        days = text.str.strptime(pl.Date, format, strict=False)
        return days.cast(pl.Datetime("us"))
    try:
        stamps = text.str.strptime(pl.Datetime("us"), format, strict=False)
    except pl.exceptions.PolarsError as error:
        raise InputError(f"--time-format {format!r} is no format of dates; write %Y-%m-%d %H:%M") from error
    stamps = stamps.dt.replace_time_zone(None) if getattr(stamps.dtype, "time_zone", None) else stamps
    date, clock = re.match(r"(.*?)(?:T|, | +|:)?%[HI]", format), stamps.null_count()
    if not clock or not date or not date[1] or is_zoned(format):
        return stamps
    return stamps.fill_null(text.str.strptime(pl.Date, date[1], strict=False).cast(pl.Datetime("us")))


def _days_later(text: pl.Series) -> pl.Series:
    """A day of stamps that are the end of one, 24:00, else none: Duration[us]."""
    return (text.str.contains(MIDNIGHT).cast(pl.Int64) * DAY).cast(pl.Duration("us"))


def is_zoned(format: str) -> bool:
    return format.endswith(("z", "Z", "UTC", "GMT"))


def offsets_in(text: pl.Series) -> set[int]:
    """Minutes ahead of UTC that stamps with an offset are written in."""
    ends = text.str.extract(r"([+-]\d\d(?::?\d\d)?)$").unique().drop_nulls()
    return {(1 if end[0] == "+" else -1) * (int(end[1:3]) * 60 + int(end[3:].strip(":") or 0)) for end in ends}


def fitting(sample: pl.Series) -> tuple[str, ...]:
    """Formats that the stamps of a sample, text without nulls, are written in, but few: reading names those."""
    text = cleaned(sample)
    if not len(text):
        return ()
    candidates = dict.fromkeys([*formats_of(text[text.str.len_chars().arg_max() or 0]), *formats_of(text[0])])
    return tuple(format for format in candidates if parse(text, format).null_count() <= few_of(len(text)))


def few_of(fields: int) -> int:
    """Fields of a column that may be otherwise than its others: a summary at the end, a slip."""
    return max(int(fields >= 3), fields // 10)


def epoch_unit(sample: np.ndarray) -> str | None:
    """``s``, ``ms``, ``us`` or ``ns`` where whole numbers are instants of this century; else None."""
    if not len(sample) or sample.min() <= 0:
        return None
    return next(
        (u for u, n in EPOCHS.items() if SINCE * n <= int(sample.min()) and int(sample.max()) < UNTIL * n), None
    )


@dataclass(frozen=True)
class TimeColumns:
    """The columns of a table that tell its time.

    columns: their names. kind: ``text``, ``epoch``, ``typed``, ``date+hour``, ``date+clock`` or ``parts`` (year,
    month, day, and hour and minute where there). formats: of text, several where day and month cannot be told apart
    by the first lines. unit: of epochs. zoned: the stamps are instants, else the clock's, of
    ``zone`` where the user tells it.
    """

    columns: tuple[str, ...]
    kind: str
    formats: tuple[str, ...] = ()
    unit: str = ""
    zoned: bool = False
    zone: str | None = None

    def readings(self, frame: pl.DataFrame) -> dict[str, pl.Series]:
        """Datetime[us] of every row by the format read in, null where there is no time."""
        first = frame[self.columns[0]]
        if self.kind == "typed":
            return {"": _typed(first)}
        if self.kind == "epoch":
            return {"": _epochs(first, self.unit)}
        if self.kind == "parts":
            parts = frame.select(
                pl.col(name).cast(pl.Float64, strict=False).cast(pl.Int32, strict=False) for name in self.columns
            )
            year, *others = map(pl.col, self.columns)
            year = pl.when(year < 100).then(year + 1900 + 100 * (year < 70)).otherwise(year)
            return {"": parts.select(pl.datetime(year, *others, time_unit="us")).to_series()}
        if self.kind == "text":
            text = cleaned(first)
            return {format: parse(text, format) for format in self.formats}
        days = {"": _typed(first)} if first.dtype.is_temporal() else {f: parse(cleaned(first), f) for f in self.formats}
        return {format: day + self._of_day(frame[self.columns[1]]) for format, day in days.items()}

    def _of_day(self, column: pl.Series) -> pl.Series:
        """Duration since midnight."""
        if self.kind == "date+hour":
            hours = column.cast(pl.Float64, strict=False)
            return (hours * 3600).cast(pl.Int64).cast(pl.Duration("ms")) * 1000
        clock = column.cast(pl.String).str.strip_chars()
        format = clock_format(clock.drop_nulls()[0]) or "%H:%M:%S"
        of_day = clock.str.replace(MIDNIGHT, "${1}00$2").str.strptime(pl.Time, format, strict=False)
        return of_day.cast(pl.Duration("us")) + _days_later(clock)


def _typed(column: pl.Series) -> pl.Series:
    if getattr(column.dtype, "time_zone", None):
        column = column.dt.convert_time_zone("UTC").dt.replace_time_zone(None)
    return column.cast(pl.Datetime("us"))


def _epochs(column: pl.Series, unit: str) -> pl.Series:
    per = EPOCHS[unit]
    whole = column.cast(pl.Int64, strict=False)
    if whole.null_count() > column.null_count():
        whole = whole.fill_null(column.cast(pl.Float64, strict=False).cast(pl.Int64, strict=False))
    return (whole * (1_000_000 // per) if per <= 1_000_000 else whole // (per // 1_000_000)).cast(pl.Datetime("us"))


def chosen_reading(path: Path | str, readings: Sequence[tuple[str, np.ndarray]], column: str) -> tuple[str, np.ndarray]:
    """The one reading of a column's stamps, datetime64[us]. readings: those under which every row is a stamp.

    Raises InputError naming ``--time-format`` where day and month cannot be told apart: no day beyond the twelfth, and
    neither reading runs at a steady pace where the other does not.
    """
    if len(readings) == 1 or all((read == readings[0][1]).all() for _, read in readings):
        return readings[0]
    steady = [reading for reading in readings if _is_steady(reading[1])]
    if len(steady) == 1:
        return steady[0]
    formats = " or ".join(f"--time-format '{format}'" for format, _ in readings)
    (_, first), (_, second), *_ = readings
    unlike = int((first != second).argmax())
    one, other = (str(stamps[unlike].astype("datetime64[m]")).replace("T", " ") for stamps in (first, second))
    raise InputError(
        f"{path}: column {column!r} may have the day or the month first, as {one} or {other}; give {formats}"
    )


def _is_steady(stamps: np.ndarray) -> bool:
    """True where more than two different stamps lie at one distance from each other."""
    steps = np.diff(np.unique(stamps))
    return len(steps) > 1 and bool((steps == steps[0]).all())


def sample_of(column: pl.Series) -> pl.Series:
    """The fields of a sample that hold something."""
    column = column.drop_nulls()
    return column.filter(column.str.strip_chars() != "") if column.dtype == pl.String else column


def whole_numbers(column: pl.Series) -> np.ndarray | None:
    """int64 of a column of whole numbers without gaps; None where it is none."""
    if column.dtype.is_integer():
        values = column
    elif column.dtype == pl.String:
        column = column.str.strip_chars().str.replace(r"\.0+$", "")
        values = column.cast(pl.Int64, strict=False)
    elif column.dtype.is_float():
        values = column.cast(pl.Int64, strict=False)
        if not (values.cast(pl.Float64) == column).all():
            return None
    else:
        return None
    values = values.cast(pl.Int64, strict=False)
    return values.to_numpy() if len(values) and not values.null_count() else None


def words_of(name: str) -> list[str]:
    """The words of a column's name, in small letters: start, station and id of ``start_station_id``."""
    return re.findall(r"[a-z]+", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower())


def pairs(names: Sequence[str], usual: Sequence[str]) -> Iterator[str]:
    """The names that are among the usual ones, whatever their case, blanks and lines below."""
    for name in names:
        if plain(name) in usual:
            yield name


def plain(name: str) -> str:
    """A column's name in small letters and digits alone."""
    return re.sub(r"[^a-z0-9]+", "", name.lower())
