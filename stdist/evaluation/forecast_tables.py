"""Forecasts as tables, Parquet or CSV, one row a value."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import polars as pl
from jaxtyping import Float, Shaped
from polars.io.plugins import register_io_source

from stdist.data.spans import AnyRegion
from stdist.errors import InputError
from stdist.evaluation import forecast_header
from stdist.evaluation.forecast_header import METADATA_KEY, ForecastHeader, ReadBlock, ReadWindows, cut, read_metadata
from stdist.evaluation.levels import FOR_COST, for_cost
from stdist.evaluation.sealed_parquet import BLANK, SEAL_KEY, require_sealed, seal

CELL_IDS_KEY = "stdist_cell_ids"
STAMP = pl.col("origin").dt.replace_time_zone(None).cast(pl.Datetime("ns"))


def quantile_column(level: float) -> str:
    """The name of a quantile's column, in per cent: ``q2.5``, ``q50``."""
    return f"q{100 * level:g}"


def write_parquet(header: ForecastHeader, read: ReadWindows, path: Path) -> None:
    """Writes a table sorted by origin and step, a few windows at a time (``ForecastHeader.block``)."""
    metadata = {
        METADATA_KEY: header.metadata.model_dump_json(),
        CELL_IDS_KEY: json.dumps(header.cell_ids.tolist()),
        SEAL_KEY: BLANK,
    }
    _tables(header, read).sink_parquet(path, metadata=metadata)
    seal(path)


def write_csv(header: ForecastHeader, read: ReadWindows, path: Path) -> None:
    """Writes the same table for people and spreadsheets. It has no place for the contract, so nothing scores it."""
    _as_text(header, _tables(header, read)).sink_csv(path)


def to_csv(header: ForecastHeader, values: Float[np.ndarray, "quantity N K *cells"]) -> str:
    """The same of forecasts in memory."""
    table = _table(header, slice(0, len(header.origins)), slice(0, header.shape[1]), values)
    return _as_text(header, table.lazy()).collect().write_csv()


def _as_text(header: ForecastHeader, table: pl.LazyFrame) -> pl.LazyFrame:
    utc, local = (pl.col(names).dt.strftime(f"%Y-%m-%dT%H:%M:%S{zone}") for names, zone in _stamps(header).items())
    return table.with_columns(utc, local)


def _stamps(header: ForecastHeader) -> dict[tuple[str, ...], str]:
    return {("origin", "target"): "Z", ("target_local",) if header.local_targets is not None else (): ""}


def _tables(header: ForecastHeader, read: ReadWindows) -> pl.LazyFrame:
    _, k, *cells = header.shape

    def tables(*_pushed_down: object) -> Iterator[pl.DataFrame]:
        for windows in cut(header.shape[0], header.block[0]):
            values = read(windows)
            together = forecast_header.POINTS_IN_MEMORY // max(1, values[0, :, 0].size)
            for steps in cut(k, max(1, together)):  # all at once, but of a large window
                yield _table(header, windows, steps, values[:, :, steps])

    nothing = _table(header, slice(0, 0), slice(0, k), np.empty((header.quantities, 0, k, *cells), np.float32))
    return register_io_source(tables, schema=nothing.schema)


def _table(
    header: ForecastHeader, windows: slice, steps: slice, values: Float[np.ndarray, "quantity n k *cells"]
) -> pl.DataFrame:
    """The rows of some windows and steps (counted from 0), cells without a forecast left out."""
    _, n, k = values.shape[:3]
    cells = header.cell_ids.size
    flat = values.reshape(len(values), -1).astype(np.float32)
    columns = {
        "origin": np.repeat(header.origins[windows].astype("datetime64[ns]"), k * cells),
        "target": np.repeat(header.targets[windows, steps].ravel(), cells),
    }
    if header.local_targets is not None:
        columns["target_local"] = np.repeat(header.local_targets[windows, steps].ravel(), cells)
    columns |= {
        "cell": np.tile(header.cell_ids.ravel(), n * k),
        "step": np.tile(np.repeat(np.arange(steps.start + 1, steps.stop + 1, dtype=np.int32), cells), n),
        "forecast": flat[0],
        **{quantile_column(level): flat[1 + i] for i, level in enumerate(header.levels)},
    }
    if (ratio := header.metadata.cost_ratio) is not None:
        columns[FOR_COST] = for_cost(flat[1:], header.levels, ratio)
    table = pl.DataFrame(columns).filter(pl.col("forecast").is_not_nan())
    return table.with_columns(pl.col("origin", "target").dt.replace_time_zone("UTC"))


def parquet_metadata(path: Path) -> str | None:
    """The metadata of forecasts in the file ``path``; None where it holds anything else."""
    if not path.is_file():
        return None
    try:
        return pl.read_parquet_metadata(path).get(METADATA_KEY)
    except (OSError, pl.exceptions.PolarsError):
        return None


def open_parquet(path: Path) -> tuple[ForecastHeader, ReadBlock]:
    """Opens a table. Raises InputError where rows contradict the contract, DamageError where the file is not as it was
    written: every byte of it is read."""
    attributes = pl.read_parquet_metadata(path)
    if SEAL_KEY in attributes:  # else it was written by a version that sealed none
        require_sealed(path)
    metadata = read_metadata(attributes.get(METADATA_KEY), path)
    cell_ids = np.array(json.loads(attributes[CELL_IDS_KEY]))
    table = pl.scan_parquet(path)

    def unique(rows: pl.LazyFrame, column: pl.Expr) -> np.ndarray:
        return rows.select(column.unique()).collect(engine="streaming").to_series().sort().to_numpy()

    foreign = unique(table.filter(~_is_one_of(cell_ids)), pl.col("cell"))
    steps, origins = unique(table, pl.col("step")), unique(table, STAMP)
    if foreign.size:
        raise InputError(f"{path}: {foreign.size} cells outside the contract's region, first {foreign[0]}")
    k = metadata.contract.K
    if steps.size and (steps[0] < 1 or steps[-1] > k):
        raise InputError(f"{path}: steps {steps[0]} to {steps[-1]}, the contract says 1 to {k}")
    names = [name for name in table.collect_schema().names() if name.startswith("q")]
    levels = tuple(sorted(float(name[1:]) / 100 for name in names))
    header = ForecastHeader(metadata, origins, cell_ids, levels)

    def read(windows: slice, tile: AnyRegion, quantiles: bool) -> Float[np.ndarray, "quantity n K *cells"]:
        columns = ["forecast", *(quantile_column(level) for level in levels if quantiles)]
        chosen, ids = origins[windows], cell_ids[header.place(windows, tile)[2:]]
        values = np.full((len(columns), len(chosen), k, ids.size), np.nan, np.float32)
        if not values.size:
            return values.reshape(*values.shape[:3], *ids.shape)
        # Row groups outside these bounds are not decoded.
        first, last = (pl.lit(stamp).dt.replace_time_zone("UTC") for stamp in chosen[[0, -1]])
        within = pl.col("origin").is_between(first, last)
        if ids.size < cell_ids.size:
            within &= _is_one_of(ids)
        rows = table.filter(within).select(STAMP, "step", "cell", *columns).collect(engine="streaming")
        by_id = np.argsort(ids, axis=None)
        place = (
            np.searchsorted(chosen, rows["origin"].to_numpy()),
            rows["step"].to_numpy() - 1,
            by_id[np.searchsorted(ids.ravel(), rows["cell"].to_numpy().astype(ids.dtype), sorter=by_id)],
        )
        filled = np.zeros(values.shape[1:], bool)
        filled[place] = True
        if filled.sum() != len(rows):
            raise InputError(f"{path}: some (origin, cell, step) appear more than once")
        values[:, *place] = rows.select(columns).to_numpy().T
        return values.reshape(*values.shape[:3], *ids.shape)

    return header, read


def _is_one_of(cell_ids: Shaped[np.ndarray, "*cells"]) -> pl.Expr:
    return pl.col("cell").is_in(pl.lit(pl.Series(cell_ids.ravel())).implode())
