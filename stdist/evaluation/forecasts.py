"""Forecast files: `.zarr` for arrays, `.parquet` for tables, both with the contract they were made under."""

from __future__ import annotations

import json
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import xarray as xr
import zarr
from jaxtyping import Float, Shaped
from polars.io.plugins import register_io_source
from pydantic import ValidationError

from stdist.errors import InputError
from stdist.evaluation.contract import ForecastMetadata

QUANTILES = (0.1, 0.5, 0.9)
QUANTILE_COLUMNS = ("q10", "q50", "q90")
METADATA_KEY = "stdist"
CELL_IDS_KEY = "stdist_cell_ids"
SUFFIXES = (".zarr", ".parquet")
POINTS_IN_MEMORY = 2**20
"""Values (window, step, cell) that are written together; one window may have more."""

ReadWindows = Callable[[slice], Float[np.ndarray, "quantity n K h w"]]
"""Gives n consecutive windows: the point forecast, then the quantiles if there are any."""


@dataclass(frozen=True, eq=False)
class ForecastHeader:
    """What a file of forecasts says beside their values; see ``Forecasts``."""

    metadata: ForecastMetadata
    origins: Shaped[np.ndarray, " N"]
    cell_ids: Shaped[np.ndarray, "h w"]
    has_quantiles: bool

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(N, K, h, w)."""
        r0, r1, c0, c1 = self.metadata.contract.region
        return len(self.origins), self.metadata.contract.K, r1 - r0, c1 - c0

    @property
    def quantities(self) -> int:
        """Values a point in time and space has: the point forecast, and the quantiles."""
        return 1 + len(QUANTILES) * self.has_quantiles


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
        expected = self.header.shape
        if self.values.shape != expected:
            raise InputError(
                f"forecasts have shape {self.values.shape}, their origins and contract say {expected} "
                "(origin, step, row, col)"
            )
        if self.cell_ids.shape != expected[2:]:
            raise InputError(f"cell ids have shape {self.cell_ids.shape}, the region is {expected[2:]}")
        if self.quantiles is not None and self.quantiles.shape != (len(QUANTILES), *expected):
            raise InputError(f"quantiles have shape {self.quantiles.shape}, expected {(3, *expected)}")

    @property
    def header(self) -> ForecastHeader:
        return ForecastHeader(self.metadata, self.origins, self.cell_ids, self.quantiles is not None)


def write_forecasts(forecasts: Forecasts, path: Path | str) -> Path:
    """Write to ``path``, by its suffix; the name appears only when the file is whole, replacing an older one.

    ``.zarr``: array ``forecast (origin, step, row, col)``; with quantiles ``forecast (quantile, origin,
    step, row, col)`` and the point forecast beside it as ``point``. ``.parquet``: one row a value, cells
    without a forecast left out. Raises InputError for another suffix.
    """
    path = require_suffix(path)
    path.parent.mkdir(parents=True, exist_ok=True)

    def read(windows: slice) -> Float[np.ndarray, "quantity n K h w"]:
        point = forecasts.values[None, windows]
        return point if forecasts.quantiles is None else np.concatenate([point, forecasts.quantiles[:, windows]])

    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as scratch:
        stream_forecasts(forecasts.header, read, path, Path(scratch))
    return path


def stream_forecasts(header: ForecastHeader, read: ReadWindows, path: Path, scratch: Path) -> None:
    """What ``write_forecasts`` writes, holding a few windows at a time (``POINTS_IN_MEMORY``).

    ``scratch``: an existing folder on the file system of ``path``, which the caller removes.
    """
    write = _write_zarr if path.suffix == ".zarr" else _write_parquet
    unfinished, replaced = scratch / path.name, scratch / "replaced"
    write(header, read, unfinished)
    if path.is_dir():  # a folder cannot be renamed onto a filled one
        shutil.rmtree(replaced, ignore_errors=True)
        path.rename(replaced)
    unfinished.replace(path)


def require_suffix(path: Path | str) -> Path:
    """``path`` if forecasts can be written to it by its suffix; raises InputError if not."""
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise InputError(f"{path}: forecasts are written as .zarr or .parquet, not '{path.suffix}'")
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


def _slabs(header: ForecastHeader) -> list[slice]:
    """Consecutive windows that are held in memory together, and make a chunk of the Zarr arrays."""
    size = max(1, POINTS_IN_MEMORY // max(1, int(np.prod(header.shape[1:]))))
    return [slice(first, min(first + size, header.shape[0])) for first in range(0, header.shape[0], size)]


def _write_zarr(header: ForecastHeader, read: ReadWindows, path: Path) -> None:
    contract = header.metadata.contract
    r0, r1, c0, c1 = contract.region
    dims = ("origin", "step", "row", "col")
    coords: dict[str, Any] = {
        "origin": ("origin", header.origins.astype("datetime64[ns]"), {"standard_name": "time"}),
        "step": ("step", np.arange(1, contract.K + 1)),
        "row": ("row", np.arange(r0, r1)),
        "col": ("col", np.arange(c0, c1)),
        "cell": (("row", "col"), header.cell_ids),
    }
    if header.has_quantiles:
        coords["quantile"] = ("quantile", np.array(QUANTILES))
    xr.Dataset(coords=coords).to_zarr(path, mode="w", zarr_format=3, consolidated=False)
    group = zarr.open_group(path, mode="r+")
    group.attrs.put({METADATA_KEY: header.metadata.model_dump_json()})
    slabs = _slabs(header)

    def create(name: str, *leading: tuple[str, int]) -> zarr.Array[Any]:
        return group.create_array(
            name,
            shape=(*(size for _, size in leading), *header.shape),
            chunks=(*(1 for _ in leading), slabs[0].stop if slabs else 1, *header.shape[1:]),
            dtype="float32",
            fill_value=np.nan,
            dimension_names=(*(dim for dim, _ in leading), *dims),
            # xarray finds the coordinates that are not dimensions by this attribute alone.
            attributes={"units": contract.units, "coordinates": "cell"},
        )

    point = create("point" if header.has_quantiles else "forecast")
    quantiles = create("forecast", ("quantile", len(QUANTILES))) if header.has_quantiles else None
    for windows in slabs:
        values = read(windows)
        point[windows] = values[0]
        if quantiles is not None:
            quantiles[:, windows] = values[1:]
    with warnings.catch_warnings():
        # Consolidated metadata is an extension of Zarr v3 that xarray and zarr both read.
        warnings.filterwarnings("ignore", message="Consolidated metadata", category=UserWarning)
        zarr.consolidate_metadata(path)


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


def _write_parquet(header: ForecastHeader, read: ReadWindows, path: Path) -> None:
    _, k, h, w = header.shape

    def tables(*_pushed_down: object) -> Iterator[pl.DataFrame]:
        for windows in _slabs(header):
            values = read(windows)
            size = max(1, POINTS_IN_MEMORY // max(1, values[0, :, 0].size))  # below K for one large window only
            for first in range(0, k, size):
                steps = slice(first, min(first + size, k))
                yield _table(header, windows, steps, values[:, :, steps])

    nothing = _table(header, slice(0, 0), slice(0, k), np.empty((header.quantities, 0, k, h, w), np.float32))
    metadata = {
        METADATA_KEY: header.metadata.model_dump_json(),
        CELL_IDS_KEY: json.dumps(header.cell_ids.tolist()),
    }
    register_io_source(tables, schema=nothing.schema).sink_parquet(path, metadata=metadata)


def _table(
    header: ForecastHeader, windows: slice, steps: slice, values: Float[np.ndarray, "quantity n k h w"]
) -> pl.DataFrame:
    """The rows of some windows and steps (counted from 0), cells without a forecast left out."""
    _, n, k, h, w = values.shape
    origin = np.repeat(header.origins[windows].astype("datetime64[ns]"), k * h * w)
    step = np.tile(np.repeat(np.arange(steps.start + 1, steps.stop + 1, dtype=np.int32), h * w), n)
    cadence = np.timedelta64(header.metadata.contract.cadence_seconds, "s")
    flat = values.reshape(len(values), -1).astype(np.float32)
    columns = {
        "origin": origin,
        "target": origin + step * cadence,
        "cell": np.tile(header.cell_ids.ravel(), n * k),
        "step": step,
        "forecast": flat[0],
    }
    if header.has_quantiles:
        columns |= dict(zip(QUANTILE_COLUMNS, flat[1:], strict=True))
    table = pl.DataFrame(columns).filter(pl.col("forecast").is_not_nan())
    return table.with_columns(pl.col("origin", "target").dt.replace_time_zone("UTC"))


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
