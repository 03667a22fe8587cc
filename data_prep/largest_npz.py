"""``his.npz``, what LargeST's generate_data_for_training.py makes of a year: read day by day as it unpacks.

Array ``data`` (T, N, 3), float64, 15 minutes: flow, standardised with the file's ``mean`` and ``std``; time of day
as a share of it; weekday / 7, Monday 0. Missing values were filled with 0 before, so that 0 is missing here. The
whole of California is 7.2 GB in memory and an npz unpacks front to back, so that it is one part.
"""

import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_prep.arrays import BROKEN, array_file, require_traffic
from data_prep.common import parse_start
from data_prep.plan import Day, Part
from stdist.errors import InputError

SLOTS = 96


@dataclass(frozen=True, eq=False)
class HisFile:
    """One file; shape: (T, N, 3). Flow = standardised · std + mean."""

    path: Path
    shape: tuple[int, ...]
    first_day: np.datetime64
    mean: float
    std: float

    @property
    def days(self) -> np.ndarray:
        """Local days, datetime64[D]."""
        return self.first_day + np.arange(-(-self.shape[0] // SLOTS))


def open_his(path: Path, start: str | None) -> HisFile:
    """Reads headers and the two numbers.

    start: first local day; by default 1 January of the year that the folder is named after, as ``2019`` or
    ``2018_2019``. Raises InputError where it is neither, or the arrays are not those of his.npz.
    """
    shape = array_file(path, "data", "T, N, feature").shape
    if shape[2] != 3:
        raise InputError(f"{path} has {shape[2]} features; his.npz has three: flow, time of day, day of week")
    year = re.match(r"(\d{4})(_\d{4})*$", path.resolve().parent.name)
    if start is None and year is None:
        raise InputError(f"{path} has no stamps and its folder is named after no year; give --start 2019-01-01")
    stamp = parse_start(start or f"{year.group(1)}-01-01")  # type: ignore[union-attr]
    if stamp != stamp.astype("datetime64[D]"):
        raise InputError(f"--start {start!r} is no midnight; his.npz begins with a day")
    try:
        with np.load(path, allow_pickle=False) as archive:
            mean, std = (float(archive[name]) for name in ("mean", "std"))
    except (TypeError, *BROKEN) as error:
        raise InputError(f"{path} lacks the numbers 'mean' and 'std' of its scaler; is it his.npz?") from error
    return HisFile(path, shape, stamp.astype("datetime64[D]"), mean, std)


@dataclass(frozen=True, eq=False)
class HisReader:
    """Reads all days in order. The features say which weekday and time a frame is of: they must fit the start."""

    his: HisFile

    def read(self, part: Part) -> Iterator[Day]:
        for index, features in enumerate(_blocks(self.his)):
            self._require_clock(index, features)
            yield self._day(index, features[:, :, 0])

    def _day(self, index: int, standardised: np.ndarray) -> Day:
        # The authors rounded before they standardised, so that rounding undoes it exactly.
        flow = np.rint(standardised * self.his.std + self.his.mean)
        stamps = self.his.days[index] + np.arange(SLOTS) * np.timedelta64(15, "m")
        require_traffic(flow, f"{self.his.path}: flow", stamps)
        values = np.full((SLOTS, flow.shape[1]), np.nan, np.float32)
        values[: len(flow)] = np.where(flow == 0, np.nan, flow)
        return Day(index, {"flow": values}, np.arange(SLOTS) < len(flow))

    def _require_clock(self, index: int, features: np.ndarray) -> None:
        day = self.his.days[index]
        # 1970-01-01 was a Thursday.
        weekday = (day.astype("datetime64[D]").astype(int) + 3) % 7
        expected = np.stack([np.arange(len(features)) / SLOTS, np.full(len(features), weekday / 7)], axis=1)
        if not np.allclose(features[:, 0, 1:], expected, atol=1e-6):
            raise InputError(
                f"{self.his.path}: the frames of day {index} are not of {day} by their weekday and time; check --start"
            )


def _blocks(his: HisFile) -> Iterator[np.ndarray]:
    """float64 [n, N, 3] of one day after the other."""
    try:
        with zipfile.ZipFile(his.path) as archive, archive.open("data.npy") as member:
            version = np.lib.format.read_magic(member)
            header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, fortran, dtype = header(member)
            if fortran:
                raise InputError(f"{his.path} is in Fortran order; save np.ascontiguousarray(data) anew")
            for start in range(0, shape[0], SLOTS):
                frames = min(SLOTS, shape[0] - start)
                block = member.read(frames * shape[1] * shape[2] * dtype.itemsize)
                yield np.frombuffer(block, dtype).reshape(frames, *shape[1:]).astype(np.float64)
    except BROKEN as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{his.path} is damaged ({error}); make it anew") from error
