"""Files of forecasts, `.zarr`, `.parquet` or `.csv`, with the contract that they were made under."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
from jaxtyping import Float

from stdist.data.spans import AnyRegion
from stdist.errors import DamageError, InputError, is_damage
from stdist.evaluation.contract import ForecastMetadata
from stdist.evaluation.forecast_arrays import open_zarr, write_zarr, zarr_metadata
from stdist.evaluation.forecast_header import ForecastHeader, ReadBlock, read_metadata
from stdist.evaluation.forecast_tables import open_parquet, parquet_metadata, write_csv, write_parquet

WRITERS = {".zarr": write_zarr, ".parquet": write_parquet, ".csv": write_csv}
READERS = {".zarr": open_zarr, ".parquet": open_parquet}
METADATA = {".zarr": zarr_metadata, ".parquet": parquet_metadata}


@dataclass(frozen=True, eq=False)
class ForecastFile:
    """A file of forecasts, of which one block at a time is in memory."""

    header: ForecastHeader
    _read: ReadBlock

    def read(
        self, windows: slice, tile: AnyRegion, *, quantiles: bool = False
    ) -> Float[np.ndarray, "quantity n K *cells"]:
        """See ``ReadBlock``; NaN where there is no forecast. Raises DamageError where the file is damaged."""
        return self._read(windows, tile, quantiles)


def require_suffix(path: Path | str) -> Path:
    """Returns ``path`` if its suffix is that of a file of forecasts; raises InputError if not."""
    path = Path(path)
    if path.suffix not in WRITERS:
        raise InputError(f"{path}: forecasts are files of .zarr, .parquet or .csv, not '{path.suffix}'; change --out")
    return path


def require_replaceable(path: Path, metadata: ForecastMetadata) -> None:
    """Raises InputError where ``path`` is there and is anything else than forecasts of this very origin and contract:
    it is not ours to replace."""
    stays = "it stays as it is: remove it, or choose another --out"
    if path.is_symlink():
        raise InputError(f"{path} is a symbolic link; {stays}")
    if not path.exists():
        return
    if path.suffix not in METADATA:
        raise InputError(f"{path} is there already, and a table of text does not say whose it is; {stays}")
    text = METADATA[path.suffix](path)
    if text is None:
        raise InputError(f"{path} holds no forecasts written by stdist; {stays}")
    there, new = (dict(each) | dict(each.contract) for each in (read_metadata(text, path), metadata))
    if other := [name for name in new if name != "contract" and there[name] != new[name]]:
        raise InputError(f"{path} holds forecasts of another {', '.join(other)}; {stays}")


def open_forecasts(path: Path | str) -> ForecastFile:
    """Opens a file that ``ForecastWriter`` wrote. Raises InputError where ``path`` holds something else."""
    path = require_suffix(path)
    if path.suffix not in READERS:
        raise InputError(f"{path} carries no contract, as no {path.suffix} can; forecast to .parquet or .zarr to score")
    open_file = READERS[path.suffix]
    if not path.exists():
        raise InputError(f"{path}: no such forecasts; write them with `stdist forecast RUN STORE --out {path}`")
    with _as_one_line(InputError, f"{path}: not forecasts written by stdist, or damaged"):
        header, read = open_file(path)
    return ForecastFile(header, _as_one_line(DamageError, f"{path} is damaged")(read))


@contextmanager
def _as_one_line(kind: type[InputError], line: str) -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    except (KeyError, ValueError, TypeError, OSError, RuntimeError, pl.exceptions.PolarsError) as error:
        if not is_damage(error):
            raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise kind(f"{line} ({reason})") from error
