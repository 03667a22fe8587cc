"""Tables in Parquet, arrays, and several files; grids of their places."""

import pickle
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from data_prep import READERS, table, table_parquet
from stdist.data.check import check_store
from stdist.errors import InputError

FIRST = np.datetime64("2013-11-01T00:00")


def values(rows: int, columns: int = 4) -> np.ndarray:
    return np.random.default_rng(0).random((rows, columns)).astype(np.float32)


def hours(rows: int, first: np.datetime64 = FIRST) -> np.ndarray:
    return first + np.arange(rows) * np.timedelta64(60, "m")


def parquet(
    folder: Path,
    data: np.ndarray,
    names: list[str] | None = None,
    stamps: np.ndarray | None = None,
    zone: str | None = None,
    name: str = "milan",
) -> Path:
    """A wide table with a column ``time`` where stamps are given, in row groups of days."""
    frame = pl.DataFrame(dict(zip(names or [f"c{i}" for i in range(data.shape[1])], data.T, strict=True)))
    if stamps is not None:
        time = pl.Series("time", stamps.astype("datetime64[ms]"))
        frame = frame.insert_column(0, time.dt.replace_time_zone(zone) if zone else time)
    frame.write_parquet(path := folder / f"{name}.parquet", row_group_size=24)
    return path


def test_slices_of_days_give_the_whole_table(tmp_path, monkeypatch, prepared):
    """Five days in slices of two: three parts, and the same store as one slice."""
    data = values(120)
    data[30, 2] = np.nan
    path = parquet(tmp_path, data, stamps=hours(120))
    monkeypatch.setattr(table, "SLICE_BYTES", 2 * 24 * 4 * 4)
    plan = pickle.loads(pickle.dumps(READERS["table"].plan([path], height=2, channel="internet")))
    assert [part.days for part in plan.parts] == [(0, 1), (2, 3), (4,)]
    store = prepared(plan)
    assert store.shape == (2, 2) and store.cadence == np.timedelta64(60, "m") and store.city == "milan"
    seen = store.observed("internet").reshape(120, 4)
    np.testing.assert_array_equal(seen, ~np.isnan(data))
    np.testing.assert_array_equal(store.values("internet", 0, 120).reshape(120, 4)[seen], data[seen])
    assert check_store(store.path).ok


def test_reading_is_bounded_by_slices(tmp_path, monkeypatch):
    """Beyond the sample no read of values takes more rows than a slice holds."""
    path = parquet(tmp_path, values(480), stamps=hours(480))
    read = []
    collect = table_parquet.collect
    monkeypatch.setattr(table_parquet, "collect", lambda *a: read.append(collect(*a)) or read[-1])
    monkeypatch.setattr(table, "SLICE_BYTES", 24 * 4 * 4)
    plan = READERS["table"].plan([path])
    assert all(frame.width == 1 or len(frame) <= 200 for frame in read)
    read.clear()
    for part in plan.parts:
        list(plan.read(part))
    assert [frame.shape for frame in read] == [(24, 4)] * 20


def test_only_a_parts_rows_travel_with_it(tmp_path, monkeypatch, read_table):
    """A table of text is read once: what another process gets is its own days."""
    rows = "".join(f"{stamp},{n},1.5\n" for n, stamp in enumerate(hours(240)))
    monkeypatch.setattr(table, "SLICE_BYTES", 24 * 4 * 2)
    plan = read_table("time,a,b\n" + rows).plan
    assert len(plan.parts) == 10 and all(len(pickle.dumps(part)) < 5000 for part in plan.parts)
    (day,) = plan.read(pickle.loads(pickle.dumps(plan.parts[3])))
    assert day.values["value"][:, 0].tolist() == list(range(72, 96))


def test_absent_rows_are_gaps(tmp_path, prepared):
    data, keep = values(72), np.r_[0:20, 40:72]
    store = prepared(READERS["table"].plan([parquet(tmp_path, data[keep], stamps=hours(72)[keep])]))
    assert store.segments == [(0, 20), (40, 72)]
    np.testing.assert_array_equal(store.values("value", 40, 72), data[40:])


def test_rows_of_parquet_in_any_order(tables, tmp_path):
    data = values(48)
    order = np.random.default_rng(1).permutation(48)
    read = tables.read_plan(READERS["table"].plan([parquet(tmp_path, data[order], stamps=hours(48)[order])]))
    np.testing.assert_array_equal(read.values["value"], data)


def test_whole_numbers_nulls_and_indices_of_frames(tables, tmp_path):
    path = tmp_path / "counts.parquet"
    columns = {"a": [1, None, 0], "b": [4, 5, 6], "__index_level_0__": [0, 1, 2]}
    pl.DataFrame(columns, schema={"a": pl.Int64, "b": pl.UInt8, "__index_level_0__": pl.Int64}).write_parquet(path)
    read = tables.read_plan(READERS["table"].plan([path], start="2013-11-01", cadence=60))
    assert read.ids == ["a", "b"] and read.values == {"value": [[1, 4], [None, 5], [0, 6]]}
    times = pl.Series("__index_level_0__", hours(3).astype("datetime64[ns]"))
    pl.DataFrame({"a": [1.0, np.nan, 0.0], "b": [4, 5, 6]}).with_columns(times).write_parquet(path)
    read = tables.read_plan(READERS["table"].plan([path]))
    assert read.ids == ["a", "b"] and read.values == {"value": [[1, 4], [None, 5], [0, 6]]}


def test_long_parquet_with_epochs_and_great_ids(tables, tmp_path):
    path = tmp_path / "long.parquet"
    ids = pl.Series("sensor", [2**63 + 5, 7] * 2, dtype=pl.UInt64)
    stamps = pl.Series("ts", [1383260400000] * 2 + [1383264000000] * 2)
    pl.DataFrame([ids, stamps, pl.Series("speed", [1.0, 2.0, 3.0, 4.0])]).write_parquet(path)
    read = tables.read_plan(READERS["table"].plan([path], utc_offset=60))
    assert read.ids == ["7", str(2**63 + 5)] and read.stamps == ["2013-11-01 00:00", "2013-11-01 01:00"]
    assert read.values == {"speed": [[2, 1], [4, 3]]}


def test_stamps_with_a_zone_become_local(tmp_path, prepared):
    """2013-10-31T23:00Z is midnight in Milan, whose clocks are an hour ahead."""
    first = np.datetime64("2013-10-31T23:00")
    store = prepared(READERS["table"].plan([parquet(tmp_path, values(24), stamps=hours(24, first), zone="UTC")]))
    assert store.segments == [(0, 24)] and store.local_times[0] == FIRST and store.times[0] == first


@pytest.mark.parametrize(
    ("names", "options"),
    [
        (["4142", "4143", "4242", "4243"], {"row0": 41, "col0": 41, "id_width": 100}),
        (["4243", "4242", "4143", "4142"], {"row0": 41, "col0": 41, "id_width": 100}),
        (["3", "0", "2", "1"], {"height": 2}),
        (["a", "b", "c", "d"], {"width": 2}),
    ],
)
def test_cells_are_placed_by_their_ids(tmp_path, names, options):
    """Whole numbers are ids and may stand in any order; other names are taken as they stand."""
    data = values(24)
    plan = READERS["table"].plan([parquet(tmp_path, data, names, hours(24))], **options)
    (day,) = plan.read(plan.parts[0])
    order = np.argsort([int(name) for name in names]) if names[0].isdigit() else np.arange(4)
    np.testing.assert_array_equal(day.values["value"].reshape(24, 4), data[:, order])


def test_cells_without_a_row_are_missing(read_table):
    """A long table of a 2 x 2 grid that never names cell 3."""
    rows = "".join(f"{cell},2019-01-01 0{hour}:00,{10 * cell + hour}\n" for hour in range(2) for cell in (4, 1, 2))
    read = read_table("cell,time,v\n" + rows, height=2, width=2)
    assert read.values == {"v": [[10, 20, None, 40], [11, 21, None, 41]]} and read.ids == [1, 2, 3, 4]


def test_squares_of_a_geometry(geometry_files, read_table, refused, tmp_path):
    """Three squares of a 2 x 2 rectangle: the fourth cell is outside the city."""
    path = geometry_files.write_geometry(tmp_path / "city.geojson", {7: (0, 0), 9: (0, 1), 5: (1, 1)})
    rows = "".join(f"{cell},2019-01-01 0{hour}:00,{10 * cell + hour}\n" for hour in range(2) for cell in (9, 5))
    read = read_table("cell,time,v\n" + rows, geometry=path)
    assert read.ids == [7, 9, -1, 5] and read.plan.spec.inside.tolist() == [[True, True], [False, True]]
    assert read.values == {"v": [[None, 90, None, 50], [None, 91, None, 51]]}
    with refused("place '8' is no square of"):
        read_table("cell,time,v\n" + rows.replace("9,", "8,"), geometry=path)
    with refused("--geometry tells rows and columns itself"):
        read_table("cell,time,v\n" + rows, geometry=path, height=2)


def test_nodes_keep_their_ids_and_graph(tmp_path, prepared):
    data = values(24, 3)
    graph = tmp_path / "weights.csv"
    graph.write_text("773869,767541,767542\n0,1,0\n1,0,0\n0,0,0\n")
    path = parquet(tmp_path, data, ["773869", "767541", "767542"], hours(24))
    plan = READERS["table"].plan([path], channel="speed", adjacency=graph)
    store = prepared(plan)
    assert store.dims == ("node",) and plan.spec.node_ids.tolist() == [773869, 767541, 767542]
    np.testing.assert_array_equal(store.values("speed", 0, 24), data)
    assert store.dataset["adjacency"].values.tolist() == [[0, 1, 0], [1, 0, 0], [0, 0, 0]]
    assert plan.spec.adjacency.tobytes() not in pickle.dumps((plan.read, plan.parts))


@pytest.mark.parametrize(
    ("given", "options", "line"),
    [
        ({"stamps": np.r_[hours(23), hours(23)[-1:]]}, {}, "2013-11-01T22:00:00 occurs twice with different values"),
        ({"stamps": hours(24)}, {"cadence": 10}, "60 minutes apart, not 10"),
        ({"stamps": hours(24)}, {"start": "2013-11-01"}, "stamps of its own in column 'time'"),
        ({"stamps": hours(24) + np.timedelta64(7, "m")}, {}, "off the 60-minute grid"),
        ({"stamps": hours(24).astype("datetime64[s]") + np.timedelta64(1, "s")}, {}, "not a whole minute"),
        ({"stamps": hours(24), "names": ["1", "2", "3", "9"]}, {"height": 2}, "columns are named 1 … 9"),
        ({"stamps": hours(24)}, {"height": 3}, "not 3 x 1"),
        ({"stamps": hours(24)}, {"height": 0}, "has no cell"),
        ({"stamps": hours(24)}, {"height": 2, "adjacency": Path("a.csv")}, "--adjacency is for nodes"),
        ({"stamps": hours(24)}, {"train": "2013-11-01:2013-11-02"}, "leaves the data's days"),
    ],
)
def test_plan_refuses(tmp_path, given, options, line, refused):
    path = parquet(tmp_path, values(24), **given)
    with refused(line):
        READERS["table"].plan([path], **options)


def test_spans_and_places_in_several_files(tables, tmp_path):
    """Two months of two sensors, a file each: by stamps, whatever the order of the files."""
    data = values(48, 4)
    files = [
        parquet(tmp_path, data[a:b, columns], [f"c{i}" for i in columns], hours(48)[a:b], name=name)
        for name, a, b, columns in (("z", 0, 24, [0, 1]), ("y", 24, 48, [0, 1]), ("x", 0, 48, [3, 2]))
    ]
    for sources in (files, files[::-1]):
        read = tables.read_plan(READERS["table"].plan(sources))
        order = [read.ids.index(f"c{i}") for i in range(4)]
        np.testing.assert_array_equal(np.array(read.values["value"])[:, order], data)
    parquet(tmp_path, data[20:30] + 1, None, hours(48)[20:30], name="w")
    with pytest.raises(InputError, match=r"w.parquet: 2013-11-01T20:00:00 occurs twice with different values"):
        READERS["table"].plan([*files, tmp_path / "w.parquet"])


def test_files_of_one_place_each(read_table):
    """Their spans lie apart: one place; they do not: two, named by their files."""
    head = "time,flow\n"
    months = {"s_2013.csv": head + "2013-01-01 00:00,3\n2013-01-01 12:00,4\n",
              "s_2012.csv": head + "2012-12-31 00:00,1\n2012-12-31 12:00,2\n"}  # fmt: skip
    read = read_table(months)
    assert read.ids == ["s"] and read.values == {"flow": [[1], [2], [3], [4]]}
    read = read_table({"A.csv": months["s_2012.csv"], "B.csv": months["s_2012.csv"]})
    assert read.ids == ["A", "B"] and read.values == {"flow": [[1, 1], [2, 2]]}


def test_files_without_stamps_follow_one_another_or_are_channels(read_table):
    files = {"flow_10.csv": "a,b\n5,6.5\n", "flow_9.csv": "a,b\n1,2.5\n3,4.5\n"}
    read = read_table(files, start="2019-01-01", cadence=60)
    assert read.values == {"value": [[1, 2.5], [3, 4.5], [5, 6.5]]} and "flow_9.csv, flow_10.csv" in read.plan.said[0]
    pair = {"in.csv": "a,b\n5,6.5\n", "out.csv": "a,b\n1,2.5\n"}
    read = read_table(pair, start="2019-01-01", cadence=60, channel="flow_in,flow_out")
    assert read.values == {"flow_in": [[5, 6.5]], "flow_out": [[1, 2.5]]}


@pytest.mark.parametrize(
    ("files", "line"),
    [
        ({"a.csv": "a,b\n5,6.5\n", "b.csv": "a,c\n5,6.5\n"}, "b.csv has other places than"),
        ({"a.csv": "a,b\n5,6.5\n", "b.csv": "time,a\n2019-01-01,6.5\n"}, "stamps of its own"),
        ({"a.csv": "a,b\n5,6.5\n", "b.npy": b"\x93NUMPY"}, "no .npy or .npz file|cut short"),
    ],
)
def test_files_that_do_not_belong_together(read_table, refused, files, line):
    with refused(line):
        read_table(files, start="2019-01-01", cadence=60)


def test_arrays(tables, tmp_path, refused):
    data = values(6, 4).reshape(6, 2, 2)
    np.savez(tmp_path / "pems.npz", data=data, mean=np.ones((2, 2)))
    np.save(tmp_path / "loop.npy", data[..., 0])
    options = {"start": "2019-01-01", "cadence": 60}
    with refused(r"holds 2 arrays of numbers .data \(6, 2, 2\), mean \(2, 2\).; choose one with --array"):
        READERS["table"].plan([tmp_path / "pems.npz"], **options)
    plan = READERS["table"].plan(
        [tmp_path / "pems.npz"], array="data", channel="flow,speed", missing=str(data[0, 0, 0]), **options
    )
    read = tables.read_plan(plan)
    np.testing.assert_array_equal(read.values["speed"], data[..., 1])
    assert read.values["flow"][0][0] is None or np.float64(str(data[0, 0, 0])) != data[0, 0, 0]
    plan = READERS["table"].plan([tmp_path / "loop.npy"], channel="speed", **options)
    np.testing.assert_array_equal(tables.read_plan(plan).values["speed"], data[..., 0])


def test_a_frame_of_pandas_in_any_order(tables, tmp_path, write_frame):
    data, order = values(30, 3).astype(float), np.random.default_rng(2).permutation(30)
    path = write_frame(tmp_path / "metr.h5", hours(30)[order], ["7", "8", "9"], data[order], key="df")
    read = tables.read_plan(READERS["table"].plan([path], channel="speed"))
    np.testing.assert_array_equal(read.values["speed"], data.astype(np.float32))
    assert read.ids == [7, 8, 9] and read.stamps[0] == "2013-11-01 00:00"


def test_great_ids_of_a_frame_are_text(tmp_path, write_frame):
    """They were wrapped to negative numbers."""
    ids = np.array([2**63 + 1, 7], np.uint64)
    path = write_frame(tmp_path / "metr.h5", hours(30), ids, values(30, 2).astype(float))
    assert READERS["dcrnn-h5"].plan([path]).spec.node_ids.tolist() == [str(2**63 + 1), "7"]


@pytest.mark.parametrize("reader", ["dcrnn-h5", "pems-npz", "city-npz", "xarray"])
def test_every_reader_names_a_pickle_and_an_archive(tmp_path, reader, refused):
    options = {} if reader in ("dcrnn-h5", "xarray") else {"start": "2019-01-01"}
    for name, content, what in (
        ("metr-la.pkl", pickle.dumps({"a": 1}), "is a pickle, which could run any program"),
        ("metr-la.zip", b"PK\x05\x06" + bytes(18), "is a zip archive; unpack it first: unzip metr-la.zip"),
        ("metr-la.h5", b"<!DOCTYPE html>", "is a page of HTML"),
    ):
        (path := tmp_path / name).write_bytes(content)
        with refused(what):
            READERS[reader].plan([path], **options)


def test_a_byte_order_mark_before_places_and_geometry(tmp_path, geometry_files, read_table):
    (meta := tmp_path / "meta.csv").write_text("sensor_id,latitude,longitude\n7,45.5,9.25\n8,46.5,9.5\n", "utf-8-sig")
    read = read_table("time,7,8\n2019-01-01,1,2\n2019-01-02,3,4\n", meta=meta)
    assert read.plan.spec.latitude.tolist() == [45.5, 46.5]
    path = geometry_files.write_geometry(tmp_path / "city.geojson", {7: (0, 0), 8: (0, 1)})
    path.write_text(path.read_text(), "utf-8-sig")
    assert read_table("time,7,8\n2019-01-01,1,2\n2019-01-02,3,4\n", geometry=path).ids == [7, 8]
