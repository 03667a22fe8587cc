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
    """``plan(sources, **options)``, whose signature and docstring are the command line's options and their help."""

    plan: Callable[..., Plan]

    def prepare(self, sources: list[Path], out: Path, **options: Any) -> PrepareSummary:
        """Plan and write the store ``out`` in this process; see ``preparation.prepare`` for more of them."""
        return prepare(self.plan(sources, **options), out)


READERS: dict[str, Reader] = {
    "telecom-italia": Reader(telecom_italia.plan),
    "frames-npz": Reader(frames_npz.plan),
    "wide-csv": Reader(wide_csv.plan),
    "wide-parquet": Reader(wide_parquet.plan),
    "largest": Reader(largest.plan),
    "dcrnn-h5": Reader(dcrnn_h5.plan),
    "xarray": Reader(xarray_source.plan),
    "pems-npz": Reader(pems_npz.plan),
    "zones-npz": Reader(zones_npz.plan),
    "yearly-npz": Reader(yearly_npz.plan),
    "city-npz": Reader(city_npz.plan),
    "synthetic": Reader(synthetic.plan),
}
