"""Large rasters: written, imputed, fitted and digested with memory for tiles, whatever the size of the city."""

import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import xarray

from data_prep import READERS, Day, Part, Plan, prepare
from stdist.data import DaySpan, GridSpec, Region, Split, open_store
from stdist.data.parts import PartResult, RunPart
from stdist.data.synthetic import SyntheticCity, generate

SIDE, DAYS, CADENCE = 1000, 2, 60
SLOTS = 1440 // CADENCE
FIRST = np.datetime64("2024-05-01")


def test_tiles_are_those_of_the_shards():
    ids = np.zeros((300, 513), np.int64)
    tiles = GridSpec("wide", ("x",), FIRST, FIRST, ids, CADENCE).tiles()
    assert [(t[0].start, t[0].stop, t[1].start, t[1].stop) for t in tiles] == [
        (0, 256, 0, 256),
        (0, 256, 256, 512),
        (0, 256, 512, 513),
        (256, 300, 0, 256),
        (256, 300, 256, 512),
        (256, 300, 512, 513),
    ]
    assert GridSpec("small", ("x",), FIRST, FIRST, ids[:256, :256], CADENCE).tiles() == [(slice(0, 256), slice(0, 256))]


def _tile_values(day: int, tile: tuple[slice, ...]) -> np.ndarray:
    """Slot + 100 day + the row's and column's share, so that a value says where it belongs; some are missing."""
    rows, cols = (np.arange(side.start, side.stop, dtype=np.float32) / 1024 for side in tile)
    slots = np.arange(SLOTS, dtype=np.float32)
    values = slots[:, None, None] + 100 * day + rows[:, None] / 2 + cols / 4
    values[SLOTS // 2, ::7, ::5] = np.nan
    values[-1, 3::7, ::5] = np.nan
    return values


def _read(part: Part) -> Iterator[Day]:
    assert part.tiles is not None
    for day in part.days:
        yield Day(day, {"x": _tile_values(day, part.tiles[0])}, tile=part.tiles[0])


def _backwards(run_part: RunPart, parts: list[Part]) -> Iterator[PartResult]:
    return map(run_part, reversed(parts))


@pytest.fixture(scope="module")
def raster(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """A store of 1000 x 1000 cells, a part for every day and tile, and the peak of memory in bytes."""
    ids = np.arange(SIDE * SIDE).reshape(SIDE, SIDE)
    spec = GridSpec("province", ("x",), FIRST, FIRST + (DAYS - 1), ids, CADENCE)
    parts = [
        Part(f"day {day} tile {index}", (day,), tiles=(tile,))
        for day in range(DAYS)
        for index, tile in enumerate(spec.tiles())
    ]
    plan = Plan(spec, {"reader": "test"}, [], Split(DaySpan(FIRST, FIRST + (DAYS - 1))), parts, _read)
    tracemalloc.start()
    try:
        path = prepare(plan, tmp_path_factory.mktemp("raster") / "province.zarr", executor=_backwards).path
        return path, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_is_bounded_by_tiles(raster):
    """A tile's day has 6 MB of values; no array of a day of the raster, 96 MB, was ever made. What has no time (ids,
    sums by cell) takes some 40 MB of it."""
    _, peak = raster
    assert peak < SLOTS * SIDE * SIDE * 4


def test_statistics_of_another_span_are_too(raster):
    store = open_store(raster[0])
    store.cell_ids, store.inside  # noqa: B018, held anyway
    tracemalloc.start()
    try:
        first = store.statistics("x", DaySpan(FIRST, FIRST))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < SLOTS * SIDE * SIDE * 4
    assert first.maximum < 100 < store.statistics("x", store.default_split.train).maximum
    assert first.cell_mean.shape == (SIDE, SIDE)


def test_a_raster_of_tiles_is_one_raster(raster):
    store = open_store(raster[0])
    plain = xarray.open_zarr(raster[0])
    assert store.shape == (SIDE, SIDE) and plain["x"].shape == (DAYS * SLOTS, SIDE, SIDE)
    corner = (slice(250, 262), slice(764, 772))  # where four tiles meet
    expected = np.concatenate([_tile_values(day, corner) for day in range(DAYS)])
    # The pattern of missing values is the tile's own.
    observed = store.observed("x", 0, DAYS * SLOTS, Region(250, 262, 764, 772))
    values = store.values("x", 0, DAYS * SLOTS, Region(250, 262, 764, 772))
    known = observed & ~np.isnan(expected)
    assert known.mean() > 0.9 and not observed.all()
    np.testing.assert_array_equal(values[known], expected[known])
    np.testing.assert_array_equal(plain["x"][:, *corner].values, values)


def test_eq20_across_tiles_and_midnight(raster):
    """Cell (3, 0) lacks the last slot of day 0: half-way between its neighbours, 22 and 100 or a little more."""
    store = open_store(raster[0])
    for row in (3, 259):  # the same place in two tiles
        series = store.values("x", SLOTS - 2, SLOTS + 1, Region(row, row + 1, 0, 1))[:, 0, 0]
        assert series[1] == pytest.approx((series[0] + series[2]) / 2)
        assert series[0] == pytest.approx(22 + row / 2048) and series[2] == pytest.approx(100 + row / 2048)
    lacking = sum(int(np.isnan(_tile_values(0, tile)).sum()) for tile in _spec_tiles())
    assert store.coverage["x"]["missing"] == DAYS * lacking


def _spec_tiles() -> list[tuple[slice, ...]]:
    return GridSpec("province", ("x",), FIRST, FIRST, np.zeros((SIDE, SIDE), np.int64), CADENCE).tiles()


def test_statistics_of_tiles_are_those_of_the_whole(raster):
    store = open_store(raster[0])
    fitted = store.statistics("x", store.default_split.train)
    count = total = squares = 0.0
    for day in range(DAYS):
        values = np.concatenate([_tile_values(day, tile).reshape(SLOTS, -1) for tile in _spec_tiles()], axis=1)
        seen = values[~np.isnan(values)].astype(np.float64)
        count, total, squares = count + len(seen), total + seen.sum(), squares + (seen**2).sum()
    assert fitted.count == count and fitted.mean == pytest.approx(total / count)
    assert fitted.std == pytest.approx(np.sqrt(squares / count - (total / count) ** 2))
    # The last cell lacks nothing: mean slot, mean day, and its place.
    assert fitted.cell_mean[999, 999] == pytest.approx(11.5 + 50 + 0.75 * 999 / 1024)


def test_the_synthetic_city_comes_tile_by_tile(tmp_path):
    """Tiles share neighbours' noise, events and absent frames: no seam runs along their borders."""
    city = SyntheticCity(260, 300, days=2, cadence_minutes=120, seed=3, missing_share=0)
    tiles = GridSpec("s", ("x",), FIRST, FIRST, np.zeros(city.shape, np.int64), 120).tiles()
    whole = np.zeros((24, *city.shape), np.float32)
    for tile in tiles:
        for day, values in generate(city, tile):
            whole[day * 12 : day * 12 + 12, *tile] = values
    logs = np.log(whole) - np.log(city.level)
    across = [np.corrcoef(logs[:, :200, at].ravel(), logs[:, :200, at + 1].ravel())[0, 1] for at in (254, 255)]
    assert across[1] == pytest.approx(across[0], abs=0.05)
    summary = READERS["synthetic"].prepare([], tmp_path / "s.zarr", height=260, width=300, days=2, cadence=120, seed=3)
    assert summary.cells == 260 * 300
    read = open_store(summary.path)
    np.testing.assert_array_equal(
        read.values("internet", 0, 24)[read.observed("internet", 0, 24)],
        np.concatenate([_stitched(260, 300, tiles)])[read.observed("internet", 0, 24)],
    )


def _stitched(height: int, width: int, tiles: list[tuple[slice, ...]]) -> np.ndarray:
    city = SyntheticCity(height, width, "2013-11-01", 2, 120, 3)
    whole = np.zeros((24, height, width), np.float32)
    for tile in tiles:
        for day, values in generate(city, tile):
            whole[day * 12 : day * 12 + 12, *tile] = values
    return whole
