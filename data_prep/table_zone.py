"""Stamps of a clock that is set forward and back, as UTC."""

import numpy as np
import polars as pl

from stdist.errors import InputError
from stdist.zones import instants

REPEATED = "it may be the hour that clocks repeat when summer time ends: give --timezone, as Europe/Madrid"


def utc_of(
    label: str, stamps: np.ndarray, zone: str, empty: np.ndarray, places: np.ndarray | None = None
) -> np.ndarray:
    """UTC of the clock's stamps, datetime64[us] [n] in the order of the rows; NaT of a row that counts for nothing.

    Of a stamp (and place, int [n]) that comes twice since clocks are set back, the first row is the earlier one; the
    later one where rows run backwards in time. An hour that the clock skips may have rows without a value (empty,
    bool [n]): they are left out. Raises InputError where one holds a value, or rows are in no order that tells which of
    two is the earlier.
    """
    groups = np.zeros(len(stamps), np.int64) if places is None else places
    clock = pl.DataFrame({"stamp": pl.Series(stamps.astype("datetime64[us]")), "place": groups})
    again = clock.select(pl.int_range(pl.len()).over("stamp", "place") > 0).to_series().to_numpy()
    earlier, later = (instants(stamps, zone, np.full(len(stamps), which)) for which in (False, True))
    # NaT is unlike itself.
    twice = (earlier != later) & ~np.isnat(earlier)
    if (again & twice).any():
        runs = _directions(stamps[~twice], groups[~twice])
        if runs == {1, -1}:
            stamp = stamps[again & twice][0].astype("datetime64[m]")
            raise InputError(
                f"{label}: {stamp} comes twice, since clocks in {zone} are set back, and rows are in no order that "
                "tells which is the earlier; sort the rows by time as they were measured, or give UTC or offsets"
            )
        if runs == {-1}:
            earlier, later = later, earlier
    utc = np.where(again, later, earlier)
    if (skipped := np.isnat(utc) & ~empty).any():
        stamp = stamps[skipped][0].astype("datetime64[m]")
        raise InputError(
            f"{label}: {stamp} does not exist in {zone}, where clocks were set forward, but has values; is this the "
            "zone of the stamps?"
        )
    return utc


def _directions(stamps: np.ndarray, places: np.ndarray) -> set[int]:
    """1 where rows of a place go on in time, -1 where they go back; both, either or none of them."""
    order = np.argsort(places, kind="stable")
    steps = np.sign(np.diff(stamps[order]).astype(np.int64))[np.diff(places[order]) == 0]
    return {*np.unique(steps[steps != 0]).tolist()}


def clock_change(stamp: np.datetime64) -> bool:
    """True in the hours of a Sunday night of spring or autumn in which clocks are changed."""
    day = stamp.astype("datetime64[D]")
    month = int(day.astype("datetime64[M]").astype(int)) % 12 + 1
    hour = int((stamp - day) // np.timedelta64(1, "h"))
    # 1970-01-01 was a Thursday.
    return int(day.astype(int)) % 7 == 3 and month in (3, 4, 9, 10, 11) and hour < 4


def skipped_hours(stamps: np.ndarray, cadence: int) -> list[str]:
    """A remark where one hour of stamps, datetime64[m] ascending, is absent in each of the nights of changed clocks
    that it names: clocks of a zone may have skipped it."""
    hour = np.timedelta64(60, "m")
    first = stamps[:-1][np.diff(stamps) == hour + np.timedelta64(cadence, "m")] + np.timedelta64(cadence, "m")
    nights = [str(stamp) for stamp in first if stamp == stamp.astype("datetime64[h]") and clock_change(stamp)]
    if not nights:
        return []
    return [f"an hour is absent at {', '.join(nights)}: where clocks skip it give --timezone, as Europe/Madrid"]
