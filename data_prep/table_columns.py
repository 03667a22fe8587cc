"""The columns of a table: which tell the time and the place, which hold values, and which are neither."""

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import polars as pl

from data_prep.table_clock import clock_of
from data_prep.table_sniff import is_number, is_time
from data_prep.table_times import (
    TimeColumns,
    clock_format,
    epoch_unit,
    fitting,
    pairs,
    plain,
    sample_of,
    whole_numbers,
    words_of,
)
from stdist.errors import InputError
from stdist.zones import require_zone

PLACES = (
    *("sensorid", "stationid", "detectorid", "cellid", "squareid", "zoneid", "nodeid", "locationid", "pulocationid"),
    *("entityid", "lclid", "uniqueid", "itemid", "seriesid", "meterid", "siteid", "segmentid", "linkid", "roadid"),
    *("gridid", "regionid", "placeid", "deviceid", "counterid", "msid", "customerid", "householdid", "tractid"),
    *("sensor", "station", "detector", "cell", "square", "zone", "node", "location", "site", "segment", "link"),
    *("place", "meter", "counter", "device", "turbine", "region", "area", "series", "seriesname", "id", "name"),
    *("stationname", "sensorname", "sitename", "road", "street", "household", "page"),
    *("estacion", "stazione", "sensore", "messstelle", "standort", "zst", "capteur", "compteur"),
)
"""Usual names of columns of places, in small letters and digits; the first of those that a table has is taken."""
INDEX = ("index", "level0", "rownum", "rownumber", "row", "rowid", "no", "nr", "instant", "dynaid", "objectid")
CALENDAR = (
    *("year", "yr", "month", "mnth", "day", "dayofmonth", "mdate", "hour", "hr", "hourday", "hourofday", "minute"),
    *("weekday", "dayofweek", "dow", "week", "weekofyear", "dayofyear", "quarter", "season", "holiday", "workingday"),
    *("isholiday", "isweekend", "weekend", "timeofday", "tod", "date", "time", "timestamp", "datetime", "epoch"),
)
IDS = ("id", "ids", "identifiant", "identifier")
ID_WORDS = (*IDS, "code", "nummer", "number", "name")
PLACE_WORDS = ("station", "sensor", "detector", "zone", "cell", "site", "node", "link", "segment", "location", "arc")
DEGREES = (
    *("lat", "latitude", "lon", "lng", "long", "longitude", "elevation", "altitude", "x", "y"),
    *("xcoord", "ycoord", "ekoord", "nkoord", "easting", "northing"),
)
CELLS = (("rowid", "row"), ("columnid", "column", "colid", "col"))
"""Usual names of rows and columns of a grid's cells."""
AXES = (*CELLS[0], *CELLS[1], "i", "j", "x", "y", "r", "c")
TOTALS = ("total", "sum", "totals", "mean", "average", "all")
MANIFOLD = 1.5
"""Rows a stamp from which on rows are of several places."""
MANY = 8
"""More columns of values than this beside a column of text: the table may be wide."""


class Table(Protocol):
    """A table before its rows are read. sample: its first rows, text or of types of their own, null where blank."""

    @property
    def label(self) -> str: ...
    @property
    def names(self) -> tuple[str, ...]: ...
    @property
    def sample(self) -> pl.DataFrame: ...


@dataclass(frozen=True)
class Named:
    """Options: the columns of a table, where their names and first lines do not tell. time: column of time, or those
    that tell it together, as date,hour. place: column of places, which makes the table long, or those that tell it
    together, as site,direction; row,column of a grid's cells. values: columns of values, a,b,…, each a channel; in a
    wide table the places to take. layout: wide (a column a place) or long (a row a place and time). time_format: how
    stamps are written, as %d/%m/%Y %H:%M. timezone: the city's zone, as Europe/Madrid: stamps without an offset are of
    its clock, also in the hours that are repeated and skipped, and so are the store's local days and times."""

    time: str | None = None
    place: str | None = None
    values: str | None = None
    layout: str | None = None
    time_format: str | None = None
    timezone: str | None = None

    def __post_init__(self) -> None:
        if self.timezone is not None:
            require_zone(self.timezone)
        if self.layout not in (None, "wide", "long"):
            raise InputError(f"--layout {self.layout!r} is neither wide nor long; give one of the two")
        if self.layout == "wide" and self.place:
            raise InputError("--place names the column of places of a long table; leave it out, or give --layout long")


@dataclass(frozen=True)
class Roles:
    """The part of every column. place: the column of places, or those that tell it together; none of a wide table.
    layout: ``wide``, ``long``, ``turned`` (a row a place, a column a time), or ``one`` (values of one place). left_out:
    what is no measurement."""

    layout: str
    time: TimeColumns | None
    place: tuple[str, ...]
    values: tuple[str, ...]
    left_out: tuple[str, ...]


def roles_of(table: Table, named: Named, stampless: bool, counting: bool = False) -> Roles:
    """stampless: the rows follow one another from a stamp that the user gives. counting: rows are events, to be counted
    by place and time, and no column holds values.

    Raises InputError in one line that names the option where the columns can be read in several ways.
    """
    place = tuple(_listed(table, "--place", named.place))
    asked = _listed(table, "--values", named.values)
    time = clock_of(table.label, table.sample, _listed(table, "--time", named.time), named.time_format, stampless)
    if time is not None and not time.zoned:
        time = replace(time, zone=named.timezone)
    if time and (both := next((name for name in time.columns if name in place), None)):
        raise InputError(f"{table.label}: column {both!r} of --place tells the time; leave it out")
    if time is None and not stampless and (turned := _turned(table, place, named.timezone)):
        return turned
    free = [name for name in table.names if not (time and name in time.columns) and name not in place]
    numeric = [name for name in free if is_numeric(table.sample[name])]
    text = [name for name in free if name not in numeric and not _is_time(table.sample[name])]
    values = [name for name in numeric if not _is_no_measurement(table, name, time is not None)]
    if counting:
        return _events(table, time, place or _place(table, time, values, text, [], "long") if time else ())
    if not place and named.layout != "wide" and time is not None:
        place = _cells(values) or _place(table, time, values, text, asked, named.layout)
    if asked:
        if wrong := next((name for name in asked if name not in numeric), None):
            raise InputError(f"{table.label}: column {wrong!r} of --values holds no numbers; choose others")
        values = asked
    if place:
        values = [name for name in values if name not in place]
        if time is None:
            raise InputError(f"{table.label} has no column of time beside {place[0]!r}; name it with --time")
        if not asked:
            others = [name for name in values if plain(name) not in (*DEGREES, *PLACES)]
            values = [name for name in others if not {*words_of(name)} & {*IDS}] or others
    if not values:
        raise InputError(f"{table.label} has no column of values; it has {', '.join(map(repr, table.names[:12]))}")
    if named.layout == "long" and time is None:
        raise InputError(f"{table.label} has no column of time, which a long table needs; name it with --time")
    layout = named.layout or ("long" if place else _layout(table, time, values, text, asked))
    if layout == "long" and not place:
        layout = "one"
    if layout == "wide" and not asked:
        values = _without_total(table, values)
    used = {*values, *place, *(time.columns if time else ())}
    return Roles(layout, time, place, tuple(values), tuple(name for name in table.names if name not in used))


def _events(table: Table, time: TimeColumns | None, place: tuple[str, ...]) -> Roles:
    """The roles of a table whose rows are counted."""
    others = [name for name in table.names if not (time and name in time.columns) and name not in place]
    for option, lacking in (("--time", time is None), ("--place", not place and others)):
        if lacking:
            columns = ", ".join(map(repr, table.names[:20]))
            raise InputError(f"{table.label}: which column tells it for --duplicates count? name it with {option}: "
                             f"{columns}")  # fmt: skip
    return Roles("long", time, place, (), tuple(others))


def is_numeric(column: pl.Series) -> bool:
    """True where what a sample holds are mostly numbers, or nothing: reading names what is none among them."""
    if column.dtype == pl.String:
        fields = [field.strip() for field in column.drop_nulls().to_list()]
        return 2 * sum(not is_number(field) for field in fields) <= len(fields)
    return column.dtype.is_numeric() or column.dtype == pl.Null


def _is_time(column: pl.Series) -> bool:
    if column.dtype != pl.String:
        return column.dtype.is_temporal()
    fields = sample_of(column).to_list()
    return is_time(fields) or (bool(fields) and all(map(clock_format, fields)))


def _is_no_measurement(table: Table, name: str, timed: bool) -> bool:
    """True of an index, a count of rows, a part of the calendar, or a column of instants."""
    column = sample_of(table.sample[name])
    if name == "" or re.fullmatch(r"Unnamed: \d+(\.\d+)*|__index_level_\d+__", name):
        return True
    whole = whole_numbers(column)
    if plain(name) in INDEX:
        return whole is not None and bool((np.diff(whole) > 0).all())
    if plain(name) in CALENDAR:
        return timed or (whole is not None and bool((np.diff(whole) > 0).all()))
    if whole is None or len(whole) < 3:
        return False
    counts = bool((np.diff(whole) == 1).all())
    steps = np.diff(whole)
    instants = epoch_unit(whole) is not None and bool((steps >= 0).all()) and bool(steps.any())
    return instants or (counts and plain(name) in ("id", "t", "step", "timestep", "frame") and not _repeats(table))


def _repeats(table: Table) -> bool:
    """True where several rows of the sample share their whole text of time: a hint that the table is long."""
    for name in pairs(table.names, ("time", "timestamp", "datetime", "date", "starttime")):
        column = sample_of(table.sample[name])
        return column.n_unique() < len(column)
    return False


def _cells(values: list[str]) -> tuple[str, ...]:
    """The columns of rows and columns of a grid's cells, none where the table has not both."""
    found = [name for usual in CELLS for name in [n for known in usual for n in pairs(values, (known,))][:1]]
    return tuple(found) if len(found) == len(CELLS) else ()


def _place(
    table: Table, time: TimeColumns, values: list[str], text: list[str], asked: list[str], layout: str | None
) -> tuple[str, ...]:
    """The column of places of a long table; none where the table has none."""
    named = [name for usual in PLACES for name in pairs(table.names, (usual,)) if name in {*values, *text}]
    if _stamps_repeat(table, time):
        named += [name for name in (*values, *text) if _is_called_a_place(name) and name not in named]
        ids = [
            name for name in (*values, *text) if {*words_of(name)} & {*IDS} and table.sample[name].is_duplicated().any()
        ]
        named += ids if len(ids) == 1 and not named else []
    named = [name for name in named if name not in asked]
    counters = [name for name in named if _counts_rows(table, name)]
    if others := [name for name in named if name not in counters]:
        # An id may be one of rows.
        apart = (n for n in others if plain(n) != "id" and not _occur_twice(table, (*time.columns, n)))
        return (next(apart, others[0]),)
    if counters and _stamps_repeat(table, time):
        return (counters[0],)
    words = [name for name in text if plain(name) not in CALENDAR]
    varied = [name for name in words if table.sample[name].n_unique() > 1]
    if asked or layout == "long":
        return tuple(varied) if len(varied) == 1 and _stamps_repeat(table, time) else ()
    few = len(values) <= MANY
    if len(varied) == 1 and few and (len(words) == 1 or _stamps_repeat(table, time)):
        return tuple(varied)
    if len(words) == 1 and len(values) == 1:
        return tuple(words)
    if _stamps_repeat(table, time):
        whole = [name for name in values if whole_numbers(sample_of(table.sample[name])) is not None]
        if len(only := [*words, *whole]) == 1 and values != only and not _occur_twice(table, (*time.columns, *only)):
            return (only[0],)
        might = ", ".join(map(repr, [*words, *whole][:6])) or "none might"
        raise InputError(
            f"{table.label}: several rows share a stamp, and no column is known to be the place ({might}); "
            "name it with --place"
        )
    return ()


def _occur_twice(table: Table, names: tuple[str, ...]) -> bool:
    """True where rows of the sample are equal in these columns, and not in others."""
    rows = table.sample.unique()
    return rows.select(names).n_unique() < len(rows)


def _is_called_a_place(name: str) -> bool:
    """True of names as start_station_id, detid_15."""
    words = words_of(name)
    return bool({*words} & {*ID_WORDS} and {*words} & {*PLACE_WORDS}) or any(
        word.endswith("id") and len(word) > 3 for word in words
    )


def _counts_rows(table: Table, name: str) -> bool:
    whole = whole_numbers(sample_of(table.sample[name]))
    return whole is not None and len(whole) > 2 and bool((np.diff(whole) == 1).all())


def _stamps_repeat(table: Table, time: TimeColumns) -> bool:
    """True where rows share their stamps as those of places do, not now and then as repeated rows do."""
    columns = table.sample.select(time.columns).drop_nulls()
    return len(columns) > MANIFOLD * columns.n_unique()


def _layout(table: Table, time: TimeColumns | None, values: list[str], text: list[str], asked: list[str]) -> str:
    """``wide`` or ``one``, of a table without a column of places."""
    if time is not None and (asked or (len(values) == 1 and not values[0].lstrip("-").isdigit())):
        return "one"
    calendar = [name for name in pairs(table.names, CALENDAR[:24]) if not (time and name in time.columns)]
    words = [
        name for name in text if table.sample[name].null_count() < len(table.sample) and plain(name) not in CALENDAR
    ]
    if time is not None and (words or calendar):
        raise InputError(
            f"{table.label}: columns {', '.join(map(repr, values[:4]))}{', …' * (len(values) > 4)} may be places "
            f"or values of one place (beside {', '.join(map(repr, [*words, *calendar][:3]))}); give --values a,b for "
            "the values, --place NAME for the column of places, or --layout wide"
        )
    if time is None and words and not asked:
        raise InputError(
            f"{table.label}: column {words[0]!r} holds text, neither a number nor a time known "
            f"({sample_of(table.sample[words[0]])[0][:30]!r}); name columns with --time, --place and --values"
        )
    return "wide"


def _without_total(table: Table, values: list[str]) -> list[str]:
    """Values without a column that is the sum or the mean of all others."""
    total = next((name for name in values if plain(name) in TOTALS), None)
    if total is None or len(values) < 3:
        return values
    others = [name for name in values if name != total]
    rows = table.sample.select(pl.col([total, *others]).cast(pl.Float64, strict=False)).drop_nulls().to_numpy()
    sums = rows[:, 1:].sum(axis=1)
    is_total = any(np.allclose(rows[:, 0], made, rtol=1e-6) for made in (sums, sums / len(others)))
    return others if len(rows) and is_total else values


def _turned(table: Table, asked: Sequence[str], zone: str | None) -> Roles | None:
    """The roles of a table with a row a place and a column a time; None where its header holds no times."""
    names = pl.Series([name for name in table.names if re.match(r"\d", name) and not name.isdigit()], dtype=pl.String)
    formats = fitting(names)
    if not formats:
        numbers = pl.Series([name for name in table.names if re.fullmatch(r"\d{8,19}", name)], dtype=pl.String)
        formats, names = (fitting(numbers), numbers) if len(numbers) else ((), names)
    if len(names) < 3 or 2 * len(names) < len(table.names) or not formats:
        return None
    others = [name for name in table.names if name not in {*names}]
    usual = [name for known in PLACES for name in pairs(others, (known,))]
    place = next(iter([*asked, *usual, *(n for n in others if not is_numeric(table.sample[n])), *others]), None)
    if place is None:
        raise InputError(f"{table.label}: columns are times, and no column names the places; add one")
    left_out = tuple(name for name in others if name != place)
    return Roles("turned", TimeColumns((names[0],), "text", formats, zone=zone), (place,), tuple(names), left_out)


def _listed(table: Table, option: str, text: str | None) -> list[str]:
    """Columns named in an option, a,b,…; a name may hold commas itself."""
    if text is None:
        return []
    names = [text] if text in table.names else [name.strip() for name in text.split(",")]
    for name in names:
        if name not in table.names:
            near = difflib.get_close_matches(name, table.names, 1)
            known = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(map(repr, table.names[:12]))}"
            raise InputError(f"{table.label} has no column {name!r} of {option}; {known}")
    return names


def shown(names: Sequence[str], most: int = 4) -> str:
    """Names for people, the first ones of many."""
    quoted = [f"`{name}`" if name else "(no name)" for name in names[:most]]
    return ", ".join([*quoted, f"… ({len(names)})"] if len(names) > most else quoted)
