"""A folder with a small one of everything that commands read: raw files, stores, configurations, a finished run."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import polars as pl
import xarray
import yaml

from data_prep import READERS

DAYS, SLOTS = 8, 24
URBAN: dict[str, Any] = {
    "recipe": "urbanpg-train",
    "name": "urban",
    "data": {"store": "nodes.zarr", "channel": "flow_in", "history": 3, "horizon": 2},
    "model": {"d": 4},
    "training": {"max_epochs": 1, "patience": 1, "train_batch_size": 8},
}
PERIOD = {"train": ["2019-01-01", "2019-01-02"], "validation": ["2019-01-03"] * 2, "test": ["2019-01-04"] * 2}
LATER = {"train": ["2019-01-05", "2019-01-06"], "validation": ["2019-01-07"] * 2, "test": ["2019-01-08"] * 2}
CONFIGS: dict[str, dict[str, Any]] = {
    "urban": URBAN,
    "stid": URBAN | {"model": {"kind": "stid", "d": 4}},
    "gwnet": URBAN | {"model": {"kind": "graph_wavenet"}},
    "stgcn": URBAN | {"model": {"kind": "stgcn"}, "data": URBAN["data"] | {"history": 12}},
    "few": URBAN | {"recipe": "few-shot", "name": "few", "few_shot": {"backbone": "runs/urban"}},
    "continual": URBAN
    | {
        "recipe": "continual",
        "name": "continual",
        "continual": {"periods": [PERIOD | {"nodes": 4}, LATER | {"nodes": 5}]},
    },
    "vision": {
        "name": "vision",
        "data": {"store": "grid.zarr", "history": 3, "horizon": 2, "region": "0:2,0:2"},
        "numerals": {"mantissa_digits": 2},
        "policy": {"base": "tiny"},
        "alignment": {"max_steps": 1, "train_batch_size": 2, "eval_examples": 1},
        "arithmetic": {"max_steps": 1, "train_batch_size": 2, "eval_examples": 1},
        "sft": {"max_steps": 1, "windows_per_step": 1, "cells_per_window": 1, "eval_windows": 1},
        "grpo": {
            "max_steps": 1,
            "windows_per_step": 1,
            "cells_per_window": 1,
            "num_generations": 2,
            "eval_windows": 1,
        },
    },
}


def build(folder: Path, stdist: Callable[..., int]) -> None:
    """Fills ``folder``, which is the current one. ``stdist`` runs a command and returns its exit code."""
    rng = np.random.default_rng(0)
    nodes = rng.uniform(1, 40, (DAYS * SLOTS, 5, 2))
    np.savez("zones.npz", arr_0=nodes)
    np.savez("pems.npz", data=np.concatenate([nodes[:, :, :1]] * 3, axis=2))
    np.savez("frames.npz", time=_stamps(), internet=rng.uniform(1, 40, (DAYS * SLOTS, 3, 3)).astype(np.float32))
    np.savez("volume_train.npz", volume=rng.uniform(0, 9, (DAYS * SLOTS, 3, 3, 2)))
    grid = rng.uniform(1, 40, (DAYS * SLOTS, 9)).round(2)
    Path("wide.csv").write_text("\n".join(",".join(map(str, row)) for row in grid) + "\n")
    columns = {f"c{i}": grid[:, i] for i in range(9)}
    pl.DataFrame({"time": _stamps().astype("datetime64[us]"), **columns}).write_parquet("wide.parquet")
    stamps = _stamps().astype("datetime64[ns]")
    xarray.Dataset({"flow": (("time", "node"), grid)}, {"time": stamps, "node": np.arange(9)}).to_netcdf(
        "grid.nc", engine="h5netcdf"
    )
    _frame(Path("frame.h5"), rng.uniform(1, 70, (2 * 288, 5)), 5)
    rows = (
        f"{square}\t{1383260400000 + slot * 600000}\t39\t1\t2\t3\t4\t{slot}.5"
        for square in (1, 2, 101)
        for slot in range(144)
    )
    Path("sms-call-internet-mi-2013-11-01.txt").write_text("\n".join(rows) + "\n")
    Path("junk").write_bytes(bytes(range(256)))
    READERS["zones-npz"].prepare([Path("zones.npz")], Path("nodes.zarr"), city="demo", start="2019-01-01T00:00")
    READERS["synthetic"].prepare([], Path("grid.zarr"), height=3, width=3, days=DAYS, cadence=60, seed=1)
    for name, tree in CONFIGS.items():
        Path(f"{name}.yaml").write_text(yaml.safe_dump(tree))
    assert stdist("train", "urban.yaml") == 0


def _stamps() -> np.ndarray:
    return np.datetime64("2019-01-01T00:00", "m") + np.arange(DAYS * SLOTS) * np.timedelta64(60, "m")


def _frame(path: Path, values: np.ndarray, minutes: int) -> None:
    labels = np.array([str(i).encode() for i in range(values.shape[1])])
    stamps = np.datetime64("2012-03-01T00:00", "m") + np.arange(len(values)) * np.timedelta64(minutes, "m")
    with h5py.File(path, "w") as file:
        group = file.create_group("df")
        group.attrs["pandas_type"], group.attrs["nblocks"] = np.bytes_("frame"), 1
        group["axis0"] = group["block0_items"] = labels
        group["block0_values"], group["axis1"] = values, stamps.astype("M8[ns]").astype("i8")
        group["axis1"].attrs["kind"] = np.bytes_("datetime64")


SOURCES = {
    "synthetic": [],
    "zones-npz": ["zones.npz"],
    "pems-npz": ["pems.npz"],
    "frames-npz": ["frames.npz"],
    "city-npz": ["volume_train.npz"],
    "table": ["wide.csv"],
    "wide-csv": ["wide.csv"],
    "wide-parquet": ["wide.parquet"],
    "xarray": ["grid.nc"],
    "dcrnn-h5": ["frame.h5"],
    "telecom-italia": ["sms-call-internet-mi-2013-11-01.txt"],
}
"""Raw files by reader; one that is not here is given ``junk``."""
OPTIONS = {
    "synthetic": ["--days", "2", "--height", "3", "--width", "3", "--cadence", "60"],
    "zones-npz": ["--city", "demo", "--start", "2019-01-01T00:00"],
    "pems-npz": ["--city", "demo", "--start", "2019-01-01T00:00", "--cadence", "60"],
    "frames-npz": ["--cadence", "60"],
    "city-npz": ["--city", "demo", "--start", "2019-01-01T00:00", "--channels", "pickup,dropoff"],
    "wide-csv": ["--city", "demo", "--start", "2019-01-01T00:00", "--cadence", "60"],
}
"""What the reader needs beside them."""
COMMANDS = {
    "append": ["nodes.zarr", "zones.npz", "--start", "2019-01-01T00:00"],
    "check": ["nodes.zarr"],
    "train": ["urban.yaml", "name=new"],
    "demo": ["--data", "grid.zarr"],
    "forecast": ["runs/urban", "nodes.zarr"],
    "calibrate": ["runs/urban", "nodes.zarr"],
    "watch": ["runs/urban", "nodes.zarr"],
    "serve": ["runs/urban", "nodes.zarr", "--port", "0"],
    "ledger": ["runs/urban"],
    "evaluate": ["runs/urban/forecasts/test.zarr", "nodes.zarr"],
    "report": ["runs/urban"],
    "submit": ["urban.yaml", "--address", "http://127.0.0.1:9"],
    "plan": ["urban.yaml"],
    "doctor": [],
}
"""A call of each command that works, but for its ``--out``."""
