"""Readers of public raw formats, by the name the command line gives them."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep import (
    city_npz,
    dcrnn_h5,
    frames_npz,
    largest,
    pems_npz,
    synthetic,
    telecom_italia,
    wide_csv,
    wide_parquet,
    xarray_source,
    yearly_npz,
    zones_npz,
)
from data_prep.plan import Day, Part, Plan
from data_prep.preparation import PrepareSummary, prepare

__all__ = ["READERS", "Day", "Part", "Plan", "PrepareSummary", "Reader", "prepare"]


@dataclass(frozen=True)
class Reader:
    """``plan(sources, **options)``; ``options``: the keywords that the command line may give."""

    plan: Callable[..., Plan]
    options: frozenset[str]

    def prepare(self, sources: list[Path], out: Path, **options: Any) -> PrepareSummary:
        """Plan and write the store ``out`` in this process; see ``preparation.prepare`` for more of them."""
        return prepare(self.plan(sources, **options), out)


_SPLIT = frozenset({"city", "train", "validation", "test"})
_GRID = frozenset({"channel", "cadence", "utc_offset", "row0", "col0", "id_width"})
_SHAPE = frozenset({"start", "height", "width"})
_NODES = frozenset({"start", "cadence", "utc_offset", "adjacency", "node_ids"})
_CITY = frozenset({"channels", "start", "cadence", "utc_offset", "poi", "north_first", "transpose"})
_AXES = frozenset({"variable", "time_dim", "row_dim", "col_dim", "node_dim"})

READERS: dict[str, Reader] = {
    "telecom-italia": Reader(telecom_italia.plan, _SPLIT),
    "frames-npz": Reader(frames_npz.plan, _SPLIT | _GRID),
    "wide-csv": Reader(wide_csv.plan, _SPLIT | _GRID | _SHAPE | {"nodes", "adjacency", "meta"}),
    "wide-parquet": Reader(wide_parquet.plan, _SPLIT | _GRID | _SHAPE | {"nodes", "adjacency"}),
    "largest": Reader(largest.plan, _SPLIT | {"region", "districts", "meta", "adjacency", "start"}),
    "dcrnn-h5": Reader(dcrnn_h5.plan, _SPLIT | {"channel", "utc_offset", "adjacency", "meta"}),
    "xarray": Reader(xarray_source.plan, _SPLIT | _AXES | {"utc_offset"}),
    "pems-npz": Reader(pems_npz.plan, _SPLIT | _NODES | {"channels"}),
    "zones-npz": Reader(zones_npz.plan, _SPLIT | _NODES | {"channels"}),
    "yearly-npz": Reader(yearly_npz.plan, _SPLIT | _NODES | {"channel"}),
    "city-npz": Reader(city_npz.plan, _SPLIT | _CITY),
    "synthetic": Reader(synthetic.plan, _SPLIT | _SHAPE | {"channel", "cadence", "utc_offset", "days", "seed"}),
}
