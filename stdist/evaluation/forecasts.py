"""Forecasts in memory and in files, `.zarr` or `.parquet`, with the contract they were made under."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
from jaxtyping import Float, Shaped

from stdist.data.spans import AnyRegion
from stdist.errors import InputError
from stdist.evaluation.contract import ForecastMetadata
from stdist.evaluation.forecast_arrays import open_zarr, write_zarr
from stdist.evaluation.forecast_header import QUANTILES, ForecastHeader, ReadBlock, ReadWindows
from stdist.evaluation.forecast_tables import open_parquet, write_parquet

FORMATS = {".zarr": (write_zarr, open_zarr), ".parquet": (write_parquet, open_parquet)}


@dataclass(frozen=True, eq=False)
class ForecastFile:
    """A file of forecasts, of which a block is in memory at a time."""

    header: ForecastHeader
    _read: ReadBlock

    def read(
        self, windows: slice, tile: AnyRegion, *, quantiles: bool = False
    ) -> Float[np.ndarray, "quantity n K *cells"]:
        """See ``ReadBlock``; NaN where there is no forecast. Raises InputError where the file is damaged."""
        return self._read(windows, tile, quantiles)


@dataclass(frozen=True, eq=False)
class Forecasts:
    """Point forecasts of N windows, K steps and the cells (h x w, or n nodes) of one region, in the data's units.

    ``origins`` are the UTC stamps (datetime64[ns]) of the last history frames; step k (from 1) is the value
    k frames later. ``quantiles`` holds the 0.1, 0.5 and 0.9 quantiles of the candidates, or None for a
    single candidate. Cells nobody forecast (outside the city) are NaN.
    """

    values: Float[np.ndarray, "N K *cells"]
    origins: Shaped[np.ndarray, " N"]
    cell_ids: Shaped[np.ndarray, "*cells"]
    metadata: ForecastMetadata
    quantiles: Float[np.ndarray, "3 N K *cells"] | None = None

    def __post_init__(self) -> None:
        self.header.require_shape(self.values.shape)
        expected = (len(QUANTILES), *self.header.shape)
        if self.quantiles is not None and self.quantiles.shape != expected:
            raise InputError(f"quantiles have shape {self.quantiles.shape}, expected {expected}")

    @property
    def header(self) -> ForecastHeader:
        return ForecastHeader(self.metadata, self.origins, self.cell_ids, self.quantiles is not None)

    def read(
        self, windows: slice, tile: AnyRegion, *, quantiles: bool = False
    ) -> Float[np.ndarray, "quantity n K *cells"]:
        """What ``ForecastFile.read`` gives."""
        place = self.header.place(windows, tile)
        wanted = self.quantiles if quantiles and self.quantiles is not None else np.empty((0, *self.values.shape))
        return np.concatenate([self.values[place][None], wanted[(slice(None), *place)]], dtype=np.float32)


def write_forecasts(forecasts: Forecasts, path: Path | str) -> Path:
    """Write to ``path``, by its suffix; the name appears only when the file is whole, replacing an older one.

    ``.zarr``: array ``forecast (origin, step, row, col)``, of nodes ``(origin, step, node)``; with quantiles
    ``forecast (quantile, origin, …)`` and the point forecast beside it as ``point``. ``.parquet``: one row a value,
    cells without a forecast left out. Raises InputError for another suffix.
    """
    path = require_suffix(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    header = forecasts.header

    def read(windows: slice) -> Float[np.ndarray, "quantity n K *cells"]:
        return forecasts.read(windows, header.region, quantiles=True)

    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as scratch:
        stream_forecasts(header, read, path, Path(scratch))
    return path


def stream_forecasts(header: ForecastHeader, read: ReadWindows, path: Path, scratch: Path) -> None:
    """What ``write_forecasts`` writes, holding a few windows at a time (``POINTS_IN_MEMORY``).

    ``scratch``: an existing folder on the file system of ``path``, which the caller removes.
    """
    write, _ = FORMATS[path.suffix]
    unfinished, replaced = scratch / path.name, scratch / "replaced"
    write(header, read, unfinished)
    if path.is_dir():  # a folder cannot be renamed onto a filled one
        shutil.rmtree(replaced, ignore_errors=True)
        path.rename(replaced)
    unfinished.replace(path)


def require_suffix(path: Path | str) -> Path:
    """``path`` if its suffix is that of a file of forecasts; raises InputError if not."""
    path = Path(path)
    if path.suffix not in FORMATS:
        raise InputError(f"{path}: forecasts are files of .zarr or .parquet, not '{path.suffix}'")
    return path


def open_forecasts(path: Path | str) -> ForecastFile:
    """A file that ``write_forecasts`` wrote. Raises InputError where ``path`` holds something else."""
    path = require_suffix(path)
    _, open_file = FORMATS[path.suffix]
    if not path.exists():
        raise InputError(f"{path}: no such forecasts; write them with `stdist forecast RUN STORE --out {path}`")
    with _damage_as_input_error(path):
        header, read = open_file(path)
    return ForecastFile(header, _damage_as_input_error(path)(read))


def read_forecasts(path: Path | str) -> Forecasts:
    """All of a file's forecasts in memory. Raises InputError as ``open_forecasts`` does."""
    file = open_forecasts(path)
    header = file.header
    values = file.read(slice(0, header.shape[0]), header.region, quantiles=True)
    quantiles = values[1:] if header.has_quantiles else None
    return Forecasts(values[0], header.origins, header.cell_ids, header.metadata, quantiles)


@contextmanager
def _damage_as_input_error(path: Path) -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    except (KeyError, ValueError, OSError, RuntimeError, pl.exceptions.PolarsError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path}: not forecasts written by stdist, or damaged ({reason})") from error
