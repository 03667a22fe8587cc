"""Time zones by their IANA names: the wall clocks of instants, also where clocks are set forward and back."""

from datetime import UTC, datetime
from difflib import get_close_matches
from zoneinfo import ZoneInfo, available_timezones

import numpy as np

from stdist.errors import InputError

NO_PLACES = ("Factory", "localtime")
"""Names without a place: the first is of no zone, the second of whichever the machine is in."""


def require_zone(zone: str) -> None:
    """InputError, with the nearest name, where there is no such zone."""
    known = available_timezones()
    if zone in known and zone not in NO_PLACES:
        return
    # By the whole name or by its city alone; an abbreviation is near to others that are of another continent.
    names = {part: name for name in known if "/" in name for part in (name.rpartition("/")[2].lower(), name.lower())}
    near = get_close_matches(zone.lower().replace(" ", "_"), names, 1, 0.8)
    meant = f"is {names[near[0]]} meant?" if near else "write one as Europe/Madrid or America/New_York"
    raise InputError(f"timezone {zone!r} is no zone of the IANA's list; {meant}")


def wall_clock(utc: np.ndarray, zone: str) -> np.ndarray:
    """Wall-clock stamps of UTC stamps, datetime64[ns] [n]: one comes twice where clocks are set back, and some never
    where they are set forward. Raises InputError where there is no such zone."""
    # Imported late: only stores with a zone need it.
    from pandas import DatetimeIndex

    require_zone(zone)
    stamps = DatetimeIndex(utc.astype("datetime64[ns]"), tz="UTC").tz_convert(ZoneInfo(zone))
    return stamps.tz_localize(None).to_numpy().astype("datetime64[ns]")


def instants(clock: np.ndarray, zone: str, later: np.ndarray) -> np.ndarray:
    """UTC of wall-clock stamps, datetime64[us] [n]; NaT where clocks were set forward over a stamp.

    later: bool [n], of a stamp that comes twice, whether it is the second."""
    from pandas import DatetimeIndex

    index = DatetimeIndex(clock.astype("datetime64[us]"))
    utc = index.tz_localize(ZoneInfo(zone), ambiguous=~later, nonexistent="NaT").tz_convert("UTC")
    return utc.tz_localize(None).to_numpy().astype("datetime64[us]")


def skips(clock: np.datetime64, zone: str) -> bool:
    """True where clocks were set forward over that stamp."""
    return bool(np.isnat(instants(np.array([clock]), zone, np.zeros(1, bool)))[0])


def standard_offset(zone: str, stamp: np.datetime64) -> int:
    """Minutes the zone's clock is ahead of UTC in the half of that year in which it is ahead least."""
    year, clock = int(str(stamp.astype("datetime64[Y]"))), ZoneInfo(zone)
    # Wherever clocks are changed, one of these days is of the winter.
    halves = (datetime(year, month, 1, 12, tzinfo=UTC).astimezone(clock).utcoffset() for month in (1, 7))
    return min(int(ahead.total_seconds()) // 60 for ahead in halves if ahead is not None)
