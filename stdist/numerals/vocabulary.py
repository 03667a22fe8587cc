"""The floating-point vocabulary V_FP: every numeral a policy can read or write, by arithmetic.

Vision-LLMs for Spatiotemporal Traffic Forecasting, Section IV.B.1: ``<|FPm/b|>`` stands for
Norm(m) · 10^b (Eq. 6) with Norm(m) = m / 10^floor(log10 |m|) (Eq. 7), m in ±[10, 9999], b in -4…5. The paper
has no zero; ``<|FP0/0|>`` is added, which makes 199,801 numerals. Rounding, aliases, zero: docs/decisions.md.

Index layout, with M = 10^digits - 10 mantissas::

    0                                            zero
    1 + (10·[m < 0] + b + 4) · M + |m| - 10      m/b

so indices sort by sign, then exponent, then mantissa. Indices are 0-based; where the numerals stand in a
tokenizer is for the tokenizer's owner to add.
"""

import numpy as np
import numpy.typing as npt

from stdist.errors import InputError
from stdist.numerals.codec import EXPONENTS, MAX_EXPONENT, MIN_EXPONENT, MIN_MANTISSA, Encoder

Indices = npt.NDArray[np.int64]


class Vocabulary:
    """All numerals of up to ``mantissa_digits`` digits (4 is the paper: 199,801; 3: 19,801; 2: 1,801).

    ``values``: float64 [len], the value of each index, correctly rounded from the decimal.
    ``encode`` writes 180,001 of them for 4 digits; the others are aliases such as ``1140/0`` of ``114/0``.
    ``limit``: magnitudes at or above it have no numeral (9.9995e5 for 4 digits).
    """

    values: npt.NDArray[np.float64]

    def __init__(self, mantissa_digits: int = 4) -> None:
        if mantissa_digits not in (2, 3, 4):
            raise InputError(f"mantissa_digits is {mantissa_digits!r}; use 4 (the paper), 3 or 2")
        self.mantissa_digits = mantissa_digits
        self._encoder = Encoder(mantissa_digits)
        self._mantissas = self._encoder.mantissas
        self._length = 1 + 2 * EXPONENTS * self._mantissas
        self.limit = self._encoder.limit

        mantissa, exponent = self.mantissa_exponent(np.arange(self._length))
        coefficient, power = decimal_parts(mantissa, exponent)
        self.values = decimal_value(coefficient, power)
        self.values.flags.writeable = False

    def __len__(self) -> int:
        return self._length

    def __repr__(self) -> str:
        return f"Vocabulary(mantissa_digits={self.mantissa_digits})"

    def __reduce__(self) -> tuple[type["Vocabulary"], tuple[int]]:
        return Vocabulary, (self.mantissa_digits,)  # two megabytes of tables are quicker made than sent

    def encode(self, values: npt.ArrayLike) -> Indices:
        """Index of the nearest numeral of each value, any shape, float32 or float64 (integers are widened).

        Writes the shortest mantissa of at least two digits, halves to even on the shortest decimal of the
        float64 (see ``codec``), |v| < 5e-5 as zero, 5e-5 <= |v| < 1e-4 as ±1.0e-4.
        Raises InputError naming the first position and value that is NaN, infinite or at or above ``limit``.
        """
        array = _real_array(values)
        flat = array.reshape(-1)
        indices = self._encoder.encode(flat)
        if indices is None:
            position = self._encoder.first_unwritable(flat)
            assert position is not None
            raise InputError(
                f"value {flat[position]}{_place(position, array.shape)} has no numeral: "
                f"need finite values below {self.limit:.10g} in magnitude; clamp, rescale or impute first"
            )
        return indices.reshape(array.shape)

    def clamp(self, values: npt.ArrayLike) -> tuple[npt.NDArray[np.floating], int]:
        """Values with every magnitude at or above ``limit`` set to the largest numeral's, and how many were.

        Raises InputError at a NaN, which has no nearest numeral.
        """
        array = _real_array(values)
        missing = np.isnan(array)
        if missing.any():
            place = _place(int(np.argmax(missing.reshape(-1))), array.shape)
            raise InputError(f"value nan{place} cannot be clamped; impute it first")
        outside = np.abs(array) >= self.limit
        largest = float(self.values.max())
        return np.where(outside, np.copysign(largest, array), array).astype(array.dtype), int(outside.sum())

    def decode(self, indices: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """Value of each index, float64, same shape. Raises InputError at an index outside 0…len-1."""
        return self.values.take(self._checked(indices), mode="clip")

    def mantissa_exponent(self, indices: npt.ArrayLike) -> tuple[Indices, Indices]:
        """(m, b) of each index, both int64 of the same shape; zero is (0, 0)."""
        indices = self._checked(indices)
        group, offset = np.divmod(indices - 1, self._mantissas)
        negative, exponent = np.divmod(group, EXPONENTS)
        mantissa = np.where(negative == 1, -1, 1) * (offset + MIN_MANTISSA)
        return np.where(indices == 0, 0, mantissa), np.where(indices == 0, 0, exponent + MIN_EXPONENT)

    def indices(self, mantissa: npt.ArrayLike, exponent: npt.ArrayLike) -> Indices:
        """Index of each numeral m/b, broadcast together; inverse of ``mantissa_exponent``, aliases stay.

        Raises InputError where V_FP has no such numeral.
        """
        m, b = np.broadcast_arrays(np.asarray(mantissa, np.int64), np.asarray(exponent, np.int64))
        magnitude = np.abs(m)
        inside = (magnitude >= MIN_MANTISSA) & (magnitude < 10**self.mantissa_digits)
        inside &= (b >= MIN_EXPONENT) & (b <= MAX_EXPONENT)
        zero = (m == 0) & (b == 0)
        if not (inside | zero).all():
            position = int(np.argmin((inside | zero).reshape(-1)))
            raise InputError(
                f"no numeral {m.reshape(-1)[position]}/{b.reshape(-1)[position]}{_place(position, m.shape)}: "
                f"mantissas are 0 or ±[10, {10**self.mantissa_digits - 1}], exponents -4…5"
            )
        group = EXPONENTS * (m < 0) + b - MIN_EXPONENT
        return np.where(zero, 0, 1 + group * self._mantissas + magnitude - MIN_MANTISSA)

    def token(self, index: int) -> str:
        """Token string of one index, as ``<|FP114/0|>``."""
        mantissa, exponent = self.mantissa_exponent(index)
        return f"<|FP{mantissa}/{exponent}|>"

    def tokens(self) -> list[str]:
        """All token strings in index order."""
        mantissa, exponent = self.mantissa_exponent(np.arange(self._length))
        return [f"<|FP{m}/{b}|>" for m, b in zip(mantissa.tolist(), exponent.tolist(), strict=True)]

    def texts(self, indices: npt.ArrayLike) -> list[str]:
        """Decimal strings of an array of indices, in C order, as the paper writes them: ``114.000000``."""
        return [decimal_text(value) for value in self.decode(indices).reshape(-1).tolist()]

    def _checked(self, indices: npt.ArrayLike) -> Indices:
        array = np.asarray(indices)
        if array.dtype.kind not in "iu" and array.size:
            raise InputError(f"numeral indices must be integers, not {array.dtype}")
        array = array.astype(np.int64, copy=False)
        if array.size and (array.min() < 0 or array.max() >= self._length):
            position = int(np.argmax(((array < 0) | (array >= self._length)).reshape(-1)))
            raise InputError(
                f"index {array.reshape(-1)[position]}{_place(position, array.shape)} is no numeral: "
                f"indices are 0…{self._length - 1}"
            )
        return array


def decimal_parts(mantissa: Indices, exponent: Indices) -> tuple[Indices, Indices]:
    """Numeral m/b as coefficient · 10^power, both integers (Eq. 6 and 7): 114/0 is 114 · 10^-2."""
    digits = 1 + sum(np.abs(mantissa) >= 10**n for n in (1, 2, 3))
    return mantissa, exponent - (digits - 1)


def decimal_value(coefficient: Indices, power: Indices) -> npt.NDArray[np.float64]:
    """The float64 nearest to coefficient · 10^power; exact operands (|coefficient| < 2^53, |power| <= 22)."""
    scale = np.array([float(f"1e{n}") for n in range(23)])
    return np.where(power < 0, coefficient / scale[np.maximum(-power, 0)], coefficient * scale[np.maximum(power, 0)])


def decimal_text(value: float) -> str:
    """Decimal string of a numeral's value: six decimals, seven where six would cut a digit (0.0001234)."""
    text = f"{value:.6f}"
    if -1e-3 < value < 1e-3 and float(text) != value:
        return f"{value:.7f}"
    return text


def _real_array(values: npt.ArrayLike) -> npt.NDArray[np.floating]:
    array = np.asarray(values)
    if array.dtype.kind not in "iuf":
        raise InputError(f"values to encode must be real numbers, not {array.dtype}")
    return array if array.dtype in (np.float32, np.float64) else array.astype(np.float64)


def _place(position: int, shape: tuple[int, ...]) -> str:
    if not shape:
        return ""
    return f" at position [{', '.join(str(int(i)) for i in np.unravel_index(position, shape))}]"
