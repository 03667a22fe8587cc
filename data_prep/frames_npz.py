"""Reader of npz files that hold whole frames with their local time stamps.

Arrays: ``time`` (T,), datetime64, local time, in any order; every other array of shape (T, H, W) is a channel
(``internet``, …). NaN is a missing value, 0 a measured zero; row 0 is the first row of the array. Stamps that
the file lacks are gaps, which no window crosses, except short absences (``stdist.data.writer.MAX_GAP``).

An example is the public whole-grid sample of Telecom Italia, Milan: ``internet`` (109, 100, 100), 10 minutes,
in three separate runs of 51, 28 and 30 frames, row 0 in the south, square id r * 100 + c + 1.
"""

import zipfile
from pathlib import Path

import numpy as np

from data_prep.common import (
    PrepareSummary,
    city_of,
    grid_spec,
    only_source,
    parse_split,
    require_on_grid,
    write_frames,
)
from stdist.data import GridWriter
from stdist.errors import InputError
from stdist.progress import Progress


def prepare(
    sources: list[Path],
    out: Path,
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
    progress: Progress | None = None,
) -> PrepareSummary:
    """Write the grid store ``out`` from one file.

    channel: the one array to read; all of them by default. The other options are those of ``wide_csv``.
    Raises InputError where an array is absent, has no (T, H, W) shape, holds infinity or a negative value, or
    where stamps are repeated or off the cadence's grid.
    """
    path = only_source(sources, "frames-npz")
    stamps, channels = _read(path, channel)
    days = stamps.min().astype("datetime64[D]"), stamps.max().astype("datetime64[D]")
    shape = next(iter(channels.values())).shape[1:]
    spec = grid_spec(
        city or city_of(path),
        list(channels),
        days,
        (shape[0], shape[1]),
        cadence=cadence,
        utc_offset=utc_offset,
        row0=row0,
        col0=col0,
        id_width=id_width,
    )
    require_on_grid(path, stamps, cadence)
    split = parse_split(train, validation, test, spec)
    recipe = {"reader": "frames-npz", "row0": row0, "col0": col0}
    with GridWriter(out, spec, recipe, [path]) as writer:
        return write_frames(writer, stamps, channels, split, progress)


def _read(path: Path, channel: str | None) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Local stamps datetime64[m] [T], and float32 [T, H, W] per channel."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (OSError, ValueError, zipfile.BadZipFile, EOFError, AttributeError) as error:
        raise InputError(f"{path} is no npz file of plain arrays, or was cut short; check the file") from error
    time = arrays.pop("time", None)
    if time is None or time.ndim != 1 or time.dtype.kind != "M" or len(time) == 0:
        raise InputError(f"{path} has no array 'time' of datetime64 stamps, one per frame; add it")
    names = [channel] if channel else [name for name, array in arrays.items() if array.ndim == 3]
    channels = {}
    for name in names:
        if name not in arrays:
            raise InputError(f"{path} has no array {name!r}; it has {', '.join(arrays)}")
        array = arrays[name]
        if array.ndim != 3 or len(array) != len(time) or array.dtype.kind not in "fiu":
            raise InputError(
                f"{path}: array {name!r} is {array.dtype} {array.shape}; frames are numbers ({len(time)}, H, W)"
            )
        channels[name] = array.astype(np.float32)
        _require_traffic(path, name, time, channels[name])
    if len({array.shape for array in channels.values()}) != 1:
        raise InputError(f"{path} holds no frames (T, H, W) of one shape beside 'time'; check its arrays")
    return time.astype("datetime64[m]"), channels


def _require_traffic(path: Path, name: str, time: np.ndarray, frames: np.ndarray) -> None:
    wrong = np.argwhere(np.isinf(frames) | (frames < 0))
    if len(wrong):
        frame, row, col = wrong[0]
        raise InputError(
            f"{path}: {name} is {frames[frame, row, col]} at {time[frame]}, row {row}, column {col}; "
            "traffic is finite and not negative, NaN means missing"
        )
