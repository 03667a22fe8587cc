"""Small cities with everything that can go wrong: missing values, a gap, a cell outside, a node that comes late."""

import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from stdist.data import GridSpec, GridStore, GridWriter, NodeSpec, Split, open_store
from stdist.evaluation import (
    ChunkGrid,
    ForecastHeader,
    ForecastMetadata,
    ForecastWriter,
    evaluate,
    forecast_contract,
    open_forecasts,
)
from stdist.evaluation.forecast_header import QUANTILES
from stdist.evaluation.protocol import EvaluationResult

DAYS, SLOTS, H, W = 21, 24, 4, 3
GAP = (15 * SLOTS + 2, 15 * SLOTS + 12)
OUTSIDE = (0, 2)


def write_city(out: Path, city: str = "toyville", seed: int = 0) -> GridStore:
    """Noise on daily and weekly curves; days 1-14 train, 15-17 validation, 18-21 test; UTC+1."""
    rng = np.random.default_rng(seed)
    t = np.arange(DAYS * SLOTS)
    shape = 60 + 30 * np.sin(2 * np.pi * t / SLOTS) + 15 * np.cos(2 * np.pi * t / (7 * SLOTS))
    size = rng.uniform(0.2, 3, (H, W))
    values = (shape[:, None, None] * size * rng.uniform(0.9, 1.1, (len(t), H, W))).astype(np.float32)
    values[rng.random(values.shape) < 0.02] = np.nan
    values[:, *OUTSIDE] = np.nan
    present = np.ones(len(t), bool)
    present[slice(*GAP)] = False
    inside = np.ones((H, W), bool)
    inside[OUTSIDE] = False
    days = np.datetime64("2024-03-04"), np.datetime64("2024-03-24")
    ids = 1000 + np.arange(H * W).reshape(H, W)
    spec = GridSpec(city, ("flow", "speed"), *days, ids, 60, 60, "vehicles", inside=inside)
    split = Split.parse("2024-03-04:2024-03-17", "2024-03-18:2024-03-20", "2024-03-21:2024-03-24")
    with GridWriter(out, spec, {"made by": "a test"}) as writer:
        for day in range(DAYS):
            slots = slice(day * SLOTS, (day + 1) * SLOTS)
            writer.write_day(day, {"flow": values[slots], "speed": values[slots] + 1}, present[slots])
        return open_store(writer.finalise(split))


def write_nodes(out: Path, days: int = 21, cadence: int = 60, **places: np.ndarray) -> GridStore:
    """Ten sensors with ids of text and true zeros; the last day is tested, the one before validation; UTC-8.

    Sensor 7 is there from the third day.
    """
    rng, per_day, first = np.random.default_rng(2), 24 * 60 // cadence, np.datetime64("2024-03-04")
    t = np.arange(days * per_day)
    shape = 60 + 40 * np.sin(2 * np.pi * t / per_day)
    values = (shape[:, None] * rng.uniform(0.2, 3, 10) * rng.uniform(0.9, 1.1, (len(t), 10))).astype(np.float32)
    values[rng.random(values.shape) < 0.02] = np.nan
    values[rng.random(values.shape) < 0.02] = 0
    since = np.full(10, first)
    since[7] += 2
    values[: 2 * per_day, 7] = np.nan
    ids, last = np.array([f"s{i}" for i in range(10)]), first + days - 1
    spec = NodeSpec("sensors", ("flow",), first, last, ids, cadence, -480, "vehicles", since=since, **places)
    with GridWriter(out, spec, {"made by": "a test"}) as writer:
        for day in range(days):
            writer.write_day(day, {"flow": values[day * per_day : (day + 1) * per_day]})
        return open_store(writer.finalise(Split.parse([first, last - 2], [last - 1, last - 1], [last, last])))


@pytest.fixture(scope="session")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> GridStore:
    return write_nodes(tmp_path_factory.mktemp("nodes") / "sensors.zarr")


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> GridStore:
    return write_city(tmp_path_factory.mktemp("city") / "toyville.zarr")


@dataclass(frozen=True, eq=False)
class Forecasts:
    """Forecasts small enough to hold: ``values`` are [N, K, *cells], ``quantiles`` [3, N, K, *cells]."""

    values: np.ndarray
    origins: np.ndarray
    cell_ids: np.ndarray
    metadata: ForecastMetadata
    quantiles: np.ndarray | None = None

    @property
    def header(self) -> ForecastHeader:
        return ForecastHeader(self.metadata, self.origins, self.cell_ids, () if self.quantiles is None else QUANTILES)

    @property
    def quantities(self) -> np.ndarray:
        """[quantity, N, K, *cells]: the point forecast, then the quantiles there are."""
        return np.stack([self.values, *([] if self.quantiles is None else self.quantiles)])


def write_forecasts(forecasts: Forecasts, path: Path, cells=None, chunks: tuple[int, int] | None = None) -> Path:
    """``cells``: positions of those that are written, else all. ``chunks``: windows and cells of one, else all."""
    n, k, *shape = forecasts.values.shape
    cells = np.arange(np.prod(shape)) if cells is None else cells
    quantities = forecasts.quantities
    flat = quantities.reshape(len(quantities), n, k, np.prod(shape))[..., cells]
    grid = ChunkGrid(n, len(cells), *(chunks or (max(1, n), len(cells))))
    with ForecastWriter(path, forecasts.header, cells, grid, {}, print) as writer:
        for chunk in writer.remaining:
            writer.write(chunk, flat[:, chunk.windows, :, chunk.cells])
        return writer.finish()


def read_forecasts(path: Path) -> Forecasts:
    file = open_forecasts(path)
    header = file.header
    values = file.read(slice(0, header.shape[0]), header.region, quantiles=True)
    quantiles = values[1:] if header.levels else None
    return Forecasts(values[0], header.origins, header.cell_ids, header.metadata, quantiles)


def score(forecasts: Forecasts, store: GridStore, suffix: str = ".zarr") -> EvaluationResult:
    with tempfile.TemporaryDirectory() as folder:
        return evaluate(write_forecasts(forecasts, Path(folder) / f"made{suffix}"), store)


def make_forecasts(windows, *, quantiles: bool = False, error: float = 5.0) -> Forecasts:
    """The truth plus noise; NaN outside the city, as a forecaster that leaves those cells out writes them."""
    rng = np.random.default_rng(7)
    truth = windows.read(np.arange(len(windows))).target
    values = (truth + rng.normal(0, error, truth.shape)).astype(np.float32)
    spread = np.array([-3, 0, 4], np.float32).reshape(3, *(1 for _ in values.shape))
    region = windows.region
    values[:, :, ~windows.store.inside[region.slices]] = np.nan
    return Forecasts(
        values=values,
        origins=windows.origin_times,
        cell_ids=windows.store.cell_ids[region.slices],
        metadata=ForecastMetadata(run="toy", checkpoint="sft/step-9", contract=forecast_contract(windows)),
        quantiles=values + spread if quantiles else None,
    )
