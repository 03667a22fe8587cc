"""Arrays that the reader of tables takes too: .npy and .npz of (T, N) or (T, N, C), frames of pandas in HDF5, and
Monash's .tsf."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from data_prep.arrays import ArrayFile, array_file, array_headers, parse_channels
from data_prep.pandas_h5 import PandasFrame, open_frame
from data_prep.table_reading import Piece
from data_prep.table_values import Held, Measure, Rows
from data_prep.tsf import Series, read_tsf
from stdist.errors import InputError


@dataclass(frozen=True, eq=False)
class FrameRows:
    """Rows of a frame that stay in its file until they are taken."""

    frame: PandasFrame
    measure: Measure

    def take(self, rows: np.ndarray) -> np.ndarray:
        first, stop = int(rows.min()), int(rows.max()) + 1
        return self.measure.of(self.frame.values(first, stop)[rows - first])


@dataclass(frozen=True, eq=False)
class MappedRows:
    """Rows of a .npy file, mapped."""

    array: ArrayFile
    channel: int
    measure: Measure

    def take(self, rows: np.ndarray) -> np.ndarray:
        values = self.array.load()[rows]
        return self.measure.of(values if values.ndim == 2 else values[..., self.channel])


def array_piece(path: Path, key: str | None, channels: str | None, usual: str, measure: Measure) -> Piece:
    """Consecutive steps of places that are known by their number alone. key: of --array.

    Raises InputError naming --array where several arrays of a file may be meant.
    """
    if path.suffix == ".npz" and key is None:
        headers = array_headers(path)
        fit = [name for name, (shape, dtype) in headers.items() if dtype.kind in "fiu" and len(shape) in (2, 3)]
        if len(fit) > 1:
            shapes = ", ".join(f"{name} {headers[name][0]}" for name in fit)
            raise InputError(f"{path} holds {len(fit)} arrays of numbers ({shapes}); choose one with --array {fit[0]}")
        key = fit[0] if fit else None
    array = array_file(path, key, "T, N", "T, N, C")
    steps, count, *more = array.shape
    number = more[0] if more else 1
    names = parse_channels(channels, number, {1: (usual,)}, str(path))
    rows: dict[str, Rows] = {}
    if array.key is None:
        rows |= {name: MappedRows(array, index, measure) for index, name in enumerate(names)}
    else:
        values = array.load().reshape(steps, count, number)
        rows |= {name: Held([measure.of(values[..., index])]) for index, name in enumerate(names)}
    return Piece(str(path), None, steps, list(map(str, range(count))), rows, np.arange(steps))


def frame_piece(path: Path, channel: str, measure: Measure) -> Piece:
    """A frame of pandas: time by columns, each a place."""
    frame = open_frame(path)
    stamps = frame.stamps().astype("datetime64[us]")
    order = np.argsort(stamps, kind="stable")
    ids = [str(name) for name in frame.ids.tolist()]
    rows: dict[str, Rows] = {channel: FrameRows(frame, measure)}
    return Piece(str(path), stamps[order], len(stamps), ids, rows, order)


def series_piece(path: Path, start: str | None, cadence: int | None, channel: str, measure: Measure) -> Piece:
    """Monash's .tsf: a series a place. Series without a stamp of their own begin together.

    start, cadence: as the user says. Raises InputError where the file says otherwise, or series fit no common steps.
    """
    series, told = read_tsf(path)
    if told and cadence not in (None, told):
        raise InputError(f"{path}: @frequency says {told} minutes between values, not {cadence}; check --cadence")
    step = told or cadence
    starts = [one.start for one in series]
    if all(stamp is None for stamp in starts):
        return _side_by_side(path, series, [0] * len(series), channel, measure)
    if any(stamp is None for stamp in starts):
        raise InputError(f"{path}: some series have a start_timestamp and others none; give them all one")
    if start is not None:
        raise InputError(f"{path} has stamps of its own, the start_timestamp of each series; leave --start out")
    if step is None:
        raise InputError(f"{path} tells no @frequency of minutes to a day; give the minutes with --cadence")
    stamps = np.array(starts, "datetime64[s]")
    since = (stamps - stamps.min()).astype(np.int64)
    if (since % (60 * step)).any():
        wrong = int(np.flatnonzero(since % (60 * step))[0])
        raise InputError(f"{path}: series {series[wrong].name!r} starts at {stamps[wrong]}, between the others' steps")
    piece = _side_by_side(path, series, (since // (60 * step)).tolist(), channel, measure)
    axis = stamps.min().astype("datetime64[us]") + np.arange(piece.steps) * np.timedelta64(step, "m")
    return replace(piece, stamps=axis, cadence=step)


def _side_by_side(
    path: Path, series: Sequence[Series], offsets: Sequence[int], channel: str, measure: Measure
) -> Piece:
    """offsets: the step at which each series begins."""
    steps = max(offset + len(one.values) for offset, one in zip(offsets, series, strict=True))
    values = np.full((steps, len(series)), np.nan, np.float32)
    for column, (offset, one) in enumerate(zip(offsets, series, strict=True)):
        values[offset : offset + len(one.values), column] = measure.of(one.values)
    rows: dict[str, Rows] = {channel: Held([values])}
    return Piece(str(path), None, steps, [one.name for one in series], rows, np.arange(steps))
