"""wide-csv --nodes: a header of node ids, one line a frame; and what is refused."""

from pathlib import Path

import numpy as np
import pytest

from data_prep.wide_nodes import plan_nodes
from stdist.errors import InputError


def _plan(path: Path, *, adjacency: Path | None = None, meta: Path | None = None, spans=(None, None, None), **options):
    options = {"start": "2012-03-01T06:00", "cadence": 360, **options}
    return plan_nodes(path, "los", "speed", options["start"], options["cadence"], -480, adjacency, meta, spans)


def _csv(folder: Path, text: str) -> Path:
    path = folder / "los_speed.csv"
    path.write_text(text)
    return path


def test_header_names_the_nodes_and_lines_are_frames(tmp_path):
    """Four frames of six hours from 06:00; a blank and a NaN are missing, 0 is measured."""
    path = _csv(tmp_path, '773869,"767541"\n1,2.5\n0,\nNaN, 4\n5,6\n')
    plan = _plan(path)
    assert plan.spec.node_ids.tolist() == [773869, 767541] and plan.spec.utc_offset_minutes == -480
    first, second = plan.read(plan.parts[0])
    assert first.present.tolist() == [False, True, True, True] and second.present.tolist() == [True] + [False] * 3
    expected = np.array([[1, 2.5], [0, np.nan], [np.nan, 4]], np.float32)
    np.testing.assert_array_equal(first.values["speed"][1:], expected)
    assert second.values["speed"][0].tolist() == [5, 6]


@pytest.mark.parametrize(
    ("text", "options", "line"),
    [
        ("a,b\n1,2\n3\n", {}, "line 3: 1 columns instead of 2"),
        ("a,b\n1,2\n3,x\n", {}, "line 3, column 2: 'x' is not a finite number; blank means missing"),
        ("a,b\n1,inf\n", {}, "line 2, column 2: 'inf'"),
        ("a,b\n1,-2\n", {}, r"speed is -2.0 at 2012-03-01T06:00, index 1"),
        ("a,a\n1,2\n", {}, "node 'a' occurs twice"),
        ("a,b\n", {}, "holds no frame below its header"),
        ("a,b\n1,2\n", {"cadence": 7}, "cadence 7 min does not divide a day"),
        ("a,b\n1,2\n", {"start": "2012-03-01T01:00"}, "off the 360-minute grid"),
        ("a,b\n1,2\n", {"spans": ("2012-03-01:2012-03-02", None, None)}, "leaves the data's days"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, text, options, line):
    with pytest.raises(InputError, match=line) as error:
        plan = _plan(_csv(tmp_path, text), **options)
        list(plan.read(plan.parts[0]))
    assert "\n" not in str(error.value)


def test_the_real_week_of_metr_la(real_data):
    folder = real_data / "metr_la_week"
    plan = _plan(
        folder / "los_speed.csv",
        start="2012-03-01",
        cadence=5,
        adjacency=folder / "los_adj.csv",
        meta=folder / "graph_sensor_locations.csv",
    )
    days = list(plan.read(plan.parts[0]))
    speeds = np.loadtxt(folder / "los_speed.csv", delimiter=",", skiprows=1).astype(np.float32)
    np.testing.assert_array_equal(np.concatenate([day.values["speed"] for day in days]), speeds)
    assert all(day.present.all() for day in days) and len(days) == 7 and plan.spec.shape == (207,)
    assert plan.spec.node_ids[0] == 773869 and plan.spec.latitude[1] == 34.11621
    np.testing.assert_array_equal(plan.spec.adjacency, plan.spec.adjacency.T)
    assert plan.spec.adjacency[0, 13] == np.float32(0.260935932)
