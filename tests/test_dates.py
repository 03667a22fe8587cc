"""Dates by one grammar: what numpy would guess at is refused."""

from datetime import date, datetime

import numpy as np
import pytest

from stdist.dates import parse_day, parse_local_time
from stdist.errors import InputError


@pytest.mark.parametrize("value", ["2013-11-01", date(2013, 11, 1), np.datetime64("2013-11-01T13:00")])
def test_a_day(value):
    assert parse_day(value) == np.datetime64("2013-11-01", "D") and parse_day(value).dtype == "datetime64[D]"


NO_DAYS = ["today", "now", "NaT", "nat", "", " ", "2019", "2019-01", "20190101", "2019-1-1", "2019-02-30", "2019-13-01"]
NO_DAYS += ["2019-01-01T00:00", "2019-01-01Z", "+2019-01-01", "-2019-01-01", "1677-12-31", "2262-01-01", "9999-12-31"]
NO_DAYS += [" 2019-01-01", "2019-01-01\n", "２０１９-01-01", "2019-W01-1", "2019-001", "0000-01-01"]


@pytest.mark.parametrize(
    "value", [*NO_DAYS, 2019, 1.5, None, True, datetime(2019, 1, 1), np.datetime64("NaT"), np.datetime64("12019-01-01")]
)
def test_what_is_no_day(value):
    with pytest.raises(InputError) as error:
        parse_day(value)
    assert "\n" not in str(error.value).replace(r"\n", "")


@pytest.mark.parametrize(
    ("text", "minute"),
    [
        ("2013-11-01T00:00", "2013-11-01T00:00"),
        ("2013-11-01 09:05", "2013-11-01T09:05"),
        ("2013-11-01", "2013-11-01T00:00"),
        ("2013-11-01T09:05:00", "2013-11-01T09:05"),
        ("2013-11-01T09:05:00.000", "2013-11-01T09:05"),
        ("1678-01-01", "1678-01-01T00:00"),
        ("2261-12-31T23:59", "2261-12-31T23:59"),
    ],
)
def test_a_local_time(text, minute):
    assert parse_local_time(text, "--start") == np.datetime64(minute, "m")


NO_TIMES = set(NO_DAYS) - {"2019-01-01T00:00", "2019-01-01Z"}
NO_TIMES |= {"2013-11-01T24:00", "2013-11-01T00:60", "2013-11-01T00:00:30", "2013-11-01T0:00", "2013-11-01T00", "00:00"}


@pytest.mark.parametrize("text", sorted(NO_TIMES))
def test_what_is_no_local_time(text):
    with pytest.raises(InputError, match="--start"):
        parse_local_time(text, "--start")


@pytest.mark.parametrize("zone", ["Z", "+01:00", "-0800", "+01", ":00+00:00", ":00.5Z"])
def test_an_offset_is_refused_and_not_dropped(zone):
    """numpy would make 2013-10-31T23:00 of the second, an hour early."""
    with pytest.raises(InputError, match=r"has an offset from UTC; write the city's local time .* --utc-offset"):
        parse_local_time(f"2013-11-01T00:00{zone}", "--start")
