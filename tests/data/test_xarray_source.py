"""NetCDF and Zarr through xarray: axes, orientation, missing values, tiles; and what is refused."""

from pathlib import Path

import numpy as np
import pytest
import xarray

from data_prep import READERS, xarray_reading, xarray_source
from stdist.data import Region, open_store
from stdist.errors import InputError

FORMATS = ["raster.nc", "raster.zarr"]


def _stamps(first: str, frames: int, minutes: int) -> np.ndarray:
    return (np.datetime64(first, "m") + np.arange(frames) * np.timedelta64(minutes, "m")).astype("datetime64[ns]")


def _raster(frames: int = 8, height: int = 3, width: int = 4, minutes: int = 360, north_first: bool = True):
    """``flow`` [time, lat, lon]: 100 · frame + 10 · row + column, counted in the file's own order."""
    values = sum(
        part.reshape(shape)
        for part, shape in (
            (100.0 * np.arange(frames), (-1, 1, 1)),
            (10.0 * np.arange(height), (1, -1, 1)),
            (1.0 * np.arange(width), (1, 1, -1)),
        )
    )
    latitude = 45 + 0.1 * np.arange(height)
    return xarray.Dataset(
        {"flow": (("time", "lat", "lon"), values.astype(np.float32), {"units": "vehicles"})},
        coords={
            "time": _stamps("2020-05-01", frames, minutes),
            "lat": ("lat", latitude[::-1] if north_first else latitude, {"units": "degrees_north"}),
            "lon": ("lon", 9 + 0.1 * np.arange(width), {"units": "degrees_east"}),
        },
    )


def _write(data: xarray.Dataset, path: Path, **encoding: object) -> Path:
    if path.suffix == ".zarr":
        data.to_zarr(path, mode="w", encoding=encoding or None)
    else:
        data.to_netcdf(path, engine="h5netcdf", encoding=encoding or None)
    return path


@pytest.mark.parametrize("name", FORMATS)
def test_row_0_becomes_the_south(tmp_path, name, read_plan):
    """A north-first raster is reversed with its latitudes, and the recipe says so; a south-first one is as it is."""
    data = _raster()
    plan = xarray_source.plan([_write(data, tmp_path / name)])
    values, present = read_plan(plan)
    spec = plan.spec
    assert (spec.city, spec.channels, spec.units, spec.cadence_minutes) == ("raster", ("flow",), "vehicles", 360)
    assert (str(spec.first_day), str(spec.last_day)) == ("2020-05-01", "2020-05-02")
    np.testing.assert_array_equal(values, data["flow"].values[:, ::-1])
    assert present.all() and plan.recipe["reversed"] == ["lat"] and plan.recipe["axes"] == ["time", "lat", "lon"]
    np.testing.assert_allclose(spec.latitude[:, 0], [45, 45.1, 45.2])
    np.testing.assert_allclose(spec.longitude[1], [9, 9.1, 9.2, 9.3])
    assert spec.cell_ids.tolist() == [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12]]
    south = xarray_source.plan([_write(_raster(north_first=False), tmp_path / ("south_" + name))])
    assert south.recipe["reversed"] == [] and south.spec.city == "south"
    np.testing.assert_array_equal(read_plan(south)[0], data["flow"].values)


def test_columns_run_from_west_to_east(tmp_path, read_plan):
    data = _raster().isel(lon=slice(None, None, -1))
    plan = xarray_source.plan([_write(data, tmp_path / "raster.nc")])
    assert plan.recipe["reversed"] == ["lat", "lon"] and plan.spec.longitude[0, 0] == 9
    np.testing.assert_array_equal(read_plan(plan)[0], data["flow"].values[:, ::-1, ::-1])


@pytest.mark.parametrize(
    ("names", "attributes", "options"),
    [
        ({"lat": "y", "lon": "x"}, {}, {}),
        ({"lat": "South_North", "lon": "West_East"}, {}, {}),
        ({"lat": "a", "lon": "b", "time": "when"}, {"a": {"axis": "Y"}, "b": {"axis": "X"}}, {}),
        ({"lat": "a", "lon": "b"}, {"a": {"standard_name": "projection_y_coordinate"}}, {}),
        (
            {"lat": "a", "lon": "b", "time": "t0"},
            {"a": {}, "b": {}},
            {"row_dim": "a", "col_dim": "b", "time_dim": "t0"},
        ),
        ({"lat": "b", "lon": "a"}, {"a": {}, "b": {}}, {"row_dim": "b"}),
        ({"lat": "a", "lon": "b"}, {}, {}),
    ],
)
def test_axes_are_found_by_attributes_names_or_options(tmp_path, names, attributes, options, read_plan):
    """Whatever their order in the file: here (column, time, row)."""
    data = _raster().rename(names)
    data = data.transpose(names["lon"], names.get("time", "time"), names["lat"])
    for name, told in attributes.items():
        data[name].attrs = told
    path = _write(data, tmp_path / "raster.nc")
    plan = xarray_source.plan([path], **options)
    assert plan.recipe["axes"] == [names.get("time", "time"), names["lat"], names["lon"]]
    values = _raster()["flow"].values
    found = plan.recipe["reversed"] == [names["lat"]]
    assert found == (not options)
    np.testing.assert_array_equal(read_plan(plan)[0], values[:, ::-1] if found else values)


def test_two_dimensional_latitudes_tell_the_orientation(tmp_path, read_plan):
    """A rotated or projected raster: (row, col) without coordinates of their own."""
    flow = _raster()["flow"].values
    north = 46 - 0.1 * np.arange(3)[:, None] + 0.01 * np.arange(4)
    places = {"lat": (("row", "col"), north), "lon": (("row", "col"), 9 + 0.1 * np.arange(4) + 0 * north)}
    data = xarray.Dataset(
        {"flow": (("time", "row", "col"), flow)}, coords={"time": _stamps("2020-05-01", 8, 360), **places}
    )
    plan = xarray_source.plan([_write(data, tmp_path / "raster.nc")])
    assert plan.recipe["reversed"] == ["row"]
    np.testing.assert_array_equal(read_plan(plan)[0], flow[:, ::-1])
    np.testing.assert_allclose(plan.spec.latitude, north[::-1])


def test_sensors_with_ids_and_places(tmp_path, read_plan):
    """(time, station) with text ids, and a second axis of length 1 that is passed over."""
    values = np.arange(24.0).reshape(8, 1, 3)
    data = xarray.Dataset(
        {"speed": (("time", "level", "station"), values)},
        coords={
            "time": _stamps("2020-05-01", 8, 360),
            "station": ["a1", "b2", "c3"],
            "latitude": ("station", [3.0, 1.0, 2.0]),
            "longitude": ("station", [6.0, 5.0, 4.0]),
        },
    )
    plan = xarray_source.plan([_write(data, tmp_path / "net.nc")])
    assert plan.spec.dims == ("node",) and plan.spec.node_ids.tolist() == ["a1", "b2", "c3"]
    assert plan.spec.latitude.tolist() == [3, 1, 2] and plan.spec.units == "unknown units"
    np.testing.assert_array_equal(read_plan(plan)[0], values[:, 0].astype(np.float32))
    bare = data.drop_vars(["station", "latitude", "longitude"])
    plan = xarray_source.plan([_write(bare, tmp_path / "bare.zarr")], node_dim="station")
    assert plan.spec.node_ids.tolist() == [0, 1, 2] and plan.spec.latitude is None


@pytest.mark.parametrize("name", FORMATS)
def test_packed_values_fill_values_and_valid_ranges(tmp_path, name, read_plan):
    """CF: packed as 0.5 · n + 10 with -9 for missing; valid_max of 200 is in packed numbers, so 110 at most."""
    data = _raster(frames=4)
    flow = 10 + 0.5 * np.arange(48).reshape(4, 3, 4)
    flow[1, 0, 0], flow[2, 1, 1] = np.nan, 150
    data["flow"] = data["flow"].copy(data=flow)
    data["flow"].attrs["valid_max"] = np.int16(200)
    packed = {"dtype": "int16", "scale_factor": 0.5, "add_offset": 10.0, "_FillValue": np.int16(-9)}
    plan = xarray_source.plan([_write(data, tmp_path / name, flow=packed)])
    expected = flow.copy()
    expected[2, 1, 1] = np.nan
    np.testing.assert_array_equal(read_plan(plan)[0], expected[:, ::-1].astype(np.float32))


def test_integers_are_counts(tmp_path, read_plan):
    data = _raster()
    data["flow"] = data["flow"].astype(np.int32)
    np.testing.assert_array_equal(
        read_plan(xarray_source.plan([_write(data, tmp_path / "x.nc")]))[0], data["flow"].values[:, ::-1]
    )


def test_negative_values_need_a_valid_range(tmp_path, read_plan):
    data = _raster()
    data["flow"][3, 0, 2] = -5
    plan = xarray_source.plan([_write(data, tmp_path / "x.nc")])
    with pytest.raises(
        InputError, match=r"x.nc: flow, counted from cell 0, 0 of the store, is -5.0 at 2020-05-01T18:00, index 2, 2"
    ):
        read_plan(plan)
    data["flow"].attrs["valid_min"] = -50.0
    assert read_plan(xarray_source.plan([_write(data, tmp_path / "y.nc")]))[0].min() == -5


def test_variables_are_channels(tmp_path, read_plan):
    """All numeric ones over time and space, or those named; bounds, flags and static fields are none."""
    data = _raster()
    data["flow out"] = data["flow"] * 2
    data["flow out"].attrs = {"units": "persons"}
    data["height"] = data["flow"].isel(time=0, drop=True)
    data["good"] = data["flow"] > 0
    data["time_bnds"] = (("time", "bnds"), np.zeros((8, 2)))
    data["time"].attrs["bounds"] = "time_bnds"
    path = _write(data, tmp_path / "raster.zarr")
    plan = xarray_source.plan([path])
    assert plan.spec.channels == ("flow", "flow_out") and plan.recipe["variables"] == ["flow", "flow out"]
    assert plan.spec.units == "flow: vehicles, flow out: persons"
    np.testing.assert_array_equal(read_plan(plan, "flow_out")[0], 2 * data["flow"].values[:, ::-1])
    assert xarray_source.plan([path], variable="flow out").spec.channels == ("flow_out",)
    with pytest.raises(InputError, match="has no variable 'good' of numbers over time; it has flow, flow out"):
        xarray_source.plan([path], variable="flow,good")


def test_local_days_begin_at_local_midnight(tmp_path, read_plan):
    """Stamps are UTC: with −8 h the first two of four frames a day are of the day before. Absent stamps stay so."""
    data = _raster(frames=8).isel(time=[0, 1, 2, 4, 5, 6, 7])
    data = data.assign_coords(time=data.time + np.timedelta64(2, "h"))
    plan = xarray_source.plan([_write(data, tmp_path / "x.nc")], utc_offset=-480)
    values, present = read_plan(plan)
    assert (str(plan.spec.first_day), plan.spec.utc_offset_minutes) == ("2020-04-30", -480)
    assert np.flatnonzero(present).tolist() == [3, 4, 5, 7, 8, 9, 10]
    np.testing.assert_array_equal(values[present], data["flow"].values[:, ::-1])
    with pytest.raises(InputError, match="off the 360-minute grid that begins at midnight"):
        xarray_source.plan([tmp_path / "x.nc"], utc_offset=60)


def test_several_files_are_one_span_even_within_a_day(tmp_path, read_plan):
    """Given in any order; local days are cut across the files' ends."""
    data = _raster(frames=12)
    paths = [
        _write(data.isel(time=slice(*span)), tmp_path / f"part{number}.nc")
        for number, span in enumerate(((0, 3), (3, 6), (6, 12)))
    ]
    plan = xarray_source.plan(paths[::-1], utc_offset=360)
    values, present = read_plan(plan)
    assert [p.name for p in plan.sources] == ["part0.nc", "part1.nc", "part2.nc"] and present.sum() == 12
    np.testing.assert_array_equal(values[present], data["flow"].values[:, ::-1])
    with pytest.raises(InputError, match="stamps run backwards at 2020-05-01T00:00"):
        xarray_source.plan([paths[0], paths[0]])
    other = _write(data.isel(time=slice(3, 6), lat=slice(0, 2)), tmp_path / "other.nc")
    with pytest.raises(InputError, match=r"other.nc has not the variables, axes and places of .*part0.nc"):
        xarray_source.plan([paths[0], other])


@pytest.mark.parametrize(
    ("budget", "chunk", "parts", "reads"), [(1 << 30, 8, 1, 1), (1 << 30, 4, 2, 2), (2_870_000, 8, 1, 6), (1, 8, 2, 12)]
)
@pytest.mark.parametrize("name", FORMATS)
def test_a_large_raster_is_read_in_pieces_that_fit(tmp_path, monkeypatch, name, budget, chunk, parts, reads, read_plan):
    """300 x 600 in 2 x 3 tiles, two days of 2.88 MB: all at once; day by day, a chunk on disk each; tiles of both days,
    which share a chunk; tiles of a day. The same days each time, and no piece above the budget or a tile of a day.
    """
    monkeypatch.setattr(xarray_reading, "BUDGET", budget)
    monkeypatch.setattr(xarray_source, "BUDGET", budget)
    pieces = []
    cut = xarray_reading.SourceReader._cut
    monkeypatch.setattr(
        xarray_reading.SourceReader, "_cut", lambda *given: pieces.append(cut(*given).nbytes) or cut(*given)
    )
    data = _raster(frames=8, height=300, width=600)
    layout = {"chunks" if "zarr" in name else "chunksizes": (chunk, 100, 100)}
    plan = xarray_source.plan([_write(data, tmp_path / name, flow=layout)])
    assert len(plan.spec.tiles()) == 6
    values, present = read_plan(plan)
    np.testing.assert_array_equal(values, data["flow"].values[:, ::-1])
    assert present.all() and (len(plan.parts), len(pieces)) == (parts, reads)
    assert max(pieces) <= max(budget, 4 * 4 * 256 * 256)


def test_a_prepared_raster_is_read_region_by_region(tmp_path):
    """Through the store: values across tiles, what was measured, places, and statistics of true zeros."""
    data = _raster(height=300, width=600)
    data["flow"][2, 10, 20] = np.nan
    path = _write(data, tmp_path / "raster.nc")
    summary = READERS["xarray"].prepare([path], tmp_path / "out.zarr")
    store = open_store(summary.path)
    expected = data["flow"].values[:, ::-1]
    region = Region(250, 291, 250, 262)
    read = store.values("flow", 0, 8, region), store.observed("flow", 0, 8, region)
    known = ~np.isnan(expected[:, 250:291, 250:262])
    np.testing.assert_array_equal(read[0][known], expected[:, 250:291, 250:262][known])
    np.testing.assert_array_equal(read[1], known)
    assert (
        not store.observed("flow")[2, 289, 20]
        and store.values("flow", 2, 3)[0, 289, 20] == expected[[1, 3], 289, 20].mean()
    )
    assert summary.missing == {"flow": 1} and summary.true_zeros == {"flow": 1} and summary.frames == 8
    assert store.dataset["latitude"].values[0, 0] == 45 and store.cell_ids[1, 0] == 601


@pytest.mark.parametrize(
    ("change", "options", "line"),
    [
        (lambda d: d.drop_vars("time"), {}, "axis time has no coordinate for stamps"),
        (lambda d: d.rename(time="when").drop_vars("when"), {}, "has axes when, lat, lon; say which is time"),
        (lambda d: d.assign_coords(time=np.arange(8)), {}, "axis time has int64 for stamps"),
        (lambda d: d.isel(time=[0, 1, 1, 2]), {}, "stamp 2020-05-01T06:00 occurs twice"),
        (lambda d: d.isel(time=[0, 2, 1, 3]), {}, "stamps run backwards at 2020-05-01T06:00"),
        (lambda d: d.isel(time=[0]), {}, "holds 1 frames, too few"),
        (lambda d: d.assign_coords(time=d.time + np.array([0] * 7 + [60], "m8[m]")), {}, "off the 360-minute grid"),
        (lambda d: d.assign_coords(time=_stamps("2020-05-01", 8, 7)), {}, "7 minutes pass"),
        (lambda d: d.assign_coords(time=d.time + np.array([0] * 7 + [30], "m8[s]")), {}, "is not a whole minute"),
        (lambda d: d.rename(lat="a", lon="b").drop_vars(["a", "b"]), {}, "say which are rows and columns"),
        (lambda d: d.expand_dims(level=2), {}, "choose one level first, a grid has rows and columns only"),
        (lambda d: d, {"node_dim": "lat"}, "choose one lon first, a node has one series"),
        (lambda d: d, {"row_dim": "up"}, "no axis 'up' of --row-dim; it has"),
        (lambda d: d, {"time_dim": "t"}, "no axis 't' of --time-dim"),
        (lambda d: d, {"node_dim": "lat", "row_dim": "lat"}, "give one kind"),
        (lambda d: d, {"variable": "speed"}, "has no variable 'speed' of numbers over time; it has flow"),
        (lambda d: d.rename(flow="present"), {}, "clash with each other or the store"),
        (lambda d: d > 1, {}, "holds no variable of numbers"),
        (lambda d: d.assign(mean=d["flow"].mean("lon")), {}, r"flow over \(lat, lon\) and mean over \(lat\)"),
        (lambda d: d.assign_attrs(format="stdist grid store"), {}, "is a grid store already"),
        (lambda d: d, {"train": "2020-05-01:2020-05-09"}, "leaves the data's days"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, change, options, line, refused):
    path = _write(change(_raster()), tmp_path / "raster.zarr")
    with refused(line):
        xarray_source.plan([path], **options)


def test_damaged_files_are_refused(tmp_path):
    path = _write(_raster(frames=40, height=40, width=40), tmp_path / "x.nc")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="is no NetCDF 4 file, or is damaged"):
        xarray_source.plan([path])
    path.write_bytes(b"CDF\x01" + bytes(100))
    with pytest.raises(InputError, match=r"is a NetCDF 3 file; make it NetCDF 4: nccopy -k nc4 x.nc"):
        xarray_source.plan([path])
    path.write_text("time,flow\n")
    with pytest.raises(InputError, match="is no NetCDF 4 file"):
        xarray_source.plan([path])
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="is no Zarr store"):
        xarray_source.plan([tmp_path / "empty"])
    with pytest.raises(InputError, match="does not exist"):
        xarray_source.plan([tmp_path / "nowhere.nc"])
    with pytest.raises(InputError, match="none given"):
        xarray_source.plan([])


def test_a_damaged_chunk_is_named(tmp_path, read_plan):
    path = _write(_raster(), tmp_path / "x.zarr")
    chunk = next(file for file in (path / "flow").rglob("*") if file.is_file() and file.name != "zarr.json")
    chunk.write_bytes(chunk.read_bytes()[:20])
    with pytest.raises(InputError, match=r"x.zarr: flow is damaged"):
        read_plan(xarray_source.plan([path]))
