"""Stamps of a clock that is set forward and back, as UTC."""

from datetime import UTC, datetime
from zoneinfo import ZoneInfo, available_timezones

import numpy as np
import polars as pl

from stdist.errors import InputError


def require_zone(zone: str | None) -> None:
    """InputError where there is no such zone."""
    if zone is not None and zone not in available_timezones():
        raise InputError(f"--timezone {zone!r} is no zone; give one as Europe/Madrid, America/New_York or UTC")


def utc_of(
    label: str, stamps: np.ndarray, zone: str, empty: np.ndarray, places: np.ndarray | None = None
) -> np.ndarray:
    """UTC of the clock's stamps, datetime64[us] [n] in the order of the rows; NaT of a row that counts for nothing.

    Of an hour that comes twice the first row of a stamp (and place, int [n]) is the earlier one, the second the later.
    An hour that the clock skips may have rows without a value (empty, bool [n]): they are left out; InputError where
    one holds a value.
    """
    groups = np.zeros(len(stamps), np.int64) if places is None else places
    clock = pl.DataFrame({"stamp": pl.Series(stamps), "place": groups})
    again = clock.select(pl.int_range(pl.len()).over("stamp", "place") > 0).to_series()
    first, second = (
        clock["stamp"].dt.replace_time_zone(zone, ambiguous=which, non_existent="null").dt.convert_time_zone("UTC")
        for which in ("earliest", "latest")
    )
    utc = second.zip_with(again, first).dt.replace_time_zone(None)
    read = utc.to_numpy().astype("datetime64[us]")
    if (skipped := np.isnat(read) & ~empty).any():
        stamp = stamps[skipped][0].astype("datetime64[m]")
        raise InputError(
            f"{label}: {stamp} does not exist in {zone}, where clocks were set forward, but has values; is this the "
            "zone of the stamps?"
        )
    return read


def standard_offset(zone: str, stamp: np.datetime64) -> int:
    """Minutes the zone's clock is ahead of UTC in the half of that year in which it is ahead least."""
    year, clock = int(str(stamp.astype("datetime64[Y]"))), ZoneInfo(zone)
    # Wherever clocks are changed, one of these days is of the winter.
    halves = (datetime(year, month, 1, 12, tzinfo=UTC).astimezone(clock).utcoffset() for month in (1, 7))
    return min(int(ahead.total_seconds()) // 60 for ahead in halves if ahead is not None)
