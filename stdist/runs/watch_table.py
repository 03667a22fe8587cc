"""The table of ``stdist watch --out``: of every place what it scored on the days watched, named or not."""

import io
from pathlib import Path

import numpy as np
import polars as pl
from jaxtyping import Bool, Float, Int

from stdist.data import GridStore, Windows
from stdist.errors import InputError
from stdist.evaluation.day_tally import HIGH, LOW, DayTally
from stdist.evaluation.levels import LEVELS
from stdist.files import require_outside, require_writable, write_atomically

SUFFIXES = (".parquet", ".csv")
NARROW = LEVELS.index(0.1), LEVELS.index(0.9)
SPACE = {"row": pl.Int64, "col": pl.Int64}
SCORES = {
    "values": pl.Int64,
    "mae": pl.Float64,
    "mean_error": pl.Float64,
    "coverage_80": pl.Float64,
    "coverage_95": pl.Float64,
    "above": pl.Float64,
    "below": pl.Float64,
    "chance": pl.Float64,
    "unusual": pl.Boolean,
    "silent": pl.Boolean,
}


def place_table(
    windows: Windows,
    places: Int[np.ndarray, " P"],
    values: Float[np.ndarray, "n K P"],
    quantiles: Float[np.ndarray, "levels n K P"],
    truth: Float[np.ndarray, "n K P"],
    observed: Bool[np.ndarray, "n K P"],
    once: Bool[np.ndarray, "n K"],
    tally: DayTally,
    chances: Float[np.ndarray, " P"],
    named: Bool[np.ndarray, " P"],
    silent: Bool[np.ndarray, " P"],
) -> pl.DataFrame:
    """One row a place, of the positions ``places`` in the region of ``windows``, whose scores follow in their order.

    ``values`` observed; ``mae`` and ``mean_error`` (truth minus forecast) of all windows and steps. Shares of the
    values, each once: inside the intervals of 80 and 95 %, ``above`` and ``below`` the latter. ``chance`` where nothing
    has changed; ``unusual`` and ``silent``: whether the place is named. Null where nothing was observed.
    """
    store, region = windows.store, windows.region
    assert isinstance(store, GridStore)
    columns = {"cell": store.cell_ids[region.slices].ravel()[places]}
    if len(store.shape) == 2:
        axes = np.meshgrid(store.dataset["row"].values, store.dataset["col"].values, indexing="ij")
        columns |= {name: axis[region.slices].ravel()[places] for name, axis in zip(SPACE, axes, strict=True)}
    count = tally.points.sum(0)
    inside = (once[..., None] & observed & _within(truth, quantiles, *NARROW)).sum((0, 1))
    inside_wide = (once[..., None] & observed & _within(truth, quantiles, LOW, HIGH)).sum((0, 1))
    with np.errstate(invalid="ignore", divide="ignore"):  # 0 / 0 is the NaN that is null below
        columns |= {
            "values": count,
            "mae": tally.errors / tally.counted,
            "mean_error": np.where(observed, truth.astype(np.float64) - values, 0).sum((0, 1)) / tally.counted,
            "coverage_80": inside / count,
            "coverage_95": inside_wide / count,
            "above": tally.above.sum(0) / count,
            "below": tally.below.sum(0) / count,
            "chance": np.where(count > 0, chances, np.nan),
            "unusual": named,
            "silent": silent,
        }
    return pl.DataFrame(columns, schema_overrides={**SPACE, **SCORES}).fill_nan(None)


def _within(
    truth: Float[np.ndarray, "n K P"], quantiles: Float[np.ndarray, "levels n K P"], low: int, high: int
) -> Bool[np.ndarray, "n K P"]:
    return (quantiles[low] <= truth) & (truth <= quantiles[high])


def require_table_place(path: Path, store: GridStore) -> None:
    """Raises InputError where ``path`` is no name for a table of the places of ``store``, or something else has it."""
    if path.suffix not in SUFFIXES:
        raise InputError(f"{path}: a watch's scores are a file of .parquet or .csv, not '{path.suffix}'; change --out")
    require_outside(path)
    require_writable(path.parent)
    names = ["cell", *(SPACE if len(store.shape) == 2 else {}), *SCORES]
    if path.is_symlink() or (path.exists() and _columns(path) != names):
        raise InputError(
            f"{path} holds no scores of places that `stdist watch` wrote of such a store; it stays as it is: remove "
            "it, or choose another --out"
        )


def _columns(path: Path) -> list[str] | None:
    try:
        if path.suffix == ".parquet":
            return list(pl.read_parquet_schema(path))
        with path.open(encoding="utf-8") as file:
            return file.readline().rstrip("\n").split(",")
    except (OSError, UnicodeDecodeError, pl.exceptions.PolarsError):
        return None


def write_table(path: Path, table: pl.DataFrame) -> None:
    content = io.BytesIO()
    if path.suffix == ".parquet":
        table.write_parquet(content)
    else:
        table.write_csv(content)
    write_atomically(path, content.getvalue())
