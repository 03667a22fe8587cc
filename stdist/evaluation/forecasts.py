"""Forecast files: `.zarr` for arrays, `.parquet` for tables, both with the contract they were made under."""

from __future__ import annotations

import json
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import xarray as xr
from jaxtyping import Float, Shaped
from pydantic import ValidationError

from stdist.errors import InputError
from stdist.evaluation.contract import ForecastMetadata

QUANTILES = (0.1, 0.5, 0.9)
QUANTILE_COLUMNS = ("q10", "q50", "q90")
METADATA_KEY = "stdist"
CELL_IDS_KEY = "stdist_cell_ids"


@dataclass(frozen=True, eq=False)
class Forecasts:
    """Point forecasts of N windows, K steps and the h x w cells of one region, in the data's units.

    ``origins`` are the UTC stamps (datetime64[ns]) of the last history frames; step k (from 1) is the value
    k frames later. ``quantiles`` holds the 0.1, 0.5 and 0.9 quantiles of the candidates, or None for a
    single candidate. Cells nobody forecast (outside the city) are NaN.
    """

    values: Float[np.ndarray, "N K h w"]
    origins: Shaped[np.ndarray, " N"]
    cell_ids: Shaped[np.ndarray, "h w"]
    metadata: ForecastMetadata
    quantiles: Float[np.ndarray, "3 N K h w"] | None = None

    def __post_init__(self) -> None:
        contract = self.metadata.contract
        r0, r1, c0, c1 = contract.region
        expected = (len(self.origins), contract.K, r1 - r0, c1 - c0)
        if self.values.shape != expected:
            raise InputError(
                f"forecasts have shape {self.values.shape}, their origins and contract say {expected} "
                "(origin, step, row, col)"
            )
        if self.cell_ids.shape != expected[2:]:
            raise InputError(f"cell ids have shape {self.cell_ids.shape}, the region is {expected[2:]}")
        if self.quantiles is not None and self.quantiles.shape != (len(QUANTILES), *expected):
            raise InputError(f"quantiles have shape {self.quantiles.shape}, expected {(3, *expected)}")


def write_forecasts(forecasts: Forecasts, path: Path | str) -> Path:
    """Write to ``path``, by its suffix; the name appears only when the file is whole, replacing an older one.

    ``.zarr``: array ``forecast (origin, step, row, col)``; with quantiles ``forecast (quantile, origin,
    step, row, col)`` and the point forecast beside it as ``point``. ``.parquet``: one row a value, cells
    without a forecast left out. Raises InputError for another suffix.
    """
    path = Path(path)
    write = {".zarr": _write_zarr, ".parquet": _write_parquet}.get(path.suffix)
    if write is None:
        raise InputError(f"{path}: forecasts are written as .zarr or .parquet, not '{path.suffix}'")
    with _whole_or_nothing(path) as unfinished:
        write(forecasts, unfinished)
    return path


def read_forecasts(path: Path | str) -> Forecasts:
    """The forecasts ``write_forecasts`` wrote. Raises InputError where ``path`` holds something else."""
    path = Path(path)
    read = {".zarr": _read_zarr, ".parquet": _read_parquet}.get(path.suffix)
    if read is None:
        raise InputError(f"{path}: forecasts are read from .zarr or .parquet, not '{path.suffix}'")
    if not path.exists():
        raise InputError(f"{path}: no such forecasts; write them with `stdist forecast RUN STORE --out {path}`")
    try:
        return read(path)
    except (KeyError, ValueError, OSError, pl.exceptions.PolarsError) as error:
        if isinstance(error, InputError):
            raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path}: not forecasts written by stdist, or damaged ({reason})") from error


@contextmanager
def _whole_or_nothing(path: Path) -> Iterator[Path]:
    """A name beside ``path`` to write to, renamed to ``path`` at the end or removed on an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    unfinished = folder / path.name
    try:
        yield unfinished
        if path.is_dir():  # a folder cannot be renamed onto a filled one
            path.rename(folder / "replaced")
        unfinished.replace(path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _write_zarr(forecasts: Forecasts, path: Path) -> None:
    contract = forecasts.metadata.contract
    r0, r1, c0, c1 = contract.region
    dims = ("origin", "step", "row", "col")
    data: dict[str, Any] = {"point": (dims, forecasts.values.astype(np.float32), {"units": contract.units})}
    coords: dict[str, Any] = {
        "origin": ("origin", forecasts.origins.astype("datetime64[ns]"), {"standard_name": "time"}),
        "step": ("step", np.arange(1, contract.K + 1)),
        "row": ("row", np.arange(r0, r1)),
        "col": ("col", np.arange(c0, c1)),
        "cell": (("row", "col"), forecasts.cell_ids),
    }
    if forecasts.quantiles is None:
        data = {"forecast": data["point"]}
    else:
        quantiles = forecasts.quantiles.astype(np.float32)
        data["forecast"] = (("quantile", *dims), quantiles, {"units": contract.units})
        coords["quantile"] = ("quantile", np.array(QUANTILES))
    attributes = {METADATA_KEY: forecasts.metadata.model_dump_json()}
    per_chunk = max(1, 2**20 // max(1, int(np.prod(forecasts.values.shape[1:]))))
    chunk = (max(1, min(len(forecasts.origins), per_chunk)), *forecasts.values.shape[1:])
    encoding = {n: {"chunks": (*(1,) * (len(v[0]) - len(chunk)), *chunk)} for n, v in data.items()}
    with warnings.catch_warnings():
        # Consolidated metadata is an extension of Zarr v3 that xarray and zarr both read.
        warnings.filterwarnings("ignore", message="Consolidated metadata", category=UserWarning)
        xr.Dataset(data, coords, attributes).to_zarr(
            path, mode="w", zarr_format=3, consolidated=True, encoding=encoding
        )


def _read_zarr(path: Path) -> Forecasts:
    with xr.open_zarr(path, chunks=None) as dataset:
        quantiles = dataset["forecast"].values if "quantile" in dataset["forecast"].dims else None
        return Forecasts(
            values=dataset["forecast" if quantiles is None else "point"].values,
            origins=dataset["origin"].values.astype("datetime64[ns]"),
            cell_ids=dataset["cell"].values,
            metadata=_metadata(dataset.attrs.get(METADATA_KEY), path),
            quantiles=quantiles,
        )


def _write_parquet(forecasts: Forecasts, path: Path) -> None:
    contract = forecasts.metadata.contract
    n, k, h, w = forecasts.values.shape
    origin = np.repeat(forecasts.origins.astype("datetime64[ns]"), k * h * w)
    step = np.tile(np.repeat(np.arange(1, k + 1, dtype=np.int32), h * w), n)
    columns = {
        "origin": origin,
        "target": origin + step * np.timedelta64(contract.cadence_seconds, "s"),
        "cell": np.tile(forecasts.cell_ids.ravel(), n * k),
        "step": step,
        "forecast": forecasts.values.ravel().astype(np.float32),
    }
    if forecasts.quantiles is not None:
        flat = forecasts.quantiles.reshape(len(QUANTILES), -1).astype(np.float32)
        columns |= dict(zip(QUANTILE_COLUMNS, flat, strict=True))
    table = pl.DataFrame(columns).filter(pl.col("forecast").is_not_nan())
    table = table.with_columns(pl.col("origin", "target").dt.replace_time_zone("UTC"))
    metadata = {
        METADATA_KEY: forecasts.metadata.model_dump_json(),
        CELL_IDS_KEY: json.dumps(forecasts.cell_ids.tolist()),
    }
    table.write_parquet(path, metadata=metadata)


def _read_parquet(path: Path) -> Forecasts:
    attributes = pl.read_parquet_metadata(path)
    metadata = _metadata(attributes.get(METADATA_KEY), path)
    cell_ids = np.array(json.loads(attributes[CELL_IDS_KEY]))
    table = pl.read_parquet(path)
    position_of = {cell: i for i, cell in enumerate(cell_ids.ravel().tolist())}
    cells = table["cell"].unique().to_list()
    foreign = [cell for cell in cells if cell not in position_of]
    if foreign:
        raise InputError(f"{path}: {len(foreign)} cells outside the contract's region, first {foreign[0]}")
    k = metadata.contract.K
    steps = table["step"].to_numpy()
    if steps.size and (steps.min() < 1 or steps.max() > k):
        raise InputError(f"{path}: steps {steps.min()} to {steps.max()}, the contract says 1 to {k}")
    stamps = table["origin"].dt.replace_time_zone(None).cast(pl.Datetime("ns"))
    origins = stamps.unique().sort().to_numpy()
    origin_index = np.searchsorted(origins, stamps.to_numpy())
    cell_index = table["cell"].replace_strict(cells, [position_of[c] for c in cells], return_dtype=pl.Int64)
    shape = (len(origins), k, cell_ids.size)
    flat = np.ravel_multi_index((origin_index, steps - 1, cell_index.to_numpy()), shape)
    written = np.zeros(int(np.prod(shape)), bool)
    written[flat] = True
    if written.sum() != len(flat):
        raise InputError(f"{path}: some (origin, cell, step) appear more than once")

    def grid(column: str) -> Float[np.ndarray, "N K h w"]:
        values = np.full(written.size, np.nan, np.float32)
        values[flat] = table[column].to_numpy()
        return values.reshape(len(origins), k, *cell_ids.shape)

    has_quantiles = QUANTILE_COLUMNS[0] in table.columns
    return Forecasts(
        values=grid("forecast"),
        origins=origins,
        cell_ids=cell_ids,
        metadata=metadata,
        quantiles=np.stack([grid(c) for c in QUANTILE_COLUMNS]) if has_quantiles else None,
    )


def _metadata(text: str | None, path: Path) -> ForecastMetadata:
    if text is None:
        raise InputError(f"{path}: carries no contract, so it was not written by stdist; it cannot be scored")
    try:
        return ForecastMetadata.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InputError(f"{path}: its contract is damaged at '{where}' ({first['msg']})") from error
