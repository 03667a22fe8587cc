"""Rounding of the codec against Decimal arithmetic (docs/decisions.md: half to even, aliases, zero)."""

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stdist.numerals import Vocabulary

VOCABULARIES = {digits: Vocabulary(digits) for digits in (2, 3, 4)}
digits_of = st.sampled_from([2, 3, 4])
magnitudes = st.floats(0.0, 994_999.0) | st.floats(0.0, 2e-4) | st.floats(0.0, 20.0)
Reference = Callable[[float, int], str]
values_of = st.builds(math.copysign, magnitudes, st.sampled_from([1.0, -1.0]))


@pytest.mark.parametrize(
    ("value", "token"),
    [
        (1.14, "<|FP114/0|>"),
        (-82.1, "<|FP-821/1|>"),
        (114, "<|FP114/2|>"),
        (1, "<|FP10/0|>"),
        (100, "<|FP10/2|>"),
        (9.9996, "<|FP10/1|>"),
        (0.00099996, "<|FP10/-3|>"),
        (0.0, "<|FP0/0|>"),
        (-0.0, "<|FP0/0|>"),
        (5e-324, "<|FP0/0|>"),
        (math.nextafter(5e-5, 0), "<|FP0/0|>"),
        (5e-5, "<|FP10/-4|>"),
        (-5e-5, "<|FP-10/-4|>"),
        (math.nextafter(1e-4, 0), "<|FP10/-4|>"),
        (1.0055, "<|FP1006/0|>"),  # halves, to even; the binary float lies below
        (1.0045, "<|FP1004/0|>"),
        (12345, "<|FP1234/4|>"),
        (12355, "<|FP1236/4|>"),
        (-999_945, "<|FP-9999/5|>"),
        (99_995, "<|FP10/5|>"),
        (123.46, "<|FP1235/2|>"),
    ],
)
def test_encode_by_hand(value: float, token: str, reference: Reference) -> None:
    vocabulary = VOCABULARIES[4]
    assert vocabulary.token(int(vocabulary.encode(value))) == token
    assert reference(float(value), 4) == token


@given(values=st.lists(values_of, min_size=1, max_size=30), digits=digits_of)
@settings(max_examples=400, deadline=None)
def test_encode_equals_decimal_arithmetic(values: list[float], digits: int, reference: Reference) -> None:
    vocabulary = VOCABULARIES[digits]
    tokens = [vocabulary.token(index) for index in vocabulary.encode(values).tolist()]
    assert tokens == [reference(value, digits) for value in values]


@given(values=st.lists(st.floats(-994_999, 994_999, width=32), min_size=1, max_size=30), digits=digits_of)
@settings(max_examples=200, deadline=None)
def test_float32_is_widened_first(values: list[float], digits: int, reference: Reference) -> None:
    vocabulary = VOCABULARIES[digits]
    narrow = vocabulary.encode(np.array(values, np.float32))
    assert [vocabulary.token(i) for i in narrow.tolist()] == [reference(value, digits) for value in values]


@pytest.mark.parametrize("digits", [2, 3, 4])
def test_every_half_and_its_neighbours(digits: int) -> None:
    """Between any two numerals: the decimal half goes to even, the next floats to their own side."""
    vocabulary = VOCABULARIES[digits]
    lowest, top = 10 ** (digits - 1), 10**digits
    for exponent in range(-4, 6):
        mantissas = np.arange(lowest, top - 1 if exponent == 5 else top)
        halves = np.array([float(f"{m}5e{exponent - digits}") for m in mantissas.tolist()])
        below = np.array([float(f"{m}e{exponent - digits + 1}") for m in mantissas.tolist()])
        above = np.array([float(f"{m + 1}e{exponent - digits + 1}") for m in mantissas.tolist()])
        even = np.where(mantissas % 2 == 0, below, above)
        for sign in (1, -1):
            for given_values, expected in (
                (halves, even),
                (np.nextafter(halves, 0), below),
                (np.nextafter(halves, np.inf), above),
            ):
                decoded = vocabulary.decode(vocabulary.encode(sign * given_values))
                np.testing.assert_array_equal(decoded, sign * expected)


@given(values=st.lists(values_of, min_size=2, max_size=50), digits=digits_of)
@settings(max_examples=200, deadline=None)
def test_monotonic_odd_and_idempotent(values: list[float], digits: int) -> None:
    vocabulary = VOCABULARIES[digits]
    ordered = np.sort(values)
    decoded = vocabulary.decode(vocabulary.encode(ordered))
    assert (np.diff(decoded) >= 0).all()
    np.testing.assert_array_equal(vocabulary.decode(vocabulary.encode(-ordered)), -decoded)
    np.testing.assert_array_equal(vocabulary.decode(vocabulary.encode(decoded)), decoded)


def test_blocks_give_what_single_values_give(reference: Reference) -> None:
    """Longer than two blocks, not a multiple of one, with halves in every block."""
    vocabulary = VOCABULARIES[4]
    rng = np.random.default_rng(0)
    values = np.round(rng.choice([-1, 1], 40_001) * 10 ** rng.uniform(-4.5, 5.9, 40_001), 4)
    values[::7] = np.round(values[::7] / 5) * 5
    encoded = vocabulary.encode(values)
    places = np.concatenate([np.arange(0, 40_001, 37), [16_383, 16_384, 32_768, 40_000]])
    assert [vocabulary.token(i) for i in encoded[places].tolist()] == [
        reference(value, 4) for value in values[places].tolist()
    ]
