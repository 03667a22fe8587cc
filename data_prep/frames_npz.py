"""Reader of npz files that hold whole frames with their local time stamps.

Arrays: ``time`` (T,), datetime64, local time, in any order; every other array of shape (T, H, W) is a channel
(``internet``, …). NaN is a missing value, 0 a measured zero; row 0 is the first row of the array. Stamps that
the file lacks are gaps, which no window crosses, except short absences (``stdist.data.writer.MAX_GAP``).

An example is the public whole-grid sample of Telecom Italia, Milan: ``internet`` (109, 100, 100), 10 minutes,
in three separate runs of 51, 28 and 30 frames, row 0 in the south, square id r * 100 + c + 1.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_prep.arrays import BROKEN, array_headers, require_traffic
from data_prep.common import city_of, days_of_frames, grid_spec, only_source, parse_split, require_on_grid
from data_prep.plan import Day, Part, Plan
from stdist.data import GridSpec
from stdist.errors import InputError


def plan(
    sources: list[Path],
    *,
    city: str | None = None,
    channel: str | None = None,
    cadence: int = 10,
    utc_offset: int | None = None,
    row0: int = 0,
    col0: int = 0,
    id_width: int | None = None,
    train: str | None = None,
    validation: str | None = None,
    test: str | None = None,
) -> Plan:
    """Plan of one file, read in one part.

    channel: the one array to read; all of them by default. The other options are those of ``wide_csv``.
    Raises InputError where an array is absent or has no (T, H, W) shape, or where stamps are repeated or off
    the cadence's grid.
    """
    path = only_source(sources, "frames-npz")
    shapes = _channel_shapes(path, channel)
    stamps = _stamps(path)
    shape = next(iter(shapes.values()))
    spec = grid_spec(
        city or city_of(path),
        list(shapes),
        (stamps.min().astype("datetime64[D]"), stamps.max().astype("datetime64[D]")),
        (shape[1], shape[2]),
        cadence=cadence,
        utc_offset=utc_offset,
        row0=row0,
        col0=col0,
        id_width=id_width,
    )
    require_on_grid(path, stamps, cadence)
    split = parse_split(train, validation, test, spec)
    recipe = {"reader": "frames-npz", "row0": row0, "col0": col0}
    days = np.unique((stamps.astype("datetime64[D]") - spec.first_day).astype(int))
    part = Part(path.name, tuple(days.tolist()))
    return Plan(spec, recipe, [path], split, [part], _Reader(spec, path))


@dataclass(frozen=True, eq=False)
class _Reader:
    """Raises InputError naming channel, time and place of a value that is infinite or negative."""

    spec: GridSpec
    path: Path

    def __call__(self, part: Part) -> Iterator[Day]:
        stamps = _stamps(self.path)
        channels = {name: _load(self.path, name).astype(np.float32) for name in self.spec.channels}
        for name, frames in channels.items():
            require_traffic(frames, f"{self.path}: {name}", stamps)
        return days_of_frames(self.spec, stamps, channels)


def _channel_shapes(path: Path, channel: str | None) -> dict[str, tuple[int, ...]]:
    """Shape (T, H, W) of every channel, from the headers of the file."""
    headers = array_headers(path)
    time, dtype = headers.pop("time", ((), np.dtype(object)))
    if len(time) != 1 or dtype.kind != "M" or time[0] == 0:
        raise InputError(f"{path} has no array 'time' of datetime64 stamps, one per frame; add it")
    names = [channel] if channel else [name for name, (shape, _) in headers.items() if len(shape) == 3]
    shapes: dict[str, tuple[int, ...]] = {}
    for name in names:
        if name not in headers:
            raise InputError(f"{path} has no array {name!r}; it has {', '.join(headers)}")
        shape, dtype = headers[name]
        if len(shape) != 3 or shape[0] != time[0] or dtype.kind not in "fiu":
            raise InputError(f"{path}: array {name!r} is {dtype} {shape}; frames are numbers ({time[0]}, H, W)")
        shapes[name] = shape
    if len(set(shapes.values())) != 1:
        raise InputError(f"{path} holds no frames (T, H, W) of one shape beside 'time'; check its arrays")
    return shapes


def _stamps(path: Path) -> np.ndarray:
    """Local stamps datetime64[m] [T], in the file's order."""
    return _load(path, "time").astype("datetime64[m]")


def _load(path: Path, name: str) -> np.ndarray:
    try:
        with np.load(path, allow_pickle=False) as archive:
            return archive[name]
    except BROKEN as error:
        raise InputError(f"{path} is damaged ({error}); download or write it again") from error
