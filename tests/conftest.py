"""Fixtures every room of the test suite shares."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from stdist.config import RunConfig
from stdist.data import GridStore, GridWriter, NodeSpec, Split, open_store
from stdist.errors import InputError
from stdist.evaluation import figures, report
from stdist.runs.recipes import parse_config

# A shell that starts the tests in the background makes them, and all that they start, deaf to the Ctrl-C some send.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture
def real_data() -> Path:
    """Folder of real data, never part of the project; the test skips where it is absent."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    path = Path(os.environ.get("STDIST_TEST_DATA", default))
    if not path.is_dir():
        pytest.skip(f"real data not found at {path}; set STDIST_TEST_DATA to its folder")
    return path


@pytest.fixture(scope="session", autouse=True)
def as_people_see_them() -> Iterator[dict[str, Any]]:
    """Every figure of a report is drawn, but coarse, and without the layout that takes most of its time. The value is
    what that replaces: test_report.py draws with it."""
    laid_out, dots = figures.page_figure, report.DOTS_PER_INCH

    @contextmanager
    def plain(*arguments: Any, **style: Any) -> Iterator[Figure]:
        with laid_out(*arguments, **style) as figure:
            figure.set_layout_engine(None)
            yield figure

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "page_figure", plain)
        patch.setattr(report, "DOTS_PER_INCH", 20)
        yield {"page_figure": laid_out, "DOTS_PER_INCH": dots}


# --- a city of nodes and runs on it -------------------------------------------------------------------------------

SLOTS = 24
FIRST_DAY = np.datetime64("2024-03-04")


def write_city(
    out: Path, nodes: int = 9, days: int = 12, name: str = "toy town", late: int | None = None, first: int = 0
) -> GridStore:
    """Hourly flow of sensors of unlike size, some values missing; 8 days train, 2 validation, 2 test; on a ring.

    ``late``: a node that is there from the third day on; ``first``: number in the first one's id.
    """
    rng = np.random.default_rng(nodes)
    t = np.arange(days * SLOTS)
    shape = 60 + 40 * np.sin(2 * np.pi * t / SLOTS) + 10 * np.sin(2 * np.pi * t / (7 * SLOTS))
    values = shape[:, None] * rng.uniform(0.5, 2, nodes) * rng.uniform(0.95, 1.05, (len(t), nodes))
    values[rng.random(values.shape) < 0.02] = np.nan
    since = np.full(nodes, FIRST_DAY)
    if late is not None:
        since[late] += 2
        values[: 2 * SLOTS, late] = np.nan
    ring = np.roll(np.eye(nodes, dtype=np.float32), 1, axis=1)
    ids = np.array([f"s{first + number}" for number in range(nodes)])
    last = FIRST_DAY + days - 1
    spec = NodeSpec(name, ("flow",), FIRST_DAY, last, ids, 60, 60, "vehicles", since=since, adjacency=ring)
    with GridWriter(out, spec, {"made by": "a test"}) as writer:
        for day in range(days):
            writer.write_day(day, {"flow": values[day * SLOTS : (day + 1) * SLOTS].astype(np.float32)})
        split = Split.parse([FIRST_DAY, last - 4], [last - 3, last - 2], [last - 1, last])
        return open_store(writer.finalise(split))


@pytest.fixture(scope="session")
def city(tmp_path_factory: pytest.TempPathFactory) -> GridStore:
    return write_city(tmp_path_factory.mktemp("city") / "city.zarr")


@pytest.fixture(scope="session")
def small_city(tmp_path_factory: pytest.TempPathFactory) -> GridStore:
    return write_city(tmp_path_factory.mktemp("small") / "small.zarr", nodes=5, name="hamlet")


def config_of(store: GridStore, runs: Path, **changes: Any) -> RunConfig:
    """A few short epochs; groups of keys in ``changes`` are merged into those here."""
    tree: dict[str, Any] = {
        "recipe": "urbanpg-train",
        "name": "tiny",
        "output_dir": str(runs),
        "data": {"store": str(store.path), "channel": "flow", "history": 6, "horizon": 4},
        "model": {"d": 8},
        "training": {"max_epochs": 3, "train_batch_size": 32, "learning_rate": 1e-2, "warmup_steps": 1},
    }
    tree["training"]["logging_steps"] = 1
    for key, value in changes.items():
        tree[key] = tree.get(key, {}) | value if isinstance(value, dict) else value
    return parse_config(tree, where="test")


@pytest.fixture(scope="session")
def make_city() -> Callable[..., GridStore]:
    return write_city


@pytest.fixture(scope="session")
def make_config() -> Callable[..., RunConfig]:
    return config_of


@pytest.fixture(scope="session")
def refused() -> Callable[..., None]:
    """Calls what is to raise an InputError of one line that has these parts."""

    def check(call: Callable[[], object], *parts: str) -> None:
        with pytest.raises(InputError) as error:
            call()
        message = str(error.value)
        assert "\n" not in message and len(message) < 400, message
        for part in parts:
            assert part in message, message

    return check
