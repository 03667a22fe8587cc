"""Reads what ``xarray_source`` planned: the days of NetCDF files and Zarr stores, in pieces of bounded size."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xarray

from data_prep.frames import require_traffic, slices_of_days, slots_filled
from data_prep.plan import Day, Part
from data_prep.xarray_axes import Axes
from stdist.data.parts import Tile
from stdist.data.schema import MINUTES_PER_DAY
from stdist.errors import InputError

BUDGET = 192 << 20
"""Bytes of values held at once, as float32, where a tile does not need more."""


@dataclass(frozen=True, eq=False)
class PieceReader:
    """Reads the days of a part, whole where they fit the budget, else tile by tile.

    files: path and frames, in order of time. A part's payload: its first row of all files together, and the local
    stamps of its rows, datetime64[m] [n].
    """

    files: tuple[tuple[Path, int], ...]
    axes: Axes
    variables: tuple[str, ...]
    channels: tuple[str, ...]
    shape: tuple[int, ...]
    tiles: tuple[Tile, ...]
    cadence: int

    def read(self, part: Part) -> Iterator[Day]:
        start, stamps = part.payload
        slots = MINUTES_PER_DAY // self.cadence
        whole = tuple(slice(0, side) for side in self.shape)
        size = 4 * len(self.channels) * len(part.days) * slots * np.prod(self.shape)
        for box in [whole] if size <= BUDGET else self.tiles:
            block = self._read(start, stamps, box)
            days = slices_of_days(stamps.astype("datetime64[D]"))
            for day, (first, last) in zip(part.days, days, strict=True):
                for tile in self.tiles if box == whole else [box]:
                    inner = tuple(slice(t.start - b.start, t.stop - b.start) for t, b in zip(tile, box, strict=True))
                    cuts = {channel: read[(slice(first, last), *inner)] for channel, read in block.items()}
                    values, present = slots_filled(cuts, stamps[first:last], slots)
                    yield Day(day, values, present, tile if len(self.tiles) > 1 else None)

    def _read(self, start: int, stamps: np.ndarray, box: Tile) -> dict[str, np.ndarray]:
        """Per channel float32 [n, *box] of the rows from ``start`` on of all files together."""
        values: dict[str, list[np.ndarray]] = {channel: [] for channel in self.channels}
        before, stop = 0, start + len(stamps)
        for path, frames in self.files:
            first, last = max(start - before, 0), min(stop - before, frames)
            if first < last:
                here = stamps[before + first - start : before + last - start]
                with opened(path) as data:
                    for channel, variable in zip(self.channels, self.variables, strict=True):
                        values[channel].append(self._cut(path, data[variable], slice(first, last), box, here))
            before += frames
        return {channel: np.concatenate(each) if len(each) > 1 else each[0] for channel, each in values.items()}

    def _cut(self, path: Path, array: xarray.DataArray, time: slice, box: Tile, stamps: np.ndarray) -> np.ndarray:
        """float32 [n, *box] in the store's order, NaN outside the valid range."""
        axes = self.axes
        where: dict[str, slice | int] = {str(dim): 0 for dim in array.dims} | {axes.time: time}
        for dim, side, piece, flipped in zip(axes.space, self.shape, box, axes.flipped, strict=True):
            where[dim] = slice(side - piece.stop, side - piece.start) if flipped else piece
        try:
            read = array.isel(where).transpose(*axes.dims).values.astype(np.float32, copy=False)
        except (OSError, RuntimeError, ValueError) as error:
            raise InputError(f"{path}: {array.name} is damaged ({_first_line(error)}); fetch the file again") from error
        read = read[(slice(None), *reversal(axes.flipped))]
        low, high = valid_range(array)
        if np.isfinite([low, high]).any():
            read = np.where((read < low) | (read > high), np.float32(np.nan), read)
        if low >= 0 or np.isneginf(low):
            corner = ", ".join(str(side.start) for side in box)
            require_traffic(read, f"{path}: {array.name}, counted from cell {corner} of the store,", stamps)
        return read


def minutes_of(path: Path, times: np.ndarray) -> np.ndarray:
    """datetime64[m]; float stamps (days since …) are exact to the second, not more."""
    if np.isnat(times).any():
        raise InputError(f"{path}: stamp {int(np.isnat(times).argmax())} is missing; give every frame its time")
    seconds = (times.astype("datetime64[ms]") + np.timedelta64(500, "ms")).astype("datetime64[s]")
    wrong = seconds != seconds.astype("datetime64[m]")
    if wrong.any():
        raise InputError(f"{path}: stamp {seconds[wrong][0]} is no whole minute; give frames at a regular cadence")
    return seconds.astype("datetime64[m]")


def valid_range(array: xarray.DataArray) -> tuple[float, float]:
    """What lies outside is missing (CF 2.5.1); infinite where not told.

    Of packed variables the attributes are packed too, unless they are fractions where the file has whole numbers.
    """
    low, high = array.attrs.get("valid_range", (-np.inf, np.inf))
    low, high = array.attrs.get("valid_min", low), array.attrs.get("valid_max", high)
    scale, offset = array.encoding.get("scale_factor", 1), array.encoding.get("add_offset", 0)
    whole = np.dtype(array.encoding.get("dtype", float)).kind in "iu"
    bounds = [
        float(value) if whole and np.asarray(value).dtype.kind == "f" else float(value) * scale + offset
        for value in (low, high)
    ]
    return min(bounds), max(bounds)


@contextmanager
def opened(path: Path) -> Iterator[xarray.Dataset]:
    """A NetCDF 4 file or a Zarr store, lazily; InputError where it is neither, or damaged."""
    if not path.exists():
        raise InputError(f"{path} does not exist; give a NetCDF file or a Zarr store")
    if path.is_file() and path.open("rb").read(3) == b"CDF":
        raise InputError(f"{path} is NetCDF 3; make it NetCDF 4: nccopy -k nc4 {path.name} new.nc")
    try:
        data = xarray.open_dataset(path, engine="zarr" if path.is_dir() else "h5netcdf", chunks=None, cache=False)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        kind = "Zarr store" if path.is_dir() else "NetCDF 4 file"
        raise InputError(f"{path} is no {kind}, or is damaged ({_first_line(error)}); check it") from error
    with data:
        yield data


def reversal(flipped: Sequence[bool]) -> tuple[slice, ...]:
    return tuple(slice(None, None, -1 if back else None) for back in flipped)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:120]
