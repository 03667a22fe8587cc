"""Spans of days, splits and regions (docs/decisions.md, 10 and 12)."""

import numpy as np
import pytest

from stdist.data import DaySpan, NodeRange, Region, Split
from stdist.data.spans import all_cells, default_split, parse_region
from stdist.errors import InputError


def _days(first: str, last: str) -> np.ndarray:
    return np.arange(first, np.datetime64(last) + 1, dtype="datetime64[D]")


@pytest.mark.parametrize("value", [["2013-11-01", "2013-11-20"], "2013-11-01:2013-11-20"])
def test_span_counts_both_ends(value):
    span = DaySpan.parse(value)
    assert len(span) == 20 and str(span) == "2013-11-01:2013-11-20"


@pytest.mark.parametrize(
    ("value", "line"),
    [
        ("2013-11-20:2013-11-01", "earlier day first"),
        ("2013-11-01", "needs two days"),
        ("2013-11-01:2013-13-01", "2013-13-01 is in no calendar"),
        (["2013-11-01", "NaT"], "not a calendar day"),
    ],
)
def test_bad_spans_say_what_to_write(value, line):
    with pytest.raises(InputError, match=line):
        DaySpan.parse(value)


def test_overlapping_splits_are_refused():
    with pytest.raises(InputError, match="share days"):
        Split.parse("2013-11-01:2013-11-20", None, "2013-11-20:2013-11-30")


@pytest.mark.parametrize(("first", "last"), [("2013-11-01", "2014-01-01"), ("2013-10-30", "2014-01-03")])
def test_paper_spans_where_the_data_covers_them(first, last):
    split = default_split(_days(first, last))
    assert [str(split.train), str(split.validation), str(split.test)] == [
        "2013-11-01:2013-12-18",
        "2013-12-19:2013-12-25",
        "2013-12-26:2014-01-01",
    ]


@pytest.mark.parametrize(
    ("first", "last", "spans"),
    [
        ("2013-11-01", "2013-11-30", "2013-11-01:2013-11-20 2013-11-21:2013-11-25 2013-11-26:2013-11-30"),
        # Thirteen days hold two each; six one each.
        ("2013-11-01", "2013-11-13", "2013-11-01:2013-11-09 2013-11-10:2013-11-11 2013-11-12:2013-11-13"),
        ("2020-01-01", "2020-01-06", "2020-01-01:2020-01-04 2020-01-05:2020-01-05 2020-01-06:2020-01-06"),
        # A day less than the paper's at either end, and one more.
        ("2013-11-02", "2014-01-01", "2013-11-02:2013-12-12 2013-12-13:2013-12-22 2013-12-23:2014-01-01"),
        ("2013-11-01", "2013-12-31", "2013-11-01:2013-12-11 2013-12-12:2013-12-21 2013-12-22:2013-12-31"),
        ("2013-10-31", "2014-01-02", "2013-11-01:2013-12-18 2013-12-19:2013-12-25 2013-12-26:2014-01-01"),
    ],
)
def test_default_split_is_four_to_one_to_one_but_for_the_papers_days(first, last, spans):
    split = default_split(_days(first, last))
    assert " ".join(map(str, (split.train, split.validation, split.test))) == spans


def test_default_split_counts_days_that_hold_data():
    days = np.delete(_days("2020-01-01", "2020-01-09"), [1, 4, 7])
    assert default_split(days) == Split.parse("2020-01-01:2020-01-06", "2020-01-07:2020-01-07", "2020-01-09:2020-01-09")


def test_default_split_counts_the_days_that_are_there():
    """Thirteen days in two stretches: nine, two and two of them, whatever lies between."""
    days = np.concatenate([_days("2013-11-01", "2013-11-08"), _days("2013-11-20", "2013-11-24")])
    assert default_split(days) == Split.parse("2013-11-01:2013-11-20", "2013-11-21:2013-11-22", "2013-11-23:2013-11-24")
    one = np.array(["2013-11-05"], "datetime64[D]")
    assert default_split(one) == Split.parse("2013-11-05:2013-11-05") and len(DaySpan(one[0], one[0])) == 1


def test_few_days_leave_no_validation_or_test():
    assert default_split(_days("2013-11-01", "2013-11-05")) == Split(DaySpan.parse("2013-11-01:2013-11-05"))


def test_split_survives_its_attribute():
    split = Split.parse("2013-11-01:2013-11-20", None, "2013-11-26:2013-11-30")
    assert Split.parse(**split.as_attribute()) == split


def test_central_region_is_eleven_by_eleven():
    region = Region.parse("44:55,44:55").within((100, 100))
    ids = np.arange(1, 10001).reshape(100, 100)[region.slices]
    assert region.shape == (11, 11) and str(region) == "44:55,44:55"
    # Row and column 45 counted from 1: id (45 - 1) * 100 + 45.
    assert ids[0, 0] == 4445 and ids[-1, -1] == 5455


def test_spans_by_name():
    split = Split.parse("2013-11-01:2013-11-20")
    assert split.named("train") is split.train
    for name, line in (("test", "no test span"), ("holdout", "no part of a split")):
        with pytest.raises(InputError, match=line):
            split.named(name)


@pytest.mark.parametrize("value", ["44:55", "5:5,0:1", "0:1,5:5", "a:b,c:d", "-1:3,0:2", (3, 2, 0, 1), (1, 2, 3)])
def test_bad_regions_are_refused(value):
    with pytest.raises(InputError, match="region"):
        Region.parse(value)


@pytest.mark.parametrize("value", ["3:3", "5:2", "1:2,3:4", (1,)])
def test_bad_node_ranges_are_refused(value):
    with pytest.raises(InputError, match="node range"):
        NodeRange.parse(value)


def test_what_leaves_the_store_is_refused_by_its_size():
    for region in ("0:21,0:30", "0:20,0:31"):
        with pytest.raises(InputError, match="20 rows x 30 columns"):
            Region.parse(region).within((20, 30))
    assert Region.parse("0:20,0:30").within((20, 30)).shape == (20, 30)
    with pytest.raises(InputError, match="the 7 nodes"):
        NodeRange(0, 8).within((7,))
    assert NodeRange(0, 7).within((7,)).shape == (7,)


def test_a_region_is_of_a_grid_or_of_nodes_by_its_text():
    assert parse_region("1:2,3:4") == Region(1, 2, 3, 4) and parse_region(" 3:9 ") == NodeRange(3, 9)
    assert parse_region(NodeRange(0, 2)) == NodeRange(0, 2) and parse_region((0, 1, 2, 3)) == Region(0, 1, 2, 3)
    assert parse_region((3, 9)) == NodeRange(3, 9)
    assert all_cells((4, 5)) == Region(0, 4, 0, 5) and all_cells((7,)) == NodeRange(0, 7)
    assert NodeRange(3, 9).shape == (6,) and NodeRange(3, 9).slices == (slice(3, 9),)
    with pytest.raises(InputError, match="the store has 7 nodes; write a range"):
        Region(0, 1, 0, 1).within((7,))
