"""Forecasts are made in pieces that bound memory; how they are cut and where they were interrupted changes nothing."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stdist.data import GridStore, open_store
from stdist.evaluation import (
    ChunkGrid,
    ForecastHeader,
    ForecastMetadata,
    ForecastWriter,
    forecast_contract,
    open_forecasts,
)
from stdist.vision_llm.config import ForecastConfig, VisionLLMConfig
from stdist.vision_llm.policy.city_windows import CityWindows
from stdist.vision_llm.policy.model import PolicyModel
from stdist.vision_llm.predictor import PolicyPredictor
from stdist.vision_llm.rollout import forecaster
from stdist.vision_llm.rollout.forecaster import (
    forecast_pieces,
    plan_pieces,
    summarise,
    validation_errors,
)
from stdist.vision_llm.rollout.sampler import Sampler

SAMPLE = ForecastConfig(decoding="sample", num_generations=3)
OUTSIDE = [(0, 0), (2, 3)]


@pytest.fixture(scope="module")
def city(policy: PolicyModel, store: GridStore) -> CityWindows:
    """Seven windows of a city of 5 × 4 cells, two of them outside."""
    store = open_store(store.path)
    store.inside[tuple(np.transpose(OUTSIDE))] = False
    setting = policy.spec.setting
    windows = store.windows("test", setting.history, setting.horizon, channel=setting.channel)
    windows.origins = windows.origins[:7]
    return CityWindows(policy, windows)


Forecast = Callable[..., np.ndarray]


@pytest.fixture
def forecast(policy: PolicyModel, city: CityWindows, tmp_path: Path) -> Forecast:
    """Forecasts of every window by a plan (windows and cells of a piece), as they are read back: ``[Q, N, K, h, w]``.

    ``stop_at``: numbers of whole pieces at which the process is taken for killed, and starts again.
    """
    windows = city.windows

    def make(config: ForecastConfig, plan: tuple[int, int], stop_at: tuple[int, ...] = ()) -> np.ndarray:
        run = VisionLLMConfig(name="toy", seed=7, data={"store": windows.store.path}, forecast=config)  # type: ignore[arg-type]
        predictor = PolicyPredictor(policy, run)
        header = ForecastHeader(
            ForecastMetadata(run="toy", checkpoint="sft/step-1", contract=forecast_contract(windows)),
            windows.origin_times,
            windows.store.cell_ids,
            levels=predictor.levels,
        )
        pieces = ChunkGrid(len(city), len(city.cells), *plan)
        for stop in (*stop_at, len(pieces.chunks())):
            with ForecastWriter(tmp_path / "f.zarr", header, city.cells, pieces, {}, lambda line: None) as writer:
                left = writer.remaining[: stop - len(pieces.chunks()) + len(writer.remaining)]
                for piece, values, counts in predictor.predict(windows, left):
                    writer.write(piece, values, counts)
                if not writer.remaining:
                    make.clipped = writer.counts["clipped"]  # type: ignore[attr-defined]
                    writer.finish()
        forecasts = open_forecasts(tmp_path / "f.zarr")
        return forecasts.read(slice(0, len(city)), windows.region, quantiles=True)

    return make


@pytest.mark.parametrize(
    ("windows", "cells", "windows_per_batch", "expected"),
    [
        (1500, 121, 16, (16, 121)),  # the paper's block: all cells of a batch of windows
        (1500, 10_000, 16, (16, 128)),
        (100, 1_000_000, 1, (1, 2048)),
        (3, 4, 16, (3, 4)),
        (9999, 50, 4000, (4000, 1)),
        (5, 0, 16, (5, 1)),
    ],
)
def test_plan(windows: int, cells: int, windows_per_batch: int, expected: tuple[int, int]) -> None:
    plan = plan_pieces(windows, cells, windows_per_batch)
    assert plan == ChunkGrid(windows, cells, *expected)


def test_summary_by_hand() -> None:
    """Five candidates 10, 20, … 50 of a window, cell and step: quantile q lies at 10 + q · 40."""
    candidates = np.array([30.0, 10, 50, 20, 40]).reshape(1, 1, 5, 1) + np.array([0, 100]).reshape(1, 2, 1, 1)
    expected = [[30, 130], [14, 114], [30, 130], [46, 146]]  # [quantity, cell]
    np.testing.assert_allclose(summarise(candidates), np.reshape(expected, (4, 1, 1, 2)), rtol=1e-6)
    assert summarise(candidates[:, :, :1]).shape == (1, 1, 1, 2)


@pytest.mark.parametrize("decoding", ["greedy", "median", "direct"])
def test_the_plan_changes_nothing(forecast: Forecast, city: CityWindows, decoding: str) -> None:
    """One window in blocks of cells, several windows with all their cells: the same values, NaN outside the city."""
    config = ForecastConfig(decoding=decoding)  # type: ignore[arg-type]
    whole = forecast(config, (7, 18))
    outside = tuple(np.transpose(OUTSIDE))
    assert np.isnan(whole[..., *outside]).all() and np.isnan(whole).sum() == len(OUTSIDE) * whole[..., 0, 0].size
    for plan in ((1, 7), (3, 18)):
        np.testing.assert_allclose(forecast(config, plan), whole, rtol=1e-4)


@pytest.mark.parametrize("plan", [(3, 18), (3, 5)])
def test_interrupted_sampling_draws_what_undisturbed_sampling_draws(forecast: Forecast, plan: tuple[int, int]) -> None:
    undisturbed = forecast(SAMPLE, plan)
    low, middle, high = undisturbed[1:]
    inside = ~np.isnan(low)
    assert (low[inside] < high[inside]).mean() > 0.9, "candidates differ, or there would be nothing to compare"
    np.testing.assert_array_equal(undisturbed[0], middle)
    np.testing.assert_array_equal(forecast(SAMPLE, plan, stop_at=(1, 2, 3)), undisturbed)


def test_values_above_t_max_are_counted_once_a_window(
    forecast: Forecast, policy: PolicyModel, city: CityWindows, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By hand, of whole grids; interrupted in the middle of a window's cells or not."""
    history = city.windows.read(np.arange(len(city))).history
    assert policy.encoder
    t_max = float(np.quantile(history, 0.9))
    monkeypatch.setattr(policy, "encoder", replace(policy.encoder, t_max=t_max))
    for stop_at in ((), (1, 2, 4)):
        forecast(ForecastConfig(decoding="direct"), (3, 7), stop_at=stop_at)
        assert forecast.clipped == (history > t_max).sum() > 0  # type: ignore[attr-defined]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch, policy: PolicyModel) -> dict[str, list]:
    """Windows read, windows encoded, shapes of what the sampler gave and its first uniform numbers, by call."""
    calls: dict[str, list] = {"read": [], "encoded": [], "candidates": [], "uniforms": []}
    read, prefix, sample = CityWindows.read, policy.prefix, Sampler.forecast

    def counted(self: Sampler, *arguments: Any) -> torch.Tensor:
        values = sample(self, *arguments)
        calls["candidates"].append(tuple(values.shape))
        calls["uniforms"].append(None if arguments[-1] is None else arguments[-1][0, 0].item())
        return values

    monkeypatch.setattr(CityWindows, "read", lambda self, i: calls["read"].append(len(i)) or read(self, i))
    monkeypatch.setattr(policy, "prefix", lambda ids, grids: calls["encoded"].append(len(ids)) or prefix(ids, grids))
    monkeypatch.setattr(Sampler, "forecast", counted)
    return calls


def test_blocks_of_the_same_windows_share_reading_and_encoding(forecast: Forecast, seen: dict[str, list]) -> None:
    """No array of candidates is larger than a piece; after an interruption only what is left is computed."""
    forecast(SAMPLE, (3, 7))
    assert seen["read"] == seen["encoded"] == [3, 3, 1]
    assert seen["candidates"] == [(w * c, 3, 3) for w in (3, 3, 1) for c in (7, 7, 4)]
    uniforms = list(seen["uniforms"])
    assert len(set(uniforms)) == 9, "pieces draw by themselves"
    for calls in seen.values():
        calls.clear()
    forecast(SAMPLE, (3, 7), stop_at=(4,))
    assert len(seen["candidates"]) == 9, "four pieces, then the other five"
    assert seen["read"] == seen["encoded"] == [3, 3, 3, 1]
    assert seen["uniforms"] == uniforms


def test_validation_in_pieces_is_that_of_all_at_once(
    policy: PolicyModel, city: CityWindows, seen: dict[str, list], monkeypatch: pytest.MonkeyPatch
) -> None:
    """MAE, RMSE and NRMSE (Eq. 21–23) of windows 1, 4 and 6 by hand, and in pieces of two windows and two cells."""
    indices = np.array([1, 4, 6])
    batch = city.batch(indices, city.cells)
    ((_, _, values),) = forecast_pieces(policy, city, indices, ChunkGrid(3, 18, 3, 18).chunks(), "direct")
    error, truth = (values[:, :, 0] - batch.truth)[batch.observed], batch.truth[batch.observed]
    rmse = float(np.sqrt(np.square(error.astype(float)).mean()))
    expected = {"mae": np.abs(error).mean(), "rmse": rmse, "nrmse": rmse / truth.mean()}
    seen["candidates"].clear()
    monkeypatch.setattr(forecaster, "PIECE_SIZE", 4)
    ours = validation_errors(policy, city, indices, 2, "direct")
    assert {name: ours[name] for name in expected} == pytest.approx(expected, rel=1e-4)
    assert seen["candidates"] == [(n, 1, 3) for n in (4, 2) for _ in range(9)]
