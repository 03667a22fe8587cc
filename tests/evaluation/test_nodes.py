"""Stores of nodes are forecast, kept, scored and compared as grids are."""

import json
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
import xarray as xr

from stdist.data import NodeRange
from stdist.errors import InputError
from stdist.evaluation import (
    ErrorState,
    baselines,
    forecast_contract,
    forecast_header,
    score_baselines,
)
from stdist.evaluation.baselines import forecast_baselines
from stdist.evaluation.contract import ForecastContract

from .conftest import make_forecasts, read_forecasts, score, write_forecasts, write_nodes
from .test_baselines import NAMES, flat

RANGE = NodeRange(2, 9)
SUFFIXES = pytest.mark.parametrize("suffix", [".zarr", ".parquet"])


@pytest.fixture
def windows(nodes):
    """21 windows of 4 steps and 7 nodes."""
    return nodes.windows("test", 6, 4, channel="flow", region=RANGE)


@pytest.fixture(params=[False, True], ids=["one candidate", "quantiles"])
def forecasts(request, windows):
    return make_forecasts(windows, quantiles=request.param)


@SUFFIXES
def test_round_trip(forecasts, suffix, tmp_path):
    path = write_forecasts(forecasts, tmp_path / f"made{suffix}")
    again = read_forecasts(path)
    np.testing.assert_array_equal(again.values, forecasts.values)
    np.testing.assert_array_equal(again.origins, forecasts.origins)
    assert again.cell_ids.tolist() == [f"s{i}" for i in range(2, 9)]
    assert again.metadata == forecasts.metadata and again.header.region == RANGE
    if forecasts.quantiles is not None:
        np.testing.assert_array_equal(again.quantiles, forecasts.quantiles)
    if suffix == ".zarr":
        dataset = xr.open_zarr(path, chunks=None)
        assert dataset.forecast.dims[-3:] == ("origin", "step", "node")
        assert dataset["node"].values.tolist() == list(range(2, 9)) and dataset["cell"].values[0] == "s2"
    else:
        row = pl.read_parquet(path).filter((pl.col("cell") == "s4") & (pl.col("step") == 3)).sort("origin")[5]
        assert row["forecast"].item() == forecasts.values[5, 2, 2]


@SUFFIXES
def test_errors_against_a_naive_loop(nodes, windows, suffix, tmp_path):
    forecasts = make_forecasts(windows)
    values, observed = nodes.values("flow", 0, len(nodes.times)), nodes.observed("flow")
    pairs = [
        (float(forecasts.values[n, k, node - 2]), float(values[origin + 1 + k, node]))
        for n, origin in enumerate(windows.origins)
        for k in range(4)
        for node in range(2, 9)
        if observed[origin + 1 + k, node]
    ]
    made, truth = np.array(pairs).T
    result = score(forecasts, nodes, suffix)
    assert len(truth) < forecasts.values.size and (truth == 0).any(), "some values are imputed, some are true zeros"
    rmse = np.sqrt(np.mean((made - truth) ** 2))
    assert result.state.pooled() == pytest.approx(
        {
            "mae": np.mean(np.abs(made - truth)),
            "rmse": rmse,
            "mape": np.mean(np.abs(made - truth)[truth != 0] / truth[truth != 0]),
            "nrmse": rmse / truth.mean(),
            "points": len(truth),
        }
    )
    assert result.contract.region == (2, 9) and result.contract.cells == 7


@SUFFIXES
@pytest.mark.parametrize("points", [200, 16, 1])
def test_any_blocks_give_the_figures_of_one(nodes, windows, suffix, points, tmp_path, monkeypatch):
    forecasts = make_forecasts(windows, quantiles=True)
    batch = windows.read(np.arange(len(windows)))
    whole = ErrorState.of(forecasts.values, batch.target, batch.target_observed)
    monkeypatch.setattr(forecast_header, "POINTS_IN_MEMORY", points)
    made = score(forecasts, nodes, suffix)
    assert len(list(forecasts.header.blocks())) > 1
    assert np.array_equal(made.state.nonzero_count, whole.nonzero_count)
    assert flat(made.state.summary()) == pytest.approx(flat(whole.summary()), rel=1e-12)


@SUFFIXES
def test_some_of_the_nodes_are_written_in_chunks(forecasts, suffix, tmp_path):
    """Six of the seven, the first one left out."""
    path = write_forecasts(forecasts, tmp_path / f"made{suffix}", cells=np.arange(1, 7), chunks=(8, 4))
    again = read_forecasts(path)
    np.testing.assert_array_equal(again.values[..., 1:], forecasts.values[..., 1:])
    assert np.isnan(again.values[..., 0]).all()


def test_contracts_of_grids_and_nodes_are_read(store, windows):
    for contract, region in (
        (forecast_contract(windows), (2, 9)),
        (forecast_contract(store.windows("test", 6, 4, channel="flow")), (0, 4, 0, 3)),
    ):
        text = contract.model_dump_json()
        assert json.loads(text)["region"] == list(region)
        assert ForecastContract.model_validate_json(text) == contract and contract.region == region


def test_forecasts_of_nodes_are_refused_on_other_nodes(nodes, windows, tmp_path):
    forecasts = make_forecasts(windows)
    with pytest.raises(InputError, match="score them on the store they were made on"):
        score(forecasts, write_nodes(tmp_path / "other.zarr", days=7))
    with pytest.raises(InputError, match=r"are not those of region 2:9 of"):
        score(replace(forecasts, cell_ids=forecasts.cell_ids[::-1]), nodes)


def forecast_all(store, windows):
    """Every baseline's forecasts, put together of their blocks, and their fallbacks."""
    values = {name: np.full((len(windows), windows.K, *windows.region.shape), np.nan, np.float32) for name in NAMES}
    fallbacks = dict.fromkeys(NAMES, 0)
    for block, tile, made in forecast_baselines(store, "train", windows):
        for name, part in made.items():
            values[name][block, :, tile.n0 - windows.region.n0 : tile.n1 - windows.region.n0] = part.values
            fallbacks[name] += int(part.fallback.sum())
    return values, fallbacks


@pytest.mark.parametrize(("days", "cadence"), [(21, 60), (4, 5)], ids=["hourly", "5 min, days before a week"])
def test_baselines_against_naive_loops(days, cadence, nodes, tmp_path, monkeypatch):
    store = nodes if days == 21 else write_nodes(tmp_path / "short.zarr", days, cadence)
    windows = store.windows("test", 6, 4, channel="flow", region=RANGE)
    windows.origins = windows.origins[::7]
    monkeypatch.setattr(baselines, "SERIES_IN_MEMORY", 3 * len(store.times))
    monkeypatch.setattr(forecast_header, "POINTS_IN_MEMORY", 60)
    made, fallbacks = forecast_all(store, windows)
    filled = store.values("flow", 0, len(store.times), RANGE).astype(float)
    series = filled.copy()
    series[store.local_times < np.datetime64("2024-03-06"), 5] = np.nan  # sensor 7 is not there yet
    measured = np.where(store.observed("flow", region=RANGE), series, np.nan)
    per_day, (start, stop) = store.slots_per_day, store.step_range(store.default_split.train)
    counted = dict.fromkeys(NAMES, 0)
    for n, origin in enumerate(windows.origins):
        for k, target in enumerate(range(origin + 1, origin + 5)):
            like = np.array([t for t in range(start, stop) if (target - t) % (7 * per_day) == 0], int)
            week = series[target - 7 * per_day] if target >= 7 * per_day else np.full(7, np.nan)
            expected = {
                "persistence": filled[origin],
                "same time yesterday": series[target - per_day],
                "same time last week": week,
                "mean by weekday and slot": np.nanmean(measured[like], axis=0) if like.size else np.full(7, np.nan),
            }
            for name, row in expected.items():
                missing = np.isnan(row)
                counted[name] += missing.sum()
                np.testing.assert_allclose(made[name][n, k], np.where(missing, filled[origin], row), rtol=1e-5)
    assert {name: fallbacks[name] for name in expected} == {name: counted[name] for name in expected}
    if days < 7:
        assert fallbacks["same time last week"] == fallbacks["mean by weekday and slot"] == made["ridge"].size
    assert fallbacks["ridge"] == (4 * len(windows) if days < 7 else 0), "sensor 7 has no training day"
    assert np.isfinite(made["ridge"]).all()
    batch = windows.read(np.arange(len(windows)))
    scores = score_baselines(store, "train", windows)
    for name in NAMES:
        expected = ErrorState.of(made[name], batch.target, batch.target_observed).summary()
        assert flat(scores[name])[:-1] == pytest.approx(flat(expected), rel=1e-12)
        assert scores[name]["fallbacks"] <= min(fallbacks[name], scores[name]["pooled"]["points"])
