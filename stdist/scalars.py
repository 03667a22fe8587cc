"""Figures that may not be defined: an error of no point, a ratio to a mean of zero. They are None, never NaN."""

import math
from collections.abc import Mapping


def defined(figures: Mapping[str, float]) -> dict[str, float | None]:
    """``figures`` with None in place of what is not finite."""
    return {name: value if math.isfinite(value) else None for name, value in figures.items()}


def figure(value: float | None) -> str:
    """A figure for people, with four decimals."""
    return "undefined" if value is None else f"{value:.4f}"
