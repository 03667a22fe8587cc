"""Levels of quantiles: which are calibrated, which pairs of them are intervals, and the one that costs least."""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from stdist.errors import InputError

LEVELS = (0.025, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.975)
INTERVALS = {"80 %": (0.1, 0.9), "95 %": (0.025, 0.975)}
"""Central intervals by name: the levels of their ends."""
FOR_COST = "forecast_for_cost"


def cost_level(ratio: float, levels: Sequence[float]) -> float:
    """The level ratio / (ratio + 1), whose quantile costs least where too little costs ``ratio`` times as much as too
    much (the newsvendor's critical ratio). Raises InputError where no two of ``levels`` have it between them."""
    if not (math.isfinite(ratio) and ratio > 0):
        raise InputError(f"--cost-ratio is {ratio:g}; give a number above 0, as 3 where too little costs three times")
    if not levels:
        raise InputError("--cost-ratio needs quantiles, and these forecasts have none; `stdist calibrate` makes them")
    level = ratio / (ratio + 1)
    if not levels[0] <= level <= levels[-1]:
        low, high = (edge / (1 - edge) for edge in (levels[0], levels[-1]))
        raise InputError(
            f"--cost-ratio {ratio:g} asks for the quantile {level:.4g}, and those that are known lie between "
            f"{levels[0]:g} and {levels[-1]:g}; give a ratio from {math.ceil(low * 1e4) / 1e4:g} to "
            f"{math.floor(high * 1e4 + 1e-6) / 1e4:g}"
        )
    return level


def for_cost(
    quantiles: Float[np.ndarray, " levels *points"], levels: Sequence[float], ratio: float
) -> Float[np.ndarray, "*points"]:
    """The quantile of :func:`cost_level`, interpolated linearly between the nearest ``levels``."""
    level = cost_level(ratio, levels)
    upper = max(1, int(np.searchsorted(levels, level)))
    share = (level - levels[upper - 1]) / (levels[upper] - levels[upper - 1])
    return (quantiles[upper - 1] * (1 - share) + quantiles[upper] * share).astype(np.float32)
