"""table, under its old name too, frames-npz and synthetic: what they read, and what they refuse."""

import json
from pathlib import Path

import numpy as np
import pytest

from data_prep import READERS, prepare
from stdist.data import open_store
from stdist.errors import InputError


def _prepare_csv(folder: Path, text: str, reader: str = "wide-csv", **options: object):
    (path := folder / "milan_block.csv").write_text(text)
    return READERS[reader].prepare([path], folder / "out.zarr", **options)


def test_rows_of_a_csv_are_frames(tmp_path):
    """Four frames of six hours from 06:00; a blank and a NaN are missing, 0 is not. The old name reads a grid of
    internet traffic by default."""
    text = "1,2,3\n0,,6\n7,NaN,9\n10,11,12\n"
    summary = _prepare_csv(tmp_path, text, start="2013-11-01T06:00", height=1, width=3, cadence=360, header=False)
    store = open_store(summary.path)
    assert (summary.frames, summary.cells, summary.city) == (4, 3, "milan")
    assert summary.missing == {"internet": 2} and summary.true_zeros == {"internet": 1}
    assert json.loads(json.dumps(summary.as_dict()))["runs"] == 1
    # Two calendar days of four slots; the frames are the slots 1 ... 4.
    assert len(store.times) == 8 and store.segments == [(1, 5)]
    assert store.local_times[1] == np.datetime64("2013-11-01T06:00")
    expected = [[1, 2, 3], [0, 5, 6], [7, 8, 9], [10, 11, 12]]
    assert store.values("internet", 1, 5)[:, 0].tolist() == expected
    assert store.observed("internet", 2, 3)[0].tolist() == [[True, False, True]]


def test_a_table_is_placed_in_the_datas_ids(tmp_path):
    options = {"start": "2013-11-01", "cadence": 360, "row0": 41, "col0": 43, "id_width": 100, "city": "milan"}
    summary = _prepare_csv(tmp_path, "1.5,2,3,4\n", "table", channel="sms_in", **options)
    store = open_store(summary.path)
    assert store.cell_ids.tolist() == [[4144, 4145], [4244, 4245]] and store.channels == ("sms_in",)
    assert store.dataset["row"].values.tolist() == [41, 42]


def test_the_old_name_reads_nodes_every_ten_minutes(tmp_path):
    text = '773869,"767541"\n1.5,2.5\n0.5,\n'
    summary = _prepare_csv(tmp_path, text, nodes=True, start="2013-11-01", city="milan")
    store = open_store(summary.path)
    assert store.cell_ids.tolist() == [773869, 767541] and store.cadence == np.timedelta64(10, "m")
    assert store.attributes["utc_offset_minutes"] == 60 and summary.missing == {"internet": 1}


@pytest.mark.parametrize(
    ("text", "options", "line"),
    [
        ("1.5,2,3\n4,five,6\n", {}, r"line 2, column 2: 'five' is not a finite number"),
        ("1.5,2,3\n4,5\n", {}, "line 2: 2 columns instead of 3"),
        ("1.5,2,3\n\n4,5,6\n", {}, "line 2: 1 columns instead of 3"),
        ('1.5,2,3\n4,"5,6\n', {}, r"line 2: 2 columns instead of 3"),
        ("1.5,2,3\n4,5,6\n7,-8.5,9\n", {}, r"is -8.5 at 2013-11-01T12:00, place 1 \(1 such"),
        ("1.5,2,3\n", {"start": None}, "--start"),
        ("1.5,2,3\n", {"start": "yesterday"}, "--start 'yesterday'"),
        ("1.5,2,3\n", {"start": "2013-11-01T01:00"}, "off the 360-minute grid"),
        ("1.5,2,3\n", {"height": None, "width": None, "row0": 1}, "3 columns, which is no square grid"),
        ("1.5,2,3\n", {"height": 2, "width": 2}, "3 places for 4 cells"),
        ("1.5,2,3\n", {"height": 2, "width": None}, "3 columns, not 2 x 1"),
        ("1.5,2,3\n", {"cadence": 7}, "does not divide a day"),
        ("1.5,2,3\n", {"col0": 98, "id_width": 100}, "98:101 leave rows of 100 ids"),
        ("1.5,2,3\n", {"train": "2013-11-01:2013-11-02"}, "leaves the data's days"),
    ],
)
def test_a_table_is_refused(tmp_path, text, options, line, refused):
    given = {"start": "2013-11-01", "height": 1, "width": 3, "cadence": 360, **options}
    with refused(line):
        _prepare_csv(tmp_path, text, "table", **given)
    assert [path.name for path in tmp_path.iterdir()] == ["milan_block.csv"]


@pytest.mark.parametrize(
    ("reader", "none"), [("table", "reads one file or more, 0"), ("frames-npz", "one file, 0 given")]
)
def test_a_file_is_needed(tmp_path, reader, none):
    for sources, line in (([], none), ([tmp_path / "absent"], "is not a file")):
        with pytest.raises(InputError, match=line):
            READERS[reader].prepare(sources, tmp_path / "out.zarr")


def _npz(folder: Path, **arrays: np.ndarray) -> Path:
    path = folder / "turin_frames.npz"
    np.savez(path, **arrays)
    return path


def _stamps(*slots: int) -> np.ndarray:
    return np.datetime64("2013-11-01T00:00") + np.array(slots) * np.timedelta64(10, "m")


def test_npz_frames_are_sorted_by_their_stamps(tmp_path):
    """Two runs, out of order in the file: 00:00 ... 00:20, and 23:50 with the next midnight."""
    frames = np.arange(5, dtype=np.float64).reshape(5, 1, 1) + np.array([1, 2])
    frames[4, 0, 1] = np.nan
    path = _npz(tmp_path, time=_stamps(143, 144, 0, 1, 2), speed=frames, calls=frames * 2)
    summary = READERS["frames-npz"].prepare([path], tmp_path / "out.zarr")
    store = open_store(summary.path)
    assert (summary.city, summary.frames, summary.runs) == ("turin", 5, 2)
    assert summary.channels == ("speed", "calls") and store.segments == [(0, 3), (143, 145)]
    assert store.values("speed", 0, 3)[:, 0, 0].tolist() == [3, 4, 5]
    assert store.values("calls", 143, 145)[:, 0, 1].tolist() == [4, 6]
    assert summary.missing == {"speed": 1, "calls": 1}
    assert store.times[0] == np.datetime64("2013-11-01")


def test_npz_channel_chooses_one_array(tmp_path):
    path = _npz(tmp_path, time=_stamps(0), a=np.ones((1, 2, 2)), b=np.ones((1, 2, 2)))
    assert READERS["frames-npz"].prepare([path], tmp_path / "out.zarr", channel="b").channels == ("b",)


@pytest.mark.parametrize(
    ("arrays", "options", "line"),
    [
        ({"x": np.ones((2, 2, 2))}, {}, "no array 'time'"),
        ({"time": np.arange(2), "x": np.ones((2, 2, 2))}, {}, "no array 'time' of datetime64"),
        ({"time": _stamps(0, 0), "x": np.ones((2, 2, 2))}, {}, "occurs twice"),
        ({"time": _stamps(0, 1), "x": np.ones((2, 2, 2))}, {"cadence": 60}, "10 minutes apart, not 60"),
        ({"time": _stamps(0, 1), "x": np.ones((3, 2, 2))}, {}, r"frames are numbers \(2, H, W\)"),
        ({"time": _stamps(0, 1), "x": np.ones((2, 4))}, {}, "holds no frames"),
        ({"time": _stamps(0, 1), "x": np.ones((2, 2, 2))}, {"channel": "y"}, "no array 'y'; it has x"),
        (
            {"time": _stamps(0, 1), "x": -np.ones((2, 2, 2))},
            {},
            "x is -1.0 at 2013-11-01T00:00, index 0, 0",
        ),
        ({"time": _stamps(0, 1), "x": np.full((2, 2, 2), "a")}, {}, "frames are numbers"),
    ],
)
def test_npz_refuses(tmp_path, arrays, options, line):
    path = _npz(tmp_path, **arrays)
    with pytest.raises(InputError, match=line):
        READERS["frames-npz"].prepare([path], tmp_path / "out.zarr", **options)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_npz_cut_short_or_pickled_is_refused(tmp_path):
    path = _npz(tmp_path, time=_stamps(0), x=np.ones((1, 20, 20)))
    whole = path.read_bytes()
    pickled = tmp_path / "pickled.npz"
    np.savez(pickled, time=_stamps(0), x=np.full((1, 2, 2), None, object))
    path.write_bytes(whole[: len(whole) // 2])
    for bad, line in ((path, "is no .npy or .npz file, or was cut short"), (pickled, "frames are numbers")):
        with pytest.raises(InputError, match=line):
            READERS["frames-npz"].prepare([bad], tmp_path / "out.zarr")


def test_synthetic_store(tmp_path):
    summary = READERS["synthetic"].prepare([], tmp_path / "out.zarr", height=6, width=7, days=6, seed=3)
    store = open_store(summary.path)
    assert store.shape == (6, 7) and len(store.times) == 6 * 144 and 0 < summary.missing["internet"] < 1000
    assert [len(span) for span in (store.default_split.train, store.default_split.test)] == [4, 1]
    assert np.isfinite(store.values("internet", 0, 864)[store.present]).all()


def test_synthetic_refuses_a_start_that_is_no_day(tmp_path):
    with pytest.raises(InputError, match="--start 'soon'"):
        READERS["synthetic"].prepare([], tmp_path / "out.zarr", start="soon")


def test_synthetic_reads_no_file(tmp_path):
    with pytest.raises(InputError, match="reads no file"):
        READERS["synthetic"].prepare([tmp_path], tmp_path / "out.zarr")


def test_progress_counts_days(tmp_path):
    seen: list[tuple[int, int]] = []
    plan = READERS["synthetic"].plan([], height=2, width=2, days=2)
    prepare(plan, tmp_path / "out.zarr", progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 2), (2, 2)]
