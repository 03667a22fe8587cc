"""Tables of numbers in delimited text: the checks that polars does not make, and where exactly a file is broken."""

from functools import partial
from pathlib import Path

import numpy as np
import polars as pl

from stdist.errors import InputError

BLANKS = ["", "nan", "NaN", "NA"]
BLOCK = 1 << 24


def require_columns(path: Path, columns: int) -> int:
    """Number of lines; InputError naming the first line of a CSV file that has not ``columns`` fields.

    polars pads short rows silently. Whole blocks are counted first (330 MB in well under a second); only
    a file that fails is looked at line by line.
    """
    commas = lines = 0
    last = b"\n"
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            commas += block.count(b",")
            lines += block.count(b"\n")
            last = block[-1:]
    lines += last != b"\n"
    if lines == 0:
        raise InputError(f"{path} is empty; give a file that holds data")
    if commas != lines * (columns - 1):
        _require_even_lines(path, columns)
    return lines


def _require_even_lines(path: Path, columns: int) -> None:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if (found := line.count(b",") + 1) != columns:
                raise InputError(
                    f"{path}, line {number}: {found} columns instead of {columns}; "
                    "the row is broken or the file was cut short"
                )


def read_numbers(path: Path, columns: int, header: bool) -> np.ndarray:
    """float64 [rows, columns] of a CSV, NaN where a field is blank; InputError names the first other that is no
    finite number. header: the first line is passed over."""
    schema = {f"column_{column}": pl.Float64 for column in range(1, columns + 1)}
    read = partial(pl.read_csv, path, has_header=False, skip_rows=int(header), null_values=BLANKS)
    try:
        values = read(schema=schema).to_numpy().astype(np.float64, copy=False)
        if not np.isinf(values).any():
            return values
    except pl.exceptions.PolarsError:
        _require_even_lines(path, columns)
    # As text, which costs more, but says what is wrong and where.
    text = read(infer_schema=False, encoding="utf8-lossy", quote_char=None).with_columns(pl.all().str.strip_chars())
    values = text.cast(pl.Float64, strict=False).to_numpy()
    wrong = np.argwhere(~np.isfinite(values) & ~text.select(pl.all().is_null() | pl.all().is_in(BLANKS)).to_numpy())
    if not len(wrong):
        return values
    row, column = wrong[0].tolist()
    line = row + 1 + header
    hint = "remove the header line" if line == 1 else "blank means missing"
    raise InputError(
        f"{path}, line {line}, column {column + 1}: {text[row, column][:40]!r} is not a finite number; {hint}"
    )
