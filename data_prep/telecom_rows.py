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

BLOCK = 1 << 20
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
    what = text[odd]
    is_separator = what <= _NEWLINE
    separators = np.flatnonzero(is_separator)
    if len(separators) == 0 or len(separators) % COLUMNS or (what[separators].view(np.uint64) != _ROW).any():
        return None
    columns = separators.reshape(-1, COLUMNS)

    # Square, stamp and country lie around the end of the stamp: three words before it and one from it on.
    stamp_end, country_end = odd[columns[:, 1]], odd[columns[:, 2]]
    begin = np.empty_like(stamp_end)
    begin[0] = PAD
    np.add(odd[columns[:-1, -1]], 1, out=begin[1:])
    square_length, country_length = stamp_end - begin - STAMP_DIGITS - 1, country_end - stamp_end - 1
    if not (_all_within(square_length, 1, ID_DIGITS) and _all_within(country_length, 1, COUNTRY_DIGITS)):
        return None
    oldest, older, newer, onward = words_from(text, stamp_end - 24, 4)
    # older: two characters of the square, a tab, five digits.
    if (((older >> np.uint64(16)) & np.uint64(0xFF)) != ord("\t")).any():
        return None
    stamp = last_digits(older.copy(), np.full(1, STAMP_DIGITS - 8)) * 10**8
    stamp += last_digits(newer, np.full(1, 8))
    square = last_digits((oldest >> np.uint64(16)) | (older << np.uint64(48)), square_length)
    # onward: the tab, then the country, left of what follows it.
    onward <<= ((7 - country_length) << 3).view(np.uint64)
    country = last_digits(onward, country_length)

    numbers = _activities(text, odd, what, is_separator, separators)
    if numbers is None:
        return None
    field, activity = numbers
    if not np.isfinite(activity).all() or (activity < 0).any():
        return None
    return Rows(square, stamp, country, field // COLUMNS, field % COLUMNS - 3, activity)


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


def _activities(
    text: np.ndarray, odd: np.ndarray, what: np.ndarray, is_separator: np.ndarray, separators: np.ndarray
) -> tuple[np.ndarray, np.ndarray] | None:
    """Fields that are not blank, counted over rows and columns, and their numbers; None where one is broken.

    odd: positions of all that is no digit; what: those bytes; separators: which of them are. All but a few
    fields have one dot and no letter: digits on both sides, between two separators.
    """
    dots = np.flatnonzero(what == _DOT)
    field = dots - np.arange(len(dots))
    unusual = []
    if len(dots) + len(separators) != len(odd):
        letters = np.flatnonzero(~is_separator & (what != _DOT))
        # A letter is no separator either: a dot's field has one less for every letter before it.
        sections = np.diff(np.searchsorted(dots, letters), prepend=0, append=len(dots))
        field -= np.repeat(np.arange(len(sections)), sections)
        unusual.append(np.searchsorted(separators, letters))
    unusual.append(field[1:][np.diff(field) == 0])

    start = odd[dots - 1]
    start += 1
    length = odd[dots]
    length -= start
    unusual.append(field[(length < 1) | (length > WHOLE_DIGITS)])

    # Square, stamp and country have no dot; the first of all has no separator before it either.
    undotted = (np.diff(odd) > 1) & is_separator[1:] & is_separator[:-1]
    if np.count_nonzero(undotted) != 3 * (len(separators) // COLUMNS) - 1:
        whole = np.searchsorted(separators, np.flatnonzero(undotted) + 1)
        unusual.append(whole[whole % COLUMNS >= 3])

    others = np.unique(np.concatenate(unusual))
    if len(others):
        usual = ~np.isin(field, others)
        field, dots, start = field[usual], dots[usual], start[usual]
    if any(len(fields) and (fields % COLUMNS).min() < 3 for fields in (field, others)):
        return None
    activity = decimals(text, start, odd[dots], odd[dots + 1])
    if not len(others):
        return field, activity

    ends = odd[separators]
    numbers = []
    for other in others.tolist():
        written = text[ends[other - 1] + 1 : ends[other]].tobytes()
        if not _NUMBER.fullmatch(written):
            return None
        numbers.append(float(written))
    return np.concatenate((field, others)), np.concatenate((activity, numbers))
