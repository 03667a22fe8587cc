"""A day appended to a store, against preparing the store anew of all its files.

Both sides read NetCDF files of a day each, of a synthetic city with missing values, whose bytes are copied into a
store almost as they are: a reader that parses text makes the other side slower still. Ours opens the store of all days
but the last, appends the last one's file and opens the result; the peer prepares all files. Both must end with the same
bytes in every file. Each run of ours begins with a copy of the store, which is not counted.

    python benchmarks/append.py --json
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import shutil
from argparse import Namespace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import xarray
from _harness import comparison, parser, publish, seconds

from data_prep import READERS
from data_prep.append import append
from stdist.data import open_store
from stdist.data.synthetic import SyntheticCity, generate

CADENCE = 10


def write_days(folder: Path, options: Namespace) -> list[Path]:
    """A NetCDF file of each day."""
    city = SyntheticCity(
        height=options.side, width=options.side, days=options.days, cadence_minutes=CADENCE, first_day="2013-11-01"
    )
    files = []
    for day, values in generate(city):
        first = np.datetime64(city.first_day, "D") + day
        stamps = first.astype("datetime64[ns]") + np.arange(len(values)) * np.timedelta64(CADENCE, "m")
        axes = {"row": np.arange(options.side), "col": np.arange(options.side)}
        data = xarray.Dataset({"internet": (("time", "row", "col"), values)}, {"time": stamps, **axes})
        files.append(folder / f"{first}.nc")
        data.to_netcdf(files[-1])
    return files


def prepare(files: list[Path], out: Path, split: dict[str, str]) -> None:
    shutil.rmtree(out, ignore_errors=True)
    READERS["xarray"].prepare(files, out, city="milan", **split)


def measure(folder: Path, options: Namespace) -> dict[str, Any]:
    files = write_days(folder, options)
    days = np.datetime64("2013-11-01", "D") + np.arange(options.days)
    cuts = options.days * 4 // 6, options.days * 5 // 6
    spans = (days[: cuts[0]], days[cuts[0] : cuts[1]], days[cuts[1] : -1])
    split = {name: f"{span[0]}:{span[-1]}" for name, span in zip(("train", "validation", "test"), spans, strict=True)}
    before, grown, whole = (folder / f"{name}.zarr" for name in ("before", "grown", "whole"))
    prepare(files[:-1], before, split)
    ours, peer = [], []
    for run in range(options.runs + 1):
        shutil.rmtree(grown, ignore_errors=True)
        shutil.copytree(before, grown)
        elapsed = seconds(lambda: append(grown, files[-1:]))
        if run:  # the first one imports what the preparation before has not
            ours.append(elapsed)
            peer.append(seconds(lambda: prepare(files, whole, split)))
    stores = open_store(grown), open_store(whole)
    if stores[0].attributes["files"] != stores[1].attributes["files"]:
        raise SystemExit("error: the two stores hold other bytes")
    missing = stores[1].coverage["internet"]["missing"]
    return comparison(
        name="append",
        unit=f"seconds to append a day to {options.days - 1}",
        values=ours,
        peer=f"preparing all {options.days} days anew",
        peer_values=peer,
        setting=(
            f"{options.side} x {options.side} cells every {CADENCE} minutes, {missing:,} values missing, NetCDF files, "
            "one process"
        ),
        better="less",
    )


if __name__ == "__main__":
    arguments = parser(__doc__, runs=3)
    arguments.add_argument("--side", type=int, default=100, help="rows and columns (default: %(default)s)")
    arguments.add_argument("--days", type=int, default=62, help="days of the whole store (default: %(default)s)")
    parsed = arguments.parse_args()
    with TemporaryDirectory() as name:
        publish(measure(Path(name), parsed), parsed.json)
