"""One raw day file as a day of the store: checked against its day and its squares, summed over countries."""

import gzip
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from data_prep.telecom_rows import COUNTRIES, blocks, explain, open_raw, read_rows
from data_prep.telecom_text import CHANNELS, SLOT_MS, SLOTS_PER_DAY, day_start_ms
from stdist.errors import InputError


@dataclass(frozen=True, eq=False)
class Squares:
    """Where a city's squares lie. Picklable.

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

    def _require(self, right: np.ndarray, found: np.ndarray, first_line: int, what: str) -> None:
        if right.all():
            return
        index = int(right.argmin())
        raise InputError(
            f"{self.path}, line {first_line + index}: {what} ({found[index]}); "
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
