"""Rows of a raw day file as arrays, fast where they are what they should be, and named by line where not.

The text is taken in blocks of whole lines. What is no digit is found in one pass, and everything follows from
it: separators say whether every row has eight columns, dots lie between two separators of a field, what is left
is looked at field by field. A block in which anything at all is wrong is read again in plain Python, line by
line (``explain``), to say where.
"""

import gzip
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NoReturn, cast

import numpy as np

from data_prep.digits import PAD, decimals, last_digits, words_from
from data_prep.telecom_text import CHANNELS
from stdist.errors import InputError

BLOCK = 1 << 19
"""Bytes that are read at once: with the arrays made of them they fit the cache."""
LONGEST_LINE = 4096
COLUMNS = 3 + len(CHANNELS)
ID_DIGITS, STAMP_DIGITS, COUNTRY_DIGITS, WHOLE_DIGITS = 8, 13, 7, 7
"""Most digits of a square's id, the digits of a stamp, most of a country code, and of an activity before its dot."""

_NEWLINE, _DOT = 10, ord(".")
_ROW = np.uint64(int.from_bytes(b"\t" * (COLUMNS - 1) + b"\n", "little"))
_NUMBER = re.compile(rb"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


@dataclass(frozen=True, eq=False)
class Rows:
    """n rows with v activities that are not blank.

    square, stamp (epoch ms), country: int64 [n]. row, channel: int64 [v], where an activity belongs.
    activity: float64 [v].
    """

    square: np.ndarray
    stamp: np.ndarray
    country: np.ndarray
    row: np.ndarray
    channel: np.ndarray
    activity: np.ndarray


def open_raw(path: Path) -> IO[bytes]:
    """The text of a file, unpacked where its name ends in .gz."""
    return cast("IO[bytes]", gzip.open(path)) if path.suffix == ".gz" else path.open("rb", buffering=0)


def blocks(file: IO[bytes]) -> Iterator[tuple[np.ndarray, int]]:
    """Yield (text, stop): whole lines in text[PAD:stop], uint8; the next block overwrites them.

    A last line without a line break gets one.
    """
    text = np.empty(PAD + BLOCK + PAD, np.uint8)
    view, kept = text.data, 0
    while read := file.readinto(view[PAD + kept : PAD + BLOCK]):  # type: ignore[attr-defined]
        end = PAD + kept + read
        tail = bytes(view[max(PAD, end - LONGEST_LINE) : end])
        # A longer line is none of this format; a block that ends within it will say so.
        stop = end - len(tail) + tail.rfind(b"\n") + 1 if b"\n" in tail or read + kept < BLOCK else end
        if stop > PAD:
            yield text, stop
        kept = end - max(stop, PAD)
        text[PAD : PAD + kept] = text[end - kept : end].copy()
    if kept:
        text[PAD + kept] = _NEWLINE
        yield text, PAD + kept + 1


def read_rows(text: np.ndarray, stop: int) -> Rows | None:
    """Rows of text[PAD:stop], whole lines; None where one of them breaks the format."""
    odd = np.flatnonzero((text[PAD:stop] - np.uint8(ord("0"))) > 9)
    odd += PAD
    what = text.take(odd)
    separators = np.flatnonzero(what <= _NEWLINE)
    if len(separators) == 0 or len(separators) % COLUMNS or (what.take(separators).view("<u8") != _ROW).any():
        return None
    columns = separators.reshape(-1, COLUMNS)

    if columns[0, 2] != 2 or (columns[1:, 2] - columns[:-1, -1] != 3).any():
        return None

    # Square, stamp and country lie around the end of the stamp: three words before it and one from it on.
    stamp_end = odd.take(columns[:, 1])
    begin = np.empty_like(stamp_end)
    begin[0] = PAD
    np.add(odd.take(columns[:-1, -1]), 1, out=begin[1:])
    square_length, country_length = stamp_end - begin, odd.take(columns[:, 2]) - stamp_end
    square_length -= STAMP_DIGITS + 1
    country_length -= 1
    if not (_all_within(square_length, 1, ID_DIGITS) and _all_within(country_length, 1, COUNTRY_DIGITS)):
        return None
    oldest, older, newer, onward = words_from(text, stamp_end - 24, 4)
    # older: two characters of the square, a tab, five digits.
    if (((older >> np.uint64(16)) & np.uint64(0xFF)) != ord("\t")).any():
        return None
    square = last_digits((oldest >> np.uint64(16)) | (older << np.uint64(48)), square_length)
    stamp = last_digits(older, np.full(1, STAMP_DIGITS - 8))
    stamp *= 10**8
    stamp += last_digits(newer, np.full(1, 8))
    # onward: the tab, then the country, left of what follows it.
    onward <<= ((7 - country_length) << 3).view(np.uint64)
    country = last_digits(onward, country_length)

    # What is left when the three, with the separators, are taken off.
    characters = stop - PAD - len(columns) * (STAMP_DIGITS + COLUMNS) - int(square_length.sum() + country_length.sum())
    numbers = _dotted(text, odd, what, separators, characters) or _any_numbers(text, odd, what, separators)
    if numbers is None:
        return None
    field, activity = numbers
    if len(activity) and not (activity.min() >= 0 and activity.max() < np.inf):
        return None
    return Rows(square, stamp, country, row=field >> 3, channel=(field & 7) - 3, activity=activity)


def explain(path: Path, block: bytes, first_line: int) -> NoReturn:
    """Raise InputError naming the line, and the column where it is one, of what ``read_rows`` could not read."""
    for number, line in enumerate(block.removesuffix(b"\n").split(b"\n"), start=first_line):
        if problem := _problem(line.split(b"\t")):
            raise InputError(f"{path}, line {number}{problem}")
    raise InputError(
        f"{path}, after line {first_line - 1}: no plain rows of the raw format; fetch the original file again"
    )


def _problem(fields: list[bytes]) -> str | None:
    if len(fields) != COLUMNS:
        return f": {len(fields)} columns instead of {COLUMNS}; the row is broken or the file was cut short"
    for column, field in enumerate(fields, start=1):
        text = repr(field[:40].decode(errors="replace"))
        if column <= 3 and not field.isdigit():
            return f", column {column}: {text} is not a whole number; the row is broken"
        if column == 2 and len(field) != STAMP_DIGITS:
            return f", column 2: {text} is no epoch in milliseconds; the row is broken"
        if column in (1, 3) and len(field) > (ID_DIGITS if column == 1 else COUNTRY_DIGITS):
            return f", column {column}: {text} has too many digits; the row is broken"
        if column > 3 and field and not (_NUMBER.fullmatch(field) and np.isfinite(float(field))):
            return f", column {column}: {text} is not a finite number; blank means no activity"
        if column > 3 and field and float(field) < 0:
            return f": negative activity ({float(field)}); the file is damaged"
    return None


def _all_within(lengths: np.ndarray, least: int, most: int) -> bool:
    return bool(lengths.min() >= least and lengths.max() <= most)


Numbers = tuple[np.ndarray, np.ndarray]
"""Fields that are not blank, counted over rows and columns, int64 [v], and what they say, float64 [v]."""


def _dotted(
    text: np.ndarray, odd: np.ndarray, what: np.ndarray, separators: np.ndarray, characters: int
) -> Numbers | None:
    """The activities of a block where all are digits around a dot, as they mostly are; None where one is not.

    odd: positions of all that is no digit; what: those bytes; separators: which of them are. characters: of all
    activities; fields without a dot have some, too.
    """
    dots = np.flatnonzero(what == _DOT)
    if len(dots) + len(separators) != len(odd) or (np.diff(dots) == 1).any():
        return None
    start, dot, end = odd.take(dots - 1), odd.take(dots), odd.take(dots + 1)
    start += 1
    if int(end.sum() - start.sum()) != characters:
        return None
    if len(dots) and not _all_within(dot - start, 1, WHOLE_DIGITS):
        return None
    # As many separators lie before a dot as marks that are no dots.
    return dots - np.arange(len(dots)), decimals(text, start, dot, end)


def _any_numbers(text: np.ndarray, odd: np.ndarray, what: np.ndarray, separators: np.ndarray) -> Numbers | None:
    """The activities of any block; whole numbers, exponents and signs one by one. None where one is no number."""
    ends = odd[separators]
    begins = np.concatenate(([PAD], ends[:-1] + 1))
    filled = np.flatnonzero(ends > begins)
    filled = filled[filled % COLUMNS >= 3]
    marks = np.diff(separators, prepend=-1)[filled] - 1
    last = separators[filled] - 1
    whole = odd[last] - begins[filled]
    dotted = (marks == 1) & (what[last] == _DOT) & (whole >= 1) & (whole <= WHOLE_DIGITS)
    activity = np.empty(len(filled))
    plain = filled[dotted]
    activity[dotted] = decimals(text, begins[plain], odd[last[dotted]], ends[plain])
    for at in np.flatnonzero(~dotted).tolist():
        written = text[begins[filled[at]] : ends[filled[at]]].tobytes()
        if not _NUMBER.fullmatch(written):
            return None
        activity[at] = float(written)
    return filled, activity
