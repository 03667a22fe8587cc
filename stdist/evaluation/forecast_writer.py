"""Forecasts too many to hold: written chunk by chunk, so that a killed forecast goes on where it was.

A chunk is a few windows times some of the cells. It is a chunk of its own in an array beside the final name,
``NAME.zarr.partial/pieces.zarr`` or ``NAME.parquet.partial/pieces.zarr``, written before ``progress.json`` counts it:
whenever the process is killed, what is counted is complete. The final file is made of them at the end, a few windows at
a time: its own chunks are sized for readers, not for the device that forecast (chunks of 16 windows and one row of a
100 x 100 grid are 50 times as many files, and seven times as slow to read; a copy costs seconds).
"""

import fcntl
import json
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import astuple, dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, NamedTuple

import numpy as np
import zarr
from jaxtyping import Float, Int

from stdist.errors import InputError
from stdist.evaluation.forecast_header import ForecastHeader, cut
from stdist.evaluation.forecasts import FORMATS, require_suffix
from stdist.files import own_file, write_atomically


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
    ``forecast (quantile, origin, …)`` and the point forecast beside it as ``point``. ``.parquet``: one row a value,
    cells without a forecast left out. The name appears only when the file is complete, replacing an older one.

    Left before ``finish`` it keeps what it has, and the next writer of the same work goes on there. What a writer of
    other work left behind is discarded with a line, not refused: as with a finished file of that name, the newest
    command counts, and a run that nobody watches never stops for a leftover.

    Args:
        path: NAME.zarr or NAME.parquet.
        header: all that the file says beside the values.
        cells: positions (row by row) in the region of the cells that are forecast; all others become NaN.
        grid: the cut into chunks.
        work: whatever else decides the values, as JSON: settings that make forecasts different work when they differ.
        log: takes a line for people about what was there already.

    Raises InputError for another suffix, and where another process is writing the same forecasts.
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
        self.partial = self.path.with_name(self.path.name + ".partial")
        self.partial.mkdir(parents=True, exist_ok=True)
        self._lock = _lock(self.partial / "lock", self.path)
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
        write_file, _ = FORMATS[self.path.suffix]
        unfinished, replaced = self.partial / self.path.name, self.partial / "replaced"
        write_file(self._header, self._read, unfinished)
        if self.path.is_dir():  # a folder cannot be renamed onto a filled one
            shutil.rmtree(replaced, ignore_errors=True)
            self.path.rename(replaced)
        unfinished.replace(self.path)
        self._drop_progress()
        shutil.rmtree(self.partial)
        return self.path

    def _resume(self, log: Callable[[str], None]) -> bool:
        """Takes over the chunks of this very work, if there are any; returns False if not."""
        path = self.partial / "progress.json"
        if not path.exists():
            return False
        with own_file(path, f"delete {self.partial} to forecast from the beginning"):
            progress = json.loads(path.read_text())
            whole, counts = int(progress["whole"]), Counter[str](progress["counts"])
            work = dict(progress["work"])
        if not whole:
            return False
        leftover = f"{self.partial} holds {whole} chunks"
        if work != self._work:
            names = [name for name in self._work if work.get(name) != self._work[name]]
            log(f"{leftover} made with another {', '.join(names)}; they are discarded")
            return False
        log(f"{leftover} of {len(self._chunks)}, going on from there")
        with own_file(self.partial / "pieces.zarr", f"delete {self.partial} to forecast from the beginning"):
            self._values = zarr.open_array(self.partial / "pieces.zarr", mode="r+")
        self._complete = whole
        self.counts.update(counts)
        return True

    def _begin(self) -> None:
        self._drop_progress()
        horizon = self._header.shape[1]
        self._values = zarr.create_array(
            self.partial / "pieces.zarr",
            shape=(self._header.quantities, self.grid.windows, horizon, self.grid.cells),
            chunks=(self._header.quantities, self.grid.windows_per_chunk, horizon, self.grid.cells_per_chunk),
            dtype="float32",
            fill_value=np.nan,
            dimension_names=("quantity", "window", "step", "cell"),
            overwrite=True,
        )
        self._save_progress()

    def _drop_progress(self) -> None:
        """Comes before chunks are removed: a kill in between must leave no count of chunks that are gone."""
        (self.partial / "progress.json").unlink(missing_ok=True)

    def _save_progress(self) -> None:
        progress = {"whole": self._complete, "counts": self.counts, "work": self._work}
        write_atomically(self.partial / "progress.json", json.dumps(progress))

    def _read(self, windows: slice) -> Float[np.ndarray, "quantity n K *cells"]:
        values = np.asarray(self._values[:, windows])
        ids = self._header.cell_ids
        region = np.full((*values.shape[:3], ids.size), np.nan, np.float32)
        region[..., self._cells] = values
        return region.reshape(*values.shape[:3], *ids.shape)


def _lock(path: Path, forecasts: Path) -> IO[str]:
    """Holds ``path`` until closed, or until the process ends, however it ends."""
    file = path.open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise InputError(
            f"{forecasts} is being written by another process; wait for it or choose another name"
        ) from None
    except OSError:  # some shared file systems know no locks; there, two writers of one name are the user's to avoid
        pass
    return file
