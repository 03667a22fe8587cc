"""Forecasts are scored block by block: any blocks give the same figures, and none outgrows its bound."""

import tracemalloc
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import xarray as xr

from stdist.data import GridSpec, GridStore, GridWriter, Region, Split, open_store
from stdist.data.sampler import WindowSampler
from stdist.errors import DamageError, InputError
from stdist.evaluation import ErrorState, evaluate, forecast_header, open_forecasts
from stdist.evaluation.forecast_header import cut, tile_shape, tiles
from stdist.evaluation.forecasts import ForecastFile

from .conftest import make_forecasts, score, write_forecasts
from .test_baselines import flat

SUFFIXES = pytest.mark.parametrize("suffix", [".zarr", ".parquet"])


@pytest.fixture
def windows(store):
    """20 windows of 4 steps and 4 x 3 cells."""
    windows = store.windows("test", 6, 4, channel="flow")
    windows.origins = windows.origins[:20]
    return windows


@pytest.fixture
def blocks_read(monkeypatch):
    """Shapes of the blocks that were read from files."""
    shapes, read = [], ForecastFile.read

    def noting(self, *place, **options):
        values = read(self, *place, **options)
        shapes.append(values.shape)
        return values

    monkeypatch.setattr(ForecastFile, "read", noting)
    return shapes


@SUFFIXES
@pytest.mark.parametrize("written_in_blocks", [False, True])
@pytest.mark.parametrize("points", [300, 48, 20, 7, 1])
def test_any_blocks_give_the_figures_of_one(
    store, windows, suffix, points, written_in_blocks, blocks_read, tmp_path, monkeypatch
):
    """Several windows, one, a part of one, a cell, and less than a cell has steps."""
    forecasts, path = make_forecasts(windows, quantiles=True), tmp_path / f"made{suffix}"
    whole = ErrorState.of(forecasts.values, *truth_of(windows))
    if written_in_blocks:
        monkeypatch.setattr(forecast_header, "POINTS_IN_MEMORY", points)
    write_forecasts(forecasts, path)
    monkeypatch.setattr(forecast_header, "POINTS_IN_MEMORY", points)
    made = evaluate(path, store)
    assert np.array_equal(made.state.count, whole.count)
    assert flat(made.state.summary()) == pytest.approx(flat(whole.summary()), rel=1e-12)
    assert len(blocks_read) > 1 and {shape[0] for shape in blocks_read} == {4}, "a point forecast and three quantiles"
    assert max(np.prod(shape[1:]) for shape in blocks_read) <= max(points, 4)
    assert blocks_read[0][1:] == forecasts.header.block, "as the chunks of a Zarr file"
    seen = truth_of(windows)[1]
    errors = truth_of(windows)[0][seen] - forecasts.quantiles[:, seen].astype(np.float64)
    losses = [np.maximum(level * e, (level - 1) * e).mean() for level, e in zip((0.1, 0.5, 0.9), errors, strict=True)]
    assert made.quantiles.summary()["pooled"]["crps"] == pytest.approx(2 * np.mean(losses), rel=1e-6)
    assert sum(np.prod(shape[1:]) for shape in blocks_read) == forecasts.values.size, "every value once"


@SUFFIXES
def test_figures_are_those_of_plain_xarray(store, windows, suffix, tmp_path, monkeypatch):
    """Means over a plain array of each file, masked by what the store observed."""
    monkeypatch.setattr(forecast_header, "POINTS_IN_MEMORY", 100)
    path = write_forecasts(make_forecasts(windows), tmp_path / f"made{suffix}")
    if suffix == ".zarr":
        forecast = xr.open_zarr(path).forecast.drop_vars("cell")
    else:
        table = pl.read_parquet(path).with_columns(pl.col("origin").dt.replace_time_zone(None))
        rows, cols = np.divmod(table["cell"].to_numpy() - 1000, 3)
        names = {"origin": table["origin"].to_numpy(), "step": table["step"].to_numpy(), "row": rows, "col": cols}
        index = [np.searchsorted(np.unique(values), values) for values in names.values()]
        grid = np.full((20, 4, 4, 3), np.nan, np.float32)
        grid[tuple(index)] = table["forecast"].to_numpy()
        forecast = xr.DataArray(grid, dims=("origin", "step", "row", "col"))
    truth, observed = (xr.DataArray(array, dims=forecast.dims) for array in truth_of(windows))
    error = (forecast.astype(float) - truth).where(observed)
    expected = {
        "mae": float(abs(error).mean()),
        "rmse": float((error**2).mean() ** 0.5),
        "mape": float(abs(error / truth).where(abs(truth) > 0).mean()),
        "nrmse": float((error**2).mean() ** 0.5 / truth.astype(float).where(observed).mean()),
        "points": int(observed.sum()),
    }
    assert evaluate(path, store).state.pooled() == pytest.approx(expected, rel=1e-12)


def truth_of(windows):
    batch = windows.read(np.arange(len(windows)))
    return batch.target, batch.target_observed


@pytest.fixture(scope="module")
def raster(tmp_path_factory) -> GridStore:
    """64 x 64 cells, 5 days of 24 frames, all but the first one tested."""
    rng, days = np.random.default_rng(0), 5
    ids = np.arange(64 * 64).reshape(64, 64)
    first, last = np.datetime64("2024-03-04"), np.datetime64("2024-03-08")
    spec = GridSpec("raster", ("flow",), first, last, ids, cadence_minutes=60)
    with GridWriter(tmp_path_factory.mktemp("raster") / "raster.zarr", spec, {}) as writer:
        for day in range(days):
            writer.write_day(day, {"flow": rng.gamma(2, 5, (24, 64, 64)).astype(np.float32)})
        return open_store(writer.finalise(Split.parse("2024-03-04:2024-03-04", test="2024-03-05:2024-03-08")))


def scored(raster: GridStore, days: int, side: int, folder: Path, suffix: str) -> tuple[Path, int]:
    """A file of forecasts of the raster's last days, and its size in values."""
    windows = raster.windows("test", 6, 6, channel="flow", region=Region(0, side, 0, side))
    windows.origins = windows.origins[: days * 24 - 5]
    forecasts = make_forecasts(windows)
    return write_forecasts(forecasts, folder / f"{days}-{side}{suffix}"), forecasts.values.size


@SUFFIXES
def test_memory_depends_neither_on_windows_nor_on_cells(raster, suffix, tmp_path, blocks_read, monkeypatch):
    """Almost five times the windows, sixteen times the cells: blocks stay below the bound, and so does what Python
    allocates.

    (What Polars allocates is not traced; the table it returns is, by its shape.)
    """
    points = 2**14
    monkeypatch.setattr(forecast_header, "POINTS_IN_MEMORY", points)
    heights, collect = [], pl.LazyFrame.collect

    def noting(self, **options):
        frame = collect(self, **options)
        heights.append(len(frame))
        return frame

    monkeypatch.setattr(pl.LazyFrame, "collect", noting)
    sizes, peaks = [], []
    for days, side in ((1, 16), (1, 16), (4, 16), (4, 64)):  # the first one pays for imports and caches
        path, size = scored(raster, days, side, tmp_path, suffix)
        store = open_store(raster.path)
        store.chunk_cache.limit = 2**20  # the truth has a bound of its own
        tracemalloc.start()
        evaluate(path, store)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        sizes.append(size)
    assert sizes[-1] > 70 * sizes[1] and sizes[-1] > 100 * points
    assert max(np.prod(shape) for shape in blocks_read) <= points
    assert max(heights, default=0) <= points
    bound = 40 * points * 4 + 2**21  # some arrays of a block, in float64 too; the cache; metadata of files
    assert max(peaks[1:]) < bound < sizes[-1] * 4, peaks


@SUFFIXES
def test_a_file_in_another_order_is_read_alike(store, windows, suffix, tmp_path, monkeypatch):
    monkeypatch.setattr(forecast_header, "POINTS_IN_MEMORY", 20)
    forecasts = make_forecasts(windows, quantiles=True)
    file = open_forecasts(write_forecasts(forecasts, tmp_path / f"made{suffix}"))
    if suffix == ".parquet":
        path, metadata = tmp_path / "made.parquet", pl.read_parquet_metadata(tmp_path / "made.parquet")
        table = pl.read_parquet(path).sample(fraction=1, shuffle=True, seed=1)
        table.write_parquet(path, row_group_size=50, metadata={k: metadata[k] for k in ("stdist", "stdist_cell_ids")})
        file = open_forecasts(path)
    for block, tile in file.header.blocks():
        expected = forecasts.quantities[:, *file.header.place(block, tile)]
        np.testing.assert_array_equal(file.read(block, tile, quantiles=True), expected)


def test_a_hole_is_named_by_its_window_and_cells(store, windows, tmp_path, monkeypatch):
    monkeypatch.setattr(forecast_header, "POINTS_IN_MEMORY", 20)
    forecasts = make_forecasts(windows)
    forecasts.values[15, 2, 3, 1] = np.nan
    stamp = np.datetime_as_string(windows.origin_times[15], unit="m")
    with pytest.raises(InputError, match=rf"^windows from origin {stamp}Z on, cells 2:4,.* not finite at 1 observed"):
        evaluate(write_forecasts(forecasts, tmp_path / "made.zarr"), store)


def test_a_damaged_chunk_is_named(store, windows, tmp_path):
    path = write_forecasts(make_forecasts(windows), tmp_path / "made.zarr")
    for chunk in (path / "forecast" / "c").rglob("*"):
        if chunk.is_file():
            chunk.write_bytes(b"damaged")
    with pytest.raises(DamageError, match=r"made\.zarr is damaged: forecast/c/0/0/0/0 is not as it was written"):
        evaluate(path, store)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_window_is_scored_once_at_any_number_of_ranks(store, windows, world):
    """Each rank scores the windows that the sampler hands it; the sum of their states is one process's state."""
    forecasts, seen, states = make_forecasts(windows), [], []
    for rank in range(world):
        state = ErrorState.empty(4)
        for indices, _ in WindowSampler(windows, 3, shuffle=False, rank=rank, world=world).batches(0):
            batch = windows.read(indices)
            state += ErrorState.of(forecasts.values[indices], batch.target, batch.target_observed)
            seen += indices.tolist()
        states.append(state)
    assert sorted(seen) == list(range(20))
    merged, whole = sum(states, ErrorState.empty(4)), score(forecasts, store).state
    assert np.array_equal(merged.count, whole.count)
    assert flat(merged.summary()) == pytest.approx(flat(whole.summary()), rel=1e-12)


def test_tiles_cover_a_region_once_within_their_bound():
    for shape in ((1, 1), (7, 3), (3, 50), (50, 3), (40, 40)):
        region = Region(5, 5 + shape[0], 2, 2 + shape[1])
        for cells in (0, 1, 2, 9, 10, 100, 10_000):
            count = np.zeros((60, 60), int)
            for tile in tiles(region, cells):
                count[tile.slices] += 1
                assert np.prod(tile.shape) <= max(1, cells)
            assert (count[region.slices] == 1).all() and count.sum() == np.prod(shape)
    assert tile_shape((300, 300), 87_381) == (150, 300), "no slivers"
    assert tile_shape((1000,), 300) == (250,)
    assert cut(5, 2) == [slice(0, 2), slice(2, 4), slice(4, 5)]
