"""Missing is what a file says is missing, and what nobody wrote; a 0 is a measured 0, and a stamp of 0 is a stamp."""

from pathlib import Path

import h5netcdf
import numpy as np
import pytest
import xarray
import zarr

from data_prep import READERS

T, N = 72, 6
FORMATS = pytest.mark.parametrize("layout", ["2", "3", "3 in shards"])


def counts(dtype="i4") -> np.ndarray:
    """Nobody drives in the first four hours of a day."""
    values = np.random.default_rng(1).integers(1, 40, (T, N)).astype(dtype)
    values[np.arange(T) % 24 < 4] = 0
    return values


def write_zarr(path: Path, values: np.ndarray, layout: str, written=slice(None), hours=None, **attributes) -> Path:
    """As zarr alone writes it, with no word about fill values; ``written``: rows, all by default."""
    group = zarr.open_group(path, mode="w", zarr_format=int(layout[0]))
    hours = np.arange(len(values)) if hours is None else hours
    for name, data, chunks in (("flow", values, (12, 3)), ("time", hours, (len(hours),))):
        shards = (24, 6) if name == "flow" and "shards" in layout else None
        dims = ["time", "node"][: data.ndim]
        named = {} if layout == "2" else {"dimension_names": dims}
        array = group.create_array(name, shape=data.shape, chunks=chunks, shards=shards, dtype=data.dtype, **named)
        if layout == "2":
            array.attrs["_ARRAY_DIMENSIONS"] = dims
        where = written if name == "flow" else slice(None)
        array[where] = data[where]
        array.attrs.update(attributes if name == "flow" else {"units": "hours since 2019-01-01"})
    return path


@pytest.fixture
def read(read_plan):
    """Values of every hour, NaN where they are missing."""
    return lambda path: read_plan(READERS["xarray"].plan([path]))[0]


@FORMATS
@pytest.mark.parametrize("dtype", ["i4", "u1", "f4"])
def test_a_measured_zero_and_a_first_stamp_of_zero(tmp_path, read, layout, dtype):
    values = counts(dtype)
    np.testing.assert_array_equal(read(write_zarr(tmp_path / "a.zarr", values, layout)), values)


@FORMATS
@pytest.mark.parametrize("name", ["_FillValue", "missing_value"])
def test_only_what_is_named_missing_is_masked(tmp_path, read, layout, name):
    values = counts()
    values[5, 2] = 99
    path = write_zarr(tmp_path / "a.zarr", values, layout, **{name: 99})
    expected = np.where(values == 99, np.nan, values)
    np.testing.assert_array_equal(read(path), expected)


@FORMATS
@pytest.mark.parametrize("dtype", ["i4", "f4"])
def test_what_was_never_written_is_missing(tmp_path, read, layout, dtype):
    """Rows 24 to 35 are a chunk of their own, in shards half a shard."""
    values = counts(dtype)
    rows = np.r_[0:24, 36:T]
    expected = values.astype(np.float32)
    expected[24:36] = np.nan
    path = write_zarr(tmp_path / "a.zarr", values, layout, written=slice(0, 24))
    array = zarr.open_array(path, path="flow", mode="r+")
    array[36:] = values[36:]
    np.testing.assert_array_equal(read(path), expected)
    np.testing.assert_array_equal(read(path)[rows], values[rows])


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_what_xarray_wrote_comes_back(tmp_path, read, zarr_format):
    """Its NaN, and the fill value that it was told, which in Zarr 2 is the array's own."""
    values = counts().astype(float)
    values[5, 2] = np.nan
    time = np.datetime64("2019-01-01", "ns") + np.arange(T) * np.timedelta64(1, "h")
    for name, encoding in (("plain", {}), ("packed", {"dtype": "i2", "_FillValue": np.int16(7777)})):
        data = xarray.Dataset({"flow": (("time", "node"), values)}, {"time": time})
        path = tmp_path / f"{name}.zarr"
        data.to_zarr(path, zarr_format=zarr_format, consolidated=False, encoding={"flow": encoding})
        np.testing.assert_array_equal(read(path), values.astype(np.float32))


def write_netcdf(path: Path, values: np.ndarray, written: slice, **options) -> Path:
    with h5netcdf.File(path, "w") as file:
        file.dimensions = {"time": len(values), "node": N}
        hours = file.create_variable("time", ("time",), "i8", data=np.arange(len(values)))
        hours.attrs["units"] = "hours since 2019-01-01"
        flow = file.create_variable("flow", ("time", "node"), values.dtype, **options)
        flow[written] = values[written]
    return path


@pytest.mark.parametrize("dtype", ["i4", "f4"])
def test_netcdf_chunks_that_were_never_written_are_missing(tmp_path, read, dtype):
    values = counts(dtype)
    path = write_netcdf(tmp_path / "a.nc", values, slice(0, 36), chunks=(12, 3))
    np.testing.assert_array_equal(read(path)[:36], values[:36])
    assert np.isnan(read(path)[36:]).all()


def test_what_the_netcdf_library_fills_in_is_missing(tmp_path, read):
    """A chunk that was written in part holds the library's fill value, which no attribute names."""
    values = counts("f4")
    path = write_netcdf(tmp_path / "a.nc", values, slice(0, 30), chunks=(12, 3), fillvalue=9.969209968386869e36)
    with h5netcdf.File(path, "a") as file:
        file["flow"].attrs._h5attrs.pop("_FillValue", None)
    np.testing.assert_array_equal(read(path)[:30], values[:30])
    assert np.isnan(read(path)[30:]).all()


@FORMATS
def test_a_grid_that_runs_south_lacks_the_right_cells(tmp_path, read, layout):
    """Rows are turned and axes of length 1 dropped after what was never written is found."""
    values = np.random.default_rng(2).integers(1, 40, (T, 1, 4, 3)).astype("f4")
    group = zarr.open_group(tmp_path / "a.zarr", mode="w", zarr_format=int(layout[0]))
    arrays = {
        "flow": (values, ["time", "level", "lat", "lon"], (24, 1, 2, 3)),
        "time": (np.arange(T), ["time"], (T,)),
        "lat": (np.array([3.0, 2, 1, 0]), ["lat"], (4,)),
        "lon": (np.array([5.0, 6, 7]), ["lon"], (3,)),
    }
    for name, (data, dims, chunks) in arrays.items():
        shards = (24, 1, 4, 3) if name == "flow" and "shards" in layout else None
        named = {} if layout == "2" else {"dimension_names": dims}
        array = group.create_array(name, shape=data.shape, chunks=chunks, shards=shards, dtype=data.dtype, **named)
        if layout == "2":
            array.attrs["_ARRAY_DIMENSIONS"] = dims
        if name == "flow":
            array[:24], array[24:48, :, :2], array[48:] = data[:24], data[24:48, :, :2], data[48:]
        else:
            array[...] = data
        array.attrs.update({"units": "hours since 2019-01-01"} if name == "time" else {})
    expected = values[:, 0, ::-1].copy()
    expected[24:48, :2] = np.nan  # lat 1 and 0 are rows 0 and 1 of the store
    np.testing.assert_array_equal(read(tmp_path / "a.zarr"), expected)
