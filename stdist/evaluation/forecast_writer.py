"""Forecasts too many to hold: written piece by piece, so that a killed forecast goes on where it was.

A piece is a few windows times a block of cells. Its values are a chunk of their own in an array beside the final name,
``NAME.zarr.partial/pieces.zarr`` or ``NAME.parquet.partial/pieces.zarr``, written before ``progress.json`` counts it:
whenever the process is killed, what is counted is whole. The final file is made of the pieces at the end, a few windows
at a time.
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
from stdist.evaluation.blocks import cut
from stdist.evaluation.forecast_header import ForecastHeader
from stdist.evaluation.forecasts import require_suffix, stream_forecasts
from stdist.files import write_atomically


class Piece(NamedTuple):
    """Positions in a forecast's windows, and in its list of cells."""

    windows: slice
    cells: slice

    @property
    def size(self) -> int:
        """Cells times windows."""
        return (self.windows.stop - self.windows.start) * (self.cells.stop - self.cells.start)


@dataclass(frozen=True)
class PiecePlan:
    """How ``windows`` x ``cells`` are cut; pieces at the ends may be smaller."""

    windows: int
    cells: int
    windows_per_piece: int
    cells_per_piece: int

    @property
    def size(self) -> int:
        """Cells times windows."""
        return self.windows * self.cells

    def pieces(self) -> list[Piece]:
        """In the order they are forecast: all blocks of cells of the first windows, then the next windows."""
        blocks = cut(self.cells, self.cells_per_piece)
        return [Piece(windows, cells) for windows in cut(self.windows, self.windows_per_piece) for cells in blocks]


class ForecastWriter:
    """Writes forecasts to ``path``, as ``write_forecasts`` does, of pieces given in the order of ``left``.

    Left before ``finish`` it keeps what it has, and the next writer of the same work goes on there. What a writer of
    other work left behind is discarded with a line, not refused: as with a finished file of that name, the newest
    command counts, and a run that nobody watches never stops for a leftover.

    Args:
        path: NAME.zarr or NAME.parquet.
        header: what the file says beside the values.
        cells: positions (row by row) in the region of the cells that are forecast; all others become NaN.
        plan: the pieces.
        work: what else decides the values, JSON: settings that make forecasts different work when they differ.
        log: is given a line for people about what was there already.

    Raises InputError for another suffix, and where another process is writing the same forecasts.
    """

    def __init__(
        self,
        path: Path | str,
        header: ForecastHeader,
        cells: Int[np.ndarray, " cells"],
        plan: PiecePlan,
        work: Mapping[str, Any],
        log: Callable[[str], None],
    ):
        self.path, self.plan = require_suffix(path), plan
        self._header, self._cells = header, cells
        self.partial = self.path.with_name(self.path.name + ".partial")
        self.partial.mkdir(parents=True, exist_ok=True)
        self._lock = _lock(self.partial / "lock", self.path)
        described = header.metadata.model_dump(mode="json")
        pieces = {"pieces": list(astuple(plan)), "quantities": header.quantities}
        self._work = json.loads(json.dumps({**described.pop("contract"), **described, **pieces, **work}))
        self._all, self._whole = plan.pieces(), 0
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
    def left(self) -> list[Piece]:
        """The pieces that are still to be written."""
        return self._all[self._whole :]

    def write(
        self,
        piece: Piece,
        values: Float[np.ndarray, "quantity windows K cells"],
        counts: Mapping[str, int] | None = None,
    ) -> None:
        """Keeps the next piece: its point forecasts, then their quantiles if the header has any.

        ``counts``: numbers to add to ``counts``, which are kept with the pieces.
        """
        assert piece == self._all[self._whole], f"{piece} is not the next one"
        self._pieces[:, piece.windows, :, piece.cells] = values
        self._whole += 1
        self.counts.update(counts or {})
        self._note()

    def finish(self) -> Path:
        """Gives the final file its name, replacing an older one, and removes the pieces."""
        assert not self.left, f"{len(self.left)} pieces are missing"
        stream_forecasts(self._header, self._read, self.path, scratch=self.partial)
        self._forget()
        shutil.rmtree(self.partial)
        return self.path

    def _resume(self, log: Callable[[str], None]) -> bool:
        """Whether pieces of this very work are there to go on with."""
        try:
            known = json.loads((self.partial / "progress.json").read_text())
        except FileNotFoundError:
            return False
        if not known["whole"]:
            return False
        have = f"{self.partial} holds {known['whole']} pieces"
        if known["work"] != self._work:
            names = [name for name in self._work if known["work"].get(name) != self._work[name]]
            log(f"{have} made with another {', '.join(names)}; they are discarded")
            return False
        log(f"{have} of {len(self._all)}, going on from there")
        self._pieces = zarr.open_array(self.partial / "pieces.zarr", mode="r+")
        self._whole = known["whole"]
        self.counts.update(known["counts"])
        return True

    def _begin(self) -> None:
        self._forget()
        horizon = self._header.shape[1]
        self._pieces = zarr.create_array(
            self.partial / "pieces.zarr",
            shape=(self._header.quantities, self.plan.windows, horizon, self.plan.cells),
            chunks=(self._header.quantities, self.plan.windows_per_piece, horizon, self.plan.cells_per_piece),
            dtype="float32",
            fill_value=np.nan,
            dimension_names=("quantity", "window", "step", "cell"),
            overwrite=True,
        )
        self._note()

    def _forget(self) -> None:
        """To be called before pieces are removed: a kill in between must not leave a note of pieces that are gone."""
        (self.partial / "progress.json").unlink(missing_ok=True)

    def _note(self) -> None:
        progress = {"whole": self._whole, "counts": self.counts, "work": self._work}
        write_atomically(self.partial / "progress.json", json.dumps(progress))

    def _read(self, windows: slice) -> Float[np.ndarray, "quantity n K *cells"]:
        values = np.asarray(self._pieces[:, windows])
        ids = self._header.cell_ids
        grid = np.full((*values.shape[:3], ids.size), np.nan, np.float32)
        grid[..., self._cells] = values
        return grid.reshape(*values.shape[:3], *ids.shape)


def _lock(path: Path, wanted: Path) -> IO[str]:
    """Holds ``path`` until closed, or until the process ends, however it ends."""
    file = path.open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise InputError(f"{wanted} is being written by another process; wait for it or choose another name") from None
    except OSError:  # some shared file systems know no locks; there, two writers of one name are the user's to avoid
        pass
    return file
