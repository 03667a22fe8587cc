"""Reader of cities as rasters in .npy and .npz files: volumes (T, H, W) or (T, H, W, C), without time stamps.

Several files are either consecutive in time, or one channel each, all of the same time steps:

- New York taxi pick-ups, 10 x 20 cells, 30 minutes, January 2015: ``volume_train.npz`` and ``volume_test.npz``,
  array ``volume`` (1190 and 298, 10, 20, 1), the second from where the first ends, in the middle of a day
  (``--start 2015-01-01 --cadence 30``). 65 % of the values are zero.
- The cross-city set of CrossTReS (Jin, Chen and Yang, KDD 2022), which STBaT uses too: folders NY, CHI and DC
  with ``TaxiNY_pickup.npy``, ``TaxiNY_dropoff.npy``, ``BikeNY_pickup.npy`` and ``BikeNY_dropoff.npy``, each
  (T, x, y), hourly, and ``NY_poi.npy`` (x, y, 14), counts of places by class. Its first space axis is the
  LONGITUDE (``lng`` in the published code): ``--transpose`` makes rows of latitude. The files name no date; the
  papers say the year 2016.

What is made of it: zeros are measured, NaN is missing, integers become float32. Row 0 is that of the file unless
``--north-first`` says that it is the northern one; then rows are turned, so that row 0 is the south as in Milan.
POI are turned alike and stored as static features ``poi_0`` ….
"""

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from data_prep.arrays import ArrayFile, array_file, parse_channels
from data_prep.common import Clock, GridPlace, city_of, in_time
from data_prep.preparation import Plan
from data_prep.reader import reader
from data_prep.steps import part_of, plan_of, stamps_from, steps_of
from stdist.errors import InputError


@reader("city-npz")
def plan(
    sources: list[Path],
    *,
    city: str | None = None,
    channels: str | None = None,
    start: str | None = None,
    cadence: int = 60,
    poi: Path | None = None,
    array: str | None = None,
    north_first: bool = False,
    transpose: bool = False,
    clock: Clock,
) -> Plan:
    """Plan of one city, in one part.

    channels: names in order: of the channel axis where there is one; else one a file, or one for all files where
    they follow one another in time, in the order of train, validation and test or of the numbers in their names, else
    as given. array: name of the array in files that hold several. start: local ISO time of the first frame, required.
    cadence: minutes between time steps. poi: file of static features (H, W, F). north_first: row 0 of the files is the
    northern one. transpose: the files are (T, x, y), longitude before latitude.
    Raises InputError where files or options do not fit.
    """
    if not sources:
        raise InputError("city-npz needs the files of one city; none was given")
    arrays = [array_file(path, array, "T, H, W", "T, H, W, C") for path in sources]
    names, stacked = _channels(arrays, channels)
    ordered, order = ([*sources], "") if stacked else in_time(sources)
    arrays.sort(key=lambda file: ordered.index(file.path))
    _require_one_raster(arrays, stacked)
    path, shape = arrays[0].path, arrays[0].shape
    steps = shape[0] if stacked else sum(array.shape[0] for array in arrays)
    town = city or city_of(path)
    following = stamps_from(path, start, steps, cadence, "2015-01-01T00:00")
    stamps, utc_offset = clock.of_first(path, town, following)
    spec = GridPlace().spec(
        town,
        names,
        stamps,
        (shape[2], shape[1]) if transpose else (shape[1], shape[2]),
        cadence=cadence,
        utc_offset=utc_offset,
        units="trips",
        static=_poi(poi, arrays[0], transpose, north_first) if poi else None,
    )
    load = partial(_load, arrays, names, stacked, transpose, north_first)
    part = part_of(spec, steps_of(path, spec, stamps), load, ", ".join(str(array.path) for array in arrays))
    recipe = {"reader": "city-npz", "start": str(following[0]), "north_first": north_first, "transpose": transpose}
    files = [*(array.path for array in arrays), *([Path(poi)] if poi else [])]
    return replace(plan_of(spec, recipe, files, [part]), said=(order,) if order else ())


def _load(
    arrays: list[ArrayFile], names: tuple[str, ...], stacked: bool, transpose: bool, north_first: bool
) -> dict[str, np.ndarray]:
    """stacked: the files are one channel each, else one after the other in time."""
    volumes = [_turned(array.load(), 1, transpose, north_first) for array in arrays]
    if stacked:
        return dict(zip(names, volumes, strict=True))
    volume = volumes[0] if len(volumes) == 1 else np.concatenate(volumes)
    volume = volume.reshape(*volume.shape[:3], -1)
    return {name: volume[..., index] for index, name in enumerate(names)}


def _turned(raster: np.ndarray, axis: int, transpose: bool, north_first: bool) -> np.ndarray:
    """A raster whose space axes are ``axis`` and the next, as rows from the south and columns from the west; a view."""
    if transpose:
        raster = raster.swapaxes(axis, axis + 1)
    return np.flip(raster, axis) if north_first else raster


def _channels(arrays: list[ArrayFile], channels: str | None) -> tuple[tuple[str, ...], bool]:
    """Names of the channels, and whether each file is one of them."""
    if len({len(array.shape) for array in arrays}) != 1:
        raise InputError("some files have a channel axis and others none; give files of one kind")
    if len(arrays[0].shape) == 4:
        return parse_channels(channels, arrays[0].shape[3], {1: ("volume",)}, str(arrays[0].path)), False
    if len(arrays) == 1 or (channels is not None and "," not in channels):
        return parse_channels(channels, 1, {1: ("volume",)}, str(arrays[0].path)), False
    if channels is None:
        raise InputError(
            f"{len(arrays)} files without a channel axis: name one channel for each, --channels pickup,dropoff, "
            "or one for all where they follow one another in time, --channels pickup"
        )
    return parse_channels(channels, len(arrays), {}, f"{len(arrays)} files"), True


def _require_one_raster(arrays: list[ArrayFile], stacked: bool) -> None:
    same = slice(0 if stacked else 1, None)
    for array in arrays[1:]:
        if array.shape[same] != arrays[0].shape[same]:
            raise InputError(
                f"{array.path} is {array.shape}, {arrays[0].path} {arrays[0].shape}; "
                f"files of one city share {'every axis' if stacked else 'all axes but time'}"
            )


def _poi(path: Path, volume: ArrayFile, transpose: bool, north_first: bool) -> dict[str, np.ndarray]:
    """Static features float32 [H, W] by name."""
    array = array_file(path, None, "H, W, F")
    if array.shape[:2] != volume.shape[1:3]:
        raise InputError(f"{path} is {array.shape}, the raster {volume.shape[1:3]}; give the POI of this city")
    features = np.asarray(array.load(), np.float32)
    if not np.isfinite(features).all():
        raise InputError(f"{path} holds a feature that is not finite; fill it or leave it out")
    turned = _turned(features, 0, transpose, north_first)
    return {f"poi_{index}": np.ascontiguousarray(turned[..., index]) for index in range(array.shape[2])}
