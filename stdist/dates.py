"""Dates and local times as people write them, by one grammar: ``2013-11-01`` and ``2013-11-01T00:00``.

numpy takes ``today``, ``2019`` and ``NaT`` for dates, and silently turns a time of another zone into UTC; and stamps in
nanoseconds wrap around beyond the years that are taken here.
"""

import re
from datetime import date, datetime
from typing import Any

import numpy as np

from stdist.errors import InputError

FIRST_YEAR, LAST_YEAR = 1678, 2261
_DAY = r"(\d{4}-\d{2}-\d{2})"
_TIME = r"(?:[T ](\d{2}:\d{2})(?::00(?:\.0+)?)?)?"
_ZONE = r"(?:Z|[+-]\d{2}(?::?\d{2})?)"


def parse_day(value: Any) -> np.datetime64:
    """One local calendar day, datetime64[D], of ``2013-11-01``, a date or a datetime64. Raises InputError otherwise."""
    if isinstance(value, np.datetime64):
        day = value.astype("datetime64[D]")
        value = str(day)
        if np.isnat(day) or not re.fullmatch(_DAY, value, re.ASCII):
            raise InputError(f"{value!r} is not a calendar day; write it as 2013-11-01")
    elif isinstance(value, date) and not isinstance(value, datetime):
        value = value.isoformat()
    if not isinstance(value, str) or not re.fullmatch(_DAY, value, re.ASCII):
        raise InputError(f"{value!r} is not a calendar day; write it as 2013-11-01")
    return _of_calendar(value, value).astype("datetime64[D]")


def parse_local_time(text: str, what: str) -> np.datetime64:
    """A local time to the minute, datetime64[m], of ``2013-11-01T00:00``, a blank for the ``T``, or a day for its
    midnight. ``what`` names it in errors.

    Raises InputError otherwise: for an offset from UTC too, since the time is local and the offset is told apart.
    """
    if re.fullmatch(_DAY + r"[T ]\d{2}:\d{2}(?::\d{2}(?:\.\d+)?)?" + _ZONE, text, re.ASCII):
        raise InputError(
            f"{what} {text!r} has an offset from UTC; write the city's local time without it, and the offset as "
            "--utc-offset MINUTES where the reader asks for one"
        )
    if (match := re.fullmatch(_DAY + _TIME, text, re.ASCII)) is None:
        raise InputError(f"{what} {text!r} is not a local time to the minute; write 2013-11-01T00:00")
    return _of_calendar(f"{match[1]}T{match[2] or '00:00'}", f"{what} {text}").astype("datetime64[m]")


def _of_calendar(text: str, said: str) -> np.datetime64:
    try:
        stamp = datetime.fromisoformat(text)
    except ValueError as error:
        raise InputError(f"{said} is in no calendar ({error}); write one that is") from None
    if not FIRST_YEAR <= stamp.year <= LAST_YEAR:
        raise InputError(f"{said} lies outside the years {FIRST_YEAR} to {LAST_YEAR}; correct the year")
    return np.datetime64(stamp)
