"""yearly-npz: nodes that grow from year to year in one store."""

import pickle
from pathlib import Path

import numpy as np
import pytest

from data_prep import READERS
from stdist.data.check import check_store
from stdist.errors import InputError

NODES = {2011: 2, 2012: 3, 2013: 3}
ROWS = 48  # two days of hourly frames


def yearly(folder: Path, nodes: dict[int, int] | None = None, rows: int = ROWS) -> Path:
    """RawData/YYYY.npz and graph/YYYY_adj.npz, array x each, as TrafficStream and EAC publish them."""
    (folder / "RawData").mkdir()
    (folder / "graph").mkdir()
    for year, count in (nodes or NODES).items():
        values = year - 2000 + np.arange(rows * count, dtype=np.float64).reshape(rows, count) / 16
        np.savez(folder / "RawData" / f"{year}.npz", x=values)
        np.savez(folder / "graph" / f"{year}_adj.npz", x=np.full((count, count), year % 100, np.float64))
    return folder / "RawData"


def make_plan(raw: Path, **options: object):
    return READERS["yearly-npz"].plan([raw], **{"city": "stream", "start": "2011-07-10", "cadence": 60, **options})


def test_nodes_grow_and_years_are_runs(tmp_path, prepared):
    raw = yearly(tmp_path)
    plan = make_plan(raw, adjacency=tmp_path / "graph" / "2013_adj.npz")
    assert len(plan.parts) == 3
    store = prepared(plan)
    assert store.shape == (3,) and len(store.segments) == 3
    assert plan.spec.since.tolist() == [np.datetime64(f"{y}-07-10").item() for y in (2011, 2011, 2012)]
    for year, (start, stop) in zip(NODES, store.segments, strict=True):
        assert store.local_times[start] == np.datetime64(f"{year}-07-10T00:00") and stop - start == ROWS
        expected = np.load(raw / f"{year}.npz")["x"]
        count = NODES[year]
        np.testing.assert_array_equal(store.values("flow", start, stop)[:, :count], expected)
        seen = store.observed("flow", start, stop)
        assert seen[:, :count].all() and not seen[:, count:].any()
    # Before a node exists its values are not missing ones.
    assert store.coverage["flow"]["missing"] == 0
    assert (store.dataset["adjacency"].values == 13).all() and check_store(store.path).ok
    assert plan.spec.adjacency.tobytes() not in pickle.dumps((plan.read, plan.parts))


def test_parts_are_independent(tmp_path):
    """Each year is read alone, in another process where wanted."""
    plan = pickle.loads(pickle.dumps(make_plan(yearly(tmp_path))))
    days = [[day.index for day in plan.read(part)] for part in plan.parts]
    assert days == [list(part.days) for part in plan.parts]
    assert not set(days[0]) & set(days[1]) and not set(days[1]) & set(days[2])
    assert days[1][0] == int((np.datetime64("2012-07-10") - np.datetime64("2011-07-10")).astype(int))


def test_full_years_touch(tmp_path):
    """AIR-Stream: hourly, from midnight to midnight; 2017 and 2018 have 365 days, whose frames have no gap."""
    plan = make_plan(yearly(tmp_path, {2017: 1, 2018: 2}, rows=8760), start="2017-01-01")
    days = [day for part in plan.parts for day in plan.read(part)]
    assert [day.index for day in days] == list(range(730)) and all(day.present.all() for day in days)
    assert [np.isfinite(day.values["flow"]).all(axis=0).tolist() for day in days[364:366]] == [
        [True, False],
        [True] * 2,
    ]


@pytest.mark.parametrize(
    ("nodes", "options", "line"),
    [
        ({2011: 3, 2012: 2}, {}, "2012.npz has 2 nodes, 2011 had 3"),
        (None, {"city": None}, "--city"),
        (None, {"start": None}, "2011.npz has no time stamps; .*--start 2011-07-10"),
        (None, {"start": "2012-07-10"}, "is not in 2011"),
        (None, {"start": "2011-07-10T00:30"}, "off the 60-minute grid"),
        (None, {"channel": "flow,speed"}, "does not name the 1 channels"),
        (None, {"train": "2011-07-01:2011-07-11"}, "leaves the data's days"),
    ],
)
def test_plan_refuses(tmp_path, nodes, options, line, refused):
    raw = yearly(tmp_path, nodes)
    with refused(line):
        make_plan(raw, **options)


def test_years_that_overlap_are_refused(tmp_path):
    """400 daily frames from 10 July 2011 end in August 2012: the cadence is wrong."""
    with pytest.raises(InputError, match=r"2011.npz runs until 2012-08-12T00:00, into 2012; .*--cadence"):
        make_plan(yearly(tmp_path, rows=400), cadence=1440)


def test_graph_of_another_year_is_refused(tmp_path):
    raw = yearly(tmp_path)
    with pytest.raises(InputError, match="2 x 2, the data has 3 nodes"):
        make_plan(raw, adjacency=tmp_path / "graph" / "2011_adj.npz")


def test_files_of_other_kinds_are_refused(tmp_path):
    raw = yearly(tmp_path)
    with pytest.raises(InputError, match=r"2013_adj.npz is not named by its year"):
        make_plan(tmp_path / "graph" / "2013_adj.npz")
    with pytest.raises(InputError, match="both of 2011; give each year once"):
        READERS["yearly-npz"].plan([raw, raw / "2011.npz"], city="stream", start="2011-07-10")
    with pytest.raises(InputError, match="none was found"):
        make_plan(tmp_path)
    # The windows that the published code makes of the raw file.
    np.savez(raw / "2012.npz", train_x=np.ones((5, 12, 3)))
    with pytest.raises(InputError, match=r"no array 'x' \(T, N\); it has train_x"):
        make_plan(raw)
