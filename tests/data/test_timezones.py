"""Stores with a time zone: local days of 23, 24.5 and 25 hours, and all that counts in days of the wall clock."""

from datetime import UTC, datetime
from itertools import pairwise
from zoneinfo import ZoneInfo

import numpy as np
import pytest

from data_prep import READERS, Plan, PrepareSummary, prepare
from data_prep.append import append
from stdist.data import DaySpan, GridStore, NodeSpec, Split, open_store
from stdist.data.check import check_store
from stdist.data.next_window import next_window
from stdist.errors import InputError
from stdist.runs.forecasting import local_targets


@pytest.fixture(scope="module")
def make_zoned(tmp_path_factory):
    """A store of hourly or finer values from local midnight of one day to that of another, and its plan: step t of
    place n holds t + 0.25 n."""

    def make(zone: str, first: str, stop: str, cadence: int = 60, absent: slice | None = None, **spans) -> GridStore:
        folder = tmp_path_factory.mktemp("zones")
        ends = (datetime.fromisoformat(day).replace(tzinfo=ZoneInfo(zone)).astimezone(UTC) for day in (first, stop))
        start, end = (np.datetime64(instant.replace(tzinfo=None), "m") for instant in ends)
        stamps = np.arange(start, end, cadence)
        rows = [f"{stamp}Z,{t},{t + 0.25}\n" for t, stamp in enumerate(stamps)]
        if absent is not None:
            del rows[absent]
        (path := folder / "city.csv").write_text("time,1,2\n" + "".join(rows))
        plan: Plan = READERS["table"].plan([path], timezone=zone, **spans)
        return open_store(prepare(plan, folder / "city.zarr").path)

    return make


@pytest.fixture(scope="module")
def year(make_zoned):
    """Madrid from 25 March to 29 October 2019: both changes, and no frames between April and late October."""
    return make_zoned("Europe/Madrid", "2019-03-25", "2019-10-30", absent=slice(10 * 24, 210 * 24))


@pytest.mark.parametrize(
    ("zone", "cadence", "forward", "back"),
    [
        ("Europe/Madrid", 60, ("2019-03-31", 23), ("2019-10-27", 25)),
        ("America/New_York", 60, ("2019-03-10", 23), ("2019-11-03", 25)),
        ("Australia/Lord_Howe", 30, ("2019-10-06", 47), ("2019-04-07", 49)),
        ("Asia/Kolkata", 30, ("2019-03-31", 48), ("2019-10-27", 48)),
    ],
)
def test_days_hold_the_hours_they_have(make_zoned, zone, cadence, forward, back):
    # From 10 April to 3 October there are no frames.
    store = make_zoned(zone, "2019-03-08", "2019-11-06", cadence, slice(33 * 1440 // cadence, 209 * 1440 // cadence))
    assert store.timezone == zone and str(store.days) == "2019-03-08:2019-11-05"
    days = np.arange(np.datetime64("2019-03-08"), np.datetime64("2019-11-06"))
    spans = [store.step_range(DaySpan(day, day)) for day in days]
    frames = {str(day): stop - start for day, (start, stop) in zip(days, spans, strict=True)}
    changed = {day: count for day, count in frames.items() if count != 1440 // cadence}
    assert changed == {day: count for day, count in (forward, back) if count != 1440 // cadence}
    assert all(before[1] == after[0] for before, after in pairwise(spans))
    assert (np.diff(store.times) == np.timedelta64(cadence, "m")).all()
    clock = [stamp.replace(tzinfo=UTC).astimezone(ZoneInfo(zone)) for stamp in store.times.astype("M8[s]").tolist()]
    assert store.local_times.astype("M8[s]").tolist() == [stamp.replace(tzinfo=None) for stamp in clock]
    assert check_store(store.path).ok


def test_a_store_of_summer_days_alone(make_zoned):
    """Its shards begin at 01:00 of the wall clock; no day is said to be there that is not."""
    store = make_zoned("Europe/Madrid", "2019-07-01", "2019-07-15")
    assert str(store.days) == "2019-07-01:2019-07-14" and int(store.present.sum()) == 14 * 24
    assert str(store.axis_days) == "2019-06-30:2019-07-14"
    assert store.local_times[np.flatnonzero(store.present)[[0, -1]]].astype("M8[h]").astype(str).tolist() == [
        "2019-07-01T00",
        "2019-07-14T23",
    ]
    split = store.default_split  # 14 days: 10, 2 and 2
    assert list(map(str, (split.train, split.validation, split.test))) == [
        "2019-07-01:2019-07-10",
        "2019-07-11:2019-07-12",
        "2019-07-13:2019-07-14",
    ]
    train = store.values("value", *store.step_range(split.train))
    assert store.statistics("value", split.train).count == train.size == 10 * 24 * 2
    assert store.statistics("value", split.train).mean == pytest.approx(train.mean())
    assert store.statistics("value", split.train).maximum == train.max()


def test_statistics_are_of_local_days(make_zoned):
    """Days of summer begin an hour before the shards': the stored figures are those of the days' own frames, and
    stdist check finds them again."""
    spans = {"train": "2019-10-20:2019-10-26", "validation": "2019-10-27:2019-10-27", "test": "2019-10-28:2019-10-30"}
    store = make_zoned("Europe/Madrid", "2019-10-20", "2019-10-31", **spans)
    # Seven days of summer time from local midnight on.
    stored = store.attributes["train_statistics"]["value"]
    expected = np.add.outer(np.arange(168), [0, 0.25])
    assert (stored["count"], stored["maximum"]) == (336, 167.25)
    assert stored["mean"] == pytest.approx(expected.mean()) and stored["std"] == pytest.approx(expected.std())
    assert len(store.windows("validation", 1, 25, channel="value")) == 1
    with pytest.raises(InputError, match="no window fits"):
        store.windows(DaySpan.parse("2019-10-27:2019-10-27"), 1, 25, channel="value")
    assert check_store(store.path).ok


def test_windows_go_on_over_the_change(year):
    """Every start, also in the night of 25 hours; frames follow one another in UTC."""
    night = year.windows(DaySpan.parse("2019-10-26:2019-10-28"), 12, 6, channel="value")
    assert len(night) == 24 + 25 + 24 - 17
    batch = night.read(range(len(night)))
    whole = np.concatenate([batch.history, batch.target], axis=1)
    assert (np.diff(whole, axis=1) == 1).all()


def test_imputation_counts_hours_not_clocks(make_zoned):
    """01:00, 02:00 of summer, 02:00 of winter and 03:00 of a night that goes back, without the middle two: a third of
    the way each. In Madrid the 25-hour night's 02:00 are steps 26 and 27 from midnight of the day before."""
    store = make_zoned("Europe/Madrid", "2019-10-26", "2019-10-30", absent=slice(26, 28))
    first = np.flatnonzero(store.present)[0]
    assert store.local_times[first + 26] == store.local_times[first + 27] == np.datetime64("2019-10-27T02")
    assert store.values("value", first + 25, first + 29)[:, 0].tolist() == [25, 26, 27, 28]
    assert not store.observed("value", first + 26, first + 28).any()


def test_an_origin_at_a_clock_that_is_changed(year):
    """The later of two; one that is skipped is told as what it is."""
    window = next_window(year, 4, 2, channel="value", origin=np.datetime64("2019-10-27T02:00"))
    assert year.times[window.origins[0]] == np.datetime64("2019-10-27T01:00")
    assert "from 2019-10-27T03:00 local time" in window.contract
    window = next_window(year, 4, 2, channel="value", origin=np.datetime64("2019-10-27T01:00"))
    assert "from 2019-10-27T02:00 local time" in window.contract and str(window.span) == "2019-10-27:2019-10-27"
    with pytest.raises(InputError, match=r"no frame at 2019-03-31T02:00, which clocks skip in Europe/Madrid;"):
        next_window(year, 4, 2, channel="value", origin=np.datetime64("2019-03-31T02:00"))
    last = next_window(year, 4, 2, channel="value")
    assert "from 2019-10-30T00:00 local time" in last.contract


def test_a_share_of_days_ends_within_the_right_one(make_zoned):
    """Of 23 + 24 hours the first 23 are a whole day."""
    store = make_zoned("Europe/Madrid", "2019-03-31", "2019-04-02")
    span = DaySpan.parse("2019-03-31:2019-04-01")
    assert store.first_part(span, 23 / 47) == DaySpan.parse("2019-03-31:2019-03-31")
    part = store.first_part(span, 24 / 47)
    assert (str(part.last_day), part.steps) == ("2019-04-01", 24)


def test_the_peak_is_the_wall_clocks(make_zoned, tmp_path):
    """A peak at 18:00 all year is at 18:00, though half of the days that is an hour earlier in UTC."""
    store = make_zoned("Europe/Madrid", "2019-03-24", "2019-04-07")
    here = store.present
    peaks = np.where(store.local_times[here].astype("M8[h]").astype(int) % 24 == 18, 9, 1)
    rows = [f"{stamp.astype('M8[m]')}Z,{value}\n" for stamp, value in zip(store.times[here], peaks, strict=True)]
    (path := tmp_path / "peaks.csv").write_text("time,1\n" + "".join(rows))
    made = READERS["table"].prepare([path], tmp_path / "peaks.zarr", timezone="Europe/Madrid")
    assert check_store(made.path).channels["value"]["peak"] == "18:00"


def test_absent_days_are_local_ones(make_zoned):
    summer = make_zoned("Europe/Madrid", "2019-07-01", "2019-07-08", absent=slice(24, 72))
    assert PrepareSummary.of(summer).absent_days == ("2019-07-02", "2019-07-03")


def test_a_fixed_offset_says_nothing_of_zones(make_store):
    store = make_store(np.ones((288, 2)))
    assert "timezone" not in store.attributes and store.timezone is None
    np.testing.assert_array_equal(store.slot_times, store.local_times)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"timezone": "Europe/Madird"}, "is Europe/Madrid meant"),
        ({"timezone": "localtime"}, "is no zone"),
        ({"timezone": "Europe/Madrid", "since": np.full(2, np.datetime64("2019-01-02"))}, "join on days of one clock"),
    ],
)
def test_specs_that_cannot_be(change, line):
    day = np.datetime64("2019-01-01")
    with pytest.raises(InputError, match=line):
        NodeSpec("x", ("flow",), day, day + 3, np.arange(2), 60, 60, **change)


def _hours(path, **arrays):
    np.savez(path, **arrays)
    return path


@pytest.mark.parametrize("reader", ["zones-npz", "city-npz", "table"])
def test_frames_after_a_start_follow_one_another_in_real_time(tmp_path, reader):
    """Frame 0 is midnight of a summer day in Madrid, 22:00 UTC; the frame after 02:00 of the 27th is 02:00 again."""
    values = np.arange(48.0)[:, None] + [0, 0.5]
    if reader == "city-npz":
        values = values[:, None]
    path = _hours(tmp_path / "city.npz", a=values)
    options = {"start": "2019-10-26T00:00", "cadence": 60, "timezone": "Europe/Madrid"}
    store = open_store(READERS[reader].prepare([path], tmp_path / "o.zarr", **options).path)
    frames = np.flatnonzero(store.present)
    assert len(frames) == 48 and store.times[frames[0]] == np.datetime64("2019-10-25T22:00")
    assert store.local_times[frames[[0, 26, 27, 28]]].astype("M8[h]").astype(str).tolist() == [
        "2019-10-26T00",
        "2019-10-27T02",
        "2019-10-27T02",
        "2019-10-27T03",
    ]
    assert store.values(store.channels[0], frames[27], frames[27] + 1).ravel().tolist() == [27, 27.5]
    with pytest.raises(InputError, match="2019-03-31T02:00 does not exist in Europe/Madrid"):
        READERS[reader].plan([path], **options | {"start": "2019-03-31T02:00"})
    with pytest.raises(InputError, match="both tell the city's clock"):
        READERS[reader].plan([path], **options, utc_offset=60)


def test_stamps_of_npz_frames_are_the_clocks(tmp_path):
    clock = np.array([f"2019-10-27T0{hour}:00" for hour in (0, 1, 2, 2, 3)], "datetime64[m]")
    path = _hours(tmp_path / "city.npz", time=clock, flow=np.arange(5.0)[:, None, None])
    store = open_store(READERS["frames-npz"].prepare([path], tmp_path / "o.zarr", timezone="Europe/Madrid").path)
    frames = np.flatnonzero(store.present)
    assert store.times[frames].astype("M8[h]").astype(str).tolist() == [
        "2019-10-26T22",
        "2019-10-26T23",
        "2019-10-27T00",
        "2019-10-27T01",
        "2019-10-27T02",
    ]
    assert store.values("flow", frames[0], frames[-1] + 1).ravel().tolist() == [0, 1, 2, 3, 4]


def test_split_days_are_checked_by_the_wall_clock(make_zoned):
    with pytest.raises(InputError, match="leaves the data's days"):
        make_zoned("Europe/Madrid", "2019-01-01", "2019-01-10", train="2019-01-01:2019-01-10")
    store = make_zoned("Europe/Madrid", "2019-07-01", "2019-07-10", train="2019-07-01:2019-07-09")
    assert store.default_split == Split.parse("2019-07-01:2019-07-09")


def test_days_appended_over_a_change_make_the_store_of_all(tmp_path):
    """Times of the wall clock as people write them, the repeated hour twice; with a hole over the change itself."""
    stamps = np.arange(np.datetime64("2019-10-20T22:00"), np.datetime64("2019-10-29T23:00"), 60)
    local = [
        datetime.fromisoformat(f"{stamp}+00:00").astimezone(ZoneInfo("Europe/Madrid")).strftime("%Y-%m-%d %H:%M")
        for stamp in stamps
    ]
    assert len(set(local)) == len(local) - 1
    rows = [f"{stamp},{t},{'' if 140 < t < 150 else t + 0.25}\n" for t, stamp in enumerate(local)]
    for name, part in (("a", rows[: 5 * 24]), ("b", rows[5 * 24 :])):
        (tmp_path / f"{name}.csv").write_text("time,1,2\n" + "".join(part))
    spans = {"train": "2019-10-21:2019-10-23", "validation": "2019-10-24:2019-10-24", "test": "2019-10-25:2019-10-25"}
    make, a, b = READERS["table"].plan, tmp_path / "a.csv", tmp_path / "b.csv"
    prepare(make([a], timezone="Europe/Madrid", **spans), tmp_path / "grown.zarr")
    summary = append(tmp_path / "grown.zarr", [b])
    whole = open_store(prepare(make([a, b], timezone="Europe/Madrid", **spans), tmp_path / "whole.zarr").path)
    grown = open_store(tmp_path / "grown.zarr")
    assert summary.growth.new_frames == len(rows) - 5 * 24 and grown.timezone == "Europe/Madrid"
    assert grown.attributes["files"] == whole.attributes["files"]
    hours = [stamp[11:13] for stamp in map(str, grown.local_times) if stamp.startswith("2019-10-27")]
    assert hours[:5] == ["00", "01", "02", "02", "03"] and len(hours) == 25
    assert check_store(grown.path).ok


def test_forecasts_tell_the_clock_of_their_targets(year):
    """Over both changes as the store's own frames, which come behind these origins."""
    windows = year.windows(DaySpan.parse("2019-10-26:2019-10-28"), 3, 4, channel=year.channels[0])
    steps = windows.origins[:, None] + np.arange(1, 5)
    np.testing.assert_array_equal(local_targets(windows), year.local_times[steps])
    assert (np.diff(local_targets(windows)[:, -1]) == np.timedelta64(0)).any(), "an hour that comes twice"
