"""Tables in Parquet files: their columns are typed, and rows are read in slices."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import polars as pl

from data_prep.kinds import kind_of, refuse_kind
from data_prep.table_text import SAMPLED
from data_prep.table_values import Measure
from stdist.errors import InputError

SLICE_BYTES = 1 << 27


@dataclass(frozen=True)
class Parquet:
    """One file before its rows are read. Its columns have names: there is no line that may be a header."""

    path: Path
    header = True

    @property
    def label(self) -> str:
        return str(self.path)

    @property
    def stem(self) -> str:
        return self.path.stem

    @cached_property
    def schema(self) -> pl.Schema:
        try:
            return pl.scan_parquet(self.path).collect_schema()
        except (pl.exceptions.PolarsError, OSError) as error:
            if kind_of(self.path) != "parquet":
                refuse_kind(self.path)
            raise InputError(f"{self.path} is no Parquet file, or was cut short; write it again") from error

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.schema)

    @cached_property
    def sample(self) -> pl.DataFrame:
        nested = [name for name, kind in self.schema.items() if kind.is_nested() or kind.is_float()]
        sample = collect(self.path, pl.scan_parquet(self.path).head(SAMPLED))
        return sample.with_columns(pl.col(n).fill_nan(None) for n in nested if self.schema[n].is_float())

    @cached_property
    def rows(self) -> int:
        return int(collect(self.path, pl.scan_parquet(self.path).select(pl.len())).item())

    def blocks(self, numeric: Sequence[str], text: Sequence[str]) -> Iterator[tuple[np.ndarray, pl.DataFrame]]:
        """Numbers of the rows from 1, and columns ``numeric`` as Float64, ``text`` as they are."""
        together = max(1, SLICE_BYTES // (8 * (len(numeric) + 4 * len(text))))
        columns = [*(pl.col(name) for name in text), *(pl.col(name).cast(pl.Float64) for name in numeric)]
        for start in range(0, self.rows, together):
            frame = pl.scan_parquet(self.path).select(columns).slice(start, together)
            block = collect(self.path, frame)
            yield np.arange(start + 1, start + 1 + len(block)), block


@dataclass(frozen=True, eq=False)
class ParquetRows:
    """Rows that stay in a file until they are taken, columns ``names`` of it."""

    path: Path
    names: tuple[str, ...]
    measure: Measure

    def take(self, rows: np.ndarray) -> np.ndarray:
        if not len(rows):
            return np.empty((0, len(self.names)), np.float32)
        first, stop = int(rows.min()), int(rows.max()) + 1
        cells = [pl.col(name).cast(pl.Float64) for name in self.names]
        if self.measure == Measure():
            # Half the memory, and the same values.
            cells = [cell.cast(pl.Float32) for cell in cells]
        frame = collect(self.path, pl.scan_parquet(self.path).select(cells).slice(first, stop - first))
        return self.measure.of(frame.fill_null(float("nan")).to_numpy())[rows - first]


def collect(path: Path, frame: pl.LazyFrame) -> pl.DataFrame:
    try:
        return frame.collect()
    except (pl.exceptions.PolarsError, OSError) as error:
        raise InputError(f"{path} is damaged ({str(error).splitlines()[0]}); write it again") from error
