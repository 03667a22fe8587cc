"""Files of forecasts, `.zarr` or `.parquet`, with the contract that they were made under."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
from jaxtyping import Float

from stdist.data.spans import AnyRegion
from stdist.errors import InputError, is_damage
from stdist.evaluation.forecast_arrays import open_zarr, write_zarr
from stdist.evaluation.forecast_header import ForecastHeader, ReadBlock
from stdist.evaluation.forecast_tables import open_parquet, write_parquet

FORMATS = {".zarr": (write_zarr, open_zarr), ".parquet": (write_parquet, open_parquet)}


@dataclass(frozen=True, eq=False)
class ForecastFile:
    """A file of forecasts, of which one block at a time is in memory."""

    header: ForecastHeader
    _read: ReadBlock

    def read(
        self, windows: slice, tile: AnyRegion, *, quantiles: bool = False
    ) -> Float[np.ndarray, "quantity n K *cells"]:
        """See ``ReadBlock``; NaN where there is no forecast. Raises InputError where the file is damaged."""
        return self._read(windows, tile, quantiles)


def require_suffix(path: Path | str) -> Path:
    """Returns ``path`` if its suffix is that of a file of forecasts; raises InputError if not."""
    path = Path(path)
    if path.suffix not in FORMATS:
        raise InputError(f"{path}: forecasts are files of .zarr or .parquet, not '{path.suffix}'")
    return path


def open_forecasts(path: Path | str) -> ForecastFile:
    """Opens a file that ``ForecastWriter`` wrote. Raises InputError where ``path`` holds something else."""
    path = require_suffix(path)
    _, open_file = FORMATS[path.suffix]
    if not path.exists():
        raise InputError(f"{path}: no such forecasts; write them with `stdist forecast RUN STORE --out {path}`")
    with _damage_as_input_error(path):
        header, read = open_file(path)
    return ForecastFile(header, _damage_as_input_error(path)(read))


@contextmanager
def _damage_as_input_error(path: Path) -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    except (KeyError, ValueError, TypeError, OSError, RuntimeError, pl.exceptions.PolarsError) as error:
        if not is_damage(error):
            raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path}: not forecasts written by stdist, or damaged ({reason})") from error
