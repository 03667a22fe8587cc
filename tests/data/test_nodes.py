"""Stores of nodes: sensors and zones in place of a grid, graph and features beside them, nodes that come later."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import xarray

from data_prep import Day, Part, Plan, prepare
from stdist.data import DaySpan, NodeRange, NodeSpec, Region, Split, open_store
from stdist.data.check import check_store
from stdist.errors import InputError

FIRST = np.datetime64("2019-01-01")
SLOTS = 24
IDS = np.array(["d4-101", "d4-102", "d11-7", "d7-9001"])


def _frames() -> np.ndarray:
    """Three days of four nodes: node j has slot + 100 j; node 3 exists from the second day on."""
    values = (np.arange(3 * SLOTS)[:, None] + 100 * np.arange(4)).astype(np.float32)
    values[5, 0] = np.nan
    values[SLOTS + 3, 1] = 0
    values[: SLOTS + 2, 3] = np.nan  # two slots of its first day are lost
    return values


def _spec(**changes: object) -> NodeSpec:
    spec = NodeSpec(
        city="sensors",
        channels=("speed",),
        first_day=FIRST,
        last_day=FIRST + 2,
        node_ids=IDS,
        cadence_minutes=60,
        utc_offset_minutes=-480,
        units="mph",
        latitude=np.array([37.1, 37.2, 32.7, 34.0]),
        longitude=np.array([-122.1, -122.2, -117.1, -118.2]),
        adjacency=np.triu(np.arange(16, dtype=np.float32).reshape(4, 4)),
        static={"lanes": np.array([4, 5, 3, 2], np.float32)},
        since=np.array([FIRST, FIRST, FIRST, FIRST + 1]),
    )
    return replace(spec, **changes)


def _plan(spec: NodeSpec, frames: np.ndarray) -> Plan:
    def read(part: Part) -> Iterator[Day]:
        for day in part.days:
            yield Day(day, {"speed": frames[day * SLOTS : (day + 1) * SLOTS]})

    parts = [Part("first", (0,)), Part("rest", (1, 2))]
    return Plan(
        spec, {"reader": "test"}, [], Split(DaySpan(FIRST, FIRST + 1), None, DaySpan(FIRST + 2, FIRST + 2)), parts, read
    )


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(_plan(_spec(), _frames()), tmp_path_factory.mktemp("nodes") / "sensors.zarr").path


def test_plain_xarray_opens_it(path):
    plain = xarray.open_zarr(path)
    assert plain["speed"].dims == ("time", "node") and plain["speed"].shape == (3 * SLOTS, 4)
    assert plain["node"].values.tolist() == IDS.tolist()
    assert plain["adjacency"].dims == ("node", "neighbour") and plain["adjacency"].values[1, 2] == 6
    assert plain["speed"].sel(node="d11-7").values[:3].tolist() == [200, 201, 202]
    assert plain["since"].values.astype("datetime64[D]").tolist() == _spec().since.tolist()
    # CF: local midnight eight hours behind UTC; coordinates travel with the channel.
    assert plain["time"].values[0] == np.datetime64("2019-01-01T08:00")
    assert {"latitude", "longitude", "since"} <= set(plain["speed"].coords)
    assert plain["static_lanes"].values.tolist() == [4, 5, 3, 2]
    assert plain["speed"].attrs["units"] == "mph"


def test_the_store_says_the_same(path):
    store = open_store(path)
    assert store.dims == ("node",) and store.shape == (4,) and check_store(store.path).ok
    assert store.cell_ids.tolist() == IDS.tolist() and store.cell_ids.dtype.kind == "U"
    assert store.since is not None and store.since[3] == FIRST + 1
    assert store.adjacency is not None and store.adjacency.dtype == np.float32
    assert store.dataset["static_lanes"].dims == ("node",) and store.inside.all()


def test_values_and_ranges(path):
    store, frames = open_store(path), _frames()
    assert store.values("speed", 0, 3 * SLOTS, NodeRange(1, 3)).shape == (3 * SLOTS, 2)
    known = store.observed("speed")
    np.testing.assert_array_equal(known, ~np.isnan(frames))
    np.testing.assert_array_equal(store.values("speed", 0, 72)[known], frames[known])
    # Eq. 20 between slots 4 and 6.
    assert store.values("speed", 5, 6)[0, 0] == 5
    assert str(store.region("1:3")) == "1:3" and store.region().shape == (4,)
    for region, line in ((Region(0, 1, 0, 1), "the store has 4 nodes"), (NodeRange(2, 5), "leaves the 4 nodes")):
        with pytest.raises(InputError, match=line):
            store.values("speed", 0, 1, region)


def test_before_a_node_exists_it_is_neither_observed_nor_missing(path):
    """Node 3: zeros on the day before; the two slots lost on its first day take the nearest value of that day."""
    store = open_store(path)
    series = store.values("speed", 0, 3 * SLOTS)[:, 3]
    assert (series[:SLOTS] == 0).all() and series[SLOTS : SLOTS + 3].tolist() == [326, 326, 326]
    assert store.coverage == {"speed": {"missing": 1 + 2, "true_zeros": 2}}


def test_values_before_a_node_exists_are_not_taken(tmp_path):
    frames = _frames()
    frames[:SLOTS, 3] = 7
    store = open_store(prepare(_plan(_spec(), frames), tmp_path / "early.zarr").path)
    assert not store.observed("speed", 0, SLOTS)[:, 3].any() and (store.values("speed", 0, SLOTS)[:, 3] == 0).all()


def test_statistics_are_per_node(path):
    store, frames = open_store(path), _frames()[: 2 * SLOTS]
    fitted = store.statistics("speed", store.default_split.train)
    assert fitted.cell_mean.shape == (4,)
    np.testing.assert_allclose(fitted.cell_mean, np.nanmean(frames, axis=0), rtol=1e-6)
    assert fitted.count == (~np.isnan(frames)).sum() and fitted.maximum == np.nanmax(frames)
    assert fitted.mean == pytest.approx(np.nanmean(frames))
    assert xarray.open_zarr(path)["train_mean_speed"].dims == ("node",)


def test_integer_ids(tmp_path):
    spec = _spec(node_ids=np.array([773869, 767541, 717447, 5]), since=None, adjacency=None, static=None)
    store = open_store(prepare(_plan(spec, _frames()), tmp_path / "ids.zarr").path)
    assert store.cell_ids.tolist() == [773869, 767541, 717447, 5]
    assert store.since is None and store.adjacency is None
    # Node 3's whole first day is missing now.
    assert store.coverage["speed"]["missing"] == 1 + SLOTS + 2


def test_many_nodes_are_sharded_in_tiles(tmp_path):
    """65,600 nodes: two shards a day, written by two parts."""
    spec = NodeSpec("many", ("x",), FIRST, FIRST, np.arange(65_600), 720)
    first, second = spec.tiles()
    assert (first, second) == ((slice(0, 65_536),), (slice(65_536, 65_600),))

    def read(part: Part) -> Iterator[Day]:
        (tile,) = part.tiles
        nodes = np.arange(tile[0].start, tile[0].stop, dtype=np.float32)
        yield Day(0, {"x": np.stack((nodes, np.full_like(nodes, np.nan)))}, tile=tile)

    parts = [Part("second", (0,), tiles=(second,)), Part("first", (0,), tiles=(first,))]
    store = open_store(prepare(Plan(spec, {}, [], None, parts, read), tmp_path / "many.zarr").path)
    np.testing.assert_array_equal(store.values("x", 0, 2), np.tile(np.arange(65_600, dtype=np.float32), (2, 1)))
    assert store.statistics("x", store.default_split.train).mean == pytest.approx(65_599 / 2)
    assert sorted(path.name for path in (store.path / "x" / "c" / "0").iterdir()) == ["0", "1"]


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"node_ids": np.array(["a", "b", "a", "c"])}, "node id a of sensors occurs twice"),
        ({"node_ids": np.zeros((2, 2), int)}, "one id a node"),
        ({"adjacency": np.zeros((3, 4), np.float32)}, r"adjacency of sensors has shape \(3, 4\)"),
        ({"since": np.array([FIRST])}, r"since of sensors has shape \(1,\)"),
        (
            {"static": {"lanes": np.zeros(3, np.float32)}},
            r"static 'lanes' of sensors has shape \(3,\), its node is \(4,\)",
        ),
        ({"cadence_minutes": 7}, "does not divide a day"),
        ({"channels": ()}, "has no channel"),
    ],
)
def test_specs_that_do_not_fit_are_refused(changes, line):
    with pytest.raises(InputError, match=line):
        _spec(**changes)


@pytest.mark.parametrize("value", ["3:3", "a:b", "1:2,3:4", (1, 2, 3), (-1, 2)])
def test_bad_ranges_say_what_to_write(value):
    with pytest.raises(InputError, match="node range"):
        NodeRange.parse(value)


def test_a_range_is_not_of_a_grid():
    with pytest.raises(InputError, match="the store is a grid of 4 x 5"):
        NodeRange(0, 2).within((4, 5))
    assert NodeRange.parse("2:5") == NodeRange(2, 5) == NodeRange.parse((2, 5))
