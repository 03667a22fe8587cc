"""Windows: how many, where, and what they hold (docs/decisions.md, 12 and 13)."""

import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stdist.data import DaySpan, Region, Split
from stdist.data.windows import window_origins
from stdist.errors import InputError

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
    store.frame_cache.limit = limit
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
