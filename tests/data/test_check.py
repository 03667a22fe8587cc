"""``stdist check``: a sound store is sound, and every kind of damage and of wrong value is found and named."""

import json
import shutil
import warnings
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from rich.console import Console

from data_prep import READERS
from stdist.data import GridSpec, GridWriter, NodeSpec, Split
from stdist.data.check import check_store
from stdist.data.check_report import CheckReport, as_table
from stdist.data.check_values import SAMPLED_DAYS
from stdist.data.integrity import ROOT_METADATA, combined_digest, sha256_of
from stdist.errors import InputError

SLOTS, DAYS, H, W = 24, 6, 3, 2
FIRST = np.datetime64("2013-11-01", "D")
SPLIT = Split.parse("2013-11-01:2013-11-03", "2013-11-04:2013-11-04", "2013-11-05:2013-11-06")


def numbers() -> tuple[np.ndarray, np.ndarray]:
    """Two missing values and one true zero; frames 60 … 69, most of the third day's second half, do not exist."""
    values = np.random.default_rng(0).gamma(2, 5, (DAYS * SLOTS, H, W)).astype(np.float32)
    values[5, 1, 0] = values[23, 2, 1] = np.nan
    values[30, 0, 1] = 0
    present = np.ones(len(values), bool)
    present[60:70] = False
    return values, present


def write(out: Path, spec: GridSpec | NodeSpec, values: np.ndarray, present: np.ndarray | None = None) -> Path:
    with GridWriter(out, spec, {"reader": "test"}) as writer:
        for day in range(len(values) // spec.slots_per_day):
            slots = slice(day * spec.slots_per_day, (day + 1) * spec.slots_per_day)
            here = None if present is None else present[slots]
            writer.write_day(day, dict.fromkeys(spec.channels, values[slots]), here)
        return writer.finalise(SPLIT)


def grid(**changes: Any) -> GridSpec:
    ids = 500 + np.arange(H * W).reshape(H, W)
    return GridSpec("toy", ("flow",), FIRST, FIRST + DAYS - 1, ids, 60, 60, **changes)


def nodes(**changes: Any) -> NodeSpec:
    ids = np.array(["a", "b", "c"])
    return NodeSpec("toy", ("flow",), FIRST, FIRST + DAYS - 1, ids, 60, **changes)


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("check") / "sound.zarr", grid(), *numbers())


@pytest.fixture
def store(sound, tmp_path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(sound, tmp_path / "toy.zarr"))


def seal(root: Path, **attributes: Any) -> None:
    """Digests as if the store had been written as it is now: what is wrong in it then is in its values alone."""
    group = zarr.open_group(root, mode="r+", use_consolidated=False)
    paths = [p for p in sorted(root.rglob("*")) if p.is_file() and p != root / ROOT_METADATA]
    files = {p.relative_to(root).as_posix(): {"bytes": p.stat().st_size, "sha256": sha256_of(p)} for p in paths}
    merged = {**dict(group.attrs), **attributes, "files": files}
    group.attrs.put({**merged, "digest": combined_digest(files, merged)})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        zarr.consolidate_metadata(root)


def change(root: Path, array: str, where: Any, value: Any) -> None:
    """Set values behind the writer's back, and seal."""
    zarr.open_group(root, mode="r+", use_consolidated=False)[array][where] = value
    seal(root)


def found(report: CheckReport, severity: str) -> list[tuple[str, str]]:
    return [(finding.what, finding.where) for finding in report.findings if finding.severity == severity]


def only(report: CheckReport, severity: str) -> tuple[str, str]:
    (finding,) = found(report, severity)
    return finding


def test_a_sound_store(sound):
    steps: list[tuple[int, int]] = []
    report = check_store(sound, lambda done, total: steps.append((done, total)))
    assert report.ok and found(report, "error") == found(report, "warning") == []
    assert report.gaps == [{"first": "2013-11-03T12:00", "last": "2013-11-03T21:00", "frames": 10}]
    assert ("gap of 10 frames", "2013-11-03T12:00 … 2013-11-03T21:00 local time") in found(report, "info")
    values, present = numbers()
    channel = report.channels["flow"]
    assert (channel["missing"], channel["true_zeros"]) == (2, 1)
    assert channel["missing_share"] == 2 / (present.sum() * H * W)
    assert channel["zero_share"] == 1 / (present.sum() * H * W - 2)
    assert (channel["lowest"], channel["highest"]) == (0, np.nanmax(values[present]))
    share = 1 / present.sum()
    assert channel["worst_cells"] == {"502": share, "505": share}
    assert all(done < total for done, total in steps) and steps[-1] == (DAYS - 1, DAYS)


def test_the_report_for_programs_and_for_people(sound, store):
    assert json.loads(json.dumps(check_store(sound).as_dict()))["ok"] is True
    change(store, "flow", (3, 0, 0), -1)
    report = check_store(store)
    report.add("info", "a name from a file", "odd [bold]")
    plain = json.loads(json.dumps(report.as_dict()))
    assert plain["ok"] is False and plain["store"] == str(store)
    assert {"severity", "what", "where"} == set(plain["findings"][0])
    page = StringIO()
    Console(file=page, width=200).print(as_table(report))
    text = page.getvalue()
    assert (
        "flow" in text
        and "odd [bold]" in text
        and text.index("mean of the training span") < text.index("values are negative")
    )
    assert report.verdict.endswith("DAMAGED OR WRONG; errors: 3, warnings: 1")


# --- files ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["flow/c/2/0/0", "observed_flow/c/0/0/0", "cell_id/c/0/0", "time/c/0", "flow/zarr.json", "present/zarr.json"],
)
def test_a_flipped_bit_is_found_and_its_file_named(store, name):
    path = store / name
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    path.write_bytes(damaged)
    report = check_store(store)
    assert only(report, "error") == ("bytes of the file are not the recorded ones", name)
    assert ("values are read of a whole store only", "all channels") in found(report, "info")


def test_files_missing_and_cut_short_are_all_named(store):
    size = (store / "flow/c/1/0/0").stat().st_size
    (store / "flow/c/1/0/0").write_bytes((store / "flow/c/1/0/0").read_bytes()[:-7])
    (store / "present/c/0").unlink()
    assert found(check_store(store), "error") == [
        (f"file has {size - 7} of {size} bytes", "flow/c/1/0/0"),
        ("file is missing", "present/c/0"),
    ]


def test_a_file_of_somebody_else_is_no_damage(store):
    (store / "notes.txt").write_text("mine")
    report = check_store(store)
    assert report.ok and only(report, "warning") == ("files that are not of this store (1)", "notes.txt")


def test_changed_attributes(store):
    text = (store / ROOT_METADATA).read_text()
    (store / ROOT_METADATA).write_text(text.replace('"cadence_minutes": 60', '"cadence_minutes": 30'))
    assert ("attributes are not the recorded ones", ROOT_METADATA) in found(check_store(store), "error")


def test_what_is_no_store_is_refused(tmp_path):
    with pytest.raises(InputError, match="is not a grid store"):
        check_store(tmp_path / "nothing.zarr")


# --- metadata, time and places -------------------------------------------------------------------------------------


def test_consolidated_metadata_of_other_arrays(store):
    root = json.loads((store / ROOT_METADATA).read_text())
    root["consolidated_metadata"]["metadata"]["flow"]["shape"][0] += 1
    (store / ROOT_METADATA).write_text(json.dumps(root))
    assert only(check_store(store), "error") == ("consolidated metadata is not that of the arrays", "flow")


def test_dimensions_and_types(store):
    for name, key, value in (("flow", "dimension_names", ["time", "y", "x"]), ("present", "data_type", "int8")):
        metadata = json.loads((store / name / ROOT_METADATA).read_text())
        metadata[key] = value
        if key == "data_type":
            metadata["fill_value"] = 0
        (store / name / ROOT_METADATA).write_text(json.dumps(metadata))
    shutil.rmtree(store / "inside")
    seal(store)
    assert found(check_store(store), "error") == [
        ("type is int8", "present"),
        ("array is missing", "inside"),
        ("dimensions are ['time', 'y', 'x'], not ['time', 'row', 'col']", "flow"),
    ]


@pytest.mark.parametrize(
    ("minutes", "what"),
    [(0, "stamps are repeated or run backwards"), (30, "stamps are off the cadence of 60 minutes")],
)
def test_stamps_off_the_grid(store, minutes, what):
    before = int(zarr.open_group(store)["time"][9])
    change(store, "time", 10, before + minutes)
    report = check_store(store)
    assert any(what == finding and "2013-11-01T0" in where for finding, where in found(report, "error"))


def test_repeated_ids(store):
    change(store, "cell_id", (0, 1), 500)
    assert ("ids are repeated", "500") in found(check_store(store), "error")


def places(rows: int = 1, cols: int = 1) -> dict[str, np.ndarray]:
    """Centres of a grid whose rows run north and whose columns run east, or the other way with -1."""
    north, east = np.meshgrid(45 + 0.1 * rows * np.arange(H), 9 + 0.1 * cols * np.arange(W), indexing="ij")
    return {"latitude": north, "longitude": east}


def test_orientation(tmp_path):
    right = check_store(write(tmp_path / "a.zarr", grid(**places()), *numbers()))
    assert right.ok and not any("orientation" in what for what, _ in found(right, "info"))
    upside_down = check_store(write(tmp_path / "b.zarr", grid(**places(rows=-1)), *numbers()))
    assert only(upside_down, "error") == ("rows run from the north, not from the south", "latitude")
    mirrored = check_store(write(tmp_path / "c.zarr", grid(**places(cols=-1)), *numbers()))
    assert only(mirrored, "error") == ("columns run from the east, not from the west", "longitude")
    crooked = places()
    crooked["latitude"][0, 0] = 50
    report = check_store(write(tmp_path / "d.zarr", grid(**crooked), *numbers()))
    assert only(report, "error") == ("latitude goes the wrong way along the rows (1)", "latitude")


# --- values --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("frame", "value", "severity", "what"),
    [
        (100, -3.5, "warning", "values are negative (1)"),
        (100, 2e6, "warning", "values from 999,950 on have no numeral (1)"),
        (100, np.nan, "error", "values are not finite (1)"),
        (100, np.inf, "error", "values are not finite (1)"),
        (62, 5.0, "error", "values where there is no frame (1)"),
    ],
)
def test_values_out_of_range(store, frame, value, severity, what):
    change(store, "flow", (frame, 2, 0), value)
    report = check_store(store)
    stamp = np.datetime64("2013-11-01T00:00") + np.timedelta64(frame, "h")
    assert (what, f"flow, first {stamp} local time, cell 504") in found(report, severity)
    assert report.ok is (severity == "warning")


def test_values_too_small_for_numerals(tmp_path):
    values, present = numbers()
    report = check_store(write(tmp_path / "small.zarr", grid(), values * np.float32(1e-7), present))
    assert only(report, "warning") == ("all values are below 5e-05, which numerals read as 0: --scale", "flow")


@pytest.mark.parametrize("frame", [5, 23])
def test_imputed_values_are_computed_again(store, frame):
    """Frame 23 is a day's last: what it is made of lies in two days."""
    cell = (1, 0) if frame == 5 else (2, 1)
    imputed = float(zarr.open_group(store)["flow"][(frame, *cell)])
    change(store, "flow", (frame, *cell), imputed * 1.001)
    what, where = only(check_store(store), "error")
    assert what == "imputed values are not those of Eq. 20 (1)" and f"T{frame:02}:00" in where


def test_imputed_values_at_edges_gaps_and_across_days_are_right(tmp_path):
    """Everything missing that can be: nothing is reported where Eq. 20 needs more than the days that are looked at."""
    rng = np.random.default_rng(1)
    values = rng.gamma(2, 5, (DAYS * SLOTS, H, W)).astype(np.float32)
    values[rng.random(values.shape) < 0.3] = np.nan
    values[20:110, 0, 0] = np.nan  # longer than three days
    values[:50, 1, 1] = np.nan
    values[:, 2, 0] = np.nan
    present = np.ones(len(values), bool)
    present[70:80] = present[120:] = False
    report = check_store(write(tmp_path / "holes.zarr", grid(), values, present))
    assert report.ok and DAYS <= SAMPLED_DAYS


def test_statistics_are_computed_again(store):
    change(store, "flow", (10, 0, 0), 1000)
    wrong = [what for what, _ in found(check_store(store), "error")]
    assert [what.split(" is ")[0] for what in wrong] == [
        "maximum of the training span",
        "mean of the training span",
        "std of the training span",
        "means of cells are not those of the training span",
    ]


def test_a_value_of_the_test_span_moves_no_statistics(store):
    change(store, "flow", (DAYS * SLOTS - 1, 0, 0), 1000)
    assert check_store(store).ok


def test_stored_statistics_of_another_span_leak(store):
    """As a store looks whose split was moved without fitting again."""
    seal(store, split=Split.parse("2013-11-05:2013-11-06", None, "2013-11-01:2013-11-03").as_attribute())
    wrong = [what for what, _ in found(check_store(store), "error")]
    assert "statistics are of 2013-11-01:2013-11-03, training is 2013-11-05:2013-11-06" in wrong
    assert "statistics fitted on 2013-11-01:2013-11-03 share days with test 2013-11-01:2013-11-03" in wrong


def test_coverage_that_was_recorded_wrong(store):
    change(store, "observed_flow", (100, 0, 0), False)
    wrong = [what for what, _ in found(check_store(store), "error")]
    assert "coverage is {'missing': 3, 'true_zeros': 1}, recorded {'missing': 2, 'true_zeros': 1}" in wrong


def test_cells_without_values_are_named(tmp_path):
    values, present = numbers()
    values[:, 0, 0] = np.nan
    values[:, 1, 1] = 0
    values[: 5 * SLOTS, 2, 0] = np.nan
    report = check_store(write(tmp_path / "dead.zarr", grid(), values, present))
    assert report.ok and found(report, "warning") == [
        ("cells never observed (1)", "flow, cells 500"),
        ("cells scored but never observed in training (1)", "flow, cells 504"),
        ("cells missing more than 50% of the time (1)", "flow, cells 504"),
        ("cells zero all the time (1)", "flow, cells 503"),
    ]
    assert report.channels["flow"]["cells"]["never observed"] == 1


def test_what_lies_outside_the_city_is_not_missing(tmp_path, store):
    inside = np.ones((H, W), bool)
    inside[0, 0] = False
    values, present = numbers()
    values[:, 0, 0] = np.nan
    path = write(tmp_path / "shape.zarr", grid(inside=inside), values, present)
    assert check_store(path).ok and not found(check_store(path), "warning")
    change(path, "observed_flow", (3, 0, 0), True)
    assert any("observed outside the city (1)" in what for what, _ in found(check_store(path), "warning"))


def test_large_grids_are_read_tile_by_tile(tmp_path, monkeypatch):
    shape = (258, 2)
    values = np.random.default_rng(0).gamma(2, 5, (DAYS * 2, *shape)).astype(np.float32)
    ids = np.arange(516).reshape(shape)
    spec = GridSpec("wide", ("flow",), FIRST, FIRST + DAYS - 1, ids, 720)
    path = write(tmp_path / "wide.zarr", spec, values)
    assert check_store(path).ok
    change(path, "flow", (7, 257, 1), -1)
    read: list[tuple[int, ...]] = []
    monkeypatch.setattr("stdist.data.check_values.interpolate", lambda v, o: read.append(v.shape) or v)
    assert ("values are negative (1)", "flow, first 2013-11-04T12:00 local time, cell 515") in found(
        check_store(path), "warning"
    )
    assert {size[1:] for size in read} == {(32, 2), (2, 2)} and max(size[0] for size in read) == 3 * 2


# --- nodes ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def write_nodes(tmp_path) -> Callable[..., Path]:
    def make(**changes: Any) -> Path:
        values = np.random.default_rng(0).gamma(2, 5, (DAYS * SLOTS, 3)).astype(np.float32)
        return write(tmp_path / "nodes.zarr", nodes(**changes), values)

    return make


def test_a_sound_node_store(write_nodes):
    since = np.array(["2013-11-01", "2013-11-03", "2013-11-01"], "datetime64[D]")
    report = check_store(write_nodes(adjacency=np.eye(3, dtype=np.float32), since=since))
    assert report.ok and not found(report, "warning") and report.channels["flow"]["missing"] == 0


def test_a_node_before_its_first_day(write_nodes):
    since = np.array(["2013-11-01", "2013-11-03", "2013-11-01"], "datetime64[D]")
    path = write_nodes(since=since)
    change(path, "observed_flow", (47, 1), True)
    what = "observed before the node exists (1)"
    assert (what, "flow, first 2013-11-02T23:00 local time, cell b") in found(check_store(path), "error")
    change(path, "since", 2, int(np.datetime64("2014-01-01").astype(int)))
    assert ("nodes begin after the last day", "c") in found(check_store(path), "error")


@pytest.mark.parametrize(
    ("weight", "severity", "what"),
    [(np.nan, "error", "weights are not finite (1)"), (-1, "warning", "weights are negative (1)")],
)
def test_weights_of_the_graph(write_nodes, weight, severity, what):
    path = write_nodes(adjacency=np.eye(3, dtype=np.float32))
    change(path, "adjacency", (0, 1), weight)
    assert (what, "adjacency") in found(check_store(path), severity)


def test_a_graph_of_other_nodes(write_nodes):
    path = write_nodes(adjacency=np.eye(3, dtype=np.float32))
    group = zarr.open_group(path, mode="r+", use_consolidated=False)
    group.create_array("adjacency", data=np.eye(2, dtype=np.float32), dimension_names=("from", "to"), overwrite=True)
    seal(path)
    assert ("graph has shape (2, 2), the store 3 nodes", "adjacency") in found(check_store(path), "error")


# --- real data -----------------------------------------------------------------------------------------------------


def test_public_data_through_prepare_and_check(real_data, tmp_path):
    """196 of the taxi raster's 200 cells ever have a pick-up, and 65 % of its values are zero."""
    folder = real_data / "nyc_taxi_10x20"
    sources = [folder / "volume_train.npz", folder / "volume_test.npz"]
    taxi = READERS["city-npz"].prepare(sources, tmp_path / "taxi.zarr", city="nyc", start="2015-01-01", cadence=30)
    report = check_store(taxi.path)
    assert only(report, "warning") == ("cells zero all the time (4)", "volume, cells 121, 195, 198, 200")
    assert report.ok and round(report.channels["volume"]["zero_share"], 2) == 0.65
    week = real_data / "metr_la_week"
    options = {"adjacency": week / "los_adj.csv", "start": "2012-03-01", "cadence": 5}
    los = READERS["table"].prepare([week / "los_speed.csv"], tmp_path / "los.zarr", channel="speed", **options)
    report = check_store(los.path)
    assert report.findings == [] and report.channels["speed"]["highest"] == 70
