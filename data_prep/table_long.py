"""Long tables, a row a place and time, as records: gathered, put on the grid of their times, merged."""

import re
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import polars as pl

from data_prep.steps import cadence_of_most, minutes_of_day
from data_prep.table_columns import AXES, Roles
from data_prep.table_grid import CELL, GRID_CELL
from data_prep.table_reading import Piece, Source, Stamps
from data_prep.table_text import array_of
from data_prep.table_times import plain
from data_prep.table_values import Held, Measure, Records, Rows, dense
from data_prep.table_zone import utc_of
from stdist.errors import InputError

COUNT = "count"
MERGED = {"refuse": "merged", "sum": "added", "mean": "averaged"}


@dataclass(frozen=True)
class Gather:
    """How rows of one place and time become one value: ``refuse`` (equal ones are merged), ``sum``, ``mean`` or
    ``count`` of them. cadence: minutes of the intervals of local time that rows are gathered in, where the user gives
    it. utc_offset: minutes of local time."""

    how: str = "refuse"
    cadence: int | None = None
    utc_offset: int | None = None

    @property
    def in_intervals(self) -> bool:
        return self.how != "refuse" and self.cadence is not None

    def begun(self, stamps: np.ndarray, zoned: bool, offsets: AbstractSet[int]) -> np.ndarray:
        """The beginnings of the intervals that stamps lie in. zoned: stamps are UTC; offsets: minutes that they were
        written ahead of it."""
        offset = self.utc_offset if self.utc_offset is not None else min(offsets, default=0)
        local = stamps + np.timedelta64(offset if zoned else 0, "m")
        return stamps - (local - local.astype("datetime64[D]")) % np.timedelta64(self.cadence or 1, "m")

    def axis(self, stamps: np.ndarray) -> np.ndarray:
        """The time steps that stamps make: of events also those without one, but not the days without any."""
        there = np.unique(stamps)
        if self.how != COUNT:
            return there
        every = np.arange(there[0], there[-1] + np.timedelta64(1, "m"), np.timedelta64(self.cadence or 1, "m"))
        return every[np.isin(every.astype("datetime64[D]"), there.astype("datetime64[D]"))]


def read_long(
    tables: Sequence[Source], roles: Sequence[Roles], channels: Sequence[str], measure: Measure, gather: Gather
) -> Piece:
    """A row a place and time, all tables together; without a column of places each table is a place of its own, or,
    where their times lie apart, a span of one."""
    position: dict[str, int] = {}
    parts: list[Records] = []
    formats, offsets, said = list[str](), set[int](), list[str]()
    for table, role in zip(tables, roles, strict=True):
        part, format, seen, notes = _records(table, role, channels, measure, position)
        parts.append(part)
        formats.append(format)
        offsets |= seen
        said += notes
    if not roles[0].place and len(tables) > 1 and _lie_apart(parts):
        name = _common_name([table.stem for table in tables])
        position = {name: 0}
        for part in parts:
            part.places[:] = 0
        said.append(f"{len(tables)} files are spans of one place")
    label = tables[0].label if len(tables) == 1 else f"{tables[0].label} … {tables[-1].label}"
    records = Records(
        label,
        np.concatenate([part.stamps for part in parts]),
        np.concatenate([part.places for part in parts]),
        {channel: np.concatenate([part.values[channel] for part in parts]) for channel in channels},
    )
    del parts
    if zone := roles[0].time and roles[0].time.zone:
        records = _in_utc(records, zone)
    records, dropped = _on_the_grid(records)
    if dropped:
        said.append(f"rows left out without a value, off the grid of the other stamps: {dropped}")
    names = list(position)
    if all(name.endswith(".0") and name[:-2].isdigit() for name in names):
        names = [name[:-2] for name in names]
    zoned = bool(zone or (roles[0].time and roles[0].time.zoned))
    if gather.in_intervals:
        records = replace(records, stamps=gather.begun(records.stamps, zoned, offsets))
    axis = gather.axis(records.stamps)
    values, again = dense(records, axis, names, "sum" if gather.how == COUNT else gather.how)
    if gather.how == COUNT:
        values = {channel: np.nan_to_num(grid) for channel, grid in values.items()}
        said.append(f"rows counted: {len(records.stamps)}; an interval without one is 0, a day without any a gap")
    elif again:
        said.append(f"rows {MERGED[gather.how]} that repeat others: {again}")
    numeric = all(name.isdigit() for name in names)
    order = sorted(range(len(names)), key=lambda number: (int(names[number]) if numeric else 0, names[number]))
    held = dict[str, Rows]({channel: Held([grid[:, order]]) for channel, grid in values.items()})
    ids = [names[number] for number in order]
    return Piece(
        label, axis, len(axis), ids, held, np.arange(len(axis)), zoned, frozenset(offsets), formats[0],
        cells=_are_cells(roles[0].place, ids), said=said,
    )  # fmt: skip


def _are_cells(columns: Sequence[str], names: Sequence[str]) -> bool:
    """True of places that columns of rows and columns tell, as whole numbers."""
    axes = len(columns) == 2 and all(plain(name) in AXES for name in columns)
    return axes and all(re.fullmatch(GRID_CELL, name) for name in names)


def gathered(piece: Piece, gather: Gather) -> Piece:
    """A wide table whose rows are added or averaged in intervals; itself where it has no stamps."""
    if piece.stamps is None:
        return piece
    begun = gather.begun(piece.stamps, piece.zoned, piece.offsets)
    axis, first = np.unique(begun, return_index=True)
    rows = dict[str, Rows]()
    for channel, source in piece.rows.items():
        values = source.take(piece.order).astype(np.float64)
        seen = ~np.isnan(values)
        totals, counts = (np.add.reduceat(of, first, axis=0) for of in (np.where(seen, values, 0), seen.astype(int)))
        divisor = np.maximum(counts, 1) if gather.how == "mean" else 1
        rows[channel] = Held([np.where(counts > 0, totals / divisor, np.nan).astype(np.float32)])
    said = [*piece.said, f"rows {MERGED[gather.how]} in intervals: {piece.steps}"]
    return replace(piece, stamps=axis, steps=len(axis), rows=rows, order=np.arange(len(axis)), said=said)


def _records(
    table: Source, roles: Roles, channels: Sequence[str], measure: Measure, position: dict[str, int]
) -> tuple[Records, str, set[int], list[str]]:
    """The rows of one table; new places are added to ``position``."""
    assert roles.time is not None
    stamps = Stamps(table.label, roles.time)
    places, values = list[np.ndarray](), dict[str, list[np.ndarray]]({channel: [] for channel in channels})
    text = dict.fromkeys([*roles.time.columns, *roles.place])
    for lines, frame in table.blocks(roles.values, [*text]):
        stamps.add(lines, frame)
        for channel, name in zip(channels, roles.values, strict=bool(roles.values)):
            values[channel].append(measure.of(array_of(frame.select(name))[:, 0]))
        if not roles.values:
            # Events, which are counted.
            values[channels[0]].append(np.ones(len(frame), np.float32))
        if not roles.place:
            places.append(np.full(len(frame), position.setdefault(table.stem, len(position)), np.int32))
            continue
        parts = [pl.col(name).cast(pl.String).str.strip_chars() for name in roles.place]
        names = frame.select(pl.concat_str(parts, separator=CELL)).to_series()
        known = names.drop_nulls().unique(maintain_order=True)
        codes = [position.setdefault(name, len(position)) for name in known]
        places.append(names.replace_strict(known, codes, default=-1, return_dtype=pl.Int32).to_numpy())
    if not places:
        raise InputError(f"{table.label} holds no row{' below its header' if table.header else ''}; give data")
    joined = {channel: np.concatenate(blocks) for channel, blocks in values.items()}
    empty = np.logical_and.reduce([np.isnan(column) for column in joined.values()])
    read, there, format, said = stamps.finish(empty)
    codes_of = np.concatenate(places)
    lost = np.flatnonzero(there & (codes_of < 0))
    if len(lost) and not roles.values:
        there &= codes_of >= 0
        said.append(f"rows left out without a place: {len(lost)}")
    elif len(lost):
        raise InputError(f"{table.label}: row {lost[0] + 1} has no place in {roles.place[0]!r}; fill or drop it")
    columns = {channel: column[there] for channel, column in joined.items()}
    return Records(table.label, read[there], codes_of[there], columns), format, stamps.offsets, said


def _common_name(stems: Sequence[str]) -> str:
    """The common beginning of several names, without numbers at its end."""
    same = [len({*letters}) == 1 for letters in zip(*stems, strict=False)]
    return stems[0][: same.index(False) if False in same else len(same)].rstrip("_-. 0123456789") or stems[0]


def _lie_apart(parts: Sequence[Records]) -> bool:
    """True where no two tables share a stretch of time."""
    spans = sorted((part.stamps.min(), part.stamps.max()) for part in parts)
    return all(after[0] > before[1] for before, after in pairwise(spans))


def _in_utc(records: Records, zone: str) -> Records:
    """Without the rows of hours that the clock skips."""
    stamps = utc_of(records.label, records.stamps, zone, _empty(records), records.places)
    keep = ~np.isnat(stamps)
    values = {channel: column[keep] for channel, column in records.values.items()}
    return Records(records.label, stamps[keep], records.places[keep], values)


def _empty(records: Records) -> np.ndarray:
    """True of rows without a value, bool [n]."""
    return np.logical_and.reduce([np.isnan(column) for column in records.values.values()])


def _on_the_grid(records: Records) -> tuple[Records, int]:
    """Records without those that hold no value and lie off the grid of all others; their number."""
    empty = _empty(records)
    if not empty.any() or empty.all():
        return records, 0
    cadence = cadence_of_most(np.unique(records.stamps[~empty]))
    if cadence is None:
        return records, 0
    minutes = minutes_of_day(records.stamps)
    whole = records.stamps == records.stamps.astype("datetime64[m]")
    keep = ~empty | (whole & (minutes % cadence == 0))
    values = {channel: column[keep] for channel, column in records.values.items()}
    return Records(records.label, records.stamps[keep], records.places[keep], values), int((~keep).sum())
