"""Whatever was fitted on a day is not scored on it: spans, data told by bytes, the line a person reads."""

import numpy as np
import pytest

from stdist.data import DaySpan, Split
from stdist.data.audit import Fitted, data_digest, leaks, refuse_leaks
from stdist.errors import InputError

TRAIN = DaySpan.parse("2013-11-01:2013-11-20")


@pytest.mark.parametrize(
    ("evaluated", "expected"),
    [
        ("2013-11-21:2013-11-30", False),  # the day after the last fitted one
        ("2013-11-20:2013-11-30", True),  # one shared day
        ("2013-10-01:2013-10-31", False),
        ("2013-10-01:2013-11-01", True),
        ("2013-11-05:2013-11-06", True),  # inside
        ("2013-10-01:2013-12-31", True),  # around
    ],
)
def test_a_leak_is_a_shared_day(evaluated, expected):
    fitted = [Fitted.on("t_max", TRAIN, "a")]
    assert bool(leaks(fitted, DaySpan.parse(evaluated), "a")) is expected


def test_other_data_is_no_leak():
    assert leaks([Fitted.on("t_max", TRAIN, "a")], TRAIN, "b") == []


def test_only_what_was_fitted_there_is_named():
    few_shot = DaySpan.parse("2013-11-01:2013-11-02")
    fitted = [Fitted.on("weights", few_shot, "a"), Fitted.on("t_max", TRAIN, "a"), Fitted.on("graph", TRAIN, "a")]
    with pytest.raises(InputError) as refused:
        refuse_leaks(fitted, DaySpan.parse("2013-11-10:2013-11-12"), "a")
    assert str(refused.value) == (
        "leak: t_max, graph fitted on 2013-11-01:2013-11-20 of this data, which shares days with "
        "2013-11-10:2013-11-12; score other days, or fit on other days"
    )
    refuse_leaks(fitted, DaySpan.parse("2013-11-21:2013-11-22"), "a")


def test_the_same_data_prepared_with_another_split_is_the_same_data(make_store):
    """The store's digest covers its split, so it cannot tell; the data's digest can."""
    rng = np.random.default_rng(0)
    values = rng.gamma(2, 5, (6 * 24, 3, 2)).astype(np.float32)
    one = make_store(values, cadence=60, split=Split.parse("2013-11-01:2013-11-04", None, "2013-11-05:2013-11-06"))
    other = make_store(values, cadence=60, split=Split.parse("2013-11-03:2013-11-06", None, "2013-11-01:2013-11-02"))
    changed = values.copy()
    changed[5, 1, 1] += 1
    third = make_store(changed, cadence=60)
    assert one.digest != other.digest
    assert data_digest(one, "internet") == data_digest(other, "internet") != data_digest(third, "internet")
