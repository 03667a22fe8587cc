"""Reader of tables as people have them: CSV, TSV, text with semicolons, packed or not, Parquet, arrays, .tsf.

Wide tables have a row a time step and a column a place; long ones a row a place and time (place, time, value, …), with
a channel for every column of values; turned ones a row a place and a column a time. Which it is, the separator, the
decimal mark, the header, and the columns of time and place are told from the first lines and shown in one line; where
they can be read in two ways the line says which option decides. Also read: .npy and .npz of (T, N) or (T, N, C), a
frame of pandas in HDF5, Monash's .tsf; zip, gzip, bzip2 and xz.

Time may be ISO text (with T or a blank, with an offset or Z), day first where days or dots say so, names of months,
epochs of s, ms, us or ns, spans (``a - b``: their beginning), a date and an hour, or year, month, day and hour. Stamps
without an offset are the clock's; --timezone tells which hours that clock repeats and skips: of two equal stamps the
first row is summer's (the second where rows run backwards in time). Without a column of time, rows follow one another
from --start at --cadence.

What is made of it: a blank field, NaN, NA, null, ``-`` or ``?`` is a missing value, as are the numbers of --missing; 0
is measured; traffic is never negative. Rows may come in any order; equal repetitions are merged, others refused unless
--duplicates adds or averages them. Absent rows are gaps. An index, a count of rows, a calendar's columns, and a summary
row at the end are no measurements.

Several files are several places, or several spans: where their times say so, in any order; where they tell none, in
the order that train, validation and test or the numbers in their names tell.

Places are nodes; a grid's cells with --height, --width, --row0, --col0, --id-width or --geometry. Whole numbers as ids
place cells by --row0, --col0 and --id-width, or count from 0; other names are taken row by row.

Examples: the 5 x 5 block of Milan of the Telecom Italia grid, 4,320 rows x 25 columns without header or time (--start
2013-11-01T00:00 --cadence 10 --row0 41 --col0 41 --id-width 100 --channel internet); the public week of METR-LA,
los_speed.csv, 2,016 x 207 with a header of ids (--start 2012-03-01T00:00 --cadence 5 --channel speed --units mile/h
--utc-offset -480 --adjacency los_adj.csv --meta graph_sensor_locations.csv).
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.common import STORE_NAMES, Clock, city_of, existing, in_time, utc_offset_of
from data_prep.graphs import SensorFiles, ids_of
from data_prep.kinds import kind_of
from data_prep.preparation import Plan
from data_prep.reader import reader
from data_prep.steps import cadence_of, part_of, plan_of, slices_of_days, stamps_from, steps_of, whole_minutes
from data_prep.table_arrays import array_piece, frame_piece, series_piece
from data_prep.table_columns import Named, Roles, roles_of, shown
from data_prep.table_grid import Contents, PlacedGrid
from data_prep.table_parquet import SLICE_BYTES, Parquet
from data_prep.table_reading import Piece, Source, described, read_long, read_turned, read_wide
from data_prep.table_text import open_text
from data_prep.table_values import Held, Measure, Rows, Slice, union
from data_prep.table_zone import skipped_hours
from stdist.data import GridSpec, NodeSpec
from stdist.data.schema import MINUTES_PER_DAY
from stdist.errors import InputError
from stdist.zones import standard_offset

CHANNEL = "value"
ENDINGS = ("*.csv", "*.csv.gz", "*.tsv", "*.tsv.gz", "*.txt", "*.txt.gz", "*.parquet", "*.zip", "*.tsf")
DUPLICATES = ("refuse", "sum", "mean")


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
    they differ (refuse), added (sum) or averaged (mean). header: the first line names the columns, or is a row.
    decimal: mark of decimals, . or , where it cannot be told. array: name of one in an npz that holds several. nodes:
    places are nodes, as they are by default. Raises InputError where a table can be read in two ways, is none, or holds
    what an option does not fit.
    """
    if duplicates not in DUPLICATES:
        raise InputError(f"--duplicates {duplicates!r} is unknown; choose {', '.join(DUPLICATES)}")
    if nodes and grid.asked:
        raise InputError("--nodes makes nodes of the places, --height, --width, … a grid; give one kind")
    options = _Options(channel, start, cadence, duplicates, header, decimal, array, named, measure)
    return _plan(sources, options, city, units, utc_offset, grid if grid.asked else None, sensors, nodes)


@dataclass(frozen=True)
class _Options:
    channel: str | None
    start: str | None
    cadence: int | None
    duplicates: str = "refuse"
    header: bool | None = None
    decimal: str | None = None
    array: str | None = None
    named: Named = field(default_factory=Named)
    measure: Measure = field(default_factory=Measure)


def _plan(
    sources: list[Path],
    options: _Options,
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
    piece, read_as = _piece(files, options)
    town = city or city_of(files[0])
    if clock.timezone and piece.stamps is not None:
        utc_offset = standard_offset(clock.timezone, piece.stamps[0])
    elif utc_offset is None and piece.zoned and piece.offsets:
        utc_offset = min(piece.offsets)
    offset = utc_offset_of(town, utc_offset)
    stamps, cadence = _stamps(piece, options, offset)
    if clock.timezone and piece.stamps is None:
        stamps, offset = clock.of_first(piece.label, town, stamps)
    said = [*piece.said, *([order] if order and piece.stamps is None else [])]
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
        rows = {name: Slice(source, piece.order[a:b]) for name, source in piece.rows.items()}
        load = partial(_load, piece.label, rows, stamps[a:b], piece.ids, columns, spec.shape)
        parts.append(part_of(spec, steps[a:b], load, piece.label))
    return replace(plan_of(spec, recipe, [*files, *about], parts), read_as=read_as, said=tuple(said))


def _stamps(piece: Piece, options: _Options, utc_offset: int) -> tuple[np.ndarray, int]:
    """Local stamps of the time steps, datetime64[m] [T], and minutes between them."""
    start, cadence = options.start, options.cadence
    if piece.stamps is None:
        if start is None or cadence is None:
            lacking = "--start 2013-11-01T00:00 (local)" if start is None else "--cadence 10 (minutes)"
            raise InputError(f"{piece.label} has no column of time; say when its first row is and how far rows lie "
                             f"apart: {lacking}")  # fmt: skip
        return stamps_from(Path(piece.label), start, piece.steps, cadence, "2013-11-01T00:00"), cadence
    stamps = whole_minutes(piece.label, piece.stamps) + np.timedelta64(utc_offset if piece.zoned else 0, "m")
    return stamps, cadence_of(piece.label, stamps, cadence)


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


def _piece(files: Sequence[Path], options: _Options) -> tuple[Piece, str]:
    """All files as one table, and the line that shows how they were read."""
    named, measure = options.named, options.measure
    channel = options.channel or CHANNEL
    kinds = {path: kind_of(path) for path in files}
    tables: list[Source] = []
    pieces: list[Piece] = []
    for path, kind in kinds.items():
        if kind in ("npy", "npz"):
            pieces.append(array_piece(path, options.array, options.channel, CHANNEL, measure))
        elif kind == "hdf5":
            pieces.append(frame_piece(path, channel, measure))
        elif path.name.lower().removesuffix(".zip").removesuffix(".gz").endswith(".tsf"):
            pieces.append(series_piece(path, options.start, options.cadence, channel, measure))
        elif kind == "parquet":
            tables.append(Parquet(path))
        else:
            tables += open_text(path, options.header, options.decimal)
    if options.array and not any(kind == "npz" for kind in kinds.values()):
        raise InputError(f"--array {options.array} is for npz files; leave it out")
    if tables and pieces:
        raise InputError(f"{pieces[0].label} is no table as {tables[0].label} is; give files of one kind")
    if pieces:
        if named.timezone and any(piece.stamps is not None for piece in pieces):
            raise InputError(f"--timezone reads stamps of text and Parquet, {pieces[0].label} is neither; leave it out")
        if options.start is not None and pieces[0].stamps is not None:
            raise InputError(f"{pieces[0].label} has stamps of its own; leave --start out")
        joined = _joined(pieces)
        every = f", every {joined.cadence} minutes" if joined.cadence else ""
        places = f"{len(joined.ids)} places {shown(joined.ids, 3)}"
        return joined, f"read as: {joined.steps} steps{every}, {places}, channels {', '.join(joined.rows)}"
    roles = [roles_of(table, named, options.start is not None) for table in tables]
    roles = _one_layout(tables, roles, named)
    layout, zoned = roles[0].layout, {role.time.zoned for role in roles if role.time}
    if len(zoned) > 1:
        raise InputError(f"{tables[0].label} … {tables[-1].label}: some stamps tell a zone, others none")
    if layout in ("long", "one"):
        channels = _channels(roles[0].values, options.channel)
        piece = read_long(tables, roles, channels, measure, options.duplicates)
    else:
        channels = _channel_a_file(options.channel, len(tables)) or [channel] * len(tables)
        read: Callable[..., Piece] = read_turned if layout == "turned" else read_wide
        piece = _joined([read(t, r, name, measure) for t, r, name in zip(tables, roles, channels, strict=True)])
        channels = [*piece.rows]
    return piece, described(tables, roles[0], piece, _zone(piece, roles[0]), channels)


def _zone(piece: Piece, roles: Roles) -> str:
    """The clock of the stamps, for people."""
    written = f", written {piece.format}" if piece.format and not piece.format.startswith("%Y-%m-%d") else ""
    if roles.time and roles.time.kind == "epoch":
        return f"epoch {roles.time.unit}, UTC"
    if roles.time and roles.time.zone:
        return f"{roles.time.zone}{written}"
    if not piece.zoned:
        return f"local{written}"
    offsets = " and ".join(f"{'+-'[m < 0]}{abs(m) // 60:02}:{abs(m) % 60:02}" for m in sorted(piece.offsets))
    return f"UTC{offsets}{written}"


def _one_layout(tables: Sequence[Source], roles: list[Roles], named: Named) -> list[Roles]:
    """The roles of tables that belong together. InputError where they do not."""
    if not named.values and {role.layout for role in roles} == {"one"} and len({role.values for role in roles}) > 1:
        # A file a place, whose column bears its name.
        return [replace(role, layout="wide") for role in roles]
    for table, role in zip(tables[1:], roles[1:], strict=True):
        same = role.layout == roles[0].layout and bool(role.time) == bool(roles[0].time)
        if not same or (role.layout in ("long", "one") and role.values != roles[0].values):
            raise InputError(
                f"{table.label} is read as {role.layout} of {', '.join(role.values[:4])}, {tables[0].label} as "
                f"{roles[0].layout} of {', '.join(roles[0].values[:4])}; give tables of one kind, or --values"
            )
    return roles


def _channels(values: Sequence[str], channel: str | None) -> list[str]:
    """Names of channels: those given, else those of the columns with what is no letter, digit or _ replaced."""
    names = [re.sub(r"\W+", "_", name).strip("_") or f"value_{n}" for n, name in enumerate(values)]
    if channel is not None:
        names = [name.strip() for name in channel.split(",")]
        if len(names) != len(values):
            raise InputError(f"--channel {channel!r} names {len(names)} of {len(values)} columns ({', '.join(values)})")
    names = [f"{name}_value" if name in STORE_NAMES else name for name in names]
    if len(set(names)) < len(names):
        raise InputError(f"columns {', '.join(values)} make channels of one name; name them with --channel a,b")
    return names


def _channel_a_file(channel: str | None, files: int) -> list[str] | None:
    """Names of one channel a file; None where the files are not that."""
    names = [name.strip() for name in channel.split(",")] if channel else []
    if len(names) > 1 and len(names) != files:
        raise InputError(f"--channel {channel!r} names {len(names)} channels for {files} tables; name one for each")
    return names if len(names) > 1 else None


def _joined(pieces: list[Piece]) -> Piece:
    """Several tables as one: by their stamps, else one after the other, else a channel each."""
    first = pieces[0]
    if len(pieces) == 1:
        return first
    said = [remark for piece in pieces for remark in piece.said]
    label = f"{first.label} … {pieces[-1].label}"
    stamped = [(p.label, p.stamps, p.ids, p.rows, p.order) for p in pieces if p.stamps is not None]
    if len(stamped) == len(pieces):
        stamps, ids, values = union(stamped)
        rows = dict[str, Rows]({name: Held([grid]) for name, grid in values.items()})
        offsets = frozenset(offset for piece in pieces for offset in piece.offsets)
        return replace(
            first, label=label, stamps=stamps, steps=len(stamps), ids=ids, rows=rows, order=np.arange(len(stamps)),
            offsets=offsets, said=said,
        )  # fmt: skip
    if stamped:
        raise InputError(f"{label}: some files tell their time and others none; prepare them apart")
    for piece in pieces[1:]:
        if piece.ids != first.ids:
            raise InputError(f"{piece.label} has other places than {first.label}, and no time to join them by")
    if len({name for piece in pieces for name in piece.rows}) == sum(len(piece.rows) for piece in pieces):
        if wrong := next((piece for piece in pieces if piece.steps != first.steps), None):
            raise InputError(f"{wrong.label} has {wrong.steps} rows, {first.label} {first.steps}; channels share them")
        return replace(first, rows={name: rows for piece in pieces for name, rows in piece.rows.items()}, said=said)
    steps = sum(piece.steps for piece in pieces)
    rows = {name: Held([piece.rows[name].take(piece.order) for piece in pieces]) for name in first.rows}
    return replace(first, label=label, steps=steps, rows=rows, order=np.arange(steps), said=said)


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
        options = _Options(channel, start, cadence, named=Named(layout="wide"), header=header)
        return _plan(sources, options, city, "unknown", utc_offset, None if nodes else grid, sensors, nodes)


for _name in ("wide-csv", "wide-parquet"):
    _alias(_name)
