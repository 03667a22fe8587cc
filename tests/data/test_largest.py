"""LargeST: year files as pandas wrote them, regions, the road graph; and what is refused."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from data_prep import largest
from data_prep.largest import quarter_hours
from stdist.errors import InputError

# In an order of their own: the metadata's order is another.
IDS = ["317802", "400001", "1204567", "312134", "715918"]
META = """ID,Lat,Lng,District,County,Fwy,Lanes,Type,Direction,ID2
400001,37.36,-121.90,4,Santa Clara,US101-N,4,Mainline,N,0
312134,38.41,-121.48,3,Sacramento,I5-S,3,Mainline,S,1
317802,38.55,-121.70,3,Yolo,I80-E,5,Mainline,E,2
715918,34.07,-118.05,7,Los Angeles,I10-W,4,Mainline,W,3
1204567,33.70,-117.80,12,Orange,I5-N,6,Mainline,N,4
"""
ADJACENCY = np.arange(25).reshape(5, 5) / 25


def _raw(days: int, seed: int = 0) -> np.ndarray:
    """Whole vehicles in 5 minutes, some missing, some zero."""
    random = np.random.default_rng(seed)
    values = random.integers(0, 300, (days * 288, 5)).astype(float)
    values[random.random(values.shape) < 0.2] = np.nan
    values[random.random(values.shape) < 0.1] = 0
    return values


def _stamps(first: str, rows: int, minutes: int = 5) -> np.ndarray:
    return np.datetime64(first, "m") + np.arange(rows) * np.timedelta64(minutes, "m")


@pytest.fixture
def folder(tmp_path: Path, write_frame) -> Path:
    """Three days around the change of the clock, with metadata and graph beside them."""
    values = _raw(3)
    values[288 + 24 : 288 + 36] = np.nan
    write_frame(tmp_path / "ca_his_raw_2019.h5", _stamps("2019-03-09", len(values)), IDS, values)
    (tmp_path / "ca_meta.csv").write_text(META)
    np.save(tmp_path / "ca_rn_adj.npy", ADJACENCY)
    return tmp_path


@pytest.fixture
def read_flow(read_plan):
    """Flow of a plan, float32 [T, N]."""
    return lambda plan: read_plan(plan)[0]


def test_quarter_hours_are_the_authors_steps(folder, read_flow):
    """pandas' resample("15min").mean().round(0) of process_ca_his.ipynb, on the very frame; NaN stays NaN."""
    plan = largest.plan([folder / "ca_his_raw_2019.h5"])
    values = _raw(3)
    values[288 + 24 : 288 + 36] = np.nan
    frame = pd.DataFrame(values, index=pd.DatetimeIndex(_stamps("2019-03-09", 864)), columns=IDS)
    theirs = frame.resample("15min").mean().round(0)[plan.spec.node_ids.tolist()]
    np.testing.assert_array_equal(read_flow(plan), theirs.to_numpy(np.float32))
    assert theirs.isna().to_numpy().any() and (theirs == 0).to_numpy().any()


def test_rounding_is_half_to_even_and_over_known_values():
    """Means 2.5, 3.5, 7 of one known value, none known: 2, 4, 7, missing."""
    nan = np.nan
    day = np.array([2, nan, 3, 3, 4, nan, nan, 7, nan, nan, nan, nan])[:, None]
    np.testing.assert_array_equal(quarter_hours(day, 3)[:, 0], np.array([2, 4, 7, nan], np.float32))


def test_the_whole_state_in_the_metadatas_order(folder):
    plan = largest.plan([folder])
    spec = plan.spec
    assert spec.node_ids.tolist() == ["400001", "312134", "317802", "715918", "1204567"]
    assert (spec.city, spec.channels, spec.cadence_minutes, spec.utc_offset_minutes) == ("ca", ("flow",), 15, -480)
    assert (str(spec.first_day), str(spec.last_day), len(plan.parts)) == ("2019-03-09", "2019-03-11", 3)
    assert spec.latitude[2] == 38.55 and spec.longitude[4] == -117.80
    np.testing.assert_array_equal(spec.adjacency, ADJACENCY.astype(np.float32))
    assert spec.static["lanes"].tolist() == [4, 3, 5, 4, 6] and spec.static["district"].tolist() == [4, 3, 3, 7, 12]
    assert [file.name for file in plan.sources] == ["ca_his_raw_2019.h5", "ca_meta.csv", "ca_rn_adj.npy"]


@pytest.mark.parametrize(
    ("options", "city", "ids"),
    [
        ({"region": "GLA"}, "gla", ["715918", "1204567"]),
        ({"region": "gba"}, "gba", ["400001"]),
        ({"districts": "4,3"}, "ca-4-3", ["400001", "312134", "317802"]),
        ({"districts": "3", "city": "north"}, "north", ["312134", "317802"]),
    ],
)
def test_regions_are_cut_from_values_and_graph(folder, options, city, ids, read_flow):
    """As generate_gla_dataset.ipynb: columns by ID, rows and columns of the graph by ID2."""
    plan, whole = largest.plan([folder], **options), largest.plan([folder])
    rows = [whole.spec.node_ids.tolist().index(label) for label in ids]
    assert (plan.spec.city, plan.spec.node_ids.tolist()) == (city, ids)
    np.testing.assert_array_equal(plan.spec.adjacency, ADJACENCY[np.ix_(rows, rows)].astype(np.float32))
    np.testing.assert_array_equal(read_flow(plan), read_flow(whole)[:, rows])


def test_a_regions_own_files_with_the_states_graph(folder, write_frame, read_flow):
    """gba_his_2019.h5 has 15 minutes and 0 for missing; ID2 counts the whole state's rows."""
    gla = folder / "gla"
    gla.mkdir()
    lines = META.splitlines()
    (gla / "gla_meta.csv").write_text("\n".join([lines[0], *lines[4:]]))
    values = np.array([[0, 5], [3, 0]] * 48)
    write_frame(gla / "gla_his_2019.h5", _stamps("2019-01-01", 96, 15), ["715918", "1204567"], values.astype(float))
    plan = largest.plan([gla / "gla_his_2019.h5"], adjacency=folder / "ca_rn_adj.npy")
    assert plan.spec.city == "gla" and plan.recipe["zeros"] == "missing"
    np.testing.assert_array_equal(plan.spec.adjacency, ADJACENCY[3:, 3:].astype(np.float32))
    np.testing.assert_array_equal(read_flow(plan)[:2], np.array([[np.nan, 5], [3, np.nan]], np.float32))


def test_years_are_one_store_whatever_their_columns_order(folder, write_frame, read_flow):
    """A second file, three days later, with its columns reversed; the days between are no parts."""
    values = _raw(2, seed=1)
    write_frame(folder / "ca_his_raw_2020.h5", _stamps("2019-03-14", 576), IDS[::-1], values[:, ::-1])
    plan = largest.plan([folder])
    assert [part.days[0] for part in plan.parts] == [0, 1, 2, 5, 6]
    column = plan.spec.node_ids.tolist().index(IDS[0])
    expected = quarter_hours(values, 3)[:, 0]
    np.testing.assert_array_equal(read_flow(plan)[5 * 96 :, column], expected)


def test_absent_rows_are_absent_frames(tmp_path, write_frame):
    """Rows from 06:00, without 07:00 … 07:10: slot 28 has no row, slot 29 has; no metadata is needed."""
    stamps = _stamps("2019-01-01T06:00", 100)
    keep = (stamps < np.datetime64("2019-01-01T07:00")) | (stamps > np.datetime64("2019-01-01T07:10"))
    write_frame(tmp_path / "ca_his_raw_2019.h5", stamps[keep], IDS, np.ones((keep.sum(), 5)))
    plan = largest.plan([tmp_path])
    (day,) = plan.read(plan.parts[0])
    assert np.flatnonzero(day.present).tolist() == [*range(24, 28), *range(29, 58)]
    assert plan.spec.adjacency is None and plan.spec.latitude is None and plan.spec.node_ids.tolist() == IDS


def test_a_detector_that_never_reports_is_kept(tmp_path, write_frame, read_flow):
    values = np.ones((288, 2))
    values[:, 1] = np.nan
    write_frame(tmp_path / "ca_his_raw_2019.h5", _stamps("2019-01-01", 288), ["1", "2"], values)
    flow = read_flow(largest.plan([tmp_path]))
    assert (flow[:, 0] == 1).all() and np.isnan(flow[:, 1]).all()


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"region": "LA"}, "--region 'LA' is unknown; choose SD, GBA, GLA, CA"),
        ({"region": "SD"}, r"ca_meta.csv has no detector in district 11"),
        ({"region": "SD", "districts": "11"}, "--region and --districts both"),
        ({"districts": "four"}, "--districts 'four' are no numbers"),
        ({"meta": Path("nowhere.csv")}, "nowhere.csv is not a file"),
        ({"train": "2019-01-01:2019-03-09"}, "leaves the data's days 2019-03-09:2019-03-11"),
    ],
)
def test_options_are_refused(folder, options, line, refused):
    with refused(line):
        largest.plan([folder], **options)


def test_metadata_and_graph_must_fit(folder, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    meta = other / "meta.csv"
    cases = [
        (META.replace("312134", "312135"), "lacks sensor 312134 .1 of 5 absent"),
        (META + "999999,0,0,4,X,I1,1,Mainline,N,5\n", "lacks detector 999999 .1 of 6"),
        (META.replace("District", "Region"), "has no column of the district; it has ID, Lat, Lng"),
        (META.replace("37.36", "north"), "'north' is not a number, in column Lat"),
    ]
    for text, line in cases:
        meta.write_text(text)
        with pytest.raises(InputError, match=line):
            largest.plan([folder], meta=meta)
    graph = other / "graph.npy"
    for matrix, line in (
        (np.ones((4, 4)), "is 4 x 4, there are 5 detectors"),
        (np.full((5, 5), np.nan), "negative or not finite"),
    ):
        np.save(graph, matrix)
        with pytest.raises(InputError, match=line):
            largest.plan([folder], adjacency=graph)
    graph.write_bytes(graph.read_bytes()[:150])
    with pytest.raises(InputError, match="cut short"):
        largest.plan([folder], adjacency=graph)
    (folder / "sd_meta.csv").write_text(META)
    with pytest.raises(InputError, match=r"holds ca_meta.csv and sd_meta.csv; choose one with --meta"):
        largest.plan([folder])


@pytest.mark.parametrize(
    ("minutes", "line"),
    [
        ([0, 5, 10, 10], "stamp 2019-01-01T00:10 occurs twice"),
        ([0, 10, 5, 15], "stamps run backwards at 2019-01-01T00:05"),
        ([0, 5, 12, 17], "2019-01-01T00:12 is off the 5-minute grid"),
        ([0, 7, 14, 21], "7 minutes pass between 2019-01-01T00:00 and the next stamp"),
        ([0, 10, 20, 30], "a row every 10 minutes; LargeST has 5"),
        ([0], "holds 1 frames, too few"),
    ],
)
def test_stamps_must_be_regular(tmp_path, write_frame, minutes, line):
    stamps = np.datetime64("2019-01-01") + np.array(minutes) * np.timedelta64(1, "m")
    path = write_frame(tmp_path / "ca_his_raw_2019.h5", stamps, IDS, np.ones((len(stamps), 5)))
    with pytest.raises(InputError, match=line):
        largest.plan([path])


def test_negative_flow_is_named(tmp_path, write_frame):
    values = np.ones((288, 5))
    values[30, 1] = -4
    path = write_frame(tmp_path / "ca_his_raw_2019.h5", _stamps("2019-01-01", 288), IDS, values)
    plan = largest.plan([path])
    with pytest.raises(InputError, match=r"flow is -4.0 at 2019-01-01T02:30, index 1 \(1 such"):
        list(plan.read(plan.parts[0]))


def test_files_must_fit_each_other(folder, write_frame):
    path = write_frame(folder / "ca_his_raw_2020.h5", _stamps("2019-03-11T12:00", 288), IDS, np.ones((288, 5)))
    with pytest.raises(InputError, match=r"2019.h5 and .*2020.h5 both hold 2019-03-11"):
        largest.plan([folder])
    write_frame(path, _stamps("2020-01-01", 288), IDS[:4], np.ones((288, 4)))
    with pytest.raises(InputError, match=r"2020.h5 lacks sensor 715918"):
        largest.plan([folder])
    for sources in ([], [folder / "empty"]):
        (folder / "empty").mkdir(exist_ok=True)
        with pytest.raises(InputError, match="none was found"):
            largest.plan(sources)
