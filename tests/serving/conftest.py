"""A calibrated run on the cells of a small grid, and the service around it in this process."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from data_prep import READERS
from stdist.runs import recipes
from stdist.runs.calibration import FORECASTS
from stdist.runs.forecast_request import ForecastRequest
from stdist.serving.app import ROUTES, make_app
from stdist.serving.city import CityForecaster
from stdist.serving.forecasts import CityForecasts
from stdist.serving.metrics import Metrics

from .serving_world import request_of, silent


@pytest.fixture(scope="session")
def trained_once(tmp_path_factory: pytest.TempPathFactory, make_config: Callable[..., Any]) -> Path:
    """A folder with city.zarr, 4 x 5 cells, and runs/tiny, which sees 6 hours and forecasts 4; not calibrated."""
    folder = tmp_path_factory.mktemp("served")
    store = READERS["synthetic"].prepare([], folder / "city.zarr", height=4, width=5, days=10, cadence=60, seed=3)
    recipes.train(make_config(store, folder / "runs", data={"channel": "internet"}), silent)
    return folder


@pytest.fixture(scope="session")
def calibrated_once(trained_once: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = Path(shutil.copytree(trained_once, tmp_path_factory.mktemp("calibrated") / "served"))
    run = folder / "runs" / "tiny"
    recipes.calibrate(ForecastRequest(run, folder / "city.zarr", None, "validation", run / FORECASTS), silent)
    return folder


@pytest.fixture
def folder(calibrated_once: Path, tmp_path: Path) -> Path:
    """A copy of the same, to change."""
    return Path(shutil.copytree(calibrated_once, tmp_path / "served"))


@pytest.fixture(scope="session")
def start() -> Callable[..., TestClient]:
    """The service of a folder, or of a forecaster, as ``stdist serve`` makes it, and a client of it."""

    def make(of: Any, rate: float = 0, token: str | None = None, patience: float = 60) -> TestClient:
        forecaster = CityForecaster(request_of(of), silent) if isinstance(of, Path) else of
        metrics = Metrics(lambda: forecasts.city.origin, ROUTES)
        forecasts = CityForecasts(forecaster, forecaster.make(), metrics.made, silent, patience)
        metrics.made(0.1)
        return TestClient(make_app(forecasts, metrics, rate, token))

    return make
