"""Columns of time: how they may be written, and the one rule for stamps, cadence and the order of files."""

import numpy as np
import pytest

from data_prep import READERS
from data_prep.common import in_time
from data_prep.steps import cadence_of, whole_minutes
from data_prep.table_times import formats_of
from stdist.errors import InputError

TWO = ["2019-02-13 00:00", "2019-02-13 01:00"]


def wide(*stamps: object) -> str:
    return "time,a,b\n" + "".join(f"{stamp},{i},{i + 0.5}\n" for i, stamp in enumerate(stamps))


@pytest.mark.parametrize(
    ("stamps", "options"),
    [
        (["2019-02-13T00:00:00", "2019-02-13T01:00:00"], {}),
        (["2019-02-13 00:00:00.000", "2019-02-13 01:00:00.000"], {}),
        (["2019/02/13 00:00", "2019/02/13 1:00"], {}),
        (["13/02/2019 00:00", "13/02/2019 01:00"], {}),
        (["02/13/2019 00:00", "02/13/2019 01:00"], {}),
        (["2/13/19 0:00", "2/13/19 1:00"], {}),
        (["13.02.2019 00:00", "13.02.2019 01:00"], {}),
        (["13-Feb-2019 12:00 AM", "13-Feb-2019 01:00 AM"], {}),
        (["201902130000", "201902130100"], {}),
        (["1550016000", "1550019600"], {}),
        (["1550016000000", "1550019600000"], {}),
        (["1550016000000000000", "1550019600000000000"], {}),
        (["2019-02-13T00:00:00Z", "2019-02-13T01:00:00Z"], {}),
        (["2019-02-13 00:00:00+00:00", "2019-02-13 01:00:00+00:00"], {}),
        (["2019-02-12T23:00:00Z", "2019-02-13T00:00:00Z"], {"utc_offset": 60}),
        (["1550012400", "1550016000"], {"utc_offset": 60}),
        (["2019-02-13 00:00:00+02", "2019-02-13 01:00:00+02"], {}),
        (["2019-02-13T00:00:00+05:30", "2019-02-13T01:00:00+05:30"], {}),
        (["13 Feb 19 // 00h00", "13 Feb 19 // 01h00"], {"time_format": "%d %b %y // %Hh%M", "time": "time"}),
        (["02/13/2019 00:00", "02/13/2019 01:00"], {"time_format": "%m/%d/%Y %H:%M"}),
    ],
)
def test_stamps(read_table, stamps, options):
    read = read_table(wide(*stamps), **options)
    assert read.stamps == TWO and read.values == {"value": [[0, 0.5], [1, 1.5]]}


def test_a_column_called_utc_holds_instants(read_table):
    read = read_table(wide("2019-02-12 23:00", "2019-02-13 00:00").replace("time", "MTU (UTC)"), utc_offset=60)
    assert read.stamps == TWO and "time = `MTU (UTC)` (UTC)" in read.plan.read_as


def test_a_time_of_day_of_any_name_beside_days_that_repeat(read_table):
    """German grid operators: from and to."""
    rows = "".join(f"13.02.2019;0{h}:00;0{h + 1}:00;1.{h}00,5;2\n" for h in range(2))
    read = read_table("Datum;Uhrzeit von;Uhrzeit bis;Nord;S\u00fcd\n" + rows)
    assert read.stamps == TWO and read.values == {"value": [[1000.5, 2], [1100.5, 2]]}


def test_stamps_with_an_offset_give_the_store_its_own(read_table):
    """Where they change between summer and winter, the winter's is the store's; UTC is exact."""
    read = read_table(wide("2019-10-27T02:00:00+02:00", "2019-10-27T02:00:00+01:00", "2019-10-27T03:00:00+01:00"))
    assert read.plan.spec.utc_offset_minutes == 60
    assert read.stamps == ["2019-10-27 01:00", "2019-10-27 02:00", "2019-10-27 03:00"]
    assert "(UTC+01:00 and +02:00)" in read.plan.read_as


def test_day_and_month_are_told_by_the_whole_column(read_table, refused):
    """The first 200 rows hold no day beyond the twelfth; where no row does, a steady pace tells."""
    days = [f"{day:02}/{month:02}/2019" for month in range(1, 13) for day in range(1, 29)]
    read = read_table(wide(*days))
    assert read.stamps[1] == "2019-01-02 00:00" and read.stamps[28] == "2019-02-01 00:00"
    read = read_table(wide(*(f"{day:02}/03/2019" for day in range(1, 13))))
    assert read.stamps[-1] == "2019-03-12 00:00" and read.plan.spec.cadence_minutes == 1440
    with refused(
        "day or the month first, as 2019-01-02 00:00 or 2019-02-01 00:00; give --time-format '%d/%m/%Y %H:%M'"
    ):
        read_table(wide("02/01/2019 00:00", "02/01/2019 01:00"))


def test_columns_of_time_that_agree_are_one(read_table, refused):
    rows = [f"2019-02-13T0{h}:00:00Z,2019-02-13T0{h + 1}:00:00+0100,{h},{h}" for h in range(3)]
    read = read_table("utc_timestamp,cet_timestamp,a,b\n" + "\n".join(rows) + "\n")
    assert read.stamps[0] == "2019-02-13 00:00" and read.ids == ["a", "b"]
    rows = [f"2019-02-13 0{h}:00,2019-02-13 0{2 * h}:00,{h}" for h in range(3)]
    with refused("2 columns of time .'begin', 'end'., which differ; choose one with --time"):
        read_table("begin,end,a\n" + "\n".join(rows) + "\n")


@pytest.mark.parametrize("cadence", [30, 120])
def test_another_cadence_than_the_stamps_is_refused(read_table, refused, cadence):
    with refused(f"frames are 60 minutes apart, not {cadence}; check --cadence"):
        read_table(wide(*TWO), cadence=cadence)


def test_the_hour_that_clocks_repeat_is_named(read_table, refused):
    stamps = [f"2019-10-27 0{hour}:00" for hour in (0, 1, 2, 2, 3)]
    with refused("2019-10-27T02:00:00 occurs twice .* the hour that clocks repeat .* --timezone, as Europe/Madrid"):
        read_table(wide(*stamps))
    with refused("2019-10-26T02:00:00 occurs twice .* give each time once"):
        read_table(wide(*(stamp.replace("27", "26") for stamp in stamps)))


@pytest.mark.parametrize(
    ("zone", "night", "standard", "first"),
    [
        ("Europe/Madrid", "2019-10-27", 60, "2019-10-26T22:00"),
        ("America/New_York", "2019-11-03", -300, "2019-11-03T04:00"),
        ("Australia/Lord_Howe", "2019-04-07", 630, "2019-04-06T13:00"),
    ],
)
def test_the_night_that_clocks_go_back(read_table, zone, night, standard, first):
    """All half-hours of a day: 50 in Madrid and New York, 49 on Lord Howe, whose summer is half an hour; from local
    midnight on they follow one another in UTC without a gap."""
    repeated = {
        "Europe/Madrid": ["02:00", "02:30"],
        "America/New_York": ["01:00", "01:30"],
        "Australia/Lord_Howe": ["01:30"],
    }
    clock = [f"{half // 2:02}:{half % 2 * 30:02}" for half in range(48)]
    at = clock.index(repeated[zone][-1]) + 1
    clock = [*clock[:at], *repeated[zone], *clock[at:]]
    read = read_table(wide(*(f"{night} {time}" for time in clock)), timezone=zone)
    spec = read.plan.spec
    assert spec.utc_offset_minutes == standard and spec.cadence_minutes == 30
    expected = np.datetime64(first) + np.arange(len(clock)) * np.timedelta64(30, "m")
    utc = np.array(read.stamps, "datetime64[m]") - np.timedelta64(standard, "m")
    np.testing.assert_array_equal(utc, expected)
    assert read.values == {"value": [[i, i + 0.5] for i in range(len(clock))]} and f"({zone})" in read.plan.read_as
    rows = "".join(f"{place},{night} {time},{i + 100 * place}\n" for place in (1, 2) for i, time in enumerate(clock))
    long = read_table("id,time,v\n" + rows, timezone=zone)
    assert long.stamps == read.stamps and long.values == {"v": [[i + 100, i + 200] for i in range(len(clock))]}


def test_the_night_that_clocks_go_forward(read_table, refused):
    """The hour that is not has a row without a value, or none; a value there is not of this zone."""
    stamps = [f"2019-03-31 0{hour}:00" for hour in range(5)]
    expected = ["2019-03-31 00:00", "2019-03-31 01:00", "2019-03-31 02:00", "2019-03-31 03:00"]
    for text in (wide(*stamps).replace("02:00,2,2.5", "02:00,,"), wide(*stamps[:2], *stamps[3:])):
        read = read_table(text, timezone="Europe/Madrid")
        # The store's clock stays that of the winter.
        assert read.stamps == expected and read.plan.spec.utc_offset_minutes == 60
    with refused("2019-03-31T02:00 does not exist in Europe/Madrid"):
        read_table(wide(*stamps), timezone="Europe/Madrid")
    turned = "z," + ",".join(stamps) + "\na,1,2,,4,5\n"
    assert read_table(turned, timezone="Europe/Madrid").values == {"value": [[1], [2], [4], [5]]}


def test_an_hour_that_is_absent_in_a_night_of_changed_clocks_is_told(read_table):
    night = [f"2019-03-31 0{hour}:00" for hour in (0, 1, 3, 4)]
    said = ("an hour is absent at 2019-03-31T02:00: where clocks skip it give --timezone, as Europe/Madrid",)
    assert read_table(wide(*night)).plan.said == said
    assert read_table(wide(*night), timezone="Europe/Madrid").plan.said == ()
    assert read_table(wide(*(stamp + "Z" for stamp in night))).plan.said == ()
    assert read_table(wide(*(stamp.replace("31", "30") for stamp in night))).plan.said == ()


def test_rows_that_run_backwards_have_the_later_hour_first(read_table, refused):
    """03:00, 02:00 of winter, 02:00 of summer, 01:00; in no order nobody can tell."""
    stamps = [f"2019-10-27 0{hour}:00" for hour in (3, 2, 2, 1, 0)]
    read = read_table(wide(*stamps), timezone="Europe/Madrid")
    assert read.values == {"value": [[i, i + 0.5] for i in (4, 3, 2, 1, 0)]}
    # By standard time, which shards are of: summer's midnight is an hour earlier.
    assert read.stamps == ["2019-10-26 23:00", *(f"2019-10-27 0{hour}:00" for hour in range(4))]
    mixed = [stamps[i] for i in (1, 0, 4, 2, 3)]
    with refused("2019-10-27T02:00 comes twice, since clocks in Europe/Madrid are set back, and rows are in no order"):
        read_table(wide(*mixed), timezone="Europe/Madrid")
    long = "id,time,v\n" + "".join(f"{place},{stamp},{i}\n" for place in (1, 2) for i, stamp in enumerate(stamps))
    assert read_table(long, timezone="Europe/Madrid").values == {"v": [[i, i] for i in (4, 3, 2, 1, 0)]}


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"timezone": "Europe/Madird"}, "'Europe/Madird' is no zone .* is Europe/Madrid meant"),
        ({"timezone": "new york"}, "is America/New_York meant"),
        ({"timezone": "CEST"}, "is no zone of the IANA's list; write one as Europe/Madrid"),
        ({"timezone": "Europe/Madrid", "utc_offset": 60}, "both tell the city's clock"),
        ({"timezone": "Europe/Madrid", "duplicates": "sum"}, "cannot tell the hours .* with --duplicates sum"),
    ],
)
def test_zones_that_do_not_fit(read_table, refused, options, line):
    with refused(line):
        read_table(wide(*TWO), **options)


@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
def test_odd_seconds_are_refused_by_one_rule(unit):
    """Fractions are rounded: days since … as floats are exact to no more."""
    stamps = np.array(["2019-02-13T00:00:00", "2019-02-13T01:00:30"], f"datetime64[{unit}]")
    with pytest.raises(InputError, match="stamp 2019-02-13T01:00:30 is not a whole minute"):
        whole_minutes("x", stamps)
    exact = np.array(["2019-02-13T00:59:59.9996", "2019-02-13T01:00:00.0004"], "datetime64[us]")
    assert whole_minutes("x", exact).astype(str).tolist() == ["2019-02-13T01:00"] * 2
    with pytest.raises(InputError, match="stamp of row 1, counted from 0, is missing"):
        whole_minutes("x", np.array(["2019-02-13", "NaT"], "datetime64[ns]"))


def test_odd_seconds_in_frames(tmp_path):
    """They were cut off there."""
    path = tmp_path / "city.npz"
    stamps = np.array(["2019-02-13T00:00:30", "2019-02-13T00:10:30"], "datetime64[s]")
    np.savez(path, time=stamps, x=np.ones((2, 1, 1)))
    with pytest.raises(InputError, match="2019-02-13T00:00:30 is not a whole minute"):
        READERS["frames-npz"].plan([path])
    np.savez(path, time=stamps - np.timedelta64(30, "s"), x=np.ones((2, 1, 1)))
    assert READERS["frames-npz"].plan([path]).spec.cadence_minutes == 10
    for cadence in (5, 20):
        with pytest.raises(InputError, match=f"frames are 10 minutes apart, not {cadence}"):
            READERS["frames-npz"].plan([path], cadence=cadence)


def test_cadence_of_one_frame_is_the_users():
    stamp = np.array(["2019-02-13T00:30"], "datetime64[m]")
    assert cadence_of("x", stamp, 30) == 30
    for given in (None, 20):
        with pytest.raises(InputError, match=r"too few|off the 20-minute grid"):
            cadence_of("x", stamp, given)


@pytest.mark.parametrize(
    ("names", "ordered", "said"),
    [
        (["volume_test.npz", "volume_train.npz"], [1, 0], "train, validation, test: volume_train.npz, volume_test"),
        (["test.npy", "train.npy", "val.npy"], [1, 2, 0], "order of train"),
        (["b10.csv", "b9.csv"], [1, 0], "the numbers in their names: b9.csv, b10.csv"),
        (["2019-02.csv", "2018-11.csv"], [1, 0], "the numbers"),
        (["pickup.npy", "dropoff.npy"], [0, 1], "as given: pickup.npy, dropoff.npy"),
        (["x_test.npy", "y_train.npy"], [0, 1], "as given"),
        (["one.csv"], [0], ""),
    ],
)  # fmt: skip
def test_files_without_stamps_are_ordered_by_their_names(tmp_path, names, ordered, said):
    paths = [tmp_path / name for name in names]
    order, line = in_time(paths)
    assert order == [paths[number] for number in ordered] and said in line and bool(line) == bool(said)


def test_a_raster_in_two_files_begins_with_the_training_part(tmp_path, read_plan):
    """STDN's volume_*.npz: the shell gives test before train."""
    frames = np.arange(4, dtype=np.float32).reshape(4, 1, 1, 1)
    np.savez(tmp_path / "volume_train.npz", volume=frames[:3])
    np.savez(tmp_path / "volume_test.npz", volume=frames[3:])
    sources = sorted(tmp_path.glob("*.npz"))
    plan = READERS["city-npz"].plan(sources, start="2015-01-01", cadence=360)
    assert read_plan(plan)[0].reshape(-1).tolist() == [0, 1, 2, 3]
    assert plan.said == ("files taken in the order of train, validation, test: volume_train.npz, volume_test.npz",)


@pytest.mark.parametrize(
    "text", ["", "12", "2019", "19:30", "20193101x", "1.5", "a-b-2019", "773869", "2019-1-1-1", "99991301"]
)
def test_no_times(text):
    assert formats_of(text) == ()
