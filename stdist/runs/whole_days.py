"""The whole local days of a store, of which ``stdist watch`` looks at the newest and ``stdist calibrate --newest`` is
made."""

import numpy as np

from stdist.data import DaySpan, GridStore
from stdist.data.spans import AnyRegion
from stdist.errors import InputError

WHOLE = 0.9
"""Share of a day's frames that have a value of some place where it is taken for whole."""


def newest_whole_days(store: GridStore, channel: str, region: AnyRegion, most: int) -> list[np.datetime64]:
    """The newest local days with ``WHOLE`` of their frames, the newest first, no more than ``most``. Raises InputError
    where there is none."""
    days: list[np.datetime64] = []
    for day in np.unique(store.local_days[store.present])[::-1]:
        seen = store.observed(channel, *store.step_range(DaySpan(day, day)), region)
        if seen.reshape(len(seen), -1).any(1).sum() >= WHOLE * store.slots_per_day:
            days.append(day)
        if len(days) == most:
            break
    if not days:
        raise InputError(f"{store.path} has no day with {WHOLE:.0%} of its frames; append the rest of one")
    return days


def span_of_newest(store: GridStore, channel: str, region: AnyRegion, count: int) -> DaySpan:
    """The span of the ``count`` newest whole days. Raises InputError where there are fewer."""
    days = newest_whole_days(store, channel, region, count)
    if len(days) < count:
        raise InputError(
            f"--newest {count}: {store.path} has {len(days)} whole days, {days[-1]} to {days[0]}; append more, or ask "
            f"for --newest {len(days)} or fewer"
        )
    return DaySpan(days[-1], days[0])
