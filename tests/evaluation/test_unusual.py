"""What is unusual: rules against numbers counted by hand, and alarms on days with and without a planted cause."""

from collections.abc import Callable
from math import comb

import numpy as np
import pytest

from stdist.evaluation.conformal import ConformalQuantiles
from stdist.evaluation.day_tally import DayTally, each_once, windows_of_days
from stdist.evaluation.levels import LEVELS
from stdist.evaluation.unusual import (
    DayScores,
    Reference,
    day_scores,
    fit_reference,
    intra_day_correlation,
    outside_tail,
    unusual,
)

SLOTS, K, CALIBRATED, PLACES = 24, 4, 7, 100
FIRST = np.datetime64("2024-03-01T00:00", "m")
REMEMBERED = 0.8


def test_a_window_counts_to_the_day_that_all_its_targets_lie_in():
    targets = FIRST + 60 * (np.arange(20, 30)[:, None] + np.arange(1, 4))
    numbers, days = windows_of_days(targets)
    assert numbers.tolist() == [0, 3, 4, 5, 6, 7, 8, 9]
    assert days.astype(str).tolist() == ["2024-03-01"] + ["2024-03-02"] * 7


def test_each_value_once_in_windows_that_do_not_overlap():
    """Day 1: targets 10 to 16 and, behind a gap, 20 to 22; day 2: 30 to 32."""
    origins = np.array([9, 10, 11, 12, 13, 19, 29])
    days = np.array(["2024-03-01"] * 6 + ["2024-03-02"], "datetime64[D]")
    once = each_once(origins, days, 3)
    targets = (origins[:, None] + np.arange(1, 4))[once]
    assert targets.tolist() == [10, 11, 12, 13, 14, 15, 16, 20, 21, 22, 30, 31, 32]
    assert once.sum(1).tolist() == [1, 3, 0, 0, 3, 3, 3]


def test_the_tail_is_the_binomials_and_the_beta_binomials():
    """4 or more of 10 at 5 %, summed by hand; 2 of 2 with correlation r: p (p + r (1 - p))."""
    by_hand = sum(comb(10, i) * 0.05**i * 0.95 ** (10 - i) for i in range(4, 11))
    assert by_hand == pytest.approx(0.0010285, rel=1e-4)
    four, ten, two = np.array([4]), np.array([10]), np.array([2])
    assert outside_tail(four, ten, np.array([0.05]), 0.0)[0] == pytest.approx(by_hand)
    assert outside_tail(two, two, np.array([0.05]), 0.2)[0] == pytest.approx(0.05 * (0.05 + 0.2 * 0.95))
    assert outside_tail(np.array([0]), ten, np.array([0.05]), 0.2)[0] == 1


def test_the_correlation_of_values_that_are_outside_together_is_one_and_of_others_none():
    assert intra_day_correlation(np.array([[4, 0, 0, 0]]), np.full((1, 4), 4)) == pytest.approx(0.99)
    rng = np.random.default_rng(0)
    points = np.full((30, 400), 24)
    assert intra_day_correlation(rng.binomial(points, 0.05), points) == pytest.approx(0, abs=0.002)
    shares = rng.beta(0.05 * 9, 0.95 * 9, points.shape)  # correlation 1 / (1 + 9)
    assert intra_day_correlation(rng.binomial(points, shares), points) == pytest.approx(0.1, abs=0.01)


def test_a_days_sums_by_hand():
    """Two windows of two steps at three places, in one day; the 95 % interval is 0 to 10, the forecast 5."""
    truth = np.array([[[1, 11, -1], [2, 12, 5]], [[3, 13, -2], [4, 6, -3]]], float)
    observed = np.ones(truth.shape, bool)
    observed[0, 0, 0] = False
    quantiles = np.broadcast_to(np.linspace(0, 10, len(LEVELS))[:, None, None, None], (len(LEVELS), *truth.shape))
    once = np.array([[True, False], [True, True]])
    day = np.array(["2024-03-01"], "datetime64[D]")
    tally = DayTally.empty(day, 3)
    tally.add(np.full(truth.shape, 5.0), quantiles, truth, observed, day.repeat(2), once)
    assert tally.points.tolist() == [[2, 3, 3]]
    assert tally.above.tolist() == [[0, 2, 0]] and tally.below.tolist() == [[0, 0, 3]]
    assert tally.errors.tolist() == [3 + 2 + 1, 6 + 7 + 8 + 1, 6 + 0 + 7 + 8] and tally.counted.tolist() == [3, 4, 4]
    assert tally.absolute.tolist() == [49] and tally.squared.tolist() == [9 + 4 + 1 + 36 + 49 + 64 + 1 + 36 + 49 + 64]
    assert (tally.stretches, tally.one_sided) == (5, 2), "the second place's first window, the third's second"


def test_a_place_is_named_for_its_last_values_all_beyond_one_end():
    """Four of 24 values outside are not rare enough alone; all of the last four, once in 25,001, are."""
    day = np.array(["2024-03-01"], "datetime64[D]")
    tally = DayTally.empty(day, 1)
    tally.points[:], tally.above[:] = 24, 4
    usual = reference([], one_sided=0, stretches=100_000)
    named, chances = unusual(usual, tally, np.array([True]), 4)
    assert named.tolist() == [True] and chances[0] == pytest.approx(2 / 25_001)
    assert unusual(usual, tally, np.array([False]), 4)[0].tolist() == [False]


def scores(coverage: float, day: int = 1) -> DayScores:
    shares = {"80 %": 0.8, "95 %": coverage}
    return DayScores(day=f"2024-03-{day:02}", points=100, mae=1, rmse=1, crps=1, coverage=shares)


def reference(days: list[DayScores], **changes) -> Reference:
    content = {"points": [24], "outside": [1], "mae": [1.0], "correlation": 0.0, "one_sided": 0, "stretches": 100}
    return Reference(days=days, **(content | changes))


def test_a_days_coverage_is_held_against_students_interval_of_the_days_before():
    """Four days of mean 0.95 and deviation 0.02; t of 3 degrees at 0.9975 is 7.4533."""
    days = [scores(c, i + 1) for i, c in enumerate((0.93, 0.97, 0.93, 0.97))]
    low, high = reference(days).ranges()["95 %"]
    half = 7.4533 * np.std([0.93, 0.97, 0.93, 0.97], ddof=1) * np.sqrt(1 + 1 / 4)
    assert (low, high) == pytest.approx((0.95 - half, 0.95 + half), rel=1e-4)
    assert reference(days).ranges()["80 %"] == pytest.approx((0.78, 0.82)), "two points at least"
    assert reference(days[:2]).ranges() == {}


def test_a_place_is_expected_to_have_its_own_share_outside_but_no_less_than_five_in_a_hundred():
    of_places = reference([scores(0.95)], points=[180, 180, 0], outside=[39, 0, 0], mae=[1.0, 1.0, None])
    assert of_places.shares == pytest.approx([40 / 200, 0.05, 0.05])
    assert reference([], one_sided=3, stretches=396).chance_of_run(4) == pytest.approx(4 / 100)


# --- a city whose forecaster knows how it was made ----------------------------------------------------------------


class City:
    """Places with a daily curve times noise that remembers; forecasts are the noise's conditional means. ``change``
    takes the values [T, P] and the first frame that is watched, and changes them there."""

    def __init__(self, seed: int, days: int, change: Callable[[np.ndarray, int], None] = lambda values, first: None):
        rng, frames = np.random.default_rng(seed), (1 + CALIBRATED + days) * SLOTS
        noise = np.zeros((frames, PLACES))
        for frame in range(1, frames):
            shocks = rng.normal(0, 0.1, PLACES) + rng.normal(0, 0.03)
            noise[frame] = REMEMBERED * noise[frame - 1] + shocks
        curve = 60 + 40 * np.sin(2 * np.pi * np.arange(frames) / SLOTS)
        self.usual = curve[:, None] * rng.uniform(0.2, 5, PLACES)
        self.values = self.usual * np.maximum(0.02, 1 + noise)
        self.seen = rng.random(self.values.shape) > 0.02
        self.first = (1 + CALIBRATED) * SLOTS
        change(self.values, self.first)
        calibrated = self._windows(1, CALIBRATED)
        self.conformal = ConformalQuantiles.fit(*calibrated[2:])
        found = fit_reference(self.conformal, *calibrated)
        assert found is not None
        self.reference = found

    def _windows(self, day: int, days: int) -> tuple[np.ndarray, ...]:
        origins = np.arange(day * SLOTS - 1, (day + days) * SLOTS - K)
        frames = origins[:, None] + np.arange(1, K + 1)
        decay = REMEMBERED ** np.arange(1, K + 1)[None, :, None]
        forecast = self.usual[frames] * (1 + decay * (self.values[origins] / self.usual[origins] - 1)[:, None])
        return FIRST + 60 * frames, origins, forecast, self.values[frames], self.seen[frames]

    def watch(self, day: int) -> tuple[list[int], bool]:
        """Places that are named on a day behind those calibrated on, and whether it drifts."""
        targets, origins, forecast, truth, seen = self._windows(1 + CALIBRATED + day, 1)
        _, days = windows_of_days(targets)
        quantiles = self.conformal.quantiles(forecast, np.arange(PLACES))
        tally = DayTally.empty(np.unique(days), PLACES)
        tally.add(forecast, quantiles, truth, seen, days, each_once(origins, days, K))
        named, _ = unusual(self.reference, tally, np.zeros(PLACES, bool), K)
        (row,) = day_scores(tally)
        ranges = self.reference.ranges()
        return np.flatnonzero(named).tolist(), any(not a <= row.coverage[n] <= b for n, (a, b) in ranges.items())


def test_clean_days_of_twenty_cities_name_no_place_and_hardly_ever_a_drift():
    """1 % is allowed of either: of 60 days none or one is likely, three are not (2 %)."""
    found = [city.watch(day) for city in (City(seed, 3) for seed in range(20)) for day in range(3)]
    assert sum(bool(places) for places, _ in found) <= 1
    assert sum(drift for _, drift in found) <= 2


def test_planted_places_are_named_and_no_others():
    def change(values: np.ndarray, first: int) -> None:
        values[first:, [3, 50]] = 0
        values[first:, 70] *= 3

    assert [City(seed, 1, change).watch(0)[0] for seed in range(5)] == [[3, 50, 70]] * 5


def test_all_values_half_as_high_again_are_a_drift():
    def change(values: np.ndarray, first: int) -> None:
        values[first:] *= 1.5

    assert all(City(seed, 1, change).watch(0)[1] for seed in range(5))
