"""MAE, RMSE, MAPE and NRMSE as sums and counts: any batch size, any number of ranks, one answer.

Vision-LLMs for Spatiotemporal Traffic Forecasting, Eq. 21-23. Papers report these either pooled over all
points or as the mean of the horizons' figures; the two differ, so both are always given. Only observed
points are scored (docs/decisions.md).

MAPE is the field's: a ratio (0.12 is 12 %), over the points whose truth is not zero. As BasicTS does, a truth within
``ZERO`` of zero, in the data's units, counts as zero: one value of 1e-9 would otherwise outweigh all others.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from stdist.errors import InputError
from stdist.scalars import defined

ZERO = 5e-5


@dataclass(frozen=True, eq=False)
class ErrorState:
    """Sums over observed points, one entry per horizon step (or per cell, of arrays reshaped to [points, cells]).

    States add with ``+``; the sum of the states of any partition of the windows is the state of all of
    them, up to float64 rounding. Sums are in the data's units (``sum_squared_error`` in units squared,
    ``sum_relative_error`` without any); ``nonzero_count`` of the ``count`` points have a truth that MAPE divides by.
    """

    count: Int[np.ndarray, " K"]
    nonzero_count: Int[np.ndarray, " K"]
    sum_absolute_error: Float[np.ndarray, " K"]
    sum_squared_error: Float[np.ndarray, " K"]
    sum_truth: Float[np.ndarray, " K"]
    sum_relative_error: Float[np.ndarray, " K"]

    @classmethod
    def empty(cls, size: int) -> ErrorState:
        """The state that has seen nothing, for ``size`` horizon steps."""
        return cls(np.zeros(size, np.int64), np.zeros(size, np.int64), *(np.zeros(size) for _ in range(4)))

    @classmethod
    def of(
        cls,
        forecast: Float[np.ndarray, "B K *cells"],
        truth: Float[np.ndarray, "B K *cells"],
        observed: Bool[np.ndarray, "B K *cells"],
    ) -> ErrorState:
        """Returns the state of one batch; ``observed`` is True where a point counts.

        Raises InputError where shapes differ, or a counted point has no finite forecast or truth: an error
        that hides a NaN would hide a diverged model.
        """
        if not forecast.shape == truth.shape == observed.shape:
            raise InputError(
                f"forecast {forecast.shape}, truth {truth.shape}, observed {observed.shape}: give one shape"
            )
        for name, array in (("forecast", forecast), ("truth", truth)):
            bad = observed & ~np.isfinite(array)
            if bad.any():
                first = ", ".join(str(i) for i in np.argwhere(bad)[0])
                raise InputError(
                    f"{name} is not finite at {int(bad.sum())} observed points, first at index ({first}) of "
                    "(window, step, row, col or node): make the forecast again, or mark the points as not observed"
                )
        truth64 = np.where(observed, truth, 0).astype(np.float64)
        error = np.where(observed, forecast, 0).astype(np.float64) - truth64
        nonzero = np.abs(truth64) > ZERO  # what is not observed is 0 here
        axes = (0, *range(2, truth.ndim))
        return cls(
            observed.sum(axes, dtype=np.int64),
            nonzero.sum(axes, dtype=np.int64),
            np.abs(error).sum(axes),
            np.square(error).sum(axes),
            truth64.sum(axes),
            np.abs(np.divide(error, truth64, out=np.zeros_like(error), where=nonzero)).sum(axes),
        )

    def __add__(self, other: ErrorState) -> ErrorState:
        if self.count.shape != other.count.shape:
            raise InputError(f"cannot add states of {self.count.size} and {other.count.size} horizons")
        return ErrorState(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def add_at(self, cells: Int[np.ndarray, " n"], other: ErrorState) -> None:
        """Adds the state of n cells to the entries ``cells``, in place."""
        for f in fields(self):
            getattr(self, f.name)[cells] += getattr(other, f.name)

    def errors(self) -> dict[str, Float[np.ndarray, " K"]]:
        """Returns ``mae``, ``rmse``, ``mape``, ``nrmse`` of each entry (Eq. 21-23); NaN where nothing was observed.

        MAPE is NaN too where no truth differs from zero.
        """
        with np.errstate(invalid="ignore", divide="ignore"):
            mae = self.sum_absolute_error / self.count
            rmse = np.sqrt(self.sum_squared_error / self.count)
            mape = self.sum_relative_error / self.nonzero_count
            mean_truth = self.sum_truth / self.count
            nrmse = np.where(mean_truth > 0, rmse / mean_truth, np.nan)
        return {"mae": mae, "rmse": rmse, "mape": mape, "nrmse": nrmse}

    def pooled(self) -> dict[str, float]:
        """``mae``, ``rmse``, ``mape``, ``nrmse`` over all points of all horizons at once, and ``points``."""
        total = ErrorState(*(getattr(self, f.name).sum(keepdims=True) for f in fields(self)))
        return {**{name: float(v[0]) for name, v in total.errors().items()}, "points": int(self.count.sum())}

    def mean_of_horizons(self) -> dict[str, float]:
        """Mean over the horizons of each horizon's figure; horizons with no point that counts are left out."""
        counts = {"mape": self.nonzero_count}
        scored = {n: v[counts.get(n, self.count) > 0] for n, v in self.errors().items()}
        means = {n: float(v.mean()) if v.size else math.nan for n, v in scored.items()}
        return {**means, "points": int(self.count.sum())}

    def summary(self) -> dict[str, Any]:
        """``pooled``, ``mean_of_horizons`` and ``per_horizon`` (``step`` from 1), as in metrics.json: None for what is
        not defined."""
        errors = self.errors()
        per_horizon = [
            {"step": k + 1, **defined({n: float(v[k]) for n, v in errors.items()}), "points": int(self.count[k])}
            for k in range(self.count.size)
        ]
        pooled, mean = defined(self.pooled()), defined(self.mean_of_horizons())
        return {"pooled": pooled, "mean_of_horizons": mean, "per_horizon": per_horizon}
