"""Time axes of sensor data: their cadence, and which rows are which local day."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data_prep.common import require_on_grid
from stdist.data.schema import MINUTES_PER_DAY
from stdist.errors import InputError


def cadence_of(path: Path, stamps: np.ndarray) -> int:
    """Minutes between frames: the shortest step of stamps, datetime64[m] [T], in local time.

    Raises InputError where stamps are repeated, run backwards, or do not lie on a regular grid from midnight
    whose step divides a day. Absent stamps are no error.
    """
    if len(stamps) < 2:
        raise InputError(f"{path} holds {len(stamps)} frames, too few to tell the cadence; give at least two")
    steps = np.diff(stamps).astype(np.int64)
    wrong = np.flatnonzero(steps <= 0)
    if len(wrong):
        at = stamps[wrong[0] + 1]
        what = f"stamp {at} occurs twice" if steps[wrong[0]] == 0 else f"stamps run backwards at {at}"
        raise InputError(f"{path}: {what}; give each frame once, in order of time")
    cadence = int(steps.min())
    if MINUTES_PER_DAY % cadence:
        before = stamps[int(steps.argmin())]
        raise InputError(
            f"{path}: {cadence} minutes pass between {before} and the next stamp, which does not divide a day; "
            "resample to a regular cadence"
        )
    require_on_grid(path, stamps, cadence)
    return cadence


def rows_of_days(stamps: np.ndarray) -> Iterator[tuple[np.datetime64, int, int]]:
    """(local day, first row, row after its last) for sorted local stamps, datetime64[m] [T]."""
    days = stamps.astype("datetime64[D]")
    starts = np.flatnonzero(np.concatenate(([True], days[1:] != days[:-1])))
    for start, stop in zip(starts, np.append(starts[1:], len(days)), strict=True):
        yield days[start], int(start), int(stop)


def slots_of(stamps: np.ndarray, cadence: int) -> np.ndarray:
    """Slot of the local day of each stamp, int64 [n]; a stamp inside a slot belongs to it."""
    return (stamps - stamps.astype("datetime64[D]")).astype("timedelta64[m]").astype(np.int64) // cadence
