"""Rows of a raw day file, block by block: polars reads them, and what it lets pass is named by line.

polars pads short rows, skips empty lines and takes NaN for a number. So every block is counted too, and one that does
not add up is read again in plain Python, line by line (``explain``), to say where.
"""

import gzip
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NoReturn, cast

import numpy as np
import polars as pl

from data_prep.telecom_text import CHANNELS
from stdist.errors import InputError

BLOCK = 1 << 23
"""Bytes that are read at once."""
COUNTRIES = 10**7
WHOLE = {"square": (0, 10**8 - 1), "stamp": (10**12, 10**13 - 1), "country": (0, COUNTRIES - 1)}
"""Least and largest; epoch milliseconds have thirteen digits from 2001 to 2286."""
RANGE = {**WHOLE, **dict.fromkeys(CHANNELS, (0, sys.float_info.max))}
SCHEMA = {name: pl.Int64 if name in WHOLE else pl.Float64 for name in RANGE}
COLUMNS = len(SCHEMA)

_WHOLE = re.compile(rb"[+-]?\d+")
_NUMBER = re.compile(rb"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


def open_raw(path: Path) -> IO[bytes]:
    """The text of a file, unpacked where its name ends in .gz."""
    return cast("IO[bytes]", gzip.open(path)) if path.suffix == ".gz" else path.open("rb")


def blocks(file: IO[bytes]) -> Iterator[bytes]:
    """Whole lines, some ``BLOCK`` bytes at a time. A last line without a line break gets one."""
    while block := file.read(BLOCK):
        block += file.readline()
        yield block if block.endswith(b"\n") else block + b"\n"


def read_rows(block: bytes) -> pl.DataFrame | None:
    """A row a line, columns as in ``SCHEMA``, null where an activity is blank; None where a line breaks the format."""
    characters = pl.Series(np.frombuffer(block, np.uint8))
    lines, tabs = ((characters == ord(character)).sum() for character in "\n\t")
    # Of all characters that no field has, polars lets these two pass.
    if tabs != lines * (COLUMNS - 1) or b"\r" in block or b" " in block:
        return None
    try:
        rows = pl.read_csv(block, separator="\t", has_header=False, schema=SCHEMA, quote_char=None)
    except pl.exceptions.PolarsError:
        return None
    right = rows.select(pl.col(n).is_between(*RANGE[n]).all(ignore_nulls=n in CHANNELS) for n in SCHEMA).row(0)
    return rows if all(right) and len(rows) == lines else None


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
    for column, (name, field) in enumerate(zip(SCHEMA, fields, strict=True), start=1):
        text = repr(field[:40].decode(errors="replace"))
        if name in WHOLE and not _WHOLE.fullmatch(field):
            return f", column {column}: {text} is not a whole number; the row is broken"
        if name in WHOLE and not RANGE[name][0] <= int(field) <= RANGE[name][1]:
            what = "is no epoch in milliseconds" if name == "stamp" else "is negative or has too many digits"
            return f", column {column}: {text} {what}; the row is broken"
        if name in CHANNELS and field and not (_NUMBER.fullmatch(field) and np.isfinite(float(field))):
            return f", column {column}: {text} is not a finite number; blank means no activity"
        if name in CHANNELS and field and float(field) < 0:
            return f": negative activity ({float(field)}); the file is damaged"
    return None
