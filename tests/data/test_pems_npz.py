"""pems-npz and zones-npz: one array over nodes, their graph, and what is refused."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import xarray

from data_prep import READERS
from stdist.data.check import check_store
from stdist.errors import InputError

T, N = 300, 4
plan_pems = READERS["pems-npz"].plan


def frames(channels: int = 3) -> np.ndarray:
    """(T, N, C) as PEMS04: float64, night zeros; here with one NaN."""
    data = np.random.default_rng(0).integers(1, 100, (T, N, channels)).astype(np.float64)
    data[:10, 0] = 0
    data[20, 1, 0] = np.nan
    return data


def pems(folder: Path, name: str = "PEMS04.npz", **arrays: np.ndarray) -> Path:
    """A file as the public ones: one compressed array ``data``."""
    np.savez_compressed(folder / name, **(arrays or {"data": frames()}))
    return folder / name


def text(folder: Path, name: str, lines: str) -> Path:
    (folder / name).write_text(lines)
    return folder / name


def test_frames_are_read_back_and_zeros_are_measured(tmp_path, prepared):
    """300 frames of 5 minutes from 23:00 touch three days and are one run."""
    path = pems(tmp_path)
    plan = plan_pems([path], start="2018-01-01T23:00")
    store = prepared(plan)
    assert store.dims == ("node",) and store.shape == (N,) and store.channels == ("flow", "occupancy", "speed")
    assert store.city == "pems04" and store.segments == [(276, 576)]
    assert store.local_times[276] == np.datetime64("2018-01-01T23:00")
    seen = store.observed("flow", 276, 576)
    np.testing.assert_array_equal(seen, ~np.isnan(frames()[..., 0]))
    for index, channel in enumerate(store.channels):
        values = store.values(channel, 276, 576)
        known = ~np.isnan(frames()[..., index])
        np.testing.assert_array_equal(values[known], frames()[..., index][known].astype(np.float32))
    assert store.coverage["flow"]["missing"] == 1 and store.coverage["flow"]["true_zeros"] == 10
    assert check_store(store.path).ok


def test_plan_is_picklable_and_reads_no_data(tmp_path, monkeypatch):
    path = pems(tmp_path)
    monkeypatch.setattr(np, "load", lambda *a, **k: pytest.fail("the plan read the array"))
    plan = pickle.loads(pickle.dumps(plan_pems([path], start="2018-01-01")))
    monkeypatch.undo()
    (part,) = plan.parts
    assert [day.index for day in plan.read(part)] == [0, 1] == list(part.days)


def test_flow_alone_and_named_channels(tmp_path):
    one = pems(tmp_path, "pems03.npz", data=frames(1))
    assert plan_pems([one], start="2018-09-01").spec.channels == ("flow",)
    two = pems(tmp_path, "two.npz", data=frames(2))
    assert plan_pems([two], start="2018-09-01", channels="flow, speed").spec.channels == (
        "flow",
        "speed",
    )


def test_an_array_of_two_axes_under_any_name(tmp_path):
    path = pems(tmp_path, "loop.npz", flows=frames(1)[..., 0], mean=np.zeros(N))
    plan = plan_pems([path], start="2018-09-01", array="flows")
    (day, *_) = plan.read(plan.parts[0])
    assert plan.spec.channels == ("flow",) and plan.spec.shape == (N,)
    np.testing.assert_array_equal(day.values["flow"][day.present], frames(1)[: day.present.sum(), :, 0])


def test_edges_become_weights_of_their_distance(tmp_path):
    """exp(-(d / sigma)^2), hand-computed: distances 1 and 3 have sigma 1; direction is the file's."""
    edges = text(tmp_path, "distance.csv", "from,to,cost\n0,1,1.0\n2,0,3.0\n")
    plan = plan_pems([pems(tmp_path)], start="2018-01-01", adjacency=edges)
    expected = np.zeros((N, N))
    expected[0, 1], expected[2, 0] = np.exp(-1), np.exp(-9)
    np.testing.assert_allclose(plan.spec.adjacency, expected, rtol=1e-6)
    assert plan.recipe["adjacency_sigma"] == 1.0 and edges in plan.sources
    # Parts that go to other processes leave the graph behind.
    assert plan.spec.adjacency.tobytes() not in pickle.dumps((plan.read, plan.parts))


def test_edges_of_stations_need_their_ids(tmp_path):
    """PEMS03 names stations; PEMS03.txt lists them in the data's order."""
    edges = text(tmp_path, "PEMS03.csv", "from,to,distance\n313344,311930,0.5\n")
    ids = text(tmp_path, "PEMS03.txt", "311903\n311930\n313344\n317080\n")
    path = pems(tmp_path)
    plan = plan_pems([path], start="2018-09-01", adjacency=edges, node_ids=ids)
    assert plan.spec.node_ids.tolist() == [311903, 311930, 313344, 317080]
    assert np.argwhere(plan.spec.adjacency).tolist() == [[2, 1]]
    with pytest.raises(InputError, match=r"line 2: 313344,311930,0.5 names a node that the data lacks; .*--node-ids"):
        plan_pems([path], start="2018-09-01", adjacency=edges)


def test_zones_with_their_tables(tmp_path, prepared):
    """A table of weights with a header of positions, and a table of zones in another order of rows."""
    flows = np.random.default_rng(1).integers(0, 9, (48, 3, 2)).astype(np.float64)
    path = pems(tmp_path, "nyc_inoutflow.npz", arr_0=flows)
    weights = text(tmp_path, "adjacency.csv", "0,1,2\n0,1,0\n1,0,0.5\n0,0.5,0\n")
    zones = text(tmp_path, "zones.csv", "zone_id,graph_id,zone_name\n13,2,C\n4,0,A\n12,1,B\n")
    plan = READERS["zones-npz"].plan([path], start="2019-01-01", adjacency=weights, node_ids=zones)
    store = prepared(plan)
    assert store.channels == ("flow_in", "flow_out") and store.city == "nyc"
    np.testing.assert_array_equal(store.values("flow_out", 0, 48), flows[..., 1])
    assert plan.spec.node_ids.tolist() == [4, 12, 13]
    assert plan.spec.adjacency.tolist() == [[0, 1, 0], [1, 0, 0.5], [0, 0.5, 0]]


def test_square_tables_with_a_named_first_column_and_as_arrays(tmp_path):
    path = pems(tmp_path, data=frames()[:, :2])
    table = [[0, 2], [1, 0]]
    named = text(tmp_path, "named.csv", "id,0,1\n0,0,2\n1,1,0\n")
    bare = text(tmp_path, "bare.csv", "0,2\n1,0\n")
    np.save(tmp_path / "table.npy", np.array(table))
    for weights in (named, bare, tmp_path / "table.npy"):
        assert plan_pems([path], start="2018-01-01", adjacency=weights).spec.adjacency.tolist() == table


@pytest.mark.parametrize(
    ("arrays", "options", "line"),
    [
        ({"x": frames()}, {}, r"no array 'data' \(T, N\) or \(T, N, C\); it has x"),
        ({"data": frames()[0, 0]}, {}, r"float64 \(3,\); it must hold numbers \(T, N\) or \(T, N, C\)"),
        ({"data": frames().astype(str)}, {}, r"must hold numbers"),
        ({"data": frames()[:0]}, {}, r"\(0, 4, 3\); it must hold"),
        ({"data": np.array([[[object()]]])}, {}, "pickled Python objects, which are never loaded"),
        ({"data": frames(2)}, {}, "2 channels; name them in order: --channels"),
        ({"data": frames()}, {"channels": "flow,speed"}, "does not name the 3 channels"),
        ({"data": frames()}, {"channels": "flow,flow,speed"}, "does not name the 3 channels"),
        ({"data": frames()}, {"start": None}, "no time stamps; .*--start 2018-01-01"),
        ({"data": frames()}, {"start": "2018-01-01T00:02"}, "off the 5-minute grid"),
        ({"data": frames()}, {"cadence": 7}, "7"),
        ({"data": frames()}, {"train": "2018-01-01:2018-01-03"}, "leaves the data's days"),
    ],
)
def test_plan_refuses(tmp_path, arrays, options, line, refused):
    path = pems(tmp_path, **arrays)
    with refused(line):
        plan_pems([path], **{"start": "2018-01-01", **options})


@pytest.mark.parametrize("value", [-1.0, np.inf])
def test_values_that_are_no_traffic_are_named(tmp_path, value):
    data = frames()
    data[290, 2, 1] = value
    plan = plan_pems([pems(tmp_path, data=data)], start="2018-01-01")
    with pytest.raises(InputError, match=rf"occupancy is {value} at 2018-01-02T00:10, index 2 \(1 such values from "):
        list(plan.read(plan.parts[0]))


def test_cut_short_or_damaged_files_are_refused(tmp_path):
    path = pems(tmp_path)
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 0xFF
    path.write_bytes(flipped)
    plan = plan_pems([path], start="2018-01-01")
    with pytest.raises(InputError, match="is damaged"):
        list(plan.read(plan.parts[0]))
    path.write_bytes(whole[:-100])
    with pytest.raises(InputError, match=r"no .npy or .npz file, or was cut short"):
        plan_pems([path], start="2018-01-01")
    np.save(tmp_path / "pems.npy", frames())
    (tmp_path / "pems.npy").write_bytes((tmp_path / "pems.npy").read_bytes()[:-8])
    with pytest.raises(InputError, match="cut short, 8 bytes are missing"):
        plan_pems([tmp_path / "pems.npy"], start="2018-01-01")


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("a.csv", "0,1\n1,0\n", "2 x 2, the data has 4 nodes"),
        ("a.csv", "9,1,2,3\n" + "0,0,0,0\n" * 4, "names other nodes than the data"),
        ("a.csv", "0,0,0,0\n" * 3 + "0,0,-1,0\n", "negative or not finite"),
        ("a.csv", "0,0,0,0\n" * 3 + "0,0,x,0\n", "'x' is not a number"),
        ("a.csv", "from,to,cost\n", "holds no edges"),
        ("a.csv", "from,to,cost\n0,1,-2\n", "distance -2.0 is negative"),
        ("a.csv", "from,to,cost\n0,4,2\n", "line 2: 0,4,2 names a node that the data lacks"),
        ("a.csv", "", "is empty"),
    ],
)
def test_graphs_that_do_not_fit_are_refused(tmp_path, name, content, line, refused):
    graph = text(tmp_path, name, content)
    with refused(line):
        plan_pems([pems(tmp_path)], start="2018-01-01", adjacency=graph)


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("1\n2\n3\n", "names 3 nodes, the data has 4"),
        ("1\n2\n3\n3\n", "'3' occurs twice"),
        ("zone,name\n1,a\n", "has no column of ids"),
        ("zone_id,graph_id\n1,0\n2,1\n3,2\n4,4\n", "'graph_id' does not count 0 … 3"),
    ],
)
def test_tables_of_nodes_that_do_not_fit_are_refused(tmp_path, content, line):
    table = text(tmp_path, "nodes.csv", content)
    with pytest.raises(InputError, match=line):
        plan_pems([pems(tmp_path)], start="2018-01-01", node_ids=table)


def test_zones_of_manhattan(real_data, prepared):
    folder = real_data / "nyc_zones"
    path = folder / "nyc_taxi_60min_inoutflow_2019_2020.npz"
    graph = {"adjacency": folder / "adjacency.csv", "node_ids": folder / "zones.csv"}
    store = prepared(READERS["zones-npz"].plan([path], start="2019-01-01", **graph))
    raw = np.load(path)["arr_0"].astype(np.float32)
    assert store.shape == (69,) and store.segments == [(0, 17544)]
    assert store.local_times[-1] == np.datetime64("2020-12-31T23:00")
    for index, channel in enumerate(("flow_in", "flow_out")):
        np.testing.assert_array_equal(store.values(channel, 0, 17544), raw[..., index])
        assert store.observed(channel).all()
    dataset = xarray.open_zarr(store.path, consolidated=True)
    assert dataset["node"].values[:3].tolist() == [4, 12, 13]
    # Alphabet City touches East Village, Lower East Side, Stuyvesant Town and Two Bridges in the file.
    assert np.flatnonzero(dataset["adjacency"].values[0]).tolist() == [13, 35, 51, 55]
    assert check_store(store.path).ok
