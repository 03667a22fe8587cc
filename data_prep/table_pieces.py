"""The tables in files as one: opened, their columns told, read, and joined by time or by place."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from data_prep.common import STORE_NAMES
from data_prep.kinds import kind_of
from data_prep.table_arrays import array_piece, frame_piece, series_piece
from data_prep.table_columns import Named, Roles, roles_of, shown
from data_prep.table_hours import HOUR, VALUE, HourColumns, rows_of_hours
from data_prep.table_long import COUNT, Gather, gathered, read_long
from data_prep.table_parquet import Parquet
from data_prep.table_reading import Piece, Source, described, read_turned, read_wide
from data_prep.table_text import Text, open_text
from data_prep.table_values import Held, Measure, Rows, union
from stdist.errors import InputError

CHANNEL = "value"


@dataclass(frozen=True)
class Options:
    """Options of a table, as ``table.plan`` has them."""

    channel: str | None
    start: str | None
    cadence: int | None
    duplicates: str = "refuse"
    header: bool | None = None
    decimal: str | None = None
    array: str | None = None
    named: Named = field(default_factory=Named)
    measure: Measure = field(default_factory=Measure)
    utc_offset: int | None = None
    span: str | None = None

    @property
    def gather(self) -> Gather:
        return Gather(self.duplicates, self.cadence, self.utc_offset)


def piece_of(files: Sequence[Path], options: Options) -> tuple[Piece, str]:
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
    tables = [rows_of_hours(table) for table in tables]
    counting = options.duplicates == COUNT
    if any(isinstance(table, HourColumns) for table in tables):
        named = replace(named, time=f"{named.time},{HOUR}" if named.time else None, values=named.values or VALUE)
    roles = [roles_of(table, named, options.start is not None, counting) for table in tables]
    roles = _one_reading(_one_layout(tables, roles, named))
    layout, zoned = roles[0].layout, {role.time.zoned for role in roles if role.time}
    if len(zoned) > 1:
        raise InputError(f"{tables[0].label} … {tables[-1].label}: some stamps tell a zone, others none")
    if layout in ("long", "one"):
        channels = [options.channel or COUNT] if counting else _channels(roles[0].values, options.channel)
        piece = read_long(tables, roles, channels, measure, options.gather)
    else:
        channels = _channel_a_file(options.channel, len(tables)) or [channel] * len(tables)
        read: Callable[..., Piece] = read_turned if layout == "turned" else read_wide
        if options.duplicates != "refuse" and options.cadence is None:
            raise InputError(f"{tables[0].label} is wide, a row a time: --duplicates {options.duplicates} gathers rows "
                             "of intervals; give --cadence too")  # fmt: skip
        piece = _joined([read(t, r, name, measure) for t, r, name in zip(tables, roles, channels, strict=True)])
        channels = [*piece.rows]
        if options.gather.in_intervals:
            piece = gathered(piece, options.gather)
    if titles := max((table.titles for table in tables if isinstance(table, Text)), default=0):
        piece.said.append(f"lines above the table left out: {titles}")
    piece.said.extend(dict.fromkeys(table.said for table in tables if isinstance(table, HourColumns)))
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


def _one_reading(roles: list[Roles]) -> list[Roles]:
    """Roles whose stamps are written in one way where one file alone may have the day or the month first, and another
    tells it."""
    common = [{*role.time.formats} for role in roles if role.time and len(role.time.formats)]
    both = {*common[0]}.intersection(*common) if common else set()
    if not both or len({role.time.columns for role in roles if role.time}) > 1:
        return roles
    return [
        replace(role, time=replace(role.time, formats=tuple(f for f in role.time.formats if f in both)))
        if role.time and role.time.formats
        else role
        for role in roles
    ]


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
