"""The period of a channel and the hour of its peak, and what a wrong cadence does to them."""

import numpy as np
import pytest

from stdist.data.check import check_store
from stdist.data.check_report import as_table
from stdist.data.rhythm import Rhythm, rhythm_of


def days(count: int, slots: int = 24, peak: int = 18) -> np.ndarray:
    """A cosine a day with its peak at a slot, on Sundays half of it."""
    steps = np.arange(count * slots)
    return (2 + np.cos(2 * np.pi * (steps - peak) / slots)) * np.where(steps // slots % 7 == 6, 0.5, 1)


def test_a_day_is_found_before_the_week():
    assert rhythm_of(days(28), 24) == Rhythm(1440, 18 * 60, 6 * 60)


@pytest.mark.parametrize(("slots", "minutes"), [(12, 2880), (48, 720)])
def test_another_cadence_makes_other_days(slots, minutes):
    """Hours said to be two, or half an hour."""
    rhythm = rhythm_of(days(28), slots)
    assert rhythm.period == minutes and not rhythm.is_of_days


def test_gaps_do_not_count():
    means = days(28)
    means[100:131] = means[400:500:7] = np.nan
    assert rhythm_of(means, 24) == Rhythm(1440, 18 * 60, 6 * 60)


def test_nothing_is_said_of_few_days_or_of_one_value():
    assert rhythm_of(days(2), 24) is None and rhythm_of(np.ones(24 * 9), 24) is None
    noise = rhythm_of(np.random.default_rng(0).random(24 * 28), 24)
    assert noise.period is None and noise.is_of_days
    means = np.full(24 * 9, np.nan)
    means[:48] = days(2)
    assert rhythm_of(means, 24) is None


def test_check_shows_it_and_warns(make_store):
    values = np.stack([days(14), 3 * days(14)], axis=1)
    values[40:50, 0] = np.nan
    right = check_store(make_store(values, cadence=60).path)
    assert right.channels["internet"]["period_hours"] == 24 and right.channels["internet"]["trough"] == "06:00"
    assert not [finding for finding in right.findings if "repeat" in finding.what]
    wrong = check_store(make_store(values, cadence=120).path)
    assert wrong.ok and wrong.channels["internet"]["period_hours"] == 48
    assert [f.what for f in wrong.findings if f.severity == "warning"] == [
        "values repeat after 48 hours, neither a day nor a week: is the cadence right?"
    ]
    from rich.console import Console

    with (console := Console(width=160)).capture() as shown:
        console.print(as_table(right))
    assert "24 h" in shown.get()
