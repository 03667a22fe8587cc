"""The naive codec the fast one is compared with."""

from collections.abc import Callable
from decimal import ROUND_HALF_EVEN, Decimal

import pytest


@pytest.fixture(scope="session")
def reference() -> Callable[[float, int], str]:
    """(value, mantissa digits) -> token, by decimal arithmetic."""
    return decimal_token


def decimal_token(value: float, digits: int) -> str:
    """Token of a float, by decimal arithmetic on its shortest decimal."""
    exact = Decimal(repr(value))
    if abs(exact) < Decimal("5e-5"):
        return "<|FP0/0|>"
    if abs(exact) < Decimal("1e-4"):
        return f"<|FP{'-' if exact < 0 else ''}10/-4|>"
    rounded = exact.quantize(Decimal(1).scaleb(exact.adjusted() - digits + 1), ROUND_HALF_EVEN)
    sign, figures, _ = rounded.as_tuple()
    mantissa = "".join(map(str, figures)).rstrip("0").ljust(2, "0")
    return f"<|FP{'-' if sign else ''}{mantissa}/{rounded.adjusted()}|>"
