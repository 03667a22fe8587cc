"""Delimited text: the checks that polars does not make, and where exactly a file is broken."""

from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import numpy as np
import polars as pl

from stdist.errors import InputError

BLOCK = 1 << 24


def require_columns(path: Path, separator: str, columns: int) -> int:
    """Number of lines; InputError naming the first line of a file that has not ``columns`` fields.

    polars pads short rows silently. Whole blocks are counted first (330 MB in well under a second); only
    a file that fails is looked at line by line.
    """
    separators = lines = 0
    last = b"\n"
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            separators += block.count(separator.encode())
            lines += block.count(b"\n")
            last = block[-1:]
    lines += last != b"\n"
    if lines == 0:
        raise InputError(f"{path} is empty; give a file that holds data")
    if separators != lines * (columns - 1):
        _require_even_lines(path, separator, columns)
    return lines


def _require_even_lines(path: Path, separator: str, columns: int) -> None:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            found = line.count(separator.encode()) + 1
            if found != columns:
                raise InputError(
                    f"{path}, line {number}: {found} columns instead of {columns}; "
                    "the row is broken or the file was cut short"
                )


def explain_failure(
    path: Path,
    separator: str,
    columns: int,
    numeric: Sequence[int],
    null_values: Sequence[str],
    cause: Exception | None = None,
) -> NoReturn:
    """Raise InputError naming line, column and text of what polars could not read.

    numeric: columns, counted from 1, that must hold finite numbers or one of ``null_values``.
    """
    _require_even_lines(path, separator, columns)
    names = [f"column_{column}" for column in numeric]
    # Named here, since polars' own names of headerless columns differ between its versions.
    strings = {f"column_{column}": pl.String for column in range(1, columns + 1)}
    text = pl.scan_csv(path, separator=separator, has_header=False, schema=strings, null_values=list(null_values))
    wrong = [
        pl.col(name).is_not_null() & ~pl.col(name).cast(pl.Float64, strict=False).is_finite().fill_null(False)
        for name in names
    ]
    rows = text.select(names).with_row_index("line", offset=1).filter(pl.any_horizontal(wrong)).head(1)
    found = rows.collect(engine="streaming")
    if found.is_empty():
        raise InputError(f"{path} is no table of numbers ({cause}); check the file") from cause
    row = found.row(0, named=True)
    column, field = next(
        (column, row[name])
        for column, name in zip(numeric, names, strict=True)
        if row[name] is not None and not _is_finite(row[name])
    )
    hint = "remove the header line" if row["line"] == 1 else "blank means missing"
    raise InputError(
        f"{path}, line {row['line']}, column {column}: {field[:40]!r} is not a finite number; {hint}"
    ) from cause


def _is_finite(text: str) -> bool:
    try:
        return bool(np.isfinite(float(text)))
    except ValueError:
        return False
