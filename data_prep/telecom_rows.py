"""Day files of the Telecom Italia challenge: their rows, block by block, and the sums of a day.

Tab-separated, no header, eight columns: square id, start of the slot (epoch milliseconds, UTC), country code,
then sms-in, sms-out, call-in, call-out, internet. An empty field is no activity of that kind. A (square,
slot) has one row per country code (0 = unknown; 3.6 on average, at most 36), and none without any activity.

polars pads short rows, skips empty lines and takes NaN for a number. So every block is counted too, and one that does
not add up is read again in plain Python, line by line (``explain``), to say where.
"""

import gzip
import re
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NoReturn, cast

import numpy as np
import polars as pl

from stdist.errors import InputError

CHANNELS = ("sms_in", "sms_out", "call_in", "call_out", "internet")
SLOT_MS = 600_000
SLOTS_PER_DAY = 144
UTC_OFFSET_MINUTES = 60
"""Central European Time throughout; a file starts at local midnight."""
BLOCK = 1 << 23
"""Bytes that are read at once."""
COUNTRIES = 10**7
WHOLE = {"square": (0, 10**8 - 1), "stamp": (10**12, 10**13 - 1), "country": (0, COUNTRIES - 1)}
"""Least and largest; epoch milliseconds have thirteen digits from 2001 to 2286."""
RANGE = {**WHOLE, **dict.fromkeys(CHANNELS, (0, sys.float_info.max))}
SCHEMA = {name: pl.Int64 if name in WHOLE else pl.Float64 for name in RANGE}
COLUMNS = len(SCHEMA)

_WHOLE = re.compile(rb"[+-]?\d+")
_NUMBER = re.compile(rb"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


def open_raw(path: Path) -> IO[bytes]:
    """The text of a file, unpacked where its name ends in .gz."""
    return cast("IO[bytes]", gzip.open(path)) if path.suffix == ".gz" else path.open("rb")


def blocks(file: IO[bytes]) -> Iterator[bytes]:
    """Whole lines, some ``BLOCK`` bytes at a time. A last line without a line break gets one."""
    while block := file.read(BLOCK):
        block += file.readline()
        yield block if block.endswith(b"\n") else block + b"\n"


def read_rows(block: bytes) -> pl.DataFrame | None:
    """A row a line, columns as in ``SCHEMA``, null where an activity is blank; None where a line breaks the format."""
    characters = pl.Series(np.frombuffer(block, np.uint8))
    lines, tabs = ((characters == ord(character)).sum() for character in "\n\t")
    # Of all characters that no field has, polars lets these two pass.
    if tabs != lines * (COLUMNS - 1) or b"\r" in block or b" " in block:
        return None
    try:
        rows = pl.read_csv(block, separator="\t", has_header=False, schema=SCHEMA, quote_char=None)
    except pl.exceptions.PolarsError:
        return None
    right = rows.select(pl.col(n).is_between(*RANGE[n]).all(ignore_nulls=n in CHANNELS) for n in SCHEMA).row(0)
    return rows if all(right) and len(rows) == lines else None


def explain(path: Path, block: bytes, first_line: int) -> NoReturn:
    """Raise InputError naming the line, and the column where it is one, of what ``read_rows`` could not read."""
    for number, line in enumerate(block.removesuffix(b"\n").split(b"\n"), start=first_line):
        if problem := _problem(line.split(b"\t")):
            raise InputError(f"{path}, line {number}{problem}")
    raise InputError(
        f"{path}, after line {first_line - 1}: no plain rows of the raw format; fetch the original file again"
    )


def _problem(fields: list[bytes]) -> str | None:
    if len(fields) != COLUMNS:
        return f": {len(fields)} columns instead of {COLUMNS}; the row is broken or the file was cut short"
    for column, (name, field) in enumerate(zip(SCHEMA, fields, strict=True), start=1):
        text = repr(field[:40].decode(errors="replace"))
        if name in WHOLE and not _WHOLE.fullmatch(field):
            return f", column {column}: {text} is not a whole number; the row is broken"
        if name in WHOLE and not RANGE[name][0] <= int(field) <= RANGE[name][1]:
            what = "is no epoch in milliseconds" if name == "stamp" else "is negative or has too many digits"
            return f", column {column}: {text} {what}; the row is broken"
        if name in CHANNELS and field and not (_NUMBER.fullmatch(field) and np.isfinite(float(field))):
            return f", column {column}: {text} is not a finite number; blank means no activity"
        if name in CHANNELS and field and float(field) < 0:
            return f": negative activity ({float(field)}); the file is damaged"
    return None


def day_start_ms(day: np.datetime64) -> int:
    """Epoch milliseconds, UTC, of local midnight."""
    minutes = int(day.astype("datetime64[m]").astype(np.int64)) - UTC_OFFSET_MINUTES
    return minutes * 60_000


@dataclass(frozen=True, eq=False)
class Squares:
    """The places of a city's squares. Picklable.

    place: int64 [largest id + 2], index of a square among the cells of the grid, -1 for an id that is none, as the
    last one.
    cells: cells of the grid. name: what the ids are of, for messages.
    """

    place: np.ndarray
    cells: int
    name: str


def read_day(path: Path, day: np.datetime64, squares: Squares) -> tuple[np.ndarray, np.ndarray]:
    """Values float32 [5, 144, cells], NaN = missing, channels as in ``CHANNELS``; slots with any row, bool [144].

    Sums are taken in float64. Raises InputError naming file and line of a row that breaks the format, lies off
    the 10-minute grid or outside ``day``, is of no known square, or was given before.
    """
    sums, line = _Sums(path, day, squares), 1
    with open_raw(path) as file:
        try:
            for block in blocks(file):
                rows = read_rows(block)
                if rows is None:
                    explain(path, block, line)
                sums.add(rows, line)
                line += len(rows)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise InputError(
                f"{path}, after line {line}: the gzip stream is damaged or cut short ({error}); fetch the file again"
            ) from error
    sums.require_unique()
    return sums.result()


class _Sums:
    def __init__(self, path: Path, day: np.datetime64, squares: Squares) -> None:
        self.path, self.day, self.squares = path, day, squares
        self.start = day_start_ms(day)
        pairs = squares.cells * SLOTS_PER_DAY
        self.totals = np.zeros((len(CHANNELS), pairs))
        self.seen = np.zeros(pairs, bool)
        self.keys: list[np.ndarray] = []

    def add(self, rows: pl.DataFrame, first_line: int) -> None:
        """Pairs are counted square by square, as the files are sorted: a block touches few of them."""
        square, stamp = rows["square"].to_numpy(), rows["stamp"].to_numpy()
        since = stamp - self.start
        slot = since // SLOT_MS
        # Ids beyond the last are looked up as the last, which is none.
        place = self.squares.place.take(square, mode="clip")
        self._require(place >= 0, square, first_line, f"square outside {self.squares.name}")
        self._require(slot * SLOT_MS == since, stamp, first_line, "stamp off the 10-minute grid")
        inside = (slot >= 0) & (slot < SLOTS_PER_DAY)
        self._require(inside, stamp, first_line, f"stamp outside {self.day} local time")

        pair = place * SLOTS_PER_DAY + slot
        self.seen[pair] = True
        self.keys.append(pair * COUNTRIES + rows["country"].to_numpy())
        first, last = int(pair.min()), int(pair.max()) + 1
        pair -= first
        for totals, name in zip(self.totals, CHANNELS, strict=True):
            totals[first:last] += np.bincount(pair, rows[name].fill_null(0).to_numpy(), last - first)

    def _require(self, right: np.ndarray, fields: np.ndarray, first_line: int, what: str) -> None:
        if right.all():
            return
        index = int(right.argmin())
        raise InputError(
            f"{self.path}, line {first_line + index}: {what} ({fields[index]}); "
            "the file is damaged, or of another city or day"
        )

    def require_unique(self) -> None:
        """Raise InputError where two rows have one square, slot and country: their sum would count twice."""
        keys = np.concatenate(self.keys) if self.keys else np.empty(0, np.int64)
        # The files are nearly sorted, which a stable sort makes use of.
        ordered = np.sort(keys, kind="stable")
        repeated = ordered[1:][ordered[1:] == ordered[:-1]]
        if len(repeated):
            first, again = np.flatnonzero(keys == repeated[0])[:2]
            raise InputError(
                f"{self.path}, line {again + 1}: square, slot and country {repeated[0] % COUNTRIES} are those of "
                f"line {first + 1}; give each row once"
            )

    def result(self) -> tuple[np.ndarray, np.ndarray]:
        self.totals[:, ~self.seen] = np.nan
        by_slot = self.totals.reshape(len(CHANNELS), -1, SLOTS_PER_DAY).transpose(0, 2, 1)
        present = np.asarray(self.seen.reshape(-1, SLOTS_PER_DAY).any(axis=0))
        return by_slot.astype(np.float32, order="C"), present
