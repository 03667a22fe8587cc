"""The readers on genuine public data; skipped where it is absent."""

import csv
import json
from collections import defaultdict

import numpy as np
import pytest

from data_prep import READERS
from data_prep.telecom_rows import CHANNELS
from stdist.data import GridStore, open_store
from stdist.errors import InputError


@pytest.fixture
def block(real_data, tmp_path) -> GridStore:
    path = real_data / "milan_block_5x5" / "milan_grid_data.csv"
    options = {"start": "2013-11-01", "cadence": 10, "channel": "internet", "row0": 41, "col0": 41, "id_width": 100}
    return open_store(READERS["table"].prepare([path], tmp_path / "block.zarr", **options).path)


@pytest.fixture
def whole(real_data, tmp_path) -> GridStore:
    path = real_data / "milan_fullgrid" / "milan_internet_100x100_109frames.npz"
    return open_store(READERS["frames-npz"].prepare([path], tmp_path / "whole.zarr").path)


def test_block_is_read_back_exactly(block, real_data):
    raw = np.loadtxt(real_data / "milan_block_5x5" / "milan_grid_data.csv", delimiter=",")
    assert raw.shape == (4320, 25)
    np.testing.assert_array_equal(block.values("internet", 0, 4320).reshape(4320, 25), raw.astype(np.float32))
    assert block.observed("internet").all() and block.city == "milan"
    assert block.cell_ids[0].tolist() == [4142, 4143, 4144, 4145, 4146] and block.cell_ids[4, 4] == 4546
    assert block.times[0] == np.datetime64("2013-10-31T23:00")
    assert block.local_times[-1] == np.datetime64("2013-11-30T23:50")
    assert [len(s) for s in (block.default_split.train, block.default_split.test)] == [20, 5]


def test_persistence_on_the_block_is_the_known_figure(block):
    """Test days 26 ... 30, S = K = 12, every start: 0.2683 with history inside the span or before it."""
    windows = block.windows("test", 12, 12, channel="internet")
    assert len(windows) == 5 * 144 - 12 + 1
    batch = windows.read(range(len(windows)))
    error = batch.target - batch.history[:, -1:]
    assert np.sqrt((error**2).mean()) / batch.target.mean() == pytest.approx(0.2683, abs=3e-4)


def test_whole_grid_has_three_runs_and_no_window_crosses_one(whole):
    assert [stop - start for start, stop in whole.segments] == [51, 28, 30]
    assert whole.local_times[whole.segments[0][0]] == np.datetime64("2013-11-03T00:00")
    assert whole.local_times[whole.segments[2][0]] == np.datetime64("2013-12-16T19:40")
    windows = whole.windows("train", 12, 6, channel="internet")
    assert len(windows) == sum(length - 17 for length in (51, 28, 30))
    batch = windows.read(range(len(windows)))
    assert np.isfinite(batch.history).all() and batch.target_observed.all()


def test_whole_grid_agrees_with_the_block(whole, block):
    rows, cols = slice(41, 46), slice(41, 46)
    assert whole.cell_ids[rows, cols].tolist() == block.cell_ids.tolist()
    common = np.intersect1d(whole.times[whole.present], block.times)
    assert len(common) == 79
    ours = whole.values("internet", 0, len(whole.times))[np.searchsorted(whole.times, common), rows, cols]
    theirs = block.values("internet", 0, 4320)[np.searchsorted(block.times, common)]
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def test_raw_sample_sums(real_data, tmp_path):
    """Against a plain sum over the file's 1,244 rows with Python's csv."""
    path = real_data / "milan_raw" / "sms-call-internet-mi-2013-11-01.sample.txt"
    sums: dict[tuple[int, int], np.ndarray] = defaultdict(lambda: np.zeros(5))
    with path.open() as file:
        for row in csv.reader(file, delimiter="\t"):
            sums[int(row[0]), int(row[1])] += [float(field or 0) for field in row[3:]]
    summary = READERS["telecom-italia"].prepare([path], tmp_path / "raw.zarr")
    store = open_store(summary.path)
    read = {name: store.values(name, 0, 144).reshape(144, 10000) for name in CHANNELS}
    for (square, stamp), expected in sums.items():
        slot = (stamp - 1383260400000) // 600_000
        found = [read[name][slot, square - 1] for name in CHANNELS]
        np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert store.observed("internet").sum() == len(sums)
    # Square 1 at local midnight: rows of countries 0 and 39.
    assert read["sms_in"][0, 0] == pytest.approx(0.08136262351125882 + 0.14186425470242922)
    assert read["internet"][0, 0] == pytest.approx(11.028366381681026)


def test_milan_lies_as_its_polygons_say(real_data, tmp_path):
    """Row 0 south, column 0 west; centres are those of the published squares; flipped ids are refused."""
    geometry = real_data / "milan_geometry" / "milano-grid.geojson"
    raw = real_data / "milan_raw" / "sms-call-internet-mi-2013-11-01.sample.txt"
    store = open_store(READERS["telecom-italia"].prepare([raw], tmp_path / "raw.zarr", geometry=geometry).path)
    assert store.city == "milan" and store.inside.all()
    latitude, longitude = (np.asarray(store.dataset[name]) for name in ("latitude", "longitude"))
    assert (np.diff(latitude, axis=0) > 0).all() and (np.diff(longitude, axis=1) > 0).all()
    # Square 1 in the south-west corner: the mean of its four published corners.
    assert latitude[0, 0] == pytest.approx(45.35774, abs=1e-5) and longitude[0, 0] == pytest.approx(9.01299, abs=1e-5)
    content = json.loads(geometry.read_text())
    for feature in content["features"]:
        row, col = divmod(feature["properties"]["cellId"] - 1, 100)
        feature["properties"]["cellId"] = (99 - row) * 100 + col + 1
    flipped = tmp_path / "flipped.geojson"
    flipped.write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"flipped\.geojson: row 0 lies in the north"):
        READERS["telecom-italia"].plan([raw], geometry=flipped)


def test_traffic_is_where_the_two_month_totals_are(whole, real_data):
    """The published totals by square id against the store's cells by row and column: one map, not a flipped one."""
    path = real_data / "milan_geometry" / "square_totals_2mo.csv"
    table = np.loadtxt(path, delimiter=",", skiprows=1)
    totals = np.zeros(10_000)
    totals[table[:, 0].astype(int) - 1] = table[:, 1]
    totals = totals.reshape(100, 100)
    frames = np.stack([whole.values("internet", *run).mean(axis=0) for run in whole.segments]).mean(axis=0)
    ranks = [np.argsort(np.argsort(values, axis=None)) for values in (frames, totals)]
    assert np.corrcoef(*ranks)[0, 1] > 0.95
    for turned in (totals[::-1], totals[:, ::-1], totals.T):
        assert np.corrcoef(ranks[0], np.argsort(np.argsort(turned, axis=None)))[0, 1] < 0.8
    busiest = [set(np.argsort(values, axis=None)[-100:].tolist()) for values in (frames, totals)]
    assert len(busiest[0] & busiest[1]) > 50
