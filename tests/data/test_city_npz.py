"""city-npz: rasters with points of interest, their orientation and their channels."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import xarray

from data_prep import city_npz
from stdist.data.check import check_store
from stdist.errors import InputError

H, W, F = 2, 3, 14


def volume(frames: int = 30, channels: int | None = None, seed: int = 0) -> np.ndarray:
    """Integers (T, H, W) or (T, H, W, C), as trips are."""
    shape = (frames, H, W) if channels is None else (frames, H, W, channels)
    return np.random.default_rng(seed).integers(0, 50, shape)


def crosstres(folder: Path) -> dict[str, np.ndarray]:
    """NY/TaxiNY_pickup.npy, TaxiNY_dropoff.npy (T, lng, lat) and NY_poi.npy (lng, lat, 14) of a city 2 x 3."""
    (folder / "NY").mkdir()
    arrays = {
        "TaxiNY_pickup": volume(seed=1).swapaxes(1, 2),
        "TaxiNY_dropoff": volume(seed=2).swapaxes(1, 2),
        "NY_poi": np.random.default_rng(3).integers(0, 9, (W, H, F)),
    }
    for name, array in arrays.items():
        np.save(folder / "NY" / f"{name}.npy", array)
    return arrays


def save(folder: Path, name: str, array: np.ndarray, key: str = "volume") -> Path:
    np.savez(folder / name, **{key: array})
    return folder / name


def test_files_follow_one_another_in_time(tmp_path, prepared):
    """The taxi raster of New York: a train and a test file whose seam lies inside a day."""
    train, test = volume(30, 1, seed=1), volume(20, 1, seed=2)
    files = [save(tmp_path, "volume_train.npz", train), save(tmp_path, "volume_test.npz", test)]
    plan = city_npz.plan(files, start="2015-01-01", cadence=30, city="nyc")
    store = prepared(pickle.loads(pickle.dumps(plan)))
    assert store.segments == [(0, 50)] and store.channels == ("volume",) and store.shape == (H, W)
    np.testing.assert_array_equal(store.values("volume", 0, 50), np.concatenate([train, test])[..., 0])
    assert store.observed("volume", 0, 50).all() and check_store(store.path).ok


def test_one_file_a_channel_with_poi(tmp_path, prepared):
    """CrossTReS stores longitude first: --transpose makes rows of latitude, of POI too."""
    arrays = crosstres(tmp_path)
    files = [tmp_path / "NY" / f"TaxiNY_{what}.npy" for what in ("pickup", "dropoff")]
    poi = tmp_path / "NY" / "NY_poi.npy"
    plan = city_npz.plan(files, city="ny", channels="pickup,dropoff", start="2016-01-01", transpose=True, poi=poi)
    store = prepared(plan)
    assert store.shape == (H, W) and store.channels == ("pickup", "dropoff")
    for channel in store.channels:
        raw = arrays[f"TaxiNY_{channel}"]
        values = store.values(channel, 0, 30)
        assert values.dtype == np.float32 and values[7, 1, 2] == raw[7, 2, 1]
        np.testing.assert_array_equal(values, raw.swapaxes(1, 2))
    dataset = xarray.open_zarr(store.path, consolidated=True)
    features = np.stack([dataset[f"static_poi_{index}"].values for index in range(F)], axis=-1)
    np.testing.assert_array_equal(features, arrays["NY_poi"].swapaxes(0, 1))
    assert dataset["static_poi_0"].dims == ("row", "col")


def test_north_first_turns_rows_and_poi(tmp_path, prepared):
    frames, poi = volume(24), np.arange(H * W * 2).reshape(H, W, 2)
    path = save(tmp_path, "city.npz", frames)
    np.save(tmp_path / "poi.npy", poi)
    plan = city_npz.plan([path], start="2016-01-01", north_first=True, poi=tmp_path / "poi.npy")
    store = prepared(plan)
    np.testing.assert_array_equal(store.values("volume", 0, 24), frames[:, ::-1])
    assert plan.spec.static["poi_1"].tolist() == poi[::-1, :, 1].tolist()
    assert plan.recipe["north_first"] is True


def test_channel_axis_is_named_in_order(tmp_path):
    frames = volume(24, 2)
    plan = city_npz.plan([save(tmp_path, "city.npz", frames)], start="2016-01-01", channels="pickup,dropoff")
    (day,) = plan.read(plan.parts[0])
    np.testing.assert_array_equal(day.values["dropoff"], frames[..., 1])


def test_files_without_channel_axis_may_follow_in_time(tmp_path):
    first, second = volume(5, seed=1), volume(7, seed=2)
    files = [save(tmp_path, "a.npz", first), save(tmp_path, "b.npz", second)]
    plan = city_npz.plan(files, start="2016-01-01T03:00", channels="pickup")
    (day,) = plan.read(plan.parts[0])
    np.testing.assert_array_equal(day.values["pickup"][3:15], np.concatenate([first, second]))
    assert np.flatnonzero(day.present).tolist() == list(range(3, 15))


@pytest.mark.parametrize(
    ("arrays", "options", "line"),
    [
        ([volume(channels=2)], {}, "has 2 channels; name them in order"),
        ([volume(), volume()], {}, "name one channel for each"),
        ([volume(), volume(20)], {"channels": "a,b"}, "share every axis"),
        ([volume(), volume()[:, :1]], {"channels": "a"}, "share all axes but time"),
        ([volume(), volume()], {"channels": "a,b,c"}, "does not name the 2 channels of 2 files"),
        ([volume(), volume(channels=1)], {}, "some files have a channel axis"),
        ([volume()[0]], {}, r"it must hold numbers \(T, H, W\) or \(T, H, W, C\)"),
        ([volume()], {"start": None}, "no time stamps; .*--start"),
        ([volume()], {"start": "2016-01-01T00:30"}, "off the 60-minute grid"),
        ([volume()], {"poi": np.ones((W, H, 2))}, r"is \(3, 2, 2\), the raster \(2, 3\)"),
        ([volume()], {"poi": np.ones((H, W))}, r"must hold numbers \(H, W, F\)"),
        ([volume()], {"poi": np.full((H, W, 1), np.nan)}, "not finite"),
        ([volume()], {"test": "2016-02-01:2016-02-02"}, "leaves the data's days"),
        ([], {}, "none was given"),
    ],
)
def test_plan_refuses(tmp_path, arrays, options, line, refused):
    files = [save(tmp_path, f"{index}.npz", array) for index, array in enumerate(arrays)]
    if "poi" in options:
        np.save(tmp_path / "poi.npy", options["poi"])
        options = {**options, "poi": tmp_path / "poi.npy"}
    with refused(line):
        city_npz.plan(files, **{"start": "2016-01-01", **options})


def test_npz_of_several_arrays_is_refused(tmp_path):
    np.savez(tmp_path / "city.npz", a=volume(), b=volume())
    with pytest.raises(InputError, match=r"holds 2 arrays \(a, b\)"):
        city_npz.plan([tmp_path / "city.npz"], start="2016-01-01")


def test_negative_trips_are_named(tmp_path):
    frames = volume(24)
    frames[5, 1, 2] = -3
    plan = city_npz.plan([save(tmp_path, "city.npz", frames)], start="2016-01-01")
    with pytest.raises(InputError, match=r"volume is -3.0 at 2016-01-01T05:00, index 1, 2 \(1 such"):
        list(plan.read(plan.parts[0]))


def test_taxi_raster_of_new_york(real_data, prepared):
    """January 2015: a trough on 26 and 27 January, the blizzard, says that the start is right."""
    files = [real_data / "nyc_taxi_10x20" / f"volume_{part}.npz" for part in ("train", "test")]
    plan = city_npz.plan(files, start="2015-01-01", cadence=30, city="nyc")
    store = prepared(plan)
    raw = np.concatenate([np.load(file)["volume"][..., 0] for file in files])
    values = store.values("volume", 0, 31 * 48)
    np.testing.assert_array_equal(values, raw.astype(np.float32))
    assert store.segments == [(0, 1488)] and store.coverage["volume"]["true_zeros"] == int((raw == 0).sum())
    by_day = values.reshape(31, -1).sum(axis=1)
    assert sorted(np.argsort(by_day)[:2].tolist()) == [25, 26]
    assert check_store(store.path).ok
    dataset = xarray.open_zarr(store.path, consolidated=True)
    assert dataset["volume"].dims == ("time", "row", "col")
