"""Forecasts too many to hold: written chunk by chunk, so that a killed forecast goes on where it was.

A chunk is a few windows times some of the cells. It is a chunk of its own in an array beside the final name,
``NAME.zarr.partial/pieces.zarr``, of the others likewise, written before ``progress.json`` counts it:
whenever the process is killed, what is counted is complete. Each carries a CRC-32C, which is compared whenever it is
read. The final file is made of them at the end, a few windows at
a time: its own chunks are sized for readers, not for the device that forecast (chunks of 16 windows and one row of a
100 x 100 grid are 50 times as many files, and seven times as slow to read; a copy costs seconds).
"""

import json
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import astuple, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import zarr
from jaxtyping import Float, Int
from zarr.codecs import Crc32cCodec, ZstdCodec

from stdist.errors import DamageError
from stdist.evaluation.forecast_header import ForecastHeader, cut
from stdist.evaluation.forecasts import WRITERS, require_replaceable, require_suffix
from stdist.files import read_sealed, require_working_folder, write_sealed
from stdist.locks import WriterLock

PIECES, PROGRESS, REPLACED = "pieces.zarr", "progress.json", "replaced"


class Chunk(NamedTuple):
    """Positions in a forecast's windows, and in its list of cells."""

    windows: slice
    cells: slice

    @property
    def size(self) -> int:
        """Cells times windows."""
        return (self.windows.stop - self.windows.start) * (self.cells.stop - self.cells.start)


@dataclass(frozen=True)
class ChunkGrid:
    """A cut of ``windows`` x ``cells``; chunks at the ends may be smaller."""

    windows: int
    cells: int
    windows_per_chunk: int
    cells_per_chunk: int

    @property
    def size(self) -> int:
        """Cells times windows."""
        return self.windows * self.cells

    def chunks(self) -> list[Chunk]:
        """All chunks in the order they are forecast: all cells of the first windows, then the next windows."""
        blocks = cut(self.cells, self.cells_per_chunk)
        return [Chunk(windows, cells) for windows in cut(self.windows, self.windows_per_chunk) for cells in blocks]


class ForecastWriter:
    """Writes forecasts to ``path``, chunk by chunk in the order of ``remaining``.

    ``.zarr``: array ``forecast (origin, step, row, col)``, of nodes ``(origin, step, node)``; with quantiles
    ``forecast (quantile, origin, …)`` and the point forecast beside it as ``point``. ``.parquet`` and ``.csv``: one
    row a value, cells without a forecast left out. The name appears only when the file is complete; it replaces older
    forecasts of the same checkpoint and contract, and nothing else.

    Left before ``finish`` it keeps what it has, and the next writer of the same work goes on there, unless a chunk is
    damaged. What a writer of other work left behind is discarded with a line, not refused: a run that nobody watches
    never stops for a leftover.

    Args:
        path: NAME.zarr, NAME.parquet or NAME.csv.
        header: all that the file says beside the values.
        cells: positions (row by row) in the region of the cells that are forecast; all others become NaN.
        grid: the cut into chunks.
        work: whatever else decides the values, as JSON: settings that make forecasts different work when they differ.
        log: takes a line for people about what was there already.

    Raises InputError for another suffix, where another process is writing the same forecasts, and where something else
    has the name.
    """

    def __init__(
        self,
        path: Path | str,
        header: ForecastHeader,
        cells: Int[np.ndarray, " cells"],
        grid: ChunkGrid,
        work: Mapping[str, Any],
        log: Callable[[str], None],
    ):
        self.path, self.grid = require_suffix(path), grid
        self._header, self._cells = header, cells
        require_replaceable(self.path, header.metadata)
        self.partial = self.path.with_name(self.path.name + ".partial")
        names = {"lock", PROGRESS, f"{PROGRESS}.partial", PIECES, REPLACED, self.path.name}
        is_ours = self.partial.is_dir() and {path.name for path in self.partial.iterdir()} <= names
        require_working_folder(self.partial, is_ours)
        self.partial.mkdir(parents=True, exist_ok=True)
        self._lock = WriterLock(self.partial / "lock", self.path)
        metadata = header.metadata.model_dump(mode="json")
        layout = {"pieces": list(astuple(grid)), "quantities": header.quantities}
        self._work = json.loads(json.dumps({**metadata.pop("contract"), **metadata, **layout, **work}))
        self._chunks, self._complete = grid.chunks(), 0
        self.counts: Counter[str] = Counter()
        if not self._resume(log):
            self._begin()

    def __enter__(self) -> "ForecastWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.close()

    @property
    def remaining(self) -> list[Chunk]:
        """The chunks that are still to be written."""
        return self._chunks[self._complete :]

    def write(
        self,
        chunk: Chunk,
        values: Float[np.ndarray, "quantity windows K cells"],
        counts: Mapping[str, int] | None = None,
    ) -> None:
        """Keeps the next chunk: its point forecasts, then their quantiles if the header has any.

        ``counts``: numbers to add to the writer's ``counts``, which are kept with the chunks.
        """
        assert chunk == self._chunks[self._complete], f"{chunk} is not the next one"
        self._values[:, chunk.windows, :, chunk.cells] = values
        self._complete += 1
        self.counts.update(counts or {})
        self._save_progress()

    def finish(self) -> Path:
        """Makes the final file, gives it its name, and removes the chunks."""
        assert not self.remaining, f"{len(self.remaining)} chunks are missing"
        unfinished, replaced = self.partial / self.path.name, self.partial / REPLACED
        WRITERS[self.path.suffix](self._header, self._read, unfinished)
        require_replaceable(self.path, self._header.metadata)
        if self.path.is_dir():  # a folder cannot be renamed onto a filled one
            shutil.rmtree(replaced, ignore_errors=True)
            self.path.rename(replaced)
        unfinished.replace(self.path)
        self._drop_progress()
        shutil.rmtree(self.partial)
        return self.path

    def _resume(self, log: Callable[[str], None]) -> bool:
        """Takes over the chunks of this very work, if there are any and all are whole; returns False if not."""
        if not (self.partial / PROGRESS).exists():
            return False
        progress = read_sealed(self.partial / PROGRESS)
        if progress is None:
            log(f"{self.partial / PROGRESS} is not as it was written; what it counted is discarded")
            return False
        if not progress["whole"]:
            return False
        leftover = f"{self.partial} holds {progress['whole']} chunks"
        if progress["work"] != self._work:
            names = [name for name in self._work if progress["work"].get(name) != self._work[name]]
            log(f"{leftover} made with another {', '.join(names)}; they are discarded")
            return False
        (self.partial / PIECES / "zarr.json").unlink(missing_ok=True)
        self._values = self._make_pieces()
        for number, chunk in enumerate(self._chunks[: progress["whole"]]):
            if not self._is_whole(chunk):
                log(f"{leftover}, of which number {number} is damaged; they are discarded")
                return False
        log(f"{leftover} of {len(self._chunks)}, going on from there")
        self._complete = progress["whole"]
        self.counts.update(progress["counts"])
        return True

    def _is_whole(self, chunk: Chunk) -> bool:
        """Reads a chunk: True where it is as it was written."""
        row, column = chunk.windows.start // self.grid.windows_per_chunk, chunk.cells.start // self.grid.cells_per_chunk
        if not (self.partial / PIECES / "c" / "0" / str(row) / "0" / str(column)).is_file():
            return False  # to Zarr it would be all NaN
        try:
            self._values[:, chunk.windows, :, chunk.cells]
        except (ValueError, RuntimeError):
            return False
        return True

    def _begin(self) -> None:
        self._drop_progress()
        shutil.rmtree(self.partial / PIECES, ignore_errors=True)
        self._values = self._make_pieces()
        self._save_progress()

    def _make_pieces(self) -> "zarr.Array[Any]":
        """The array of all chunks; those that are there stay."""
        horizon = self._header.shape[1]
        return zarr.create_array(
            self.partial / PIECES,
            shape=(self._header.quantities, self.grid.windows, horizon, self.grid.cells),
            chunks=(self._header.quantities, self.grid.windows_per_chunk, horizon, self.grid.cells_per_chunk),
            dtype="float32",
            compressors=[ZstdCodec(level=0), Crc32cCodec()],
            fill_value=np.nan,
            dimension_names=("quantity", "window", "step", "cell"),
            config={"write_empty_chunks": True},
        )

    def _drop_progress(self) -> None:
        """Comes before chunks are removed: a kill in between must leave no count of chunks that are gone."""
        (self.partial / PROGRESS).unlink(missing_ok=True)

    def _save_progress(self) -> None:
        progress = {"whole": self._complete, "counts": self.counts, "work": self._work}
        write_sealed(self.partial / PROGRESS, progress)

    def _read(self, windows: slice) -> Float[np.ndarray, "quantity n K *cells"]:
        try:
            values = np.asarray(self._values[:, windows])
        except (ValueError, RuntimeError) as error:
            raise DamageError(
                f"{self.partial} is damaged: a chunk of windows {windows.start} to {windows.stop - 1} is not as it was "
                "written; the same command forecasts it again"
            ) from error
        ids = self._header.cell_ids
        region = np.full((*values.shape[:3], ids.size), np.nan, np.float32)
        region[..., self._cells] = values
        return region.reshape(*values.shape[:3], *ids.shape)
