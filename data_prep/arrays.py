"""Arrays in .npy and .npz files: headers without the data, and frames that follow one another as days.

Pickled files are never loaded: an array of Python objects is refused by its header.
"""

import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from data_prep.common import existing
from data_prep.plan import Day
from stdist.data.schema import GridSpec, NodeSpec
from stdist.errors import InputError

BROKEN = (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error)


@dataclass(frozen=True)
class ArrayFile:
    """One array of numbers in a file, known by its header; ``key`` is None in a .npy file."""

    path: Path
    key: str | None
    shape: tuple[int, ...]

    def load(self) -> np.ndarray:
        """The array, mapped and not read where the file is .npy; InputError where the file is damaged."""
        try:
            if self.key is None:
                return np.load(self.path, mmap_mode="r", allow_pickle=False)
            with np.load(self.path, allow_pickle=False) as archive:
                return archive[self.key]
        except BROKEN as error:
            raise InputError(f"{self.path} is damaged ({error}); download or write it again") from error


def array_file(path: Path, key: str | None, *dims: str) -> ArrayFile:
    """The array ``key`` of a file, or its only one where None; reads headers alone.

    dims: the axes it may have, as ``"T, N, C"``, named in errors. Raises InputError for a file that is no
    .npy or .npz file or was cut short, for another key, for pickled objects, and for another number of axes.
    """
    headers = array_headers(existing(path))
    axes = " or ".join(f"({each})" for each in dims)
    if key is None and len(headers) != 1:
        raise InputError(f"{path} holds {len(headers)} arrays ({', '.join(headers)}); keep the one of the frames")
    name = next(iter(headers)) if key is None or list(headers) == [""] else key
    if name not in headers:
        raise InputError(f"{path} has no array {key!r} {axes}; it has {', '.join(headers) or 'none'}")
    shape, dtype = headers[name]
    where = f"{path}, array {name!r}" if name else f"{path}"
    if dtype.hasobject:
        raise InputError(f"{where} holds pickled Python objects, which are never loaded; save it as plain numbers")
    if dtype.kind not in "fiu" or len(shape) not in [each.count(",") + 1 for each in dims] or 0 in shape:
        raise InputError(f"{where} is {dtype} {shape}; it must hold numbers {axes}")
    return ArrayFile(Path(path), name or None, shape)


def array_headers(path: Path) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Shape and type of every array by its key; a .npy file has the one key ``""``. InputError for other files."""
    try:
        if path.suffix != ".npz":
            with path.open("rb") as file:
                header = _header(file)
                missing = int(np.prod(header[0])) * header[1].itemsize - (path.stat().st_size - file.tell())
            if missing > 0 and not header[1].hasobject:
                raise InputError(f"{path} was cut short, {missing} bytes are missing; download or write it again")
            return {"": header}
        headers = {}
        with zipfile.ZipFile(path) as archive:
            for member in archive.namelist():
                with archive.open(member) as entry:
                    headers[member.removesuffix(".npy")] = _header(entry)
        return headers
    except BROKEN as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} is no .npy or .npz file, or was cut short; download or write it again") from error


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype]:
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(file)
    return shape, dtype


def parse_channels(channels: str | None, count: int, known: Mapping[int, Sequence[str]], what: str) -> tuple[str, ...]:
    """Channel names from ``a,b,c``; where None, those ``known`` for this many. InputError for a wrong number."""
    if channels is None:
        if count not in known:
            raise InputError(f"{what} has {count} channels; name them in order: --channels a,b,…")
        return tuple(known[count])
    names = tuple(name.strip() for name in channels.split(","))
    if len(names) != count or len(set(names)) != count or not all(name.isidentifier() for name in names):
        raise InputError(f"--channels {channels!r} does not name the {count} channels of {what}; write a,b,…")
    return names


def consecutive_days(
    spec: GridSpec | NodeSpec, first: int, frames: Mapping[str, np.ndarray], source: str
) -> Iterator[Day]:
    """Days of frames that follow one another at the cadence; the rest of the first and last day is not present.

    first: index of the first frame, counted from midnight of the spec's first day. frames: per channel numbers
    [n, *shape], NaN = missing; their last axis may be shorter than the spec's: the last nodes are then missing.
    Raises InputError naming ``source``, time and place of a value that is infinite or negative.
    """
    slots = spec.slots_per_day
    end = first + len(next(iter(frames.values())))
    for day in range(first // slots, -(-end // slots)):
        midnight = day * slots
        start, stop = max(first, midnight), min(end, midnight + slots)
        here = slice(start - midnight, stop - midnight)
        present = np.zeros(slots, bool)
        present[here] = True
        values = {}
        for name, numbers in frames.items():
            part = np.asarray(numbers[start - first : stop - first], np.float32)
            require_traffic(part, f"{source}: {name}", local_times(spec, np.arange(start, stop)))
            values[name] = np.full((slots, *spec.shape), np.nan, np.float32)
            values[name][here, ..., : part.shape[-1]] = part
        yield Day(day, values, present)


def local_times(spec: GridSpec | NodeSpec, frames: np.ndarray) -> np.ndarray:
    """Local stamps, datetime64[m] [n], of frame indices."""
    return spec.first_day.astype("datetime64[m]") + frames * np.timedelta64(spec.cadence_minutes, "m")


def require_traffic(values: np.ndarray, what: str, times: np.ndarray) -> None:
    """Raise InputError naming the first value [n, ...] that is infinite or negative, and its time (times [n])."""
    wrong = np.isinf(values) | (values < 0)
    if wrong.any():
        frame, *place = np.argwhere(wrong)[0].tolist()
        raise InputError(
            f"{what} is {values[frame, *place]} at {times[frame]}, index {', '.join(map(str, place))} "
            f"({int(wrong.sum())} such values); traffic is finite and not negative, NaN means missing"
        )
