"""Time steps: their stamps, the parts and days they make, and the values that are refused in them."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.common import parse_start
from data_prep.preparation import Plan
from data_prep.table_zone import REPEATED, clock_change
from stdist.data import Day, GridSpec, NodeSpec, Part
from stdist.data.schema import MINUTES_PER_DAY
from stdist.errors import InputError

Load = Callable[[], Mapping[str, np.ndarray]]
"""Per channel numbers [n, *shape], NaN = missing; where their last axis is shorter, the last nodes are missing."""


def stamps_from(
    path: Path, start: str | None, steps: int, cadence: int, example: str, lacking: str = "time stamps"
) -> np.ndarray:
    """Local stamps, datetime64[m] [steps], of time steps that follow one another; InputError without a start."""
    if start is None:
        raise InputError(f"{path} has no {lacking}; give the local time of its first frame: --start {example}")
    return parse_start(start) + np.arange(steps) * np.timedelta64(cadence, "m")


def whole_minutes(path: Path | str, stamps: np.ndarray, advice: str = "round the stamps to the cadence") -> np.ndarray:
    """Stamps of any unit as datetime64[m]: what all readers make of them.

    Fractions of a second are rounded, since stamps that are stored as fractions (days since …) are exact to no more.
    Raises InputError where one is absent or at odd seconds: nothing says which step of the cadence it belongs to.
    """
    if (lost := np.isnat(stamps)).any():
        raise InputError(
            f"{path}: the stamp of row {int(lost.argmax())}, counted from 0, is missing; give every frame its time"
        )
    if np.datetime_data(stamps.dtype)[0] in ("ms", "us", "ns"):
        stamps = (stamps.astype("datetime64[ms]") + np.timedelta64(500, "ms")).astype("datetime64[s]")
    minutes = stamps.astype("datetime64[m]")
    if (odd := minutes != stamps).any():
        raise InputError(f"{path}: stamp {stamps[odd][0]} is not a whole minute; {advice}")
    return minutes


def cadence_of(path: Path | str, stamps: np.ndarray, given: int | None = None, advice: str = "check --cadence") -> int:
    """Minutes between time steps: the shortest step of stamps, datetime64[m] [T], in local time.

    given: as the user says; it must be what the stamps show, and counts alone where there is one stamp. Raises
    InputError where it is not, where stamps are repeated, run backwards, or do not lie on a regular grid from midnight
    whose step divides a day. Absent stamps are no error.
    """
    if len(stamps) < 2:
        if given is not None and len(stamps):
            require_on_grid(path, stamps, given)
            return given
        raise InputError(f"{path} holds {len(stamps)} frames, too few to tell the cadence; give at least two")
    steps = np.diff(stamps).astype(np.int64)
    wrong = np.flatnonzero(steps <= 0)
    if len(wrong):
        at = stamps[wrong[0] + 1]
        what = f"stamp {at} occurs twice" if steps[wrong[0]] == 0 else f"stamps run backwards at {at}"
        advice = REPEATED if clock_change(at) else "give each frame once, in order of time"
        raise InputError(f"{path}: {what}; {advice}")
    cadence = int(steps.min())
    if given not in (None, cadence):
        raise InputError(f"{path}: frames are {cadence} minutes apart, not {given}; check --cadence")
    if MINUTES_PER_DAY % cadence:
        before = stamps[int(steps.argmin())]
        raise InputError(
            f"{path}: {cadence} minutes pass between {before} and the next stamp, which does not divide a day; "
            "resample to a regular cadence"
        )
    require_on_grid(path, stamps, cadence, advice)
    return cadence


def cadence_of_most(stamps: np.ndarray) -> int | None:
    """Minutes between whole-minute stamps, ascending; None where they make no grid that divides a day."""
    if len(stamps) < 2 or (stamps != stamps.astype("datetime64[m]")).any():
        return None
    cadence = int(np.diff(stamps.astype("datetime64[m]")).astype(np.int64).min())
    return None if MINUTES_PER_DAY % cadence or (minutes_of_day(stamps) % cadence).any() else cadence


def beginnings(stamps: np.ndarray, cadence: int) -> tuple[np.ndarray, str]:
    """Local stamps that all lie behind the grid of ``cadence`` minutes by one and the same time, as 00:14, 00:29, …, as
    the beginnings of their intervals, and a remark; others as they are."""
    behind = (stamps - stamps.astype("datetime64[D]")) % np.timedelta64(cadence, "m")
    if not len(stamps) or not behind[0] or (behind != behind[0]).any():
        return stamps, ""
    begun = stamps - behind[0]
    clocks = (str(stamp.astype("datetime64[s]"))[11:] for stamp in (stamps[0], begun[0]))
    return begun, "stamps as {} are taken for the intervals they lie in, from {} on".format(*clocks)


def require_on_grid(path: Path | str, stamps: np.ndarray, cadence: int, advice: str = "check --cadence") -> None:
    """Raise InputError for a local stamp (datetime64[m] [n]) that is repeated or off the cadence's grid."""
    off = stamps[minutes_of_day(stamps) % cadence != 0]
    if len(off):
        raise InputError(f"{path}: stamp {off[0]} is off the {cadence}-minute grid that begins at midnight; {advice}")
    unique, counts = np.unique(stamps, return_counts=True)
    if (counts > 1).any():
        raise InputError(f"{path}: stamp {unique[counts > 1][0]} occurs twice; give each frame once")


def minutes_of_day(stamps: np.ndarray) -> np.ndarray:
    """Since local midnight, int64 [n]."""
    return (stamps - stamps.astype("datetime64[D]")).astype("timedelta64[m]").astype(np.int64)


def steps_of(path: Path | str, spec: GridSpec | NodeSpec, stamps: np.ndarray) -> np.ndarray:
    """Index of each local stamp on the spec's time axis, int64 [n]; InputError where one is not on it."""
    require_on_grid(path, stamps, spec.cadence_minutes)
    return (stamps - spec.first_day.astype("datetime64[m]")).astype(np.int64) // spec.cadence_minutes


def slices_of_days(days: np.ndarray, together: int = 1) -> list[tuple[int, int]]:
    """Rows [start, stop) of every ``together`` days that have rows; days: of each row, ascending [n]."""
    starts = np.flatnonzero(np.append(True, days[1:] != days[:-1]))[::together].tolist()
    return list(zip(starts, [*starts[1:], len(days)], strict=True))


def part_of(spec: GridSpec | NodeSpec, steps: np.ndarray, load: Load, source: Path | str) -> Part:
    """A part of the days of the time steps that ``load`` reads, by their indices, int64 [n] in any order."""
    days = np.unique(steps // spec.slots_per_day)
    return Part(str(spec.days[days[0]]), tuple(days.tolist()), (steps, load, str(source)))


def plan_of(spec: GridSpec | NodeSpec, recipe: dict[str, Any], files: list[Path], parts: list[Part]) -> Plan:
    """Plan of parts that ``part_of`` made."""
    # The graph would travel with every part.
    axes = replace(spec, adjacency=None) if isinstance(spec, NodeSpec) else spec
    return Plan(spec, recipe, files, None, parts, partial(read_days, axes))


def read_days(spec: GridSpec | NodeSpec, part: Part) -> Iterator[Day]:
    """The days of a part of ``part_of``; slots without a time step are not present.

    Raises InputError naming source, channel, time and place of a value that is infinite or negative.
    """
    steps, load, source = part.payload
    channels, slots = load(), spec.slots_per_day
    stamps = spec.first_day.astype("datetime64[m]") + steps * np.timedelta64(spec.cadence_minutes, "m")
    order = np.argsort(steps, kind="stable")
    for start, stop in slices_of_days(steps[order] // slots):
        rows = order[start:stop]
        of_day = {name: np.asarray(numbers[rows], np.float32) for name, numbers in channels.items()}
        for name, values in of_day.items():
            require_traffic(values, f"{source}: {name}", stamps[rows])
        yield Day(int(steps[rows[0]] // slots), *slots_filled(of_day, stamps[rows], slots, spec.shape[-1]))


def slots_filled(
    channels: Mapping[str, np.ndarray], stamps: np.ndarray, slots: int, side: int | None = None
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Spreads values [n, ...] of one local day over all its slots, float32; with them the slots that are present, bool.

    side: length that the last axis gets, filled up as missing.
    """
    slot = minutes_of_day(stamps) * slots // MINUTES_PER_DAY
    present = np.zeros(slots, bool)
    present[slot] = True
    filled = {}
    for name, values in channels.items():
        *shape, last = values.shape[1:]
        filled[name] = np.full((slots, *shape, side or last), np.nan, np.float32)
        filled[name][slot, ..., :last] = values
    return filled, present


def require_traffic(values: np.ndarray, what: str, times: np.ndarray) -> None:
    """Raise InputError naming the first value [n, ...] that is infinite or negative, and its time (times [n])."""
    wrong = np.isinf(values) | (values < 0)
    if wrong.any():
        frame, *place = np.argwhere(wrong)[0].tolist()
        raise InputError(
            f"{what} is {values[frame, *place]} at {times[frame]}, index {', '.join(map(str, place))} "
            f"({int(wrong.sum())} such values from {times[0]} to {times[-1]}); traffic is finite and not negative, NaN "
            "means missing"
        )
