"""Sensor readers through the store on genuine public data; skipped where it is absent."""

import numpy as np
import pytest

from data_prep import READERS
from stdist.data import NodeRange, open_store


@pytest.fixture
def week(real_data) -> dict[str, object]:
    """Sources and options of the public week of METR-LA."""
    folder = real_data / "metr_la_week"
    graph = {"adjacency": folder / "los_adj.csv", "meta": folder / "graph_sensor_locations.csv"}
    return {"file": folder / "los_speed.csv", "graph": graph}


def test_metr_la_week_as_csv_and_as_the_published_frame(week, tmp_path, write_frame):
    """One store from the CSV, one from the same values in pandas' layout: all values, graph and places agree."""
    options = {"start": "2012-03-01", "cadence": 5, "channel": "speed", "utc_offset": -480}
    as_csv = READERS["table"].prepare([week["file"]], tmp_path / "csv.zarr", **options, **week["graph"])
    with week["file"].open() as file:
        ids = file.readline().strip().split(",")
    speeds = np.loadtxt(week["file"], delimiter=",", skiprows=1)
    stamps = np.datetime64("2012-03-01T00:00") + np.arange(len(speeds)) * np.timedelta64(5, "m")
    path = write_frame(tmp_path / "metr-la.h5", stamps, ids, speeds, key="df")
    as_frame = READERS["dcrnn-h5"].prepare([path], tmp_path / "h5.zarr", **week["graph"])
    for summary in (as_csv, as_frame):
        store = open_store(summary.path)
        assert (summary.frames, summary.cells, summary.runs, summary.missing) == (2016, 207, 1, {"speed": 0})
        np.testing.assert_array_equal(store.values("speed", 0, 2016), speeds.astype(np.float32))
        nodes = store.values("speed", 100, 110, NodeRange(5, 9))
        np.testing.assert_array_equal(nodes, speeds[100:110, 5:9].astype(np.float32))
        weights = np.loadtxt(week["graph"]["adjacency"], delimiter=",").astype(np.float32)
        np.testing.assert_array_equal(store.dataset["adjacency"].values, weights)
        assert store.dataset["latitude"].values[0] == 34.15497 and store.times[0] == np.datetime64("2012-03-01T08:00")
    assert store.dataset["node"].values.tolist() == ids
