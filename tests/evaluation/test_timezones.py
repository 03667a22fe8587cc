"""What counts in days and weeks, in a city whose clocks are set forward and back: against loops over datetimes."""

from datetime import timedelta
from types import SimpleNamespace

import matplotlib.dates as mdates
import numpy as np
import pytest

from stdist.data import DaySpan, GridWriter, NodeSpec, Split, open_store
from stdist.evaluation import figures
from stdist.evaluation.baselines import calendar, forecast_baselines, same_slot_before, slots_before, week_slots
from stdist.nodes.dataset import NodeDataset
from stdist.nodes.scaling import CityScaling
from stdist.runs.forecasting import local_targets

FORWARD, BACK = "2019-03-31", "2019-10-27"


@pytest.fixture(scope="module", params=[FORWARD, BACK])
def city(request, tmp_path_factory):
    """Fifteen days of noise every hour at three places in Madrid around one change of clocks: on the tenth day."""
    first = np.datetime64(request.param) - 9
    spec = NodeSpec("madrid", ("flow",), first, first + 14, np.arange(3), 60, 60, timezone="Europe/Madrid")
    values = np.random.default_rng(1).uniform(1, 9, (15 * 24, 3)).astype(np.float32)
    split = Split(DaySpan(first + 1, first + 8), None, DaySpan(first + 9, first + 12))
    with GridWriter(tmp_path_factory.mktemp("city") / "madrid.zarr", spec, {"made by": "a test"}) as writer:
        for day in range(15):
            writer.write_day(day, {"flow": values[day * 24 : day * 24 + 24]})
        return open_store(writer.finalise(split))


def before(clock, target, origin, days):
    """The frame of the same wall-clock hour, the last of two, the fewest times ``days`` days before that is known at
    the origin."""
    wanted = clock[target]
    while True:
        wanted -= timedelta(days=days)
        if wanted < clock[0]:
            return None
        like = [t for t, stamp in enumerate(clock) if stamp == wanted]
        if like and like[-1] <= origin:
            return like[-1]


def test_local_targets_are_what_clocks_show_then(city):
    windows = city.windows("test", 3, 25, channel="flow")
    frames = windows.origins[:, None] + 1 + np.arange(25)
    np.testing.assert_array_equal(local_targets(windows), city.local_times[frames])


def test_baselines_are_of_the_wall_clock(city):
    windows = city.windows("test", 3, 25, channel="flow")
    made = {name: [] for name in ("same time yesterday", "same time last week", "mean by weekday and slot")}
    for _, _, forecasts in forecast_baselines(city, "train", windows):
        for name, parts in made.items():
            parts.append(forecasts[name].values)
    made = {name: np.concatenate(parts) for name, parts in made.items()}
    clock = city.local_times.astype("datetime64[s]").tolist()
    values = city.values("flow", 0, len(clock)).astype(float)
    train = [t for t, stamp in enumerate(clock) if np.datetime64(stamp.date()) in city.default_split.train]
    for n, origin in enumerate(windows.origins):
        for k in range(25):
            target = origin + 1 + k
            for name, days in (("same time yesterday", 1), ("same time last week", 7)):
                source = before(clock, target, origin, days)
                expected = values[origin if source is None else source]
                np.testing.assert_allclose(made[name][n, k], expected, rtol=1e-6)
            key = clock[target].weekday(), clock[target].hour
            like = [t for t in train if (clock[t].weekday(), clock[t].hour) == key]
            expected = values[like].mean(axis=0) if like else values[origin]
            np.testing.assert_allclose(made["mean by weekday and slot"][n, k], expected, rtol=1e-6)


def test_the_rules_of_the_hour_that_is_skipped_and_of_the_one_that_comes_twice():
    """Hours 0 1 3 4 of a day of four, then 0 … 4; and 0 1 1 2, then 0 1 2."""
    assert slots_before(np.array([0, 1, 2, 3, 4, 5, 7, 8, 9, 10, 11]), 4).tolist() == [-1] * 4 + [0, 1, 3, 4, 5, 2, 6]
    assert slots_before(np.array([0, 1, 1, 2, 3, 4, 5]), 3).tolist() == [-1] * 4 + [0, 2, 3]


def test_a_day_of_23_hours_is_not_looked_past():
    """The target 24 hours ahead is 23 hours after its own slot of yesterday, which is not known yet."""
    slots = np.r_[0:26, 27:80]  # hour 26 is skipped
    series = np.arange(len(slots), dtype=float)[:, None]
    made = same_slot_before(series, 24, slots_before(slots, 24), np.array([25]))[0, :, 0]
    assert made[0] == list(slots).index(27 - 24) and made[-1] == list(slots).index(50 - 48) and slots[25 + 24] == 50


def test_features_of_the_calendar(city):
    clock = city.local_times.astype("datetime64[s]").tolist()
    assert week_slots(city).tolist() == [stamp.weekday() * 24 + stamp.hour for stamp in clock]
    slot, weekday = CityScaling("x", 60, 0.0, 1.0).calendar(city.slot_times)
    assert slot.tolist() == [stamp.hour for stamp in clock]
    assert weekday.tolist() == [stamp.weekday() for stamp in clock]


def test_two_weeks_with_a_day_of_23_hours_hold_every_weekday_twice(city):
    first = city.days.first_day + int(city.local_slots[0] % 24 != 0)  # summer begins before the first shard
    for last, holds in ((13, True), (12, False)):
        train = SimpleNamespace(span=DaySpan(first, first + last))
        assert NodeDataset.holds_weeks.fget(SimpleNamespace(store=city, train=train)) is holds


def test_slots_of_a_clock_that_changes_by_half_of_one(tmp_path):
    """Hours on Lord Howe, 10:30 ahead of UTC, in summer 11:00: half past of summer is in the slot of its hour."""
    day = np.datetime64("2019-10-05")
    spec = NodeSpec("howe", ("flow",), day, day + 2, np.arange(1), 60, 630, timezone="Australia/Lord_Howe")
    with GridWriter(tmp_path / "howe.zarr", spec, {"made by": "a test"}) as writer:
        for number in range(3):
            writer.write_day(number, {"flow": np.ones((24, 1))})
        store = open_store(writer.finalise(Split(DaySpan(day, day))))
    assert str(store.local_times[24 + 2].astype("M8[m]")) == "2019-10-06T02:30"
    assert str(store.slot_times[24 + 2]) == "2019-10-06T02:00"
    slot, _ = CityScaling("x", 60, 0.0, 1.0).calendar(store.slot_times)
    assert slot.tolist()[20:30] == [20, 21, 22, 23, 0, 1, 2, 3, 4, 5]
    assert calendar(week_slots(store), 24, 48).shape == (72, 13)


def test_a_plot_shows_the_hour_that_comes_twice():
    """25 hours are 25 hours wide, and are labelled by the wall clock."""
    times = np.datetime64("2019-10-26T22:00") + np.arange(25) * np.timedelta64(1, "h")
    trace = figures.Trace("x", "u", times, np.ones(25), np.array([2, 10]), np.ones((2, 3)), None, "Europe/Madrid")
    top, _ = figures.cell_traces(trace).axes
    (line, _) = top.get_lines()
    assert np.ptp(line.get_xdata()) == np.timedelta64(24, "h")
    ticks = [mdates.num2date(tick) for tick in top.xaxis.get_major_locator()()]
    assert all(tick.astimezone(top.xaxis.get_major_locator().tz).hour % 3 == 0 for tick in ticks)
