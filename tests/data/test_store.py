"""The grid store: what it holds, that it is whole, and that nothing half-made takes its name."""

import json
import shutil

import numpy as np
import pytest
import xarray
import zarr

from stdist.data import DaySpan, GridSpec, GridWriter, Region, Split, open_store
from stdist.data.integrity import VerifiedStore
from stdist.data.schema import chunk_and_shard
from stdist.errors import DamageError, InputError

SPLIT = Split.parse("2013-11-01:2013-11-02", None, "2013-11-03:2013-11-03")


@pytest.fixture
def values() -> np.ndarray:
    rng = np.random.default_rng(0)
    values = rng.gamma(2, 30, (432, 4, 5)).astype(np.float32)
    values[rng.random(values.shape) < 0.05] = np.nan
    values[10, 0, 0] = 0
    return values


def test_plain_xarray_opens_it(make_store, values):
    store = make_store(values)
    plain = xarray.open_zarr(store.path)
    assert plain["internet"].dims == ("time", "row", "col") and plain["internet"].dtype == np.float32
    assert plain["observed_internet"].dtype == bool and plain["observed_internet"].dims == plain["internet"].dims
    # CF time in UTC: local midnight of 1 November is 23:00 the day before.
    assert plain["time"].values[0] == np.datetime64("2013-10-31T23:00")
    assert plain.attrs["utc_offset_minutes"] == 60 and plain.attrs["units"] == "unknown units"
    assert plain["cell_id"].values[1, 0] == 505 and plain["row"].values.tolist() == [0, 1, 2, 3]
    assert plain["inside"].values.all() and plain["present"].values.all()
    known = ~np.isnan(values)
    np.testing.assert_array_equal(plain["internet"].values[known], values[known])
    np.testing.assert_array_equal(plain["observed_internet"].values, known)
    assert plain.equals(store.dataset)


def test_metadata_is_consolidated_and_names_dimensions(make_store, values):
    root = json.loads((make_store(values).path / "zarr.json").read_text())
    arrays = root["consolidated_metadata"]["metadata"]
    assert arrays["internet"]["dimension_names"] == ["time", "row", "col"]
    assert arrays["internet"]["codecs"][0]["name"] == "sharding_indexed"
    # One shard is one local day of the whole grid.
    assert arrays["internet"]["chunk_grid"]["configuration"]["chunk_shape"] == [144, 4, 5]
    assert arrays["internet"]["attributes"]["units"] == "unknown units"


def test_large_grids_are_sharded_in_tiles():
    assert chunk_and_shard(144, (100, 100)) == ((48, 32, 32), (144, 128, 128))
    assert chunk_and_shard(144, (300, 1000)) == ((48, 32, 32), (144, 256, 256))
    assert chunk_and_shard(24, (5, 5)) == ((24, 5, 5), (24, 5, 5))


def test_a_tiled_grid_reads_back(tmp_path):
    """260 x 3 cells: two tiles, the second almost wholly outside the grid."""
    values = np.random.default_rng(0).random((2, 260, 3)).astype(np.float32)
    day = np.datetime64("2020-02-28")
    spec = GridSpec("tall", ("x",), day, day, np.arange(780).reshape(260, 3), 720)
    with GridWriter(tmp_path / "tall.zarr", spec, {}) as writer:
        writer.write_day(0, {"x": values})
        store = open_store(writer.finalise())
    np.testing.assert_array_equal(store.values("x", 0, 2), values)
    np.testing.assert_array_equal(store.values("x", 1, 2, Region(250, 260, 1, 2)), values[1:, 250:, 1:2])


def test_facts_of_the_store(make_store, values):
    store = make_store(values, split=SPLIT)
    assert store.shape == (4, 5) and store.channels == ("internet",) and store.city == "toy"
    assert store.slots_per_day == 144 and store.cadence == np.timedelta64(10, "m")
    assert store.times.dtype == np.dtype("datetime64[ns]") and len(store.times) == 432
    assert store.local_times[0] == np.datetime64("2013-11-01")
    assert store.default_split == SPLIT and store.segments == [(0, 432)]
    assert store.coverage["internet"] == {"missing": int(np.isnan(values).sum()), "true_zeros": 1}
    assert store.attributes["recipe"] == {"reader": "test"}


def test_cells_outside_the_city_are_neither_missing_nor_observed(tmp_path, values):
    inside = np.ones((4, 5), bool)
    inside[0, :2] = False
    values[:, ~inside] = np.nan
    day = np.datetime64("2013-11-01")
    spec = GridSpec("toy", ("x",), day, day + 2, np.arange(20).reshape(4, 5), inside=inside)
    with GridWriter(tmp_path / "toy.zarr", spec, {}) as writer:
        for d in range(3):
            writer.write_day(d, {"x": values[d * 144 : d * 144 + 144]})
        store = open_store(writer.finalise())
    assert store.coverage["x"]["missing"] == np.isnan(values[:, inside]).sum()
    assert (store.values("x", 0, 432)[:, ~inside] == 0).all() and not store.observed("x")[:, ~inside].any()
    np.testing.assert_array_equal(store.inside, inside)


def test_statistics_by_hand(make_store):
    """Day 1 holds 0 ... 143 in the first cell and nothing in the second; day 2 is ten times that."""
    values = np.full((288, 1, 2), np.nan, np.float32)
    values[:144, 0, 0] = np.arange(144)
    values[144:, 0] = 10 * np.arange(144)[:, None]
    store = make_store(values, split=Split.parse("2013-11-01:2013-11-01"))
    first = store.statistics("internet", store.default_split.train)
    assert (first.mean, first.maximum, first.count) == (71.5, 143, 144)
    assert first.std == pytest.approx(np.sqrt((144**2 - 1) / 12))
    assert first.cell_mean.tolist() == [[71.5, 0]]
    both = store.statistics("internet", DaySpan.parse("2013-11-01:2013-11-02"))
    seen = values[~np.isnan(values)]
    assert (both.count, both.maximum) == (432, 1430)
    assert both.mean == pytest.approx(seen.mean()) and both.std == pytest.approx(seen.std(), rel=1e-5)


def test_stored_statistics_equal_computed_ones(make_store, values):
    one, other = make_store(values, split=SPLIT), make_store(values)
    assert other.default_split != SPLIT
    stored, computed = (s.statistics("internet", SPLIT.train) for s in (one, other))
    assert stored.mean == computed.mean and stored.std == computed.std and stored.count == computed.count
    np.testing.assert_array_equal(stored.cell_mean, computed.cell_mean)
    np.testing.assert_allclose(stored.mean, np.nanmean(values[:288]), rtol=1e-6)


def test_later_data_does_not_reach_the_training_statistics(make_store, values):
    later = values.copy()
    later[288:] *= 1000
    stored = [make_store(v, split=SPLIT).statistics("internet", SPLIT.train) for v in (values, later)]
    assert stored[0].as_attribute() == stored[1].as_attribute()
    np.testing.assert_array_equal(stored[0].cell_mean, stored[1].cell_mean)


@pytest.mark.parametrize(
    ("share", "span"),
    [
        (0.1, "2013-11-01:2013-11-01 (its first 40 time steps)"),  # 39.6 of 396
        (0.001, "2013-11-01:2013-11-01 (its first 1 time steps)"),
        (144 / 396, "2013-11-01:2013-11-01"),
        (0.5, "2013-11-01:2013-11-02 (its first 234 time steps)"),  # 198 exist of these
        (252 / 396, "2013-11-01:2013-11-02"),
        (258 / 396, "2013-11-01:2013-11-03 (its first 294 time steps)"),
        (1, "2013-11-01:2013-11-03"),
    ],
)
def test_the_first_part_of_a_span_counts_frames_that_exist(make_store, share, span):
    """docs/decisions.md, 12: 10 % of the training data, not of its days rounded down."""
    present = np.ones(432, bool)
    present[150:186] = False  # 36 frames of the second day
    store = make_store(np.ones((432, 1, 1), np.float32), present)
    assert str(store.first_part(DaySpan.parse("2013-11-01:2013-11-03"), share)) == span


def test_a_part_of_a_day_is_all_that_its_windows_and_statistics_see(make_store):
    """Frames hold their own number: 10 % of 432 are 43, and nothing behind them is fitted."""
    store = make_store(np.arange(432, dtype=np.float32)[:, None, None])
    few = store.first_part(DaySpan.parse("2013-11-01:2013-11-03"), 0.1)
    assert store.statistics("internet", few).maximum == 42 and store.statistics("internet", few).count == 43
    windows = store.windows(few, 4, 3, channel="internet", history_inside=True)
    assert len(windows) == 43 - 4 - 3 + 1
    assert windows.read([len(windows) - 1]).target[0, -1, 0, 0] == 42
    with pytest.raises(InputError, match=r"no window fits span .*first 4 time steps.*has 4 frames"):
        store.windows(store.first_part(DaySpan.parse("2013-11-01:2013-11-03"), 0.01), 4, 3, channel="internet")


def test_statistics_of_an_empty_span_are_refused(make_store):
    values = np.ones((432, 1, 1), np.float32)
    present = np.arange(432) < 144
    with pytest.raises(InputError, match="no observed value of internet"):
        make_store(values, present).statistics("internet", DaySpan.parse("2013-11-02:2013-11-03"))


def test_digest_follows_the_data(make_store, values):
    changed = values.copy()
    changed[400, 3, 4] += 1
    digests = [make_store(v).digest for v in (values, values, changed)]
    assert digests[0] == digests[1] != digests[2]


def test_a_short_shard_is_named(make_store, values):
    store = make_store(values)
    shard = store.path / "internet" / "c" / "1" / "0" / "0"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"internet/c/1/0/0 has \d+ of \d+ bytes"):
        open_store(store.path)
    shard.unlink()
    with pytest.raises(InputError, match="internet/c/1/0/0 is missing"):
        open_store(store.path)


def test_what_is_no_store_is_one_clear_line(make_store, values, tmp_path):
    (tmp_path / "empty").mkdir()
    for name, line in (("absent", "does not exist"), ("empty", "holds no zarr.json")):
        with pytest.raises(InputError, match=line):
            open_store(tmp_path / name)
    root = make_store(values).path
    shutil.copytree(root, tmp_path / "cut")
    text = (root / "zarr.json").read_text()
    (tmp_path / "cut" / "zarr.json").write_text(text[: len(text) // 2])
    with pytest.raises(InputError, match=r"zarr\.json is damaged .*prepare or copy the store again"):
        open_store(tmp_path / "cut")
    (tmp_path / "cut" / "zarr.json").write_text('{"zarr_format": 3, "node_type": "group", "attributes": {}}')
    with pytest.raises(InputError, match="not a grid store"):
        open_store(tmp_path / "cut")


def _spec() -> GridSpec:
    day = np.datetime64("2013-11-01")
    return GridSpec("toy", ("x",), day, day, np.arange(4).reshape(2, 2))


def test_an_existing_name_is_refused(tmp_path):
    (tmp_path / "there.zarr").mkdir()
    with pytest.raises(InputError, match="exists already"):
        GridWriter(tmp_path / "there.zarr", _spec(), {})


def test_bad_input_leaves_nothing(tmp_path):
    with pytest.raises(InputError), GridWriter(tmp_path / "toy.zarr", _spec(), {}) as writer:
        writer.write_day(0, {"x": np.ones((144, 2, 2), np.float32)})
        raise InputError("row 7 is broken")
    assert list(tmp_path.iterdir()) == []


def test_any_other_failure_leaves_what_is_done_but_not_the_final_name(tmp_path):
    out = tmp_path / "toy.zarr"
    with pytest.raises(RuntimeError), GridWriter(out, _spec(), {}) as writer:
        writer.write_day(0, {"x": np.ones((144, 2, 2), np.float32)})
        raise RuntimeError
    assert [path.name for path in tmp_path.iterdir()] == ["toy.zarr.partial"]
    with GridWriter(out, _spec(), {}) as writer:
        assert writer.done == {"day-0"}
        writer.finalise()
    assert [path.name for path in tmp_path.iterdir()] == ["toy.zarr"]
    assert (open_store(out).values("x", 0, 144) == 1).all()


def test_a_store_without_frames_is_refused(tmp_path):
    with (
        pytest.raises(InputError, match="no frame"),
        GridWriter(tmp_path / "toy.zarr", _spec(), {}) as writer,
    ):
        writer.finalise()
    assert list(tmp_path.iterdir()) == []


def test_arrays_of_another_shape_are_refused():
    day = np.datetime64("2013-11-01")
    with pytest.raises(InputError, match=r"inside of toy has shape \(2,\), its row x col is \(2, 2\)"):
        GridSpec("toy", ("x",), day, day, np.zeros((2, 2), int), inside=np.ones(2, bool))


def test_a_cadence_that_does_not_divide_the_day_is_refused():
    day = np.datetime64("2013-11-01")
    for cadence in (7, 0, -10):
        with pytest.raises(InputError, match="does not divide a day"):
            GridSpec("toy", ("x",), day, day, np.zeros((2, 2)), cadence)


def test_a_file_that_is_not_of_the_store_is_damage(make_store):
    """A shard where the store has recorded none, as a day that somebody else's copy put there."""
    store = make_store(np.ones((288, 2, 3), np.float32))
    shard = next(name for name in store.attributes["files"] if name.startswith("internet/c/"))
    files = {name: record for name, record in store.attributes["files"].items() if name != shard}
    verified = VerifiedStore(store.path, files)
    with pytest.raises(DamageError, match=f"{shard} is not of this store"):
        zarr.open_array(verified, path="internet", mode="r")[...]
