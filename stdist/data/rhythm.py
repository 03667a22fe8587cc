"""The rhythm of a channel: the period after which it looks most like itself, and the hours of its peak and its trough.

A cadence, an offset or a phase that is wrong moves them: at twice the true cadence a day lasts 48 hours.
"""

from dataclasses import dataclass

import numpy as np

SHORTEST, LONGEST = 3 * 60, (60 * 60, 8 * 1440)
"""Periods that are looked for, minutes: of days, said to be up to 60 hours long; only then of weeks."""
LIKE = 0.9
"""A shorter period is taken where it explains this share of what the best one does: a day, not two."""
CLEAR, SIGMAS = 0.2, 4
"""Autocorrelation from which on there is a period at all, and how many times that of noise it must be."""
DAY, WEEK = 1440, 7 * 1440


@dataclass(frozen=True)
class Rhythm:
    """period: minutes, None where none is clear. peak, trough: minutes since local midnight of the slots with the
    largest and the smallest mean."""

    period: int | None
    peak: int
    trough: int

    @property
    def is_of_days(self) -> bool:
        """False where a period is clear that is neither a day nor a week."""
        return self.period in (None, DAY, WEEK)

    def as_dict(self) -> dict[str, float | str | None]:
        hours = None if self.period is None else self.period / 60
        return {"period_hours": hours, "peak": _clock(self.peak), "trough": _clock(self.trough)}


def rhythm_of(means: np.ndarray, slots_per_day: int, slots: np.ndarray | None = None) -> Rhythm | None:
    """The rhythm of means over all cells, one a time step, float64 [T], whole days of them, NaN where nothing is
    observed. slots: local slot of each step, counted from any midnight; from the first step on by default. None where
    fewer than three days hold something, or all is one value."""
    cadence = DAY // slots_per_day
    seen = ~np.isnan(means)
    days = means.reshape(-1, slots_per_day)
    if (~np.isnan(days)).any(axis=1).sum() < 3 or np.nanmax(means) == np.nanmin(means):
        return None
    of_day = (np.arange(len(means)) if slots is None else slots)[seen] % slots_per_day
    sums, counts = (np.bincount(of_day, weights, slots_per_day) for weights in (means[seen], None))
    profile = np.divide(sums, counts, out=np.full(slots_per_day, np.nan), where=counts > 0)
    peak, trough = int(np.nanargmax(profile)), int(np.nanargmin(profile))
    return Rhythm(_period(means, seen, cadence), peak * cadence, trough * cadence)


def _period(means: np.ndarray, seen: np.ndarray, cadence: int) -> int | None:
    """Minutes of the lag of the largest autocorrelation, over the pairs of steps that are both observed."""
    deviation = np.where(seen, means - np.nanmean(means), 0)
    size = 1 << int(np.ceil(np.log2(2 * len(means))))
    spectra = (np.abs(np.fft.rfft(series, size)) ** 2 for series in (deviation, seen.astype(float)))
    products, pairs = (np.fft.irfft(spectrum, size)[: len(means)] for spectrum in spectra)
    last = min(LONGEST[-1] // cadence, len(means) // 2)
    lags = np.arange(last + 2)
    variance = (deviation**2).sum() / seen.sum()
    with np.errstate(invalid="ignore", divide="ignore"):
        alike = np.where(pairs[lags] > 0.5, products[lags] / pairs[lags] / variance, -np.inf)
    tops = [
        lag for lag in range(max(2, SHORTEST // cadence), last + 1) if alike[lag - 1] < alike[lag] >= alike[lag + 1]
    ]
    for longest in LONGEST:
        near = [lag for lag in tops if lag * cadence <= longest]
        if near and (best := max(alike[lag] for lag in near)) >= max(CLEAR, SIGMAS / np.sqrt(seen.sum())):
            return int(next(lag for lag in near if alike[lag] >= LIKE * best)) * cadence
    return None


def _clock(minutes: int) -> str:
    return f"{minutes // 60:02}:{minutes % 60:02}"
