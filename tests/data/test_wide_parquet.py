"""wide-parquet: cells or nodes as columns, read by slices of days."""

import pickle
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from data_prep import READERS, wide
from stdist.data.check import check_store
from stdist.errors import InputError

FIRST = np.datetime64("2013-11-01T00:00")


def values(rows: int, columns: int = 4) -> np.ndarray:
    return np.random.default_rng(0).random((rows, columns)).astype(np.float32)


def parquet(
    folder: Path,
    data: np.ndarray,
    names: list[str] | None = None,
    stamps: np.ndarray | None = None,
    zone: str | None = None,
    row_group: int = 24,
) -> Path:
    """A wide table with a column ``time`` where stamps are given, in row groups of days."""
    columns = dict(zip(names or [f"c{i}" for i in range(data.shape[1])], data.T, strict=True))
    frame = pl.DataFrame(columns)
    if stamps is not None:
        time = pl.Series("time", stamps.astype("datetime64[ms]"))
        frame = frame.insert_column(0, time.dt.replace_time_zone(zone) if zone else time)
    path = folder / "milan.parquet"
    frame.write_parquet(path, row_group_size=row_group)
    return path


def hours(rows: int, first: np.datetime64 = FIRST) -> np.ndarray:
    return first + np.arange(rows) * np.timedelta64(60, "m")


def test_slices_of_days_give_the_whole_table(tmp_path, monkeypatch, prepared):
    """Five days in slices of two: three parts, and the same store as one slice."""
    data = values(120)
    data[30, 2] = np.nan
    path = parquet(tmp_path, data, stamps=hours(120))
    monkeypatch.setattr(wide, "SLICE_BYTES", 2 * 24 * 4 * 4)
    plan = pickle.loads(pickle.dumps(READERS["wide-parquet"].plan([path])))
    assert [part.days for part in plan.parts] == [(0, 1), (2, 3), (4,)]
    store = prepared(plan)
    assert store.shape == (2, 2) and store.cadence == np.timedelta64(60, "m") and store.city == "milan"
    seen = store.observed("internet").reshape(120, 4)
    np.testing.assert_array_equal(seen, ~np.isnan(data))
    np.testing.assert_array_equal(store.values("internet", 0, 120).reshape(120, 4)[seen], data[seen])
    assert check_store(store.path).ok


def test_reading_is_bounded_by_slices(tmp_path, monkeypatch):
    """No read of values takes more rows than a slice holds."""
    read = []
    collect = wide._collect
    monkeypatch.setattr(wide, "_collect", lambda *a: read.append(collect(*a)) or read[-1])
    monkeypatch.setattr(wide, "SLICE_BYTES", 24 * 4 * 4)
    plan = READERS["wide-parquet"].plan([parquet(tmp_path, values(240), stamps=hours(240))])
    assert read[0].shape == (240, 1)
    read.clear()
    for part in plan.parts:
        list(plan.read(part))
    assert [table.shape for table in read] == [(24, 4)] * 10


def test_absent_rows_are_gaps(tmp_path, prepared):
    data, keep = values(72), np.r_[0:20, 40:72]
    path = parquet(tmp_path, data[keep], stamps=hours(72)[keep])
    store = prepared(READERS["wide-parquet"].plan([path], width=4, height=1))
    assert store.segments == [(0, 20), (40, 72)]
    np.testing.assert_array_equal(store.values("internet", 40, 72)[:, 0], data[40:])


def test_whole_numbers_and_nulls(tmp_path):
    path = tmp_path / "counts.parquet"
    pl.DataFrame({"a": [1, None, 0], "b": [4, 5, 6]}, schema={"a": pl.Int64, "b": pl.UInt8}).write_parquet(path)
    plan = READERS["wide-parquet"].plan([path], start="2013-11-01", cadence=60, nodes=True)
    (day,) = plan.read(plan.parts[0])
    np.testing.assert_array_equal(day.values["internet"][:3], [[1, 4], [np.nan, 5], [0, 6]])


def test_stamps_with_a_zone_become_local(tmp_path, prepared):
    """2013-10-31T23:00Z is midnight in Milan, whose clocks are an hour ahead."""
    first = np.datetime64("2013-10-31T23:00")
    path = parquet(tmp_path, values(24), stamps=hours(24, first), zone="UTC")
    store = prepared(READERS["wide-parquet"].plan([path]))
    assert store.segments == [(0, 24)] and store.local_times[0] == FIRST and store.times[0] == first


def test_rows_without_stamps_need_a_start(tmp_path):
    path = parquet(tmp_path, values(24))
    plan = READERS["wide-parquet"].plan([path], start="2013-11-01T05:00", cadence=60)
    assert sum(day.present.sum() for part in plan.parts for day in plan.read(part)) == 24
    with pytest.raises(InputError, match=r"no column of stamps; .*--start"):
        READERS["wide-parquet"].plan([path])


@pytest.mark.parametrize(
    ("names", "options"),
    [
        (["4142", "4143", "4242", "4243"], {"row0": 41, "col0": 41, "id_width": 100}),
        (["4243", "4242", "4143", "4142"], {"row0": 41, "col0": 41, "id_width": 100}),
        (["3", "0", "2", "1"], {}),
        (["a", "b", "c", "d"], {}),
    ],
)
def test_cells_are_placed_by_their_ids(tmp_path, names, options):
    """Whole numbers are ids and may stand in any order; other names are taken as they stand."""
    data = values(24)
    plan = READERS["wide-parquet"].plan([parquet(tmp_path, data, names, hours(24))], **options)
    (day,) = plan.read(plan.parts[0])
    order = np.argsort([int(name) for name in names]) if names[0].isdigit() else np.arange(4)
    np.testing.assert_array_equal(day.values["internet"].reshape(24, 4), data[:, order])


def test_nodes_keep_their_ids(tmp_path, prepared):
    data = values(24, 3)
    graph = tmp_path / "weights.csv"
    graph.write_text("773869,767541,767542\n0,1,0\n1,0,0\n0,0,0\n")
    path = parquet(tmp_path, data, ["773869", "767541", "767542"], hours(24))
    plan = READERS["wide-parquet"].plan([path], nodes=True, channel="speed", adjacency=graph)
    store = prepared(plan)
    assert store.dims == ("node",) and plan.spec.node_ids.tolist() == [773869, 767541, 767542]
    np.testing.assert_array_equal(store.values("speed", 0, 24), data)
    assert store.dataset["adjacency"].values.tolist() == [[0, 1, 0], [1, 0, 0], [0, 0, 0]]
    assert plan.spec.adjacency.tobytes() not in pickle.dumps((plan.read, plan.parts))


@pytest.mark.parametrize(
    ("table", "options", "line"),
    [
        ({"stamps": hours(24)[::-1]}, {}, "run backwards at 2013-11-01T22:00"),
        ({"stamps": np.r_[hours(23), hours(23)[-1:]]}, {}, "2013-11-01T22:00 occurs twice"),
        ({"stamps": hours(24)}, {"cadence": 10}, "60 minutes apart, not 10"),
        ({"stamps": hours(24)}, {"start": "2013-11-01"}, "stamps of its own in column 'time'"),
        ({"stamps": hours(24) + np.timedelta64(7, "m")}, {}, "off the 60-minute grid"),
        ({"stamps": hours(24).astype("datetime64[s]") + np.timedelta64(1, "s")}, {}, "not a whole minute"),
        ({"stamps": hours(24), "names": ["1", "2", "3", "9"]}, {}, "columns are named 1 … 9"),
        ({"stamps": hours(24)}, {"height": 3}, "not 3 x 1"),
        ({"stamps": hours(24)}, {"adjacency": Path("a.csv")}, "--adjacency is for nodes"),
        ({"stamps": hours(24)}, {"train": "2013-11-01:2013-11-02"}, "leaves the data's days"),
    ],
)
def test_plan_refuses(tmp_path, table, options, line, refused):
    path = parquet(tmp_path, values(24), **table)
    with refused(line):
        READERS["wide-parquet"].plan([path], **options)


def test_columns_that_are_no_numbers_are_refused(tmp_path):
    path = tmp_path / "t.parquet"
    pl.DataFrame({"a": [1.0], "b": ["x"]}).write_parquet(path)
    with pytest.raises(InputError, match="column 'b' is String, not numbers"):
        READERS["wide-parquet"].plan([path], start="2013-11-01")
    pl.DataFrame({"a": pl.Series([], dtype=pl.Float64)}).write_parquet(path)
    with pytest.raises(InputError, match="holds no row"):
        READERS["wide-parquet"].plan([path], start="2013-11-01")


def test_negative_values_are_named_by_time_and_cell(tmp_path):
    data = values(24)
    data[7, 3] = -0.5
    plan = READERS["wide-parquet"].plan([parquet(tmp_path, data, stamps=hours(24))])
    with pytest.raises(InputError, match=r"internet is -0.5 at 2013-11-01T07:00, index 1, 1"):
        list(plan.read(plan.parts[0]))


def test_file_cut_short_is_refused(tmp_path):
    path = parquet(tmp_path, values(24), stamps=hours(24))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InputError, match="no Parquet file, or was cut short"):
        READERS["wide-parquet"].plan([path])
