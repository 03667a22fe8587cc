"""The window behind which nothing is known yet."""

import numpy as np
import pytest

from stdist.data import Region, Split
from stdist.data.next_window import next_window
from stdist.errors import InputError

SPLIT = Split.parse("2013-11-01:2013-11-02", None, "2013-11-03:2013-11-03")
NOON = np.datetime64("2013-11-03T12:00")


def counting(days: int = 3) -> np.ndarray:
    """Frame t holds t * 100 + cell."""
    return (np.arange(days * 144)[:, None, None] * 100 + np.arange(6).reshape(2, 3)).astype(np.float32)


def test_the_last_frames_and_days_that_no_store_holds(make_store):
    """Frames 420 to 431 of a store whose last one is 23:50 of the third day: the targets are the fourth day's."""
    window = next_window(make_store(counting(), split=SPLIT), 12, 6, channel="internet")
    assert len(window) == 1 and window.origins.tolist() == [431]
    assert str(window.span) == "2013-11-04:2013-11-04" and window.span_name == "next"
    assert window.contract.startswith("6 steps from 2013-11-04T00:00 local time on, from the 12 frames before")
    batch = window.read([0])
    assert batch.history[0, :, 1, 2].tolist() == [t * 100 + 5 for t in range(420, 432)]
    assert batch.target.shape == (1, 6, 2, 3) and not batch.target.any() and not batch.target_observed.any()


def test_an_origin_inside_the_store_sees_no_truth(make_store):
    """Noon is frame 288 + 72; the steps go on over midnight."""
    store = make_store(counting(), split=SPLIT)
    window = next_window(store, 12, 80, channel="internet", region=Region(0, 1, 1, 3), origin=NOON)
    assert window.origins.tolist() == [360] and str(window.span) == "2013-11-03:2013-11-04"
    batch = window.read([0])
    same = store.windows("test", 12, 6, channel="internet")
    np.testing.assert_array_equal(batch.history, same.read(np.flatnonzero(same.origins == 360)).history)
    assert batch.target.shape == (1, 80, 1, 2) and not batch.target.any() and not batch.target_observed.any()
    assert window.of_region(Region(0, 1, 0, 1)).read([0]).history.shape == (1, 12, 1, 1)


def test_a_gap_at_the_end_is_behind_the_last_frame_and_counts_of_missing_values(make_store):
    """Frames from 400 on are absent; of the twelve before, one cell misses two values and another one."""
    values, present = counting(), np.ones(432, bool)
    present[400:] = False
    values[390:392, 0, 0] = values[399, 1, 2] = np.nan
    window = next_window(make_store(values, present, split=SPLIT), 12, 6, channel="internet")
    assert window.origins.tolist() == [399] and window.missing() == 3
    assert np.isfinite(window.read([0]).history).all()


def test_a_run_of_just_S_frames_is_enough_and_one_fewer_is_not(make_store):
    """Frames 330 to 348 are absent: 349 to 360, noon, are twelve."""
    present = np.ones(432, bool)
    present[330:349] = False
    store = make_store(counting(), present, split=SPLIT)
    assert next_window(store, 12, 6, channel="internet", origin=NOON).read([0]).history[0, 0, 0, 0] == 34900
    with pytest.raises(InputError, match="has 12 frames, S needs 13"):
        next_window(store, 13, 6, channel="internet", origin=NOON)


def test_what_cannot_be(make_store):
    present = np.ones(432, bool)
    present[330:358] = False
    store = make_store(counting(), present, split=SPLIT)
    with pytest.raises(InputError, match="ends at 2013-11-03T12:00 has 3 frames, S needs 12; choose a later --origin"):
        next_window(store, 12, 6, channel="internet", origin=NOON)
    frames = "its frames are of 2013-11-01T00:00 to 2013-11-03T23:50 local time"
    for origin in (NOON - np.timedelta64(30, "m"), NOON + np.timedelta64(5, "m"), np.datetime64("2013-12-01T00:00")):
        with pytest.raises(InputError, match=f"has no frame at {origin}; {frames}"):
            next_window(store, 12, 6, channel="internet", origin=origin)
