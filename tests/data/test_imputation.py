"""Imputation: "Vision-LLMs for Spatiotemporal Traffic Forecasting", Eq. 20."""

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stdist.data import GridSpec, GridWriter, imputation, open_store
from stdist.data.imputation import Nearest, first_observed, interpolate, last_observed
from stdist.data.shards import Shards

NAN = np.nan


def _one_cell(values: list[float]) -> tuple[np.ndarray, np.ndarray]:
    column = np.array(values, np.float32)[:, None]
    return column, ~np.isnan(column)


def test_eq20_by_hand():
    """t_start = 1 with 10, t_end = 5 with 30: 10 + (t - 1) / 4 * 20."""
    filled = interpolate(*_one_cell([7, 10, NAN, NAN, NAN, 30, 8]))
    assert filled[:, 0].tolist() == [7, 10, 15, 20, 25, 30, 8]


def test_edges_take_the_nearest_known_value_and_an_unseen_cell_is_zero():
    values, observed = _one_cell([NAN, NAN, 4, NAN, 6, NAN])
    assert interpolate(values, observed)[:, 0].tolist() == [4, 4, 4, 5, 6, 6]
    assert interpolate(*_one_cell([NAN, NAN]))[:, 0].tolist() == [0, 0]


def test_eq20_with_neighbours_outside_the_stretch():
    """Known 2 at frame 97 and 10 at frame 101; frames 98 ... 100 are missing."""
    values, observed = _one_cell([NAN, NAN])
    before = Nearest(np.array([97]), np.array([2], np.float32))
    after = Nearest(np.array([101]), np.array([10], np.float32))
    assert interpolate(values, observed, 98, before, after)[:, 0].tolist() == [4, 6]
    assert interpolate(values, observed, 98, before)[:, 0].tolist() == [2, 2]
    assert interpolate(values, observed, 98, None, after)[:, 0].tolist() == [10, 10]


def test_first_and_last_observed():
    values = np.array([[NAN, NAN], [3, NAN], [5, NAN]], np.float32)
    first, last = (find(values, ~np.isnan(values), 10) for find in (first_observed, last_observed))
    assert (first.time.tolist(), first.value.tolist()) == ([11, -1], [3, 0])
    assert (last.time.tolist(), last.value.tolist()) == ([12, -1], [5, 0])


@given(st.lists(st.one_of(st.just(NAN), st.floats(0, 1000, width=32, allow_subnormal=False)), min_size=1, max_size=30))
def test_eq20_equals_numpys_interpolation(series):
    """np.interp is linear inside and carries the edge values outside: the rule, by other means."""
    values, observed = _one_cell(series)
    t, known = np.arange(len(series)), observed[:, 0]
    expected = np.interp(t, t[known], values[known, 0]) if known.any() else np.zeros(len(series))
    np.testing.assert_allclose(interpolate(values, observed)[:, 0], expected, rtol=1e-6)


def test_eq20_cell_by_cell_equals_all_at_once(monkeypatch):
    rng = np.random.default_rng(2)
    values = rng.random((12, 3, 5)).astype(np.float32)
    values[rng.random(values.shape) < 0.4] = NAN
    left, right = (Nearest(np.full((3, 5), t), rng.random((3, 5)).astype(np.float32)) for t in (7, 40))
    at_once = interpolate(values, ~np.isnan(values), 10, left, right)
    monkeypatch.setattr(imputation, "CELLS_AT_ONCE", 2)
    np.testing.assert_array_equal(interpolate(values, ~np.isnan(values), 10, left, right), at_once)


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([0.1, 0.6, 0.97]))
def test_eq20_day_by_day_equals_the_whole_run_at_once(seed, share):
    """The writer holds one day in memory; runs cross midnight, and some end in a gap inside a day."""
    rng = np.random.default_rng(seed)
    slots, days = 24, 5
    values = rng.random((slots * days, 2, 3)).astype(np.float32)
    values[rng.random(values.shape) < share] = NAN
    present = np.ones(len(values), bool)
    for start in rng.integers(0, len(values), 2):
        present[start : start + rng.integers(7, 40)] = False
    present[0] = True
    with tempfile.TemporaryDirectory() as folder:
        day = np.datetime64("2020-01-01", "D")
        spec = GridSpec("toy", ("x",), day, day + np.timedelta64(days - 1, "D"), np.arange(6).reshape(2, 3), 60)
        with GridWriter(Path(folder) / "toy.zarr", spec, {}) as writer:
            for d in range(days):
                where = slice(d * slots, d * slots + slots)
                writer.write_day(d, {"x": values[where]}, present[where])
            store = open_store(writer.finalise())
        written = store.values("x", 0, len(values))
        assert store.segments
        for start, stop in store.segments:
            part = values[start:stop].copy()
            part[~present[start:stop]] = NAN
            np.testing.assert_allclose(written[start:stop], interpolate(part, ~np.isnan(part)), rtol=1e-6)
        assert np.isnan(written[~store.present]).all()


def test_across_midnight_by_hand(make_store):
    """Cell (0, 0) is known at 23:40 with 10 and at 00:20 the next day with 50: 20, 30, 40 between."""
    values = np.full((288, 1, 2), 1.0, np.float32)
    values[142, 0, 0], values[143:146, 0, 0], values[146, 0, 0] = 10, NAN, 50
    store = make_store(values)
    assert store.values("internet", 142, 147)[:, 0, 0].tolist() == [10, 20, 30, 40, 50]
    assert store.observed("internet", 142, 147)[:, 0, 0].tolist() == [True, False, False, False, True]
    assert store.coverage["internet"]["missing"] == 3


def test_a_day_long_spell_is_carried_over_whole_days(make_store):
    """Known at the last slot of day 1 and the first of day 3 only: the line crosses the whole of day 2."""
    values = np.full((432, 1, 1), NAN, np.float32)
    values[143], values[288] = 0, 145
    filled = make_store(values).values("internet", 0, 432)[:, 0, 0]
    np.testing.assert_allclose(filled[143:289], np.arange(146), rtol=1e-5)
    assert (filled[:143] == 0).all() and (filled[289:] == 145).all()


@pytest.mark.parametrize(("slot", "reads"), [(None, 6), (142, 6), (143, 10), (431, 6)])
def test_days_ahead_are_read_where_a_cell_lacks_its_last_value_before_midnight(make_store, monkeypatch, slot, reads):
    """Three days of one run: values and mask of each once, and of the two later ones once more."""
    days, read = [], Shards.read
    monkeypatch.setattr(Shards, "read", lambda self, name, day, tile: days.append(day) or read(self, name, day, tile))
    values = np.ones((432, 1, 2), np.float32)
    if slot is not None:
        values[slot, 0, 0] = NAN
    make_store(values)
    assert len(days) == reads


@pytest.mark.parametrize(("absent", "runs"), [(6, [(0, 288)]), (7, [(0, 140), (147, 288)])])
def test_short_absences_are_imputed_and_longer_ones_are_gaps(make_store, absent, runs):
    values = np.arange(288, dtype=np.float32).reshape(288, 1, 1)
    present = np.ones(288, bool)
    present[140 : 140 + absent] = False
    store = make_store(values, present)
    assert store.segments == runs
    assert not store.observed("internet", 140, 140 + absent).any()
    inside = store.values("internet", 140, 140 + absent)[:, 0, 0]
    if len(runs) == 1:
        np.testing.assert_allclose(inside, np.arange(140, 146))
    else:
        assert np.isnan(inside).all()


def test_nothing_is_interpolated_across_a_gap(make_store):
    values = np.full((432, 1, 1), NAN, np.float32)
    values[100], values[300] = 5, 9
    present = np.ones(432, bool)
    present[144:288] = False
    filled = make_store(values, present).values("internet", 0, 432)[:, 0, 0]
    assert (filled[:144] == 5).all() and (filled[288:] == 9).all()
