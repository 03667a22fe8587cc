"""Readers of public raw formats, by the name the command line gives them."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
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
    """A module whose docstring tells the facts of the data, and whose ``plan(sources, **options)`` has a signature and
    a docstring that are the command line's options and their help."""

    module: ModuleType

    @property
    def plan(self) -> Callable[..., Plan]:
        return self.module.plan

    def prepare(self, sources: list[Path], out: Path, **options: Any) -> PrepareSummary:
        """Plan and write the store ``out`` in this process; see ``preparation.prepare`` for more of them."""
        return prepare(self.plan(sources, **options), out)


READERS: dict[str, Reader] = {
    "telecom-italia": Reader(telecom_italia),
    "frames-npz": Reader(frames_npz),
    "wide-csv": Reader(wide_csv),
    "wide-parquet": Reader(wide_parquet),
    "largest": Reader(largest),
    "dcrnn-h5": Reader(dcrnn_h5),
    "xarray": Reader(xarray_source),
    "pems-npz": Reader(pems_npz),
    "zones-npz": Reader(zones_npz),
    "yearly-npz": Reader(yearly_npz),
    "city-npz": Reader(city_npz),
    "synthetic": Reader(synthetic),
}
