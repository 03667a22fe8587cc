"""Windows: how many, where, and what they hold (docs/decisions.md, 12 and 13)."""

import pickle
from collections import Counter

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from zarr.abc.store import SuffixByteRequest
from zarr.storage import LocalStore, WrapperStore

from stdist.data import DaySpan, NodeRange, Region, Split
from stdist.data.windows import window_origins
from stdist.errors import DamageError, InputError

SPLIT = Split.parse("2013-11-01:2013-11-02", None, "2013-11-03:2013-11-03")


def _counting(days: int, height: int = 2, width: int = 3) -> np.ndarray:
    """Frame t holds t * 100 + cell."""
    cells = np.arange(height * width).reshape(height, width)
    return (np.arange(days * 144)[:, None, None] * 100 + cells).astype(np.float32)


def test_counts_by_hand(make_store):
    store = make_store(_counting(3), split=SPLIT)
    # 288 frames of training: 288 - 12 - 6 + 1. 144 target frames of test, history from the day before.
    assert len(store.windows("train", 12, 6, channel="internet")) == 271
    assert len(store.windows("test", 12, 6, channel="internet")) == 139
    strict = store.windows(DaySpan.parse("2013-11-03:2013-11-03"), 12, 6, channel="internet")
    assert len(strict) == 144 - 18 + 1


def test_counts_by_hand_with_a_gap(make_store):
    """Frames 100 ... 119 are absent: runs of 100 and 168 frames in training make 83 and 151 windows."""
    present = np.ones(432, bool)
    present[100:120] = False
    windows = make_store(_counting(3), present, split=SPLIT).windows("train", 12, 6, channel="internet")
    assert len(windows) == 83 + 151
    assert (np.diff(windows.origins) > 1).sum() == 1


def test_test_history_never_reaches_over_a_gap(make_store):
    """Frames 270 ... 283 are absent, so that only 4 frames precede the test day in their run."""
    present = np.ones(432, bool)
    present[270:284] = False
    windows = make_store(_counting(3), present, split=SPLIT).windows("test", 12, 6, channel="internet")
    assert windows.origins[0] == 284 + 11 and windows.origins[-1] == 432 - 6 - 1


@given(
    st.lists(st.booleans(), min_size=1, max_size=40),
    st.integers(1, 5),
    st.integers(1, 5),
    st.data(),
    st.booleans(),
)
def test_origins_equal_a_naive_search(present, S, K, data, history_inside):
    first = data.draw(st.integers(0, len(present)))
    stop = data.draw(st.integers(first, len(present)))
    expected = [
        o
        for o in range(len(present))
        if o - S + 1 >= 0
        and o + K < len(present)
        and all(present[o - S + 1 : o + K + 1])
        and first <= (o - S + 1 if history_inside else o + 1)
        and o + K < stop
    ]
    found = window_origins(np.array(present), first, stop, S, K, history_inside=history_inside)
    assert found.tolist() == expected


@pytest.mark.parametrize("limit", [2**30, 0], ids=["cached", "from disk"])
def test_batches_hold_the_right_frames(make_store, limit):
    values = _counting(3)
    values[150, 1, 2] = np.nan
    store = make_store(values, split=SPLIT)
    store.chunk_cache.limit = limit
    region = Region(1, 2, 1, 3)
    windows = store.windows("train", 3, 2, channel="internet", region=region)
    # Windows number 147 and 10 have origins 149 and 12.
    batch = windows.read([147, 10])
    assert batch.origin_index.tolist() == [149, 12]
    assert batch.history.shape == (2, 3, 2, 3) and batch.target.shape == (2, 2, 1, 2)
    assert batch.history.dtype == batch.target.dtype == np.float32
    assert batch.history[0, :, 0, 0].tolist() == [14700, 14800, 14900]
    assert batch.target[1, :, 0, 0].tolist() == [1304, 1404]
    # Frame 150 of cell (1, 2) is imputed between 149 and 151, and says so.
    assert batch.target[0, :, 0, 1].tolist() == [15005, 15105]
    assert batch.target_observed[0, :, 0].tolist() == [[True, False], [True, True]]
    assert batch.target_observed[1].all()


def test_a_pickled_copy_leaves_the_cache_behind(make_store):
    windows = make_store(np.ones((144, 50, 50), np.float32)).windows("train", 3, 2, channel="internet")
    history = windows.read([5]).history
    pickled = pickle.dumps(windows)
    assert len(pickled) < 144 * 50 * 50
    np.testing.assert_array_equal(pickle.loads(pickled).read([5]).history, history)


def test_origin_times_are_utc(make_store):
    windows = make_store(_counting(1)).windows("train", 6, 1, channel="internet")
    # The sixth local frame of 1 November, 00:50, is 23:50 UTC of the day before.
    assert windows.origin_times[0] == np.datetime64("2013-10-31T23:50")


def test_contract_says_rule_and_count(make_store):
    store = make_store(_counting(3), split=SPLIT)
    train = store.windows("train", 12, 6, channel="internet").contract
    test = store.windows("test", 12, 6, channel="internet").contract
    assert "history included" in train and "271 windows" in train and "region 0:2,0:3" in train
    named = store.windows(SPLIT.train, 12, 6, channel="internet", name="few-shot").contract
    assert named == train.replace("train", "few-shot")
    assert "history may reach back" in test and "139 windows" in test and "2013-11-03:2013-11-03" in test


def test_too_long_windows_name_the_longest_run(make_store):
    present = np.ones(144, bool)
    present[50:80] = False
    store = make_store(_counting(1), present)
    with pytest.raises(InputError, match=r"longest gap-free run has 64 frames, S \+ K needs 65"):
        store.windows("train", 60, 5, channel="internet")


@pytest.mark.parametrize(
    ("span", "channel", "region", "line"),
    [
        ("validation", "internet", None, "no validation span"),
        ("holdout", "internet", None, "no part of a split"),
        ("train", "sms_in", None, "no channel 'sms_in'; it has internet"),
        ("train", "internet", Region(0, 3, 0, 3), "2 rows x 3 columns"),
        (DaySpan.parse("2013-11-01:2013-12-01"), "internet", None, "leaves the days"),
    ],
)
def test_bad_requests_are_one_clear_line(make_store, span, channel, region, line):
    store = make_store(_counting(1))
    with pytest.raises(InputError, match=line):
        store.windows(span, 12, 6, channel=channel, region=region)


def test_windows_need_frames(make_store):
    with pytest.raises(InputError, match="at least one frame"):
        make_store(_counting(1)).windows("train", 0, 6, channel="internet")


# Reading: what is decoded, how often, and what is held


class CountedReads(WrapperStore[LocalStore]):
    """Notes which shard every chunk is read from; a whole shard at once counts as ``ALL``."""

    ALL = "all"

    def __init__(self, path) -> None:
        super().__init__(LocalStore(path, read_only=True))
        self.reads: list[tuple[str, object]] = []

    async def get(self, key, prototype, byte_range=None):
        # The index at a shard's end is read as a suffix.
        if "/c/" in key and not isinstance(byte_range, SuffixByteRequest):
            self.reads.append((key, self.ALL if byte_range is None else (byte_range.start, byte_range.end)))
        return await super().get(key, prototype, byte_range)


def _counted(store) -> CountedReads:
    counted = CountedReads(store.path)
    store.__dict__["_arrays"] = dict(zarr.open_group(counted, mode="r").arrays())
    # These are read once, whatever the windows.
    assert store.present.any() and store.inside.any()
    counted.reads.clear()
    return counted


def test_a_region_reads_only_the_chunks_it_touches(make_store):
    """Chunks are 48 frames x 32 x 32 cells. Cells 30 ... 40 of 80 lie in two of three chunks along either axis."""
    store = make_store(np.random.default_rng(0).random((288, 80, 80), np.float32))
    counted = _counted(store)
    region = Region(30, 41, 30, 41)
    windows = store.windows("train", 6, 6, channel="internet", region=region, history_region=region)
    # Origin 60: frames 55 ... 66 lie in the second chunk of time of the first day.
    batch = windows.read([55])
    assert Counter(key for key, _ in counted.reads) == {"internet/c/0/0/0": 4, "observed_internet/c/0/0/0": 4}
    assert counted.ALL not in dict(counted.reads).values()
    np.testing.assert_array_equal(batch.history[0], store.values("internet", 55, 61, region))
    counted.reads.clear()
    # Held by now: the same frames, other windows. Then over midnight: two more chunks of time.
    windows.read([56, 57])
    assert counted.reads == []
    windows.read([133])
    assert len(counted.reads) == 2 * 2 * 4 and len(set(counted.reads)) == 16


def test_a_tile_of_a_large_grid_touches_no_other_shard(make_store):
    """300 rows are two shards along them; a region in the second leaves the first alone."""
    store = make_store(np.random.default_rng(0).random((144, 300, 8), np.float32))
    counted = _counted(store)
    tile = Region(260, 300, 0, 8)
    batch = store.windows("train", 6, 6, channel="internet").of_region(tile).read([0, 40])
    assert {key for key, _ in counted.reads} == {"internet/c/0/1/0", "observed_internet/c/0/1/0"}
    np.testing.assert_array_equal(batch.target[1], store.values("internet", 46, 52, tile))


@pytest.mark.parametrize("limit", [2**30, 0], ids=["cached", "from disk"])
def test_windows_of_a_batch_that_overlap_read_their_frames_once(make_store, limit):
    store = make_store(np.random.default_rng(0).random((144, 40, 8), np.float32))
    store.chunk_cache.limit = limit
    counted = _counted(store)
    windows = store.windows("train", 12, 36, channel="internet", region=Region(0, 8, 0, 8))
    windows.read(np.arange(len(windows)))
    # Every chunk of the day once: three along time, two along rows for the values, one for the targets' mask.
    assert len(counted.reads) == len(set(counted.reads)) == 3 * 2 + 3


@pytest.fixture(scope="module")
def whole_store(make_store):
    values = np.random.default_rng(0).random((288, 8, 8), np.float32)
    values[np.random.default_rng(1).random(values.shape) < 0.1] = np.nan
    return make_store(values)


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_batches_equal_a_naive_reading(whole_store, data):
    """Any S, K, cells and memory: the frames before and after each origin."""
    store, S, K = whole_store, data.draw(st.integers(1, 60)), data.draw(st.integers(1, 60))
    sides = st.tuples(st.integers(0, 5), st.integers(1, 3)).map(lambda side: (side[0], side[0] + side[1]))
    region, seen = (Region(*data.draw(sides), *data.draw(sides)) for _ in range(2))
    store.chunk_cache.limit = data.draw(st.sampled_from([0, 48 * 4 * 9, 10_000, 2**30]))
    windows = store.windows("train", S, K, channel="internet", region=region, history_region=seen)
    indices = data.draw(st.lists(st.integers(0, len(windows) - 1), min_size=1, max_size=6))
    batch = windows.read(indices)
    assert batch.origin_index.tolist() == windows.origins[indices].tolist()
    for row, origin in enumerate(windows.origins[indices]):
        np.testing.assert_array_equal(batch.history[row], store.values("internet", origin - S + 1, origin + 1, seen))
        after = origin + 1, origin + 1 + K, region
        np.testing.assert_array_equal(batch.target[row], store.values("internet", *after))
        np.testing.assert_array_equal(batch.target_observed[row], store.observed("internet", *after))


def test_windows_of_nodes(make_store):
    """History [B, S, N] of all nodes, or [B, S, n] of a range alone, which reads no other chunk of 1024 nodes."""
    values = np.random.default_rng(0).random((144, 1100), np.float32)
    values[30, 1050] = np.nan
    store = make_store(values)
    nodes = NodeRange(1040, 1060)
    windows = store.windows("train", 4, 3, channel="internet", region=nodes)
    batch = windows.read([25, 0])
    assert batch.history.shape == (2, 4, 1100) and batch.target.shape == (2, 3, 20)
    np.testing.assert_array_equal(batch.history[0], values[25:29])
    np.testing.assert_array_equal(batch.target[0, 0], values[29, 1040:1060])
    assert np.argwhere(~batch.target_observed).tolist() == [[0, 1, 10]]
    assert "region 1040:1060" in windows.contract

    counted = _counted(store)
    store.chunk_cache.limit = 0
    alone = windows.of_region(nodes).read([25, 0])
    np.testing.assert_array_equal(alone.history, batch.history[:, :, 1040:1060])
    np.testing.assert_array_equal(alone.target, batch.target)
    assert len(counted.reads) == 2


def test_windows_outside_the_store_are_refused(make_store):
    windows = make_store(_counting(1)).windows("train", 6, 6, channel="internet")
    with pytest.raises(InputError, match="2 rows x 3 columns"):
        windows.of_region(Region(0, 1, 0, 4))


def test_a_damaged_shard_is_one_clear_line(make_store):
    store = make_store(np.random.default_rng(0).random((144, 8, 8), np.float32))
    shard = store.path / "internet/c/0/0/0"
    content = bytearray(shard.read_bytes())
    content[:64] = bytes(64)
    shard.write_bytes(content)
    with pytest.raises(DamageError, match=r"is damaged: internet/c/0/0/0 is not as it was written"):
        store.windows("train", 6, 6, channel="internet").read([0])
