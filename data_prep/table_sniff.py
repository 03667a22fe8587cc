"""The look of a table of text, from its first lines: its separator, its decimal mark, and whether it has a header."""

import csv
import io
import re
from collections.abc import Iterator, Sequence
from itertools import pairwise

from data_prep.table_times import few_of, formats_of
from stdist.errors import InputError

BLANKS = [
    *("", "NA", "N/A", "n/a", "#N/A", "NaN", "nan", "NAN", "NULL", "Null", "null", "None", "none", "nil", "-", "--"),
    *("?", "n/e", "N/E", "n.a.", "N.A.", ".", "<NA>", "missing", "NIL", "Nil", "#DIV/0!", "#VALUE!", "#REF!"),
]
"""Fields that mean missing."""
SEPARATORS = ",;\t|"
NUMBER = re.compile(r"[+-]?(\d+[.,]?\d*|[.,]\d+)([eE][+-]?\d+)?")
PERCENT = re.compile(r"\s*%$")
GROUPED = re.compile(r"[+-]?\d{1,3}([.,' \u00a0\u202f]\d{3})+([.,]\d+)?")
CHANCE = 1e-3
"""At less than this a row of values would hold whole numbers alone."""
FOOTER = re.compile(r"(?i)\W*(total|source|note|rows?|records?|end|generated|exported|copyright|\d+ rows?)\b.*")
"""A line below a table that is none of its rows."""
ALIKE = 0.1
"""Share of rows that must be as orderly as a first row of whole numbers for it to be one of them."""


def records(text: str, separator: str) -> Iterator[tuple[int, list[str]]]:
    """The line of each record, counted from 0, and its fields."""
    reader, line = csv.reader(io.StringIO(text, newline=""), delimiter=separator), 0
    for fields in reader:
        yield line, fields or [""]
        line = reader.line_num


def separator_of(lines: list[str]) -> str:
    """The mark that cuts the lines evenly, and into most fields; the semicolon before others, since commas may be
    decimal marks; the comma where none does."""
    best: dict[str, tuple[bool, float, int]] = {}
    for mark in SEPARATORS:
        widths = [len(fields) for _, fields in records("\n".join(lines), mark) if fields != [""]]
        usual = max(set(widths), key=widths.count)
        even = widths.count(usual) / len(widths)
        best[mark] = (usual > 1 and even >= 0.9, mark == ";" or even, usual)
    if not any(fits for fits, _, _ in best.values()):
        fields = {len(line.split()) for line in lines if line.strip()}
        if len(fields) == 1 and fields != {1} and all(map(is_number, lines[-1].split())):
            # numpy.savetxt, and columns of one width
            return " "
        return max(SEPARATORS, key=lambda mark: sum(line.count(mark) for line in lines))
    return max(SEPARATORS, key=lambda mark: best[mark])


def titles_above(rows: Sequence[Sequence[str]]) -> int:
    """The number of rows above a table that are titles of it: fewer fields than it has columns, or words in fewer than
    half of them, and neither a number nor a time. The row below them names the columns, and at least one more follows,
    all of one length."""
    if len(rows) < 2:
        return 0
    width, number = len(rows[-1]), 0
    while number < len(rows) and _is_title(rows[number], width):
        number += 1
    table = rows[number:]
    is_whole = len(table) > 1 and all(len(row) == width for row in table)
    return number if is_whole and not any(is_number(field) or formats_of(field) for field in table[0]) else 0


def _is_title(row: Sequence[str], width: int) -> bool:
    words = [field for field in row if field.strip()]
    short = len(row) < width or (len(row) == width and 2 * len(words) < width)
    return short and not any(is_number(word) or formats_of(word) for word in words)


def require_even(label: str, rows: list[list[str]], first_line: int = 1) -> None:
    """InputError where the first rows differ in length."""
    widths = [len(row) for row in rows]
    wrong = next((number for number, width in enumerate(widths) if width != widths[0]), None)
    if wrong is None:
        return
    if wrong == 1 and len(widths) > 2 and len({*widths[1:]}) == 1:
        raise InputError(
            f"{label}, line {first_line}: {widths[0]} columns, the lines below have {widths[1]}; "
            "is the line a title? remove what stands above the table, or mark it with #"
        )
    raise InputError(
        f"{label}, line {wrong + first_line}: {widths[wrong]} columns instead of {widths[0]}; "
        "the row is broken, blank, or the file was cut short"
    )


def is_header(label: str, rows: list[list[str]]) -> bool:
    """True where the first row names columns. A first row of numbers does only where it cannot be a row of values.

    Raises InputError naming --header and --no-header where it may be either.
    """
    first, below = rows[0], rows[1:]
    columns = list(zip(*below, strict=True)) if below else [()] * len(first)
    times = [is_time(column) for column in columns]
    if any(times):
        return not any(of_time and formats_of(field) for field, of_time in zip(first, times, strict=True))
    if any(re.fullmatch(r"[+-]?\d*[.,]\d+([eE][+-]?\d+)?", field) for field in first):
        return False
    if not all(field in BLANKS or is_number(field) for field in first):
        return True
    if not below:
        raise InputError(f"{label} holds one line; say --no-header where it is a row of values")
    numbers = [field for field in first if field not in BLANKS]
    if not all(field.isdigit() for field in numbers) or len(set(numbers)) < len(numbers):
        return False
    body = [field for row in below for field in row if field not in BLANKS]
    share = sum("." in field or "," in field or "e" in field.lower() for field in body) / max(1, len(body))
    if (1 - share) ** len(numbers) < CHANCE:
        # Whole numbers above fractions: ids, as sensors have them.
        return True
    blank = [column for column, field in zip(columns, first, strict=True) if field in BLANKS]
    if any(list(column) == [str(number) for number in range(len(column))] for column in blank):
        # The index of a frame, which has no name.
        return True
    if _is_alike([float(number) for number in numbers], below):
        return False
    raise InputError(
        f"{label}, line 1: {', '.join(first[:4])}{', …' if len(first) > 4 else ''} may be ids or values; "
        "say --header where the line names the columns, --no-header where it is a row of values"
    )


def is_time(column: Sequence[str]) -> bool:
    """True where all first fields of a column are stamps."""
    fields = [field for field in column[:20] if field not in BLANKS]
    return bool(fields) and sum(not formats_of(field) for field in fields) <= few_of(len(fields))


def _is_alike(first: list[float], below: list[list[str]]) -> bool:
    """True where a first row of whole numbers, all different, is like the rows below: within their bounds, and they
    too are often without a repetition, and in rising order, or counted by ones, where it is."""
    rows = [[float(f.replace(",", ".")) for f in row if NUMBER.fullmatch(f)] for row in below]
    rows = [row for row in rows if row]
    if not rows:
        return False
    low, high = min(map(min, rows)), max(map(max, rows))
    kin = [row for row in rows if len({*row}) == len(row) and (row == sorted(row) or first != sorted(first))]
    share = ALIKE
    if len(first) > 2 and _counts(first):
        kin, share = [row for row in rows if _counts(row)], 0.5
    return all(low <= value <= high for value in first) and len(kin) >= share * len(rows)


def _counts(row: list[float]) -> bool:
    return all(after == before + 1 for before, after in pairwise(row))


def is_number(field: str) -> bool:
    """True of numbers, with marks of thousands or a sign of percent too."""
    field = PERCENT.sub("", field)
    return bool(NUMBER.fullmatch(field) or GROUPED.fullmatch(field))


def marks_of(label: str, rows: Sequence[Sequence[str]], separator: str, decimal: str | None) -> tuple[str, str]:
    """The decimal mark, and the marks of thousands. InputError naming --decimal where a comma may be either: between
    commas, quoted ones before three digits are marks of thousands."""
    if decimal not in (None, ",", "."):
        raise InputError(f"--decimal {decimal!r} is neither , nor .; give one of the two")
    given = decimal
    fields = [PERCENT.sub("", field) for row in rows for field in row if not field.isalnum() and is_number(field)]
    commas, dots = ([field for field in fields if mark in field] for mark in ",.")
    blanks = "".join({mark for field in fields for mark in "' \u00a0\u202f" if mark in field})
    if decimal is None:
        by_dot = not commas and any(field.count(".") > 1 for field in dots)
        decimal = "." if not by_dot and (not commas or _groups_by_comma(commas, dots)) else ","
        grouped = all(re.fullmatch(r"[+-]?[1-9]\d{0,2},\d{3}", field) for field in commas)
        if decimal == "," and grouped and separator == ",":
            decimal = "."
        elif decimal == "," and grouped and not dots:
            either = commas[0].replace(",", ""), commas[0].replace(",", ".")
            raise InputError(
                f"{label}: {commas[0]!r} may be {either[0]} or {either[1]}; say --decimal . or --decimal ,"
            )
    german = given is None and separator == ";" and bool(dots) and not commas
    if german and all(re.fullmatch(r"[+-]?[1-9]\d{0,2}\.\d{3}", field) for field in dots):
        whole = dots[0].replace(".", "")
        raise InputError(f"{label}: {dots[0]!r} may be {dots[0]} or {whole}; say --decimal . or --decimal ,")
    other, marked = (",", commas) if decimal == "." else (".", dots)
    return decimal, (other if marked else "") + blanks


def _groups_by_comma(commas: list[str], dots: list[str]) -> bool:
    """True where commas mark thousands: they stand before a dot, occur twice in a number, or numbers with dots stand
    beside whole groups of three."""
    if any(("." in field and field.rfind(",") < field.rfind(".")) or field.count(",") > 1 for field in commas):
        return True
    grouped = all(re.fullmatch(r"[+-]?\d{1,3},\d{3}", field) for field in commas)
    return grouped and bool(dots) and not any(field.count(".") > 1 for field in dots)
