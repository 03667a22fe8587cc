"""A small hourly city with everything that can go wrong: missing values, a gap, a cell outside the city."""

from pathlib import Path

import numpy as np
import pytest

from stdist.data import GridSpec, GridStore, GridWriter, Split, open_store
from stdist.evaluation import ForecastMetadata, Forecasts, forecast_contract

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


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> GridStore:
    return write_city(tmp_path_factory.mktemp("city") / "toyville.zarr")


def make_forecasts(windows, *, quantiles: bool = False, error: float = 5.0) -> Forecasts:
    """The truth plus noise; NaN outside the city, as a forecaster that leaves those cells out writes them."""
    rng = np.random.default_rng(7)
    truth = windows.read(np.arange(len(windows))).target
    values = (truth + rng.normal(0, error, truth.shape)).astype(np.float32)
    spread = np.array([-3, 0, 4], np.float32).reshape(3, 1, 1, 1, 1)
    region = windows.region
    values[:, :, ~windows.store.inside[region.slices]] = np.nan
    return Forecasts(
        values=values,
        origins=windows.origin_times,
        cell_ids=windows.store.cell_ids[region.slices],
        metadata=ForecastMetadata(run="toy", checkpoint="sft/step-9", contract=forecast_contract(windows)),
        quantiles=values + spread if quantiles else None,
    )
