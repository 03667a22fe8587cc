"""Baselines against naive loops, and against known figures on real data."""

from typing import NamedTuple

import numpy as np
import pytest

from stdist.data import DaySpan, GridSpec, GridWriter, Region, Split, open_store
from stdist.errors import InputError
from stdist.evaluation import ErrorState, baselines, forecast_header, score_baselines
from stdist.evaluation.baselines import (
    calendar,
    forecast_baselines,
    ridge,
    same_slot_before,
    slots_before,
    week_slots,
)

NAMES = ["persistence", "same time yesterday", "same time last week", "mean by weekday and slot", "ridge"]


class Made(NamedTuple):
    """``fallbacks``: of the city's cells, observed or not."""

    values: np.ndarray
    fallbacks: int


def forecast_all(store, train, windows):
    """Every baseline's forecasts, put together of their blocks."""
    r0, c0 = windows.region.r0, windows.region.c0
    values = {name: np.full((len(windows), windows.K, *windows.region.shape), np.nan, np.float32) for name in NAMES}
    fallbacks = dict.fromkeys(NAMES, 0)
    for block, tile, made in forecast_baselines(store, train, windows):
        assert list(made) == NAMES
        for name, part in made.items():
            values[name][block, :, tile.r0 - r0 : tile.r1 - r0, tile.c0 - c0 : tile.c1 - c0] = part.values
            fallbacks[name] += int(part.fallback[:, :, store.inside[tile.slices]].sum())
    return {name: Made(values[name], fallbacks[name]) for name in NAMES}


def test_against_naive_loops(store):
    region = Region(1, 4, 0, 2)
    windows = store.windows("test", 6, 4, channel="flow", region=region)
    made = forecast_all(store, "train", windows)
    assert list(made) == NAMES
    values = store.values("flow", 0, len(store.times), region).astype(float)
    measured = np.where(store.observed("flow", region=region), values, np.nan)
    local, train_days = store.local_times.astype("datetime64[s]").tolist(), range(4, 18)
    n_of_fallbacks = dict.fromkeys(NAMES, 0)
    for n, origin in enumerate(windows.origins):
        for k in range(4):
            target = origin + 1 + k
            like = [
                t
                for t, stamp in enumerate(local)
                if stamp.day in train_days
                and (stamp.weekday(), stamp.hour) == (local[target].weekday(), local[target].hour)
            ]
            expected = {
                "persistence": values[origin],
                "same time yesterday": values[target - 24],
                "same time last week": values[target - 7 * 24],
                "mean by weekday and slot": np.nanmean(measured[like], axis=0),
            }
            assert len(like) == 2
            for name, grid in expected.items():
                if np.isnan(grid).any():
                    grid = values[origin]
                    n_of_fallbacks[name] += grid.size
                np.testing.assert_allclose(made[name].values[n, k], grid, rtol=1e-5)
    assert {name: baseline.fallbacks for name, baseline in made.items()} == n_of_fallbacks


def test_missing_sources_fall_back_to_persistence_and_are_counted(store):
    """The day after the 10-hour gap, yesterday is missing; in the first week, so is last week."""
    after = store.windows(DaySpan.parse("2024-03-20:2024-03-20"), 6, 4, channel="flow", history_inside=False)
    made = forecast_all(store, "train", after)["same time yesterday"]
    gap = store.values("flow", 0, len(store.times), Region(0, 1, 0, 1))[:, 0, 0]
    absent = np.isnan(gap[after.origins[:, None] + np.arange(1, 5) - 24])
    assert absent.any()
    cells_in_city = 11
    assert made.fallbacks == absent.sum() * cells_in_city
    history = store.values("flow", 0, len(store.times))[after.origins]
    last = np.repeat(history[:, None], 4, axis=1)
    np.testing.assert_array_equal(made.values[absent][:, 1:], last[absent][:, 1:])

    first = store.windows(DaySpan.parse("2024-03-05:2024-03-05"), 6, 4, channel="flow")
    made = forecast_all(store, "train", first)
    assert made["same time last week"].fallbacks == len(first) * 4 * cells_in_city
    np.testing.assert_array_equal(made["same time last week"].values, made["persistence"].values)


def test_yesterday_never_looks_past_the_origin():
    """With K above a day, the value two days before the target stands in."""
    series = np.arange(100.0)[:, None]
    made = same_slot_before(series, 30, slots_before(np.arange(100), 24), np.array([50]))[0, :, 0]
    assert made.tolist() == [51 + k - 24 for k in range(24)] + [51 + k - 48 for k in range(24, 30)]


def test_ridge_against_a_naive_solution():
    rng = np.random.default_rng(3)
    S, K = 3, 2
    series, features = rng.normal(5, 2, (60, 2)), np.stack([np.ones(60), rng.normal(size=60)], axis=1)
    fit, origins = np.arange(2, 40), np.arange(41, 58)
    made = ridge(series, series, features, fit, S, K)(origins)
    for cell in range(2):
        s = series[:, cell]
        lags = np.array([[s[o - 2], s[o - 1], s[o]] for o in fit])
        mean, deviation = lags.mean(), lags.std()
        x = np.hstack([(lags - mean) / deviation, features[fit]])
        y = np.array([[s[o + 1], s[o + 2]] for o in fit])
        # Ridge as least squares with one penalty row per weight, a penalty of 1.
        penalty = np.eye(5)
        rows = np.vstack([x, penalty]), np.vstack([(y - mean) / deviation, np.zeros((5, 2))])
        weights = np.linalg.lstsq(*rows, rcond=None)[0]
        for n, o in enumerate(origins):
            z = np.concatenate([(s[o - 2 : o + 1] - mean) / deviation, features[o]])
            np.testing.assert_allclose(made[n, :, cell], z @ weights * deviation + mean, rtol=1e-9)


def test_fits_see_the_training_span_only(store, tmp_path):
    """Spoiling everything before and after the training span changes no weight and no profile: no leak."""
    values = np.array(store.values("flow", 0, len(store.times)))
    ids, present = store.cell_ids, store.present
    spoiled = values.copy()
    spoiled[: 4 * 24] *= 10
    spoiled[14 * 24 + 24 :] *= 10
    made = []
    for name, grid in (("a", values), ("b", spoiled)):
        spec = GridSpec("x", ("flow",), np.datetime64("2024-03-04"), np.datetime64("2024-03-24"), ids, 60, 60)
        split = Split.parse("2024-03-08:2024-03-17")
        with GridWriter(tmp_path / f"{name}.zarr", spec, {}) as writer:
            for day in range(21):
                slots = slice(day * 24, day * 24 + 24)
                writer.write_day(day, {"flow": grid[slots]}, present[slots])
            other = open_store(writer.finalise(split))
        span = DaySpan.parse("2024-03-18:2024-03-18")
        made.append(forecast_all(other, "train", other.windows(span, 6, 4, channel="flow")))
    for name in NAMES:
        np.testing.assert_array_equal(made[0][name].values, made[1][name].values)


def test_slots_count_from_monday_local_time(store):
    slots = week_slots(store)
    assert slots[0] == 0 and store.local_times[0] == np.datetime64("2024-03-04T00:00")  # a Monday
    assert slots[7 * 24 - 1] == 7 * 24 - 1 and slots[7 * 24] == 0


def test_a_cycle_not_seen_twice_is_left_out(store):
    slots = week_slots(store)
    assert calendar(slots, 24, 14 * 24).shape[1] == 1 + 2 * 2 * 6
    assert calendar(slots, 24, 13 * 24).shape[1] == 1 + 2 * 6
    assert calendar(slots, 24, 24).shape[1] == 1


def test_calendar_by_hand():
    """Six harmonics of the day, then six of the week, a sine and a cosine each; a constant before them."""
    row = calendar(np.arange(168), 24, 2 * 168)[42]  # Tuesday 18:00, a quarter of the week
    day = [-1, 0, 0, -1, 1, 0, 0, 1, -1, 0, 0, -1]
    week = [1, 0, 0, -1, -1, 0, 0, 1, 1, 0, 0, -1]
    np.testing.assert_allclose(row, [1, *day, *week], atol=1e-12)


def test_scores_carry_their_fallbacks(store):
    windows = store.windows("test", 6, 4, channel="flow")
    scores = score_baselines(store, "train", windows)
    batch = windows.read(np.arange(len(windows)))
    made = forecast_all(store, "train", windows)
    for name in NAMES:
        expected = ErrorState.of(made[name].values, batch.target, batch.target_observed).summary()
        assert scores[name] == {**expected, "fallbacks": scores[name]["fallbacks"]}
        assert scores[name]["fallbacks"] <= min(made[name].fallbacks, scores[name]["pooled"]["points"])
    assert scores["ridge"]["pooled"]["nrmse"] < scores["persistence"]["pooled"]["nrmse"]


def test_small_blocks_score_as_one(store, monkeypatch):
    """Tiles of one cell or of a few, and windows one by one or a few: every figure to rounding."""
    windows = store.windows("test", 6, 4, channel="flow")
    expected, frames = score_baselines(store, "train", windows), len(store.times)
    for values in (frames, 4 * frames + 3, 1):
        monkeypatch.setattr(baselines, "SERIES_IN_MEMORY", values)
        monkeypatch.setattr(forecast_header, "POINTS_IN_MEMORY", values // 4)
        blocks = [(b.stop - b.start, t.shape) for b, t, _ in forecast_baselines(store, "train", windows)]
        cells = max(1, values // frames)
        assert len(blocks) > 1 and all(h * w <= cells and n * 4 * h * w <= max(values // 4, 4) for n, (h, w) in blocks)
        for name, scores in score_baselines(store, "train", windows).items():
            assert flat(scores) == pytest.approx(flat(expected[name]), rel=1e-12)


def flat(scores):
    """The figures of a summary in order."""
    if not isinstance(scores, dict):
        return [scores]
    values = [value for each in scores.values() for value in (each if isinstance(each, list) else [each])]
    return [number for value in values for number in flat(value)]


def test_a_span_too_short_is_refused(store):
    windows = store.windows("test", 6, 4, channel="flow")
    with pytest.raises(InputError, match="no window"):
        forecast_all(store, DaySpan.parse("2024-03-19:2024-03-19"), windows_of(windows, 24))


def windows_of(windows, S):
    return windows.store.windows("test", S, windows.K, channel=windows.channel, region=windows.region)


@pytest.mark.parametrize(
    ("K", "expected"),
    [
        (1, [0.1856, 0.2957, 0.3164, 0.2594, 0.1601]),
        (12, [0.2683, 0.2965, 0.3174, 0.2600, 0.1949]),
        (36, [0.4163, 0.2981, 0.3198, 0.2616, 0.2138]),
    ],
)
def test_known_figures_of_a_milan_block(real_data, milan_block, K, expected):
    """25 cells of Milan, internet, November 2013: pooled NRMSE known from an independent computation."""
    scores = score_baselines(milan_block, "train", milan_block.windows("test", 12, K, channel="internet"))
    assert [scores[name]["pooled"]["nrmse"] for name in NAMES] == pytest.approx(expected, abs=5e-4)


@pytest.fixture
def milan_block(real_data, tmp_path):
    source = real_data / "milan_block_5x5" / "milan_grid_data.csv"
    if not source.is_file():
        pytest.skip(f"{source} is absent")
    values = np.loadtxt(source, delimiter=",", dtype=np.float32).reshape(30, 144, 5, 5)
    side = np.arange(41, 46)
    days = np.datetime64("2013-11-01"), np.datetime64("2013-11-30")
    spec = GridSpec("milan", ("internet",), *days, side[:, None] * 100 + side + 1, 10, 60)
    split = Split.parse("2013-11-01:2013-11-20", "2013-11-21:2013-11-25", "2013-11-26:2013-11-30")
    with GridWriter(tmp_path / "milan.zarr", spec, {}) as writer:
        for day, frames in enumerate(values):
            writer.write_day(day, {"internet": frames})
        return open_store(writer.finalise(split))
