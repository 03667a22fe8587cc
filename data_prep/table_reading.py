"""Tables read once: wide ones row by row, long ones as records, turned ones a place a row."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import polars as pl

from data_prep.table_columns import TOTALS, Roles, shown
from data_prep.table_parquet import Parquet, ParquetRows
from data_prep.table_text import array_of
from data_prep.table_times import TimeColumns, chosen_reading, cleaned, offsets_in, parse, plain
from data_prep.table_values import Held, Measure, Rows, in_order, merge
from data_prep.table_zone import utc_of
from stdist.errors import InputError

LISTED = 3


class Source(Protocol):
    """A table whose rows are read in blocks; see ``table_text.Text``."""

    @property
    def header(self) -> bool: ...
    @property
    def path(self) -> Path: ...
    @property
    def label(self) -> str: ...
    @property
    def stem(self) -> str: ...
    @property
    def names(self) -> tuple[str, ...]: ...
    @property
    def sample(self) -> pl.DataFrame: ...
    def blocks(self, numeric: Sequence[str], text: Sequence[str]) -> Iterator[tuple[np.ndarray, pl.DataFrame]]: ...


@dataclass(frozen=True, eq=False)
class Piece:
    """A table on its own axes.

    stamps: datetime64[us] [T], ascending, each once; None where the table has none. steps: T. ids: of places, N.
    rows: per channel; order: the row of each time step. zoned: stamps are UTC; offsets: minutes from UTC that they were
    written in. format: of stamps, ``""`` where not text. cadence: minutes, where the file itself tells them. said:
    remarks for the user. cells: places are named by row and column of a grid.
    """

    label: str
    stamps: np.ndarray | None
    steps: int
    ids: list[str]
    rows: dict[str, Rows]
    order: np.ndarray
    zoned: bool = False
    offsets: frozenset[int] = frozenset()
    format: str = ""
    cadence: int | None = None
    cells: bool = False
    said: list[str] = field(default_factory=list)


class Stamps:
    """The stamps of a table's rows, block by block."""

    def __init__(self, label: str, time: TimeColumns) -> None:
        self.label, self.time = label, time
        self.offsets: set[int] = set()
        self._read: dict[str, list[np.ndarray]] = {}
        self._lines: list[np.ndarray] = []
        self._wrong: list[tuple[int, str]] = []

    def add(self, lines: np.ndarray, frame: pl.DataFrame) -> None:
        fields = frame.select(self.time.columns)
        missing = np.ones(len(fields), bool)
        for format, stamps in self.time.readings(fields).items():
            read = stamps.to_numpy().astype("datetime64[us]")
            self._read.setdefault(format, []).append(read)
            missing &= np.isnat(read)
        if any(format.endswith("z") for format in self.time.formats):
            self.offsets |= offsets_in(cleaned(fields.to_series()))
        for row in np.flatnonzero(missing)[:LISTED]:
            self._wrong.append((int(lines[row]), ", ".join(str(v) for v in fields.row(int(row)) if v is not None)))
        self._lines.append(lines)

    def finish(self, empty: np.ndarray) -> tuple[np.ndarray, np.ndarray, str, list[str]]:
        """Stamps datetime64[us] of all rows, which rows count, the format read in, and remarks.

        empty: rows without any value, bool [n]; they may lack a stamp. A last row without a stamp is a summary and left
        out. Raises InputError naming the line of any other, and where day and month cannot be told apart.
        """
        read = {format: np.concatenate(blocks) for format, blocks in self._read.items()}
        fewest = min(int(np.isnat(stamps).sum()) for stamps in read.values())
        read = {format: stamps for format, stamps in read.items() if int(np.isnat(stamps).sum()) == fewest}
        there = ~np.isnat(next(iter(read.values())))
        if not there.any():
            line, text = self._wrong[0] if self._wrong else (1, "")
            raise InputError(f"{self.label}, line {line}: {text[:40]!r} is no time; check --time and --time-format")
        chosen = [(format, stamps[there]) for format, stamps in read.items()]
        format, stamps = chosen_reading(self.label, chosen, ", ".join(self.time.columns))
        last = int(np.flatnonzero(there)[-1])
        bad = np.flatnonzero(~there & ~empty)
        if len(bad) and bad[0] < last:
            line = int(np.concatenate(self._lines)[bad[0]])
            text = next((text for number, text in self._wrong if number == line), "")
            other = str(stamps[0].astype("datetime64[s]"))
            raise InputError(
                f"{self.label}, line {line}: {text[:40]!r} is no time as the others, such as {other}; "
                "fill it or drop the row"
            )
        said = (
            [f"rows left out at the end, without a time: {len(bad)} ({self._wrong[-1][1][:30]!r})"] if len(bad) else []
        )
        return read[format], there, format, said


def read_wide(table: Source, roles: Roles, channel: str, measure: Measure) -> Piece:
    """A row a time step, a column a place. Rows of a Parquet file in order of time stay on disk."""
    if isinstance(table, Parquet) and (piece := _left_on_disk(table, roles, channel, measure)):
        return piece
    stamps = Stamps(table.label, roles.time) if roles.time else None
    blocks: list[np.ndarray] = []
    for lines, frame in table.blocks(roles.values, roles.time.columns if roles.time else ()):
        blocks.append(measure.of(array_of(frame.select(roles.values))))
        if stamps:
            stamps.add(lines, frame)
    steps = sum(map(len, blocks))
    if not steps:
        raise InputError(f"{table.label} holds no row{' below its header' if table.header else ''}; give data")
    ids, rows = _ids(table, roles), dict[str, Rows]({channel: Held(blocks)})
    if stamps is None:
        return Piece(table.label, None, steps, ids, rows, np.arange(steps))
    empty = np.concatenate([np.isnan(block).all(axis=1) for block in blocks])
    read, there, format, said = stamps.finish(empty)
    zone, zoned = stamps.time.zone, stamps.time.zoned or stamps.time.zone is not None
    if zone:
        read[there] = utc_of(table.label, read[there], zone, empty[there])
        there &= ~np.isnat(read)
    if not there.all():
        rows = {channel: Held([Held(blocks).take(np.flatnonzero(there))])}
    read, order, again = in_order(table.label, read[there], rows, ids)
    said += [f"rows merged that repeat others: {again}"] if again else []
    return Piece(table.label, read, len(read), ids, rows, order, zoned, frozenset(stamps.offsets), format, said=said)


def _ids(table: Source, roles: Roles) -> list[str]:
    """Columns without names are counted, from 0."""
    return list(roles.values) if table.header else list(map(str, range(len(roles.values))))


def _left_on_disk(table: Parquet, roles: Roles, channel: str, measure: Measure) -> Piece | None:
    """None where rows are out of order, repeated or without a stamp, or of a zone whose clock repeats hours."""
    if not table.rows:
        raise InputError(f"{table.label} holds no row; give a file that holds data")
    order, rows = np.arange(table.rows), {channel: ParquetRows(table.path, roles.values, measure)}
    if roles.time is None:
        return Piece(table.label, None, table.rows, _ids(table, roles), {**rows}, order)
    if roles.time.zone:
        return None
    stamps = Stamps(table.label, roles.time)
    for lines, frame in table.blocks((), roles.time.columns):
        stamps.add(lines, frame)
    read, there, format, _ = stamps.finish(np.zeros(table.rows, bool))
    if not there.all() or (read[1:] <= read[:-1]).any():
        return None
    offsets = frozenset(stamps.offsets)
    ids = list(roles.values)
    return Piece(table.label, read, len(read), ids, {**rows}, order, roles.time.zoned, offsets, format)


def read_turned(table: Source, roles: Roles, channel: str, measure: Measure) -> Piece:
    """A row a place, a column a time step."""
    assert roles.time is not None
    (place,) = roles.place
    names: list[str] = []
    blocks: list[np.ndarray] = []
    for _, frame in table.blocks(roles.values, [place]):
        blocks.append(measure.of(array_of(frame.select(roles.values))))
        names += frame[place].cast(pl.String).fill_null("").str.strip_chars().to_list()
    if not names:
        raise InputError(f"{table.label} holds no row below its header; give a file that holds data")
    values, said = np.concatenate(blocks).T, list[str]()
    if len(names) > 2 and plain(names[-1]) in TOTALS:
        names, values = names[:-1], values[:, :-1]
        said.append("the summary row at the end left out")
    places = list(dict.fromkeys(names))
    if len(places) < len(names):
        kept = {name: values[:, names.index(name)] for name in places}
        for number, name in enumerate(names):
            if (merged := merge(kept[name], values[:, number])) is None:
                raise InputError(f"{table.label}: place {name!r} has two rows that differ; give each place once")
            kept[name] = merged
        values = np.stack(list(kept.values()), axis=1)
        said.append(f"rows merged that repeat others: {len(names) - len(places)}")
    header = cleaned(pl.Series(list(roles.values)))
    readings = [(format, parse(header, format).to_numpy().astype("datetime64[us]")) for format in roles.time.formats]
    format, stamps = chosen_reading(table.label, readings, "header")
    if (lost := np.isnat(stamps)).any():
        name = roles.values[int(lost.argmax())]
        raise InputError(f"{table.label}: column {name[:40]!r} is no time as the others; rename or drop it")
    if roles.time.zone:
        stamps = utc_of(table.label, stamps, roles.time.zone, np.isnan(values).all(axis=1))
        values, stamps = values[~np.isnat(stamps)], stamps[~np.isnat(stamps)]
    rows = dict[str, Rows]({channel: Held([np.ascontiguousarray(values)])})
    stamps, order, _ = in_order(table.label, stamps, rows, places)
    zoned = roles.time.zoned or roles.time.zone is not None
    return Piece(table.label, stamps, len(stamps), places, rows, order, zoned, format=format, said=said)


def described(tables: Sequence[Source], roles: Roles, piece: Piece, zone: str, channels: Sequence[str]) -> str:
    """One line that shows how the tables were read."""
    words = {"wide": "wide, a column a place", "turned": "a row a place, a column a time", "one": "values of one place"}
    said = [f"read as: {words.get(roles.layout, 'long')}"]
    if not tables[0].header:
        said.append("no header")
    if roles.place:
        said.append(f"place = {shown(roles.place)}")
    if roles.time and roles.layout != "turned":
        said.append(f"time = {' + '.join(shown([name]) for name in roles.time.columns)} ({zone})")
    elif roles.time:
        said.append(f"time = header ({zone})")
    said.append(f"{len(piece.ids)} places {shown(piece.ids, 3)}")
    if roles.layout in ("long", "one"):
        said.append(f"values = {shown(roles.values, 8) or 'the count of rows'}")
    if [*channels] != [*roles.values] or roles.layout in ("wide", "turned"):
        said.append(f"channels {', '.join(channels)}")
    if roles.left_out:
        said.append(f"left out {shown(roles.left_out, 6)}")
    return ", ".join(said)
