"""Reader of tables as people have them: CSV, TSV, text with semicolons, packed or not, Parquet, arrays, .tsf.

Wide tables have a row a time step and a column a place; long ones a row a place and time (place, time, value, …), with
a channel for every column of values; turned ones a row a place and a column a time; others a row a day and a column an
hour. Which it is, the separator, the decimal mark, the header, and the columns of time and place are told from the
first lines and shown in one line; where they can be read in two ways the line says which option decides. Columns
without names are column_1, column_2, …. Also read: .npy and .npz of (T, N) or (T, N, C), a frame of pandas in HDF5,
Monash's .tsf, LibCity's .dyna and .grid; zip, gzip, bzip2 and xz.

Time may be ISO text (with T or a blank, with an offset or Z), day first where days or dots say so, names of months,
epochs of s, ms, us or ns, spans (``a - b``: their beginning), a date and an hour, or year, month, day and hour; 24:00
and hour 24 are the next midnight. Stamps without an offset are the clock's; --timezone tells which hours that clock
repeats and skips: of two equal stamps the first row is summer's (the second where rows run backwards in time). Stamps
are kept as they are written: one that ends its interval on the grid stays its end. Where all lie behind the grid of
--cadence by one time, as 00:14, 00:29, …, each is taken for the interval it lies in. Without a column of time, rows
follow one another from --start at --cadence.

What is made of it: a blank field, NaN, NA, null, NIL, ``-`` or ``?`` is a missing value, as are the numbers of
--missing; 0 is measured; a sign of percent is passed over; traffic is never negative. Rows may come in any order; equal
repetitions are merged, others refused unless --duplicates adds or averages them, with --cadence in intervals of that
length, also stamps at odd seconds. Absent rows are gaps. An index, a count of rows, a calendar's columns, titles above
a table, and a summary row or a note at the end are no measurements.

Trips and other events are counted: --duplicates count --cadence 60 --time started_at --place start_station_id, with
--span where some stamps are wrong. An interval without one is 0, a day without any a gap.

Several files are several places, or several spans: where their times say so, in any order; where they tell none, in
the order that train, validation and test or the numbers in their names tell.

Places are nodes, of several columns where --place names them, as site,direction; a grid's cells with --height, --width,
--row0, --col0, --id-width or --geometry. Whole numbers as ids place cells by --row0, --col0 and --id-width, or count
from 0; other names are taken row by row.

Examples: the 5 x 5 block of Milan of the Telecom Italia grid, 4,320 rows x 25 columns without header or time (--start
2013-11-01T00:00 --cadence 10 --row0 41 --col0 41 --id-width 100 --channel internet); the public week of METR-LA,
los_speed.csv, 2,016 x 207 with a header of ids (--start 2012-03-01T00:00 --cadence 5 --channel speed --units mile/h
--utc-offset -480 --adjacency los_adj.csv --meta graph_sensor_locations.csv).
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.common import Clock, city_of, existing, in_time, utc_offset_of
from data_prep.graphs import SensorFiles, ids_of
from data_prep.preparation import Plan
from data_prep.reader import reader
from data_prep.steps import (
    beginnings,
    cadence_of,
    part_of,
    plan_of,
    require_on_grid,
    slices_of_days,
    stamps_from,
    steps_of,
    whole_minutes,
)
from data_prep.table_columns import Named
from data_prep.table_grid import Contents, PlacedGrid
from data_prep.table_long import COUNT
from data_prep.table_parquet import SLICE_BYTES
from data_prep.table_pieces import Options, piece_of
from data_prep.table_reading import Piece
from data_prep.table_values import Measure, Slice
from data_prep.table_zone import skipped_hours
from stdist.data import DaySpan, GridSpec, NodeSpec
from stdist.data.schema import MINUTES_PER_DAY
from stdist.errors import InputError
from stdist.zones import standard_offset

TEXTS = ("csv", "csv.gz", "tsv", "tsv.gz", "txt", "txt.gz", "dyna", "grid")
ENDINGS = tuple(f"*.{ending}" for ending in (*TEXTS, "parquet", "zip", "tsf"))
DUPLICATES = ("refuse", "sum", "mean", COUNT)
WITHIN = "give --cadence where stamps lie within their intervals, with --duplicates mean where rows are to be gathered"
ODD = "give --cadence, with --duplicates mean or sum where rows are to be gathered, count where they are events"
"""What to do about stamps off the grid, and at odd seconds."""


@reader("table")
def plan(
    sources: list[Path],
    *,
    city: str | None = None,
    channel: str | None = None,
    units: str = "unknown",
    start: str | None = None,
    cadence: int | None = None,
    utc_offset: int | None = None,
    duplicates: str = "refuse",
    span: str | None = None,
    header: bool | None = None,
    decimal: str | None = None,
    array: str | None = None,
    nodes: bool = False,
    named: Named,
    measure: Measure,
    grid: PlacedGrid,
    sensors: SensorFiles,
) -> Plan:
    """Plan of one table, of several that together make one, or of the tables in a folder or a zip archive.

    city: first word of the file name by default. channel: what the values are, as speed; names a,b,… in place of those
    of the columns of values. units: of the values. start: local ISO time of the first row, where there is no column of
    time. cadence: minutes between rows, as the stamps say where there are some. utc_offset: minutes the city is ahead
    of UTC, by default as the stamps' own offset says. duplicates: several rows of one place and time are refused where
    they differ (refuse), added (sum) or averaged (mean), with --cadence those of one place and interval; rows that are
    events, as trips, are counted (count). span: local days to take, as 2013-11-01:2013-11-20. header:
    the first line names the columns, or is a row.
    decimal: mark of decimals, . or , where it cannot be told. array: name of one in an npz that holds several. nodes:
    places are nodes, as they are by default. Raises InputError where a table can be read in two ways, is none, or holds
    what an option does not fit.
    """
    if duplicates not in DUPLICATES:
        raise InputError(f"--duplicates {duplicates!r} is unknown; choose {', '.join(DUPLICATES)}")
    if nodes and grid.asked:
        raise InputError("--nodes makes nodes of the places, --height, --width, … a grid; give one kind")
    if duplicates == COUNT and cadence is None:
        raise InputError("--duplicates count counts the rows of each interval; say how long it is: --cadence 60")
    options = Options(channel, start, cadence, duplicates, header, decimal, array, named, measure, utc_offset, span)
    return _plan(sources, options, city, units, utc_offset, grid if grid.asked else None, sensors, nodes)


def _plan(
    sources: list[Path],
    options: Options,
    city: str | None,
    units: str,
    utc_offset: int | None,
    grid: PlacedGrid | None,
    sensors: SensorFiles,
    nodes: bool,
) -> Plan:
    if options.cadence is not None and (options.cadence < 1 or MINUTES_PER_DAY % options.cadence):
        raise InputError(f"cadence {options.cadence} min does not divide a day; give whole minutes")
    clock = Clock(utc_offset, options.named.timezone)
    if clock.timezone and options.duplicates != "refuse":
        raise InputError(
            f"--timezone cannot tell the hours that clocks repeat with --duplicates {options.duplicates}; give UTC or "
            "offsets"
        )
    if grid and (sensors.adjacency or sensors.meta):
        option = "--adjacency" if sensors.adjacency else "--meta"
        raise InputError(f"{option} is for nodes; give --nodes too where columns are nodes")
    if not sources:
        raise InputError("table reads one file or more, 0 given; give the tables of one city")
    files, order = in_time(_files(sources))
    piece, read_as = piece_of(files, options)
    town = city or city_of(files[0])
    if clock.timezone and piece.stamps is not None:
        utc_offset = standard_offset(clock.timezone, piece.stamps[0])
    elif utc_offset is None and piece.zoned and piece.offsets:
        utc_offset = min(piece.offsets)
    offset = utc_offset_of(town, utc_offset)
    stamps, cadence, begun = _stamps(piece, options, offset)
    stamps, row, other_days = _of_days(piece, stamps, options.span)
    if clock.timezone and piece.stamps is None:
        stamps, offset = clock.of_first(piece.label, town, stamps)
    said = [*piece.said, *begun, *other_days, *([order] if order and piece.stamps is None else [])]
    if piece.stamps is not None and not piece.zoned:
        said += skipped_hours(stamps, cadence)
    recipe: dict[str, Any] = {"reader": "table", "start": str(stamps[0]), "read_as": read_as, "said": said}
    channels = [*piece.rows]
    spec: GridSpec | NodeSpec
    columns: np.ndarray | None = None
    about: list[Path] = []
    if grid is None and not nodes and piece.cells:
        grid = PlacedGrid()
    if grid is not None:
        spec, columns = grid.placed(Contents(piece.label, piece.ids, town, channels, stamps, cadence, offset, units))
        recipe |= {"row0": grid.row0, "col0": grid.col0}
        about = [grid.geometry] if grid.geometry else []
    else:
        known = sensors.nodes(ids_of(piece.ids))
        spec = known.spec(town, channels, stamps, cadence, offset, units)
        recipe, about = recipe | known.notes, known.files
    steps = steps_of(piece.label, spec, stamps)
    days_at_once = max(1, SLICE_BYTES // (4 * len(piece.ids) * len(channels) * spec.slots_per_day))
    parts = []
    for a, b in slices_of_days(steps // spec.slots_per_day, days_at_once):
        rows = {name: Slice(source, row[a:b]) for name, source in piece.rows.items()}
        load = partial(_load, piece.label, rows, stamps[a:b], piece.ids, columns, spec.shape)
        parts.append(part_of(spec, steps[a:b], load, piece.label))
    return replace(plan_of(spec, recipe, [*files, *about], parts), read_as=read_as, said=tuple(said))


def _stamps(piece: Piece, options: Options, utc_offset: int) -> tuple[np.ndarray, int, list[str]]:
    """Local stamps of the time steps, datetime64[m] [T], minutes between them, and remarks."""
    start, cadence = options.start, options.cadence
    if piece.stamps is None:
        if start is None or cadence is None:
            lacking = "--start 2013-11-01T00:00 (local)" if start is None else "--cadence 10 (minutes)"
            raise InputError(f"{piece.label} has no column of time; say when its first row is and how far rows lie "
                             f"apart: {lacking}")  # fmt: skip
        return stamps_from(Path(piece.label), start, piece.steps, cadence, "2013-11-01T00:00"), cadence, []
    local, said = piece.stamps + np.timedelta64(utc_offset if piece.zoned else 0, "m"), ""
    if cadence and (not piece.zoned or not (60 % cadence or utc_offset % cadence)):
        local, said = beginnings(local, cadence)
    stamps = whole_minutes(piece.label, local, ODD)
    if options.gather.in_intervals and cadence is not None:
        require_on_grid(piece.label, stamps, cadence)
        return stamps, cadence, []
    return stamps, cadence_of(piece.label, stamps, cadence, WITHIN), [said] if said else []


def _of_days(piece: Piece, stamps: np.ndarray, days: str | None) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """The stamps of ``days`` alone, the row of each, and a remark."""
    if days is None:
        return stamps, piece.order, []
    span = DaySpan.parse(days)
    of_day = stamps.astype("datetime64[D]")
    inside = (of_day >= span.first_day) & (of_day <= span.last_day)
    if not inside.any():
        raise InputError(f"{piece.label} has no time step in --span {days}, but {of_day[0]} to {of_day[-1]}")
    return stamps[inside], piece.order[inside], [f"time steps of other days left out: {int((~inside).sum())}"]


def _files(sources: Sequence[Path]) -> list[Path]:
    files: list[Path] = []
    for source in sources:
        if Path(source).is_dir():
            inside = sorted({path for ending in ENDINGS for path in Path(source).glob(ending)})
            if not inside:
                raise InputError(f"{source} holds no {', '.join(ENDINGS)}; give the tables themselves")
            files += inside
        else:
            files.append(existing(source))
    if twice := next((path for path in files if files.count(path) > 1), None):
        raise InputError(f"{twice} is given twice; give each file once")
    return files


def _load(
    label: str,
    rows: dict[str, Slice],
    stamps: np.ndarray,
    ids: Sequence[str],
    columns: np.ndarray | None,
    shape: tuple[int, ...],
) -> dict[str, np.ndarray]:
    """float32 [n, *shape] per channel; InputError naming time and place of a negative or too large value."""
    read = {}
    for channel, source in rows.items():
        values = source.take()
        wrong = np.isinf(values) | (values < 0)
        if wrong.any():
            row, column = np.argwhere(wrong)[0]
            value = values[row, column]
            number = f"{float(value):g}"
            raise InputError(
                f"{label}: {channel} is {number} at {stamps[row]}, place {ids[column]} ({int(wrong.sum())} such "
                f"values in these days); traffic is finite and not negative: give --missing {number} where it means "
                "missing, --values to choose other columns"
            )
        if columns is not None:
            placed = values[:, columns]
            placed[:, columns < 0] = np.nan
            values = placed.reshape(-1, *shape)
        read[channel] = values
    return read


ALIAS = """Another name of `stdist prepare table` for wide tables, kept for commands that are written down: without
--nodes the columns are a grid's cells; the channel is internet, and rows are 10 minutes apart where no stamps say
otherwise."""


def _alias(name: str) -> None:
    @reader(name, ALIAS)
    def plan_wide(
        sources: list[Path],
        *,
        city: str | None = None,
        channel: str = "internet",
        start: str | None = None,
        cadence: int | None = None,
        utc_offset: int | None = None,
        nodes: bool = False,
        header: bool | None = None,
        grid: PlacedGrid,
        sensors: SensorFiles,
    ) -> Plan:
        """Plan of a wide table. nodes: columns are nodes. start: local ISO time of the first row, where there is no
        column of time. header: the first line names the columns, or is a row."""
        cadence = 10 if cadence is None and start is not None else cadence
        options = Options(channel, start, cadence, named=Named(layout="wide"), header=header)
        return _plan(sources, options, city, "unknown", utc_offset, None if nodes else grid, sensors, nodes)


for _name in ("wide-csv", "wide-parquet"):
    _alias(_name)
