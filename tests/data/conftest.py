"""Small stores for the tests of the data floor."""

import importlib.util
import pickle
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from data_prep import Plan, prepare
from stdist.data import GridSpec, GridStore, GridWriter, NodeSpec, Split, open_store
from stdist.errors import InputError

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


@pytest.fixture
def prepared(tmp_path: Path) -> Callable[[Plan], GridStore]:
    """The store of a plan."""
    return lambda plan: open_store(prepare(plan, tmp_path / "out.zarr").path)


@pytest.fixture(scope="session")
def read_plan() -> Callable[..., tuple[np.ndarray, np.ndarray]]:
    """Values of a plan's channel, the first by default, float32 [T, *shape], and bool [T], put together from days and
    tiles; every part reads after a journey to another process."""

    def read(plan: Plan, channel: str | None = None) -> tuple[np.ndarray, np.ndarray]:
        plan = pickle.loads(pickle.dumps(plan))
        spec = plan.spec
        values = np.full((spec.steps, *spec.shape), np.nan, np.float32)
        present = np.zeros(spec.steps, bool)
        seen = set()
        for part in plan.parts:
            for day in plan.read(part):
                where = slice(day.index * spec.slots_per_day, (day.index + 1) * spec.slots_per_day)
                tile = day.tile or tuple(slice(0, side) for side in spec.shape)
                key = day.index, *((s.start, s.stop) for s in tile)
                assert day.index in part.days and key not in seen
                seen.add(key)
                values[(where, *tile)], present[where] = day.values[channel or spec.channels[0]], day.present
        assert len(seen) == len({day for part in plan.parts for day in part.days}) * len(spec.tiles())
        return values, present

    return read


@pytest.fixture(scope="session")
def refused() -> Callable[[str], AbstractContextManager[None]]:
    """``with refused(line)``: bad input is answered with one line, which fits the pattern."""

    @contextmanager
    def expect(line: str) -> Iterator[None]:
        with pytest.raises(InputError, match=line) as error:
            yield
        assert "\n" not in str(error.value)

    return expect


def _load(path: Path) -> ModuleType:
    """A module that lies in no package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def write_frame() -> Callable[..., Path]:
    """``write_frame`` of pandas_frame.py."""
    return _load(Path(__file__).with_name("pandas_frame.py")).write_frame


@pytest.fixture(scope="session")
def geometry_files() -> ModuleType:
    """geometry_files.py: writes GeoJSON files of squares."""
    return _load(Path(__file__).with_name("geometry_files.py"))


@pytest.fixture(scope="session")
def raw_telecom() -> ModuleType:
    """benchmarks/_raw_telecom.py: writes raw text of the Telecom Italia challenge."""
    return _load(Path(__file__).parents[2] / "benchmarks" / "_raw_telecom.py")


@pytest.fixture(scope="session")
def tables() -> ModuleType:
    """table_case.py: writes tables and reads them."""
    return _load(Path(__file__).with_name("table_case.py"))


@pytest.fixture
def read_table(tables, tmp_path) -> Callable[..., object]:
    """``read_table`` of table_case.py, in a folder of its own: of files by name, or of the text of ``city.csv``."""

    def read(files: dict[str, str | bytes] | str | bytes, **options: object) -> object:
        return tables.read_table(tmp_path, files if isinstance(files, dict) else {"city.csv": files}, **options)

    return read
