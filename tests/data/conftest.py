"""Small stores for the tests of the data floor."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from stdist.data import GridSpec, GridStore, GridWriter, NodeSpec, Split, open_store

FIRST_DAY = np.datetime64("2013-11-01", "D")


@pytest.fixture(scope="session")
def make_store(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., GridStore]:
    """Write values [T, H, W] of a grid or [T, N] of nodes and open the store.

    NaN = missing; T is whole days of 144 slots or ``cadence``.
    """
    folder, count = tmp_path_factory.mktemp("stores"), 0

    def make(
        values: np.ndarray,
        present: np.ndarray | None = None,
        *,
        cadence: int = 10,
        split: Split | None = None,
        out: Path | None = None,
    ) -> GridStore:
        nonlocal count
        count += 1
        slots = 1440 // cadence
        days = len(values) // slots
        ids = 500 + np.arange(values[0].size).reshape(values[0].shape)
        spec = (GridSpec if ids.ndim == 2 else NodeSpec)(
            "toy", ("internet",), FIRST_DAY, FIRST_DAY + np.timedelta64(days - 1, "D"), ids, cadence, 60
        )
        here = np.ones(len(values), bool) if present is None else present
        with GridWriter(out or folder / f"toy{count}.zarr", spec, {"reader": "test"}) as writer:
            for day in range(days):
                where = slice(day * slots, (day + 1) * slots)
                if here[where].any():
                    writer.write_day(day, {"internet": values[where]}, here[where])
            return open_store(writer.finalise(split))

    return make


def _beside(name: str) -> ModuleType:
    """A module of this folder, which is no package."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def write_frame() -> Callable[..., Path]:
    """``write_frame`` of pandas_frame.py."""
    return _beside("pandas_frame").write_frame


@pytest.fixture(scope="session")
def geometry_files() -> ModuleType:
    """geometry_files.py: writes GeoJSON files of squares."""
    return _beside("geometry_files")
