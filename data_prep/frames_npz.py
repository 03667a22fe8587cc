"""Reader of npz files that hold whole frames with their local time stamps.

Arrays: ``time`` (T,), datetime64, local time, in any order; every other array of shape (T, H, W) is a channel
(``internet``, …). NaN is a missing value, 0 a measured zero; row 0 is the first row of the array. Stamps that
the file lacks are gaps, which no window crosses, except short absences (``stdist.data.finalise.MAX_GAP``).

An example is the public whole-grid sample of Telecom Italia, Milan: ``internet`` (109, 100, 100), 10 minutes,
in three separate segments of 51, 28 and 30 frames, row 0 in the south, square id r * 100 + c + 1.
"""

from functools import partial
from pathlib import Path

import numpy as np

from data_prep.arrays import array_headers, load_array
from data_prep.common import Clock, GridPlace, city_of, only_source
from data_prep.preparation import Plan
from data_prep.reader import reader
from data_prep.steps import cadence_of, part_of, plan_of, steps_of, whole_minutes
from stdist.errors import InputError

CADENCE = 10
"""Minutes, of a file with one frame: Telecom Italia's."""


@reader("frames-npz")
def plan(
    sources: list[Path],
    *,
    city: str | None = None,
    channel: str | None = None,
    cadence: int | None = None,
    clock: Clock,
    place: GridPlace,
) -> Plan:
    """Plan of one file, read in one part.

    channel: the one array to read; all of them by default. cadence: minutes between time steps, as the stamps say, 10
    of one frame. Raises InputError where an array is absent or has no (T, H, W) shape, where stamps are repeated or
    irregular, or say another cadence.
    """
    path = only_source(sources, "frames-npz")
    names, shape = _channels(path, channel)
    town = city or city_of(path)
    stamps, utc_offset = clock.of_each(path, town, whole_minutes(path, load_array(path, "time")))
    cadence = cadence_of(path, np.sort(stamps), cadence or (CADENCE if len(stamps) < 2 else None))
    spec = place.spec(town, names, stamps, shape, cadence=cadence, utc_offset=utc_offset)
    part = part_of(spec, steps_of(path, spec, stamps), partial(_load, path, names), path)
    return plan_of(spec, {"reader": "frames-npz", "row0": place.row0, "col0": place.col0}, [path], [part])


def _load(path: Path, names: list[str]) -> dict[str, np.ndarray]:
    return {name: load_array(path, name) for name in names}


def _channels(path: Path, channel: str | None) -> tuple[list[str], tuple[int, int]]:
    """Names of the channels and (H, W), from the headers of the file."""
    headers = array_headers(path)
    time, dtype = headers.pop("time", ((), np.dtype(object)))
    if len(time) != 1 or dtype.kind != "M" or time[0] == 0:
        raise InputError(f"{path} has no array 'time' of datetime64 stamps, one per frame; add it")
    names = [channel] if channel else [name for name, (shape, _) in headers.items() if len(shape) == 3]
    for name in names:
        if name not in headers:
            raise InputError(f"{path} has no array {name!r}; it has {', '.join(headers)}")
        shape, dtype = headers[name]
        if len(shape) != 3 or shape[0] != time[0] or dtype.kind not in "fiu":
            raise InputError(f"{path}: array {name!r} is {dtype} {shape}; frames are numbers ({time[0]}, H, W)")
    shapes = {headers[name][0][1:] for name in names}
    if len(shapes) != 1:
        raise InputError(f"{path} holds no frames (T, H, W) of one shape beside 'time'; check its arrays")
    ((height, width),) = shapes
    return names, (height, width)
