"""METR-LA and PEMS-BAY as pandas wrote them: zeros, the absent hour, ids, graphs and places; and what is refused."""

from pathlib import Path

import h5py
import numpy as np
import pytest

from data_prep import dcrnn_h5
from data_prep.graphs import gaussian_kernel, read_graph
from data_prep.pandas_h5 import open_frame
from stdist.errors import InputError

METR_LA = ["773869", "767541", "767542"]
PEMS_BAY = [400001, 400017, 400030, 400040]


def _stamps(first: str, rows: int) -> np.ndarray:
    return np.datetime64(first, "m") + np.arange(rows) * np.timedelta64(5, "m")


def _speeds(rows: int, sensors: int) -> np.ndarray:
    return 20 + np.arange(rows * sensors, dtype=float).reshape(rows, sensors) % 45


@pytest.fixture
def metr_la(tmp_path: Path, write_frame) -> Path:
    values = _speeds(2 * 288, 3)
    values[10:20, 1] = 0
    values[5, 0] = np.nan
    return write_frame(tmp_path / "metr-la.h5", _stamps("2012-03-01", 576), METR_LA, values, key="df")


def test_metr_la_zeros_are_missing(metr_la, read_plan):
    plan = dcrnn_h5.plan([metr_la])
    spec = plan.spec
    assert (spec.city, spec.units, spec.cadence_minutes, spec.utc_offset_minutes) == ("metr-la", "mile/h", 5, -480)
    assert spec.node_ids.tolist() == METR_LA and [p.name for p in plan.parts] == ["2012-03-01", "2012-03-02"]
    values, present = read_plan(plan)
    expected = _speeds(576, 3)
    expected[10:20, 1] = expected[5, 0] = np.nan
    np.testing.assert_array_equal(values, expected.astype(np.float32))
    assert present.all()


def test_pems_bay_gets_its_twelve_absent_stamps_back(tmp_path, write_frame, read_plan):
    """02:00 … 02:55 of 2017-03-12, the hour the clock skips: frames whose values are all missing. A longer
    absence, 13 stamps, stays a gap."""
    stamps = _stamps("2017-03-11", 3 * 288)
    minutes = stamps.astype("datetime64[m]")
    skipped = (minutes >= np.datetime64("2017-03-12T02:00")) & (minutes < np.datetime64("2017-03-12T03:00"))
    longer = (minutes >= np.datetime64("2017-03-13T10:00")) & (minutes < np.datetime64("2017-03-13T11:05"))
    keep = ~(skipped | longer)
    speeds = _speeds(864, 4)
    path = write_frame(tmp_path / "pems-bay.h5", stamps[keep], PEMS_BAY, speeds[keep], key="speed")
    plan = dcrnn_h5.plan([path])
    values, present = read_plan(plan)
    assert plan.spec.node_ids.tolist() == PEMS_BAY and plan.spec.steps == 864 and skipped.sum() == 12
    np.testing.assert_array_equal(present, ~longer)
    np.testing.assert_array_equal(values, np.where(keep[:, None], speeds, np.nan).astype(np.float32))


def test_a_day_that_only_an_absence_reaches_into_is_read(tmp_path, write_frame, read_plan):
    """23:30 … 00:25 absent between two frames: both days' slots are present and missing."""
    stamps = np.concatenate([_stamps("2017-01-01T23:00", 6), _stamps("2017-01-02T00:30", 6)])
    path = write_frame(tmp_path / "bay.h5", stamps, PEMS_BAY, _speeds(12, 4), unit="us")
    values, present = read_plan(dcrnn_h5.plan([path]))
    assert np.flatnonzero(present).tolist() == list(range(276, 300))
    assert np.isnan(values[282:294]).all() and not np.isnan(values[294:300]).any()


def test_compressed_frames_are_read(tmp_path, write_frame, read_plan):
    path = write_frame(tmp_path / "x.h5", _stamps("2017-01-01", 288), PEMS_BAY, _speeds(288, 4), compression="gzip")
    np.testing.assert_array_equal(read_plan(dcrnn_h5.plan([path]))[0], _speeds(288, 4).astype(np.float32))


# Files that are no such frame


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda g: g.__delitem__("block0_values"), "lacks block0_values"),
        (lambda g: g.create_group("table"), "table layout; write it anew with to_hdf"),
        (lambda g: g["axis1"].attrs.modify("kind", "integer"), "is indexed by integer, not by time"),
        (lambda g: g["axis1"].attrs.create("tz", "UTC"), "stamps of a time zone"),
        (lambda g: g.attrs.modify("nblocks", 2), "block1_values is absent"),
        (lambda g: g["axis0"].__setitem__(0, g["axis0"][1]), "columns of one name"),
        (lambda g: g.move("block0_values", "x") or g.create_dataset("block0_values", data=np.ones((2, 2))), "2, 2"),
        (
            lambda g: g.move("axis0", "x") or g.create_dataset("axis0", data=[1.5, 2, 3]),
            "ids are whole numbers or text",
        ),
        (lambda g: g["axis1"].__setitem__(3, np.iinfo(np.int64).min), "stamp of row 3, counted from 0, is missing"),
        (lambda g: g["axis1"].__setitem__(3, g["axis1"][3] + 10**9), "00:15:01 is not a whole minute"),
        (lambda g: g["axis1"].__setitem__(3, g["axis1"][2]), "stamp 2012-03-01T00:10 occurs twice"),
        (lambda g: g.file.copy(g, "speed"), "holds pandas data frames df, speed"),
        (lambda g: g.attrs.__delitem__("pandas_type"), "no pandas data frame .it holds df"),
    ],
)
def test_other_layouts_are_refused(metr_la, change, line, refused):
    with h5py.File(metr_la, "r+") as file:
        change(file["df"])
    with refused(f"{metr_la}.*{line}"):
        dcrnn_h5.plan([metr_la])


def test_a_file_cut_short_or_of_another_kind_is_refused(metr_la):
    whole = metr_la.read_bytes()
    metr_la.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="was cut short; fetch the file again"):
        dcrnn_h5.plan([metr_la])
    metr_la.write_bytes(b"speed,773869\n")
    with pytest.raises(InputError, match="is no HDF5 file"):
        dcrnn_h5.plan([metr_la])
    for sources, line in (([], "reads one file, 0 given"), ([metr_la.with_name("none")], "is not a file")):
        with pytest.raises(InputError, match=line):
            dcrnn_h5.plan(sources)


def test_a_filter_that_cannot_be_read_is_named(metr_la, monkeypatch):
    """blosc is no part of h5py; zlib stands in for it here, as if h5py lacked that."""
    with h5py.File(metr_la, "r+") as file:
        values = file["df/block0_values"][:]
        del file["df/block0_values"]
        file["df"].create_dataset("block0_values", data=values, compression="gzip")
    monkeypatch.setattr(h5py.h5z, "filter_avail", lambda code: False)
    with pytest.raises(InputError, match=r"compressed with filter 1; .*complib='zlib'"):
        open_frame(metr_la)


def test_negative_speed_is_named(tmp_path, write_frame, read_plan):
    values = _speeds(288, 4)
    values[12, 2] = -1
    plan = dcrnn_h5.plan([write_frame(tmp_path / "x.h5", _stamps("2017-01-01", 288), PEMS_BAY, values)])
    with pytest.raises(InputError, match=r"speed is -1.0 at 2017-01-01T01:00, index 2"):
        read_plan(plan)


# Graphs and places


def test_gaussian_kernel_of_distances():
    """w = exp(−(d / σ)²), 0 below 0.1 (Li et al., 2018, section 4.1): d = 0, 0, 2, 4, σ = 1.6583; by hand."""
    distances = np.array([[0, 2], [4, 0]], float)
    sigma = np.sqrt((1.5**2 * 2 + 0.5**2 + 2.5**2) / 4)
    expected = [[1, np.exp(-((2 / sigma) ** 2))], [0, 1]]
    assert np.exp(-((4 / sigma) ** 2)) < 0.1 < expected[0][1]
    np.testing.assert_allclose(gaussian_kernel(distances), expected)
    np.testing.assert_allclose(gaussian_kernel(np.array([[0, np.inf], [np.inf, 0]])), np.eye(2))


@pytest.mark.parametrize("header", ["from,to,cost\n", ""])
def test_graph_from_the_roads_distances(tmp_path, header):
    """The published list has more sensors than the data, in any order; the matrix is not symmetric."""
    rows = ["400030,400030,0.0", "400001,400017,1000", "999999,400001,5", "400017,400017,0.0", "400001,400001,0.0"]
    path = tmp_path / "distances_bay_2017.csv"
    path.write_text(header + "\n".join([*rows, "400040,400001,9000.5", "400040,400040,0"]) + "\n")
    weights, notes = read_graph(path, np.array(PEMS_BAY), dcrnn=True)
    sigma = np.std([0, 0, 0, 0, 1000, 9000.5])
    expected = np.eye(4)
    expected[0, 1] = np.exp(-((1000 / sigma) ** 2))
    expected[3, 0] = np.exp(-((9000.5 / sigma) ** 2)) if np.exp(-((9000.5 / sigma) ** 2)) >= 0.1 else 0
    np.testing.assert_allclose(weights, expected.astype(np.float32), rtol=1e-6)
    assert notes == {"adjacency_sigma": pytest.approx(sigma), "adjacency_threshold": 0.1}
    assert weights.dtype == np.float32


def test_graph_and_places_go_into_the_plan(metr_la):
    matrix, places = metr_la.with_name("adj.npy"), metr_la.with_name("graph_sensor_locations.csv")
    np.save(matrix, np.eye(3) + 0.5)
    lines = ["index,sensor_id,latitude,longitude", "0,767542,34.1,-118.1", "1,1,0,0", "2,773869,34.2,-118.2"]
    places.write_text("\n".join([*lines, "3,767541,34.3,-118.3"]))
    plan = dcrnn_h5.plan([metr_la], adjacency=matrix, meta=places)
    assert plan.spec.latitude.tolist() == [34.2, 34.3, 34.1] and plan.spec.longitude[0] == -118.2
    np.testing.assert_array_equal(plan.spec.adjacency, np.eye(3, dtype=np.float32) + 0.5)
    assert [file.name for file in plan.sources] == ["metr-la.h5", "adj.npy", "graph_sensor_locations.csv"]
    bay = metr_la.with_name("graph_sensor_locations_bay.csv")
    bay.write_text("773869,1,2\n767541,3,4\n767542,5,6\n")
    assert dcrnn_h5.plan([metr_la], meta=bay).spec.latitude.tolist() == [1, 3, 5]


@pytest.mark.parametrize(
    ("name", "text", "option", "line"),
    [
        ("adj_mx.pkl", "", "adjacency", "is a pickle, which could run any program and is never loaded"),
        ("adj.csv", "1,0\n0,1\n", "adjacency", "is 2 x 2, the data has 3 nodes"),
        ("adj.csv", "1,0,0\n0,1,0\n0,x,1\n", "adjacency", "'x' is not a number"),
        ("adj.csv", "1,0,0\n0,1,0\n0,-1,1\n", "adjacency", "negative or not finite"),
        ("places.csv", "sensor_id,latitude,longitude\n773869,1,2\n", "meta", "lacks sensor 767541 .2 of 3 absent"),
        ("places.csv", "sensor_id,where\n773869,1\n", "meta", "has no column of the latitude; it has sensor_id, where"),
        ("places.csv", "", "meta", "places.csv"),
    ],
)
def test_graphs_and_places_that_do_not_fit_are_refused(metr_la, name, text, option, line, refused):
    path = metr_la.with_name(name)
    path.write_text(text)
    with refused(line):
        dcrnn_h5.plan([metr_la], **{option: path})


def test_distances_of_other_sensors_are_refused(tmp_path, write_frame):
    path = write_frame(tmp_path / "x.h5", _stamps("2017-01-01", 288), PEMS_BAY, _speeds(288, 4))
    distances = tmp_path / "distances.csv"
    for text, line in (("from,to,cost\n1,2,3\n", "names none of the 4 sensors"), ("400001,400017,-1\n", "-1.0 is neg")):
        distances.write_text(text)
        with pytest.raises(InputError, match=line):
            dcrnn_h5.plan([path], adjacency=distances)
