"""wide-csv --nodes: a header of node ids, one line a frame; and what is refused."""

from pathlib import Path

import numpy as np
import pytest

from data_prep import READERS, Plan


def _plan(folder: Path, text: str, **options: object) -> Plan:
    path = folder / "los_speed.csv"
    path.write_text(text)
    given = {"start": "2012-03-01T06:00", "cadence": 360, "channel": "speed", "utc_offset": -480, **options}
    return READERS["wide-csv"].plan([path], **{"nodes": True, **given})


def test_header_names_the_nodes_and_lines_are_frames(tmp_path):
    """Four frames of six hours from 06:00; a blank and a NaN are missing, 0 is measured."""
    plan = _plan(tmp_path, '773869,"767541"\n1,2.5\n0,\nNaN, 4\n5,6\n')
    assert plan.spec.node_ids.tolist() == [773869, 767541] and plan.spec.utc_offset_minutes == -480
    first, second = plan.read(plan.parts[0])
    assert first.present.tolist() == [False, True, True, True] and second.present.tolist() == [True] + [False] * 3
    expected = np.array([[1, 2.5], [0, np.nan], [np.nan, 4]], np.float32)
    np.testing.assert_array_equal(first.values["speed"][1:], expected)
    assert second.values["speed"][0].tolist() == [5, 6]


def test_spaces_around_numbers_are_passed_over(tmp_path):
    (day,) = (plan := _plan(tmp_path, "a,b\n1 , 2.5 \n NaN, \n")).read(plan.parts[0])
    np.testing.assert_array_equal(day.values["speed"][1:3], [[1, 2.5], [np.nan, np.nan]])


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
        ("a,b\n1,2\n", {"train": "2012-03-01:2012-03-02"}, "leaves the data's days"),
        ("a,b\n1,2\n", {"nodes": False, "adjacency": Path("a.csv")}, "--adjacency is for nodes; give --nodes too"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, text, options, line, refused):
    with refused(line):
        plan = _plan(tmp_path, text, **options)
        list(plan.read(plan.parts[0]))
