"""Plain decimal numbers in text, many at once: eight digits are one 64-bit word.

The arithmetic is that of D. Lemire, "Quickly parsing eight digits" (2018): pairs of digits, then pairs of pairs,
in three multiplications. A compiled parser goes field by field; here every step is one pass of numpy over all
fields of a block that fits the cache, which is faster still where most of the text is long fractions.
"""

import numpy as np

PAD = 24
"""Bytes that a text needs before its first number and after its last one, of any content."""

_ZEROS = np.uint64(0x3030303030303030)
_ONE, _TEN, _EIGHT, _WORD = np.uint64(1), np.uint64(10), np.uint64(8), np.uint64(64)
_SIXTEEN, _HALF = np.uint64(16), np.uint64(32)
_PAIRS = np.uint64(0x000000FF000000FF)
_HIGH, _LOW = np.uint64(100 + (1_000_000 << 32)), np.uint64(1 + (10_000 << 32))
_EIGHT_DIGITS = np.uint64(10**8)


def words_from(text: np.ndarray, at: np.ndarray, count: int) -> list[np.ndarray]:
    """The ``count`` words of 8 bytes from byte ``at[i]`` on, uint64 [n] each, first byte lowest.

    text: uint8, aligned and of a length that 8 divides; at: int64 [n]. Aligned words are read and shifted into
    place: numpy takes them five times faster than unaligned ones.
    """
    aligned, first = text.view("<u8"), at >> 3
    down = ((at & 7) << 3).view(np.uint64)
    # A shift by 64 gives 0 in numpy, which is what an aligned word needs of its neighbour.
    up = _WORD - down
    words, low = [], aligned.take(first)
    for _ in range(count):
        first += 1
        high = aligned.take(first)
        word = low >> down
        word |= high << up
        words.append(word)
        low = high
    return words


def eight_digits(words: np.ndarray) -> np.ndarray:
    """int64 [n] of eight ASCII digits a word, uint64 [n], which is overwritten; bytes 0 count as digits 0."""
    digits = words
    shifted = digits >> _EIGHT
    digits *= _TEN
    digits += shifted
    np.right_shift(digits, _SIXTEEN, out=shifted)
    digits &= _PAIRS
    digits *= _HIGH
    shifted &= _PAIRS
    shifted *= _LOW
    digits += shifted
    digits >>= _HALF
    return digits.view(np.int64)


def last_digits(words: np.ndarray, length: np.ndarray) -> np.ndarray:
    """int64 [n] of the last ``length`` (int64 [n], 1 … 8) characters of each word, which are digits."""
    drop = ((8 - length) << 3).view(np.uint64)
    words ^= _ZEROS
    words >>= drop
    words <<= drop
    return eight_digits(words)


def first_digits(words: np.ndarray, length: np.ndarray) -> np.ndarray:
    """int64 [n] of the first ``length`` (int64 [n], at least 0) characters of each word, as if zeros followed."""
    words ^= _ZEROS
    if len(length) and length.min() < 8:
        # 1 << 64 is 0 in numpy: eight and more characters keep the whole word.
        words &= (_ONE << (length << 3).view(np.uint64)) - _ONE
    return eight_digits(words)


def decimals(text: np.ndarray, start: np.ndarray, dot: np.ndarray, stop: np.ndarray) -> np.ndarray:
    """float64 [n] of the numbers text[start[i]:stop[i]], digits with one dot at ``dot[i]``.

    One to seven digits before the dot and any number after it, of which sixteen count: the error is below
    1e-16 and two units in the last place.
    """
    after = dot + 1
    whole, tenths, rest = words_from(text, after - 8, 3)
    # The word that ends in the dot: seven characters before it.
    whole <<= _EIGHT
    length = stop - after
    value = first_digits(tenths, length)
    value *= 10**8
    length -= 8
    if len(length) and length.min() < 0:
        np.maximum(length, 0, out=length)
    value += first_digits(rest, length)
    number = value.astype(np.float64)
    number *= 1e-16
    number += last_digits(whole, dot - start)
    return number
