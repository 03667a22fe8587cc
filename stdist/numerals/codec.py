"""Float array -> numeral index by table look-ups on the bits of the float: no logarithm, no division.

Vision-LLMs for Spatiotemporal Traffic Forecasting, Section IV.B.1 (Eq. 6 and 7), with the rounding of
docs/decisions.md. The binary exponent of a float64 leaves at most two decimal exponents open, and one
comparison settles which; a second table turns the rounded mantissa into its shortest form.

A "half": a float64 stands for its shortest decimal, the one ``repr`` prints. 1.0055, which no binary
float holds exactly, is therefore half-way between 1.005 and 1.006 and goes to the even 1.006. float32 is
widened to float64 first, exactly.
"""

import numpy as np
import numpy.typing as npt

MIN_EXPONENT, MAX_EXPONENT = -4, 5
EXPONENTS = MAX_EXPONENT - MIN_EXPONENT + 1
MIN_MANTISSA = 10
ZERO_BELOW = 5e-5  # half of the smallest magnitude, 1.0e-4

# 16,384 values: the working buffers of one block (about 1 MB with tables) stay in the second-level cache.
_BLOCK = 1 << 14
_MAGNITUDE_BITS = np.int64((1 << 63) - 1)
_MANTISSA_WIDTH = np.uint64(52)
_BINADES = 2048
# The scaled value is below 10^4, so two roundings put it less than 4e-12 away from the exact product.
_NEARLY_HALF = 0.5 - 1e-11


class Encoder:
    """Index of the numeral nearest to each value; see ``Vocabulary`` for the index layout.

    ``limit``: magnitudes at or above it would need exponent 6 after rounding, and have no numeral.
    """

    def __init__(self, mantissa_digits: int) -> None:
        self.digits = mantissa_digits
        self.mantissas = 10**mantissa_digits - MIN_MANTISSA
        self.limit = 10.0 ** (MAX_EXPONENT + 1) - 0.5 * 10.0 ** (MAX_EXPONENT + 1 - mantissa_digits)
        self._limit_bits = np.float64(self.limit).view(np.int64)
        self._offset = self._mantissa_offsets()
        self._threshold, self._scale, self._base = self._binade_tables()

    def _mantissa_offsets(self) -> npt.NDArray[np.int64]:
        """Rounded mantissa of ``digits`` digits -> position among the numerals of its sign and exponent."""
        shortest = np.arange(10**self.digits + 1)
        for _ in range(self.digits - 2):
            shortest = np.where((shortest >= 100) & (shortest % 10 == 0), shortest // 10, shortest)
        offset = shortest - MIN_MANTISSA
        offset[-1] = self.mantissas  # the carry: mantissa 10 of the next exponent
        offset[0] = 0  # zero and ±1.0e-4 come with scale 0 and carry their index in the base
        return offset

    def _binade_tables(
        self,
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64], npt.NDArray[np.int64]]:
        """For every (sign, binary exponent): bits where the decade changes; scale and base on either side."""
        # rank 0: zero; rank 1: rounded up to ±1.0e-4; rank r >= 2: decimal exponent r - 2 + MIN_EXPONENT
        exponents = range(MIN_EXPONENT, MAX_EXPONENT + 1)
        edges = np.array([0.0, ZERO_BELOW] + [float(f"1e{b}") for b in exponents])
        rank_scale = np.array([0.0, 0.0] + [float(f"1e{self.digits - 1 - b}") for b in exponents])
        rank_base = np.concatenate([[0, 1], 1 + self.mantissas * np.arange(EXPONENTS)]).astype(np.int64)

        lowest = (np.arange(_BINADES, dtype=np.uint64) << _MANTISSA_WIDTH).view(np.float64)
        rank = np.searchsorted(edges, lowest, side="right") - 1
        rank[-1] = len(edges) - 1  # infinity and NaN never get here: the limit is checked before
        next_rank = np.minimum(rank + 1, len(edges) - 1)
        threshold = np.where(next_rank > rank, edges[next_rank], np.inf)
        scale = np.stack([rank_scale[rank], rank_scale[next_rank]], axis=1).ravel()
        base = np.stack([rank_base[rank], rank_base[next_rank]], axis=1).ravel()
        negative = np.where(base > 0, base + EXPONENTS * self.mantissas, 0)
        return (
            np.tile(threshold.view(np.int64), 2),
            np.concatenate([scale, -scale]),
            np.concatenate([base, negative]),
        )

    def first_unwritable(self, flat: npt.NDArray[np.floating]) -> int | None:
        """Position of the first NaN or magnitude at or above the limit, or None."""
        bad = ~(np.abs(flat) < self.limit)
        return int(np.argmax(bad)) if bad.any() else None

    def encode(self, flat: npt.NDArray[np.floating]) -> npt.NDArray[np.int64] | None:
        """Indices of a one-dimensional float32 or float64 array; None where a value has no numeral."""
        indices = np.empty(flat.size, np.int64)
        size = min(_BLOCK, flat.size)
        reals, words, above = np.empty((4, size)), np.empty((3, size), np.int64), np.empty(size, bool)
        for start in range(0, flat.size, _BLOCK):
            out = indices[start : start + _BLOCK]
            value, scaled, mantissa, distance = reals[:, : out.size]
            magnitude, slot, integers = words[:, : out.size]
            carried = above[: out.size]

            np.copyto(value, flat[start : start + _BLOCK])
            bits = value.view(np.int64)
            np.bitwise_and(bits, _MAGNITUDE_BITS, out=magnitude)
            if magnitude.max() >= self._limit_bits:
                return None
            np.right_shift(bits.view(np.uint64), _MANTISSA_WIDTH, out=slot.view(np.uint64))
            # mode="clip" writes straight into `out`; every look-up is inside its table anyway.
            np.take(self._threshold, slot, out=integers, mode="clip")
            np.greater_equal(magnitude, integers, out=carried)
            np.add(slot, slot, out=slot)
            np.add(slot, carried, out=slot)
            np.take(self._scale, slot, out=scaled, mode="clip")
            np.multiply(scaled, value, out=scaled)
            np.rint(scaled, out=mantissa)
            np.subtract(scaled, mantissa, out=distance)
            np.abs(distance, out=distance)
            if distance.max() > _NEARLY_HALF:
                where = np.flatnonzero(distance > _NEARLY_HALF)
                mantissa[where] = _settle_halves(value[where], self._scale[slot[where]], scaled[where])
            np.copyto(integers, mantissa, casting="unsafe")
            np.take(self._offset, integers, out=out, mode="clip")
            np.take(self._base, slot, out=integers, mode="clip")
            np.add(out, integers, out=out)
        return indices


def _settle_halves(
    value: npt.NDArray[np.float64], scale: npt.NDArray[np.float64], scaled: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """Mantissas of the values whose product with their signed scale 10^k cannot be told from a half."""
    magnitude, scale = np.abs(value), np.abs(scale)
    half = np.rint(scaled - 0.5) + 0.5
    # One correctly rounded operation on exact operands: the float64 nearest to the decimal half.
    tie = np.where(scale < 1.0, half * np.rint(1.0 / scale), half / scale)
    side = np.where(magnitude > tie, half + 0.5, half - 0.5)
    return np.where(magnitude == tie, np.rint(half), side)
