"""Tables of text as people have them, packed or not: their rows, block by block, so that a file is read once and never
held as text.

polars pads short rows and takes ``NaN`` for a number: every block's fields are counted too, and a block that does not
add up is read again as text, to say where.
"""

import bz2
import codecs
import gzip
import lzma
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import polars as pl

from data_prep.kinds import kind_of, refuse_kind
from data_prep.table_sniff import (
    BLANKS,
    FOOTER,
    PERCENT,
    is_header,
    marks_of,
    records,
    require_even,
    separator_of,
    titles_above,
)
from stdist.errors import InputError

BLOCK = 1 << 24
"""Bytes of text that are read at once."""
HEAD = 1 << 20
SAMPLED = 200
"""Rows that are looked at to see what a table is."""
PACKED: dict[str, Callable[..., Any]] = {"gzip": gzip.open, "bzip2": bz2.open, "xz": lzma.open}
NO_TABLE = re.compile(r"(?i)\..*|(readme|licen[cs]e|notice|metadata|citation).*|.*\.(pdf|html?|md|docx?|xml|png|jpg)")
"""Names of what lies beside tables in an archive."""
DAMAGES = (OSError, EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile)


@dataclass(frozen=True)
class Text:
    """One table of text before its rows are read. member: its name in a zip archive.

    separator, decimal, thousands: marks. comments: whether lines begin with ``#``, which are passed over. titles: how
    many lines above the table are none of it. header: whether its first line names the columns; names: of the columns.
    head: the first rows.
    """

    path: Path
    member: str | None
    separator: str = ","
    decimal: str = "."
    thousands: str = ""
    comments: bool = False
    titles: int = 0
    header: bool = False
    names: tuple[str, ...] = ()
    head: tuple[tuple[str, ...], ...] = ()

    @property
    def label(self) -> str:
        return f"{self.path}:{self.member}" if self.member else str(self.path)

    @property
    def stem(self) -> str:
        """The file's name without its endings."""
        return re.sub(r"(\.(csv|tsv|txt|dat|gz|bz2|xz|zip))+$", "", Path(self.member or self.path).name, flags=re.I)

    @cached_property
    def sample(self) -> pl.DataFrame:
        """The first rows as text, null where blank."""
        columns = zip(*self.head, strict=True) if self.head else [()] * len(self.names)
        return pl.DataFrame(
            {
                name: pl.Series([None if field in BLANKS else field for field in column], dtype=pl.String)
                for name, column in zip(self.names, columns, strict=True)
            }
        )

    def blocks(self, numeric: Sequence[str], text: Sequence[str]) -> Iterator[tuple[np.ndarray, pl.DataFrame]]:
        """The lines of the rows of a block, int64 [n], and columns ``numeric`` of it, Float64, and ``text``, null where
        blank.

        Raises InputError naming the line of a row of another length, and line and column of what is no finite number.
        """
        wanted, line = {*numeric}, 1
        schema: dict[str, type[pl.DataType]] = {
            name: pl.Float64 if name in wanted else pl.String for name in self.names
        }
        for number, block in enumerate(_blocks(self)):
            lines = np.arange(line, line + block.count(b"\n"))
            line += len(lines)
            if self.comments and b"#" in block:
                lines = lines[[not text.startswith(b"#") for text in block.splitlines()]]
                block = re.sub(rb"(?m)^#.*\n", b"", block)
            if number == 0 and self.titles:
                block, lines = block.split(b"\n", self.titles)[-1], lines[self.titles :]
            if number == 0 and self.header:
                block, lines = _behind_record(block), lines[1:]
            block = self._without_footers(block.rstrip(b"\r\n")) + b"\n"
            if self.separator == " ":
                block = re.sub(rb"(?m)^ +| +$", b"", re.sub(rb"[ \t]+", b" ", block))
            if block != b"\n":
                self._require_even(block, lines)
                rows = self._rows(block, lines, schema, [*text, *numeric])
                yield lines[: len(rows)], rows

    def _without_footers(self, block: bytes) -> bytes:
        """A line of words below the table becomes a row whose other fields are blank, as a summary is."""
        above, _, last = block.rpartition(b"\n")
        if len(self.names) < 2 or self.separator.encode() in last or not FOOTER.fullmatch(last.decode().strip('"')):
            return block
        row = last + self.separator.encode() * (len(self.names) - 1)
        return self._without_footers(above.rstrip(b"\r\n")) + b"\n" + row

    def _rows(
        self, block: bytes, lines: np.ndarray, schema: dict[str, type[pl.DataType]], wanted: list[str]
    ) -> pl.DataFrame:
        if not self.thousands:
            try:
                rows = pl.read_csv(
                    block,
                    has_header=False,
                    separator=self.separator,
                    decimal_comma=self.decimal == ",",
                    schema=schema,
                    null_values=BLANKS,
                ).select(wanted)
            except pl.exceptions.PolarsError:
                pass
            else:
                numbers = [name for name in wanted if schema[name] == pl.Float64]
                finite = rows.select(pl.col(numbers).is_finite().all()).row(0) if numbers else ()
                if all(finite) and len(rows) <= len(lines):
                    return rows
        return self._spelled(block, lines, schema).select(wanted)

    def _spelled(self, block: bytes, lines: np.ndarray, schema: dict[str, type[pl.DataType]]) -> pl.DataFrame:
        """A block read as text, which costs more, but knows thousands and blanks around numbers, and says what is
        wrong and where."""
        as_text = dict.fromkeys(schema, pl.String)
        try:
            rows = pl.read_csv(block, has_header=False, separator=self.separator, schema=as_text)
        except pl.exceptions.PolarsError as error:
            self._explain_lengths(block, lines)
            raise InputError(
                f"{self.label}, from line {lines[0]} on: quotes are not closed, or stand within a field; double them, "
                "as CSV does"
            ) from error
        columns = []
        for column, name in enumerate(schema, start=1):
            text = rows[name].fill_null("").str.strip_chars()
            blank = text.is_in(BLANKS)
            if schema[name] != pl.Float64:
                columns.append(text.set(blank, None).alias(name))
                continue
            plain, odd = text.str.replace(PERCENT.pattern, ""), pl.Series([False]).new_from_index(0, len(text))
            if self.thousands:
                mark = f"[{re.escape(self.thousands)}]"
                odd = plain.str.contains(mark) & ~plain.str.contains(rf"^[+-]?\d{{1,3}}({mark}\d{{3}})+(\D\d+)?$")
                plain = plain.str.replace_all(mark, "")
            plain = plain.str.replace(",", ".", literal=True) if self.decimal == "," else plain
            numbers = plain.cast(pl.Float64, strict=False)
            wrong = ~blank & (odd | numbers.is_null() | ~numbers.is_finite())
            if wrong.any():
                row = int(wrong.arg_max() or 0)
                said = f"column {name!r}" if self.header else f"column {column}"
                raise InputError(
                    f"{self.label}, line {lines[row]}, {said}: {text[row][:40]!r} is not a finite number; "
                    f"{self._hint(text[row], int(lines[row]))}"
                )
            columns.append(numbers.set(blank, None).alias(name))
        return pl.DataFrame(columns)

    def _hint(self, field: str, line: int) -> str:
        if line == 1 and not self.header:
            return "where the first line names the columns, say --header"
        if re.fullmatch(r"[\d.,]+", field):
            return "say which mark is the decimal one, --decimal , or --decimal ."
        return "blank means missing; --values names the columns to read"

    def _require_even(self, block: bytes, lines: np.ndarray) -> None:
        """InputError where a row has not as many fields as there are columns."""
        bare = re.sub(rb'"[^"]*"', b"", block) if b'"' in block else block
        if bare.count(self.separator.encode()) != bare.count(b"\n") * (len(self.names) - 1):
            self._explain_lengths(block, lines)

    def _explain_lengths(self, block: bytes, lines: np.ndarray) -> None:
        columns = len(self.names)
        for number, fields in records(block.decode(), self.separator):
            if len(fields) != columns:
                raise InputError(
                    f"{self.label}, line {lines[number]}: {len(fields)} columns instead of {columns}; "
                    "the row is broken, blank, or the file was cut short"
                )


def open_text(path: Path, header: bool | None, decimal: str | None) -> list[Text]:
    """The tables in a file of text, packed or not, one for each member of a zip archive; their first lines alone are
    read. header, decimal: as the user says, else by the look of the lines.

    Raises InputError where a file is something else, empty, or where header or decimal mark cannot be told.
    """
    return [_sniffed(table, header, decimal) for table in _members(path)]


def text_blocks(path: Path) -> Iterator[bytes]:
    """Whole lines of the one file of text that ``path`` is, or holds packed, in UTF-8; InputError as ``open_text``."""
    table, *others = _members(path)
    if others:
        raise InputError(f"{path} holds {1 + len(others)} files; unpack it and give one")
    return _blocks(table)


def _members(path: Path) -> list[Text]:
    kind = kind_of(path)
    members: list[str | None] = [None]
    if kind == "zip":
        try:
            with zipfile.ZipFile(path) as archive:
                infos = [i for i in archive.infolist() if not i.is_dir() and "__MACOSX" not in i.filename]
        except DAMAGES as error:
            raise InputError(f"{path} is a zip archive that was cut short ({error}); fetch it again") from error
        if any(info.flag_bits & 1 for info in infos):
            raise InputError(f"{path} is a zip archive under a password; unpack it first")
        members = [i.filename for i in infos if not NO_TABLE.fullmatch(Path(i.filename).name)] or [
            i.filename for i in infos
        ]
        if not members:
            raise InputError(f"{path} is a zip archive without a file in it; give one that holds a table")
    elif kind not in PACKED and kind != "text":
        refuse_kind(path, kind)
    return [Text(path, member) for member in members]


def _blocks(table: Text) -> Iterator[bytes]:
    """Whole records in UTF-8 without a byte order mark, each with a line feed, the last one too."""
    kind = kind_of(table.path)
    try:
        with _stream(table, kind) as raw:
            head = raw.read(16)
            packed = Path(table.member or (table.path.stem if kind in PACKED else table.path.name))
            refuse_kind(Path(table.label), kind_of(packed, head))
            utf16 = head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
            decoder = codecs.getincrementaldecoder("utf-16")() if utf16 else None
            left, block = b"", head
            while block:
                block += raw.read(BLOCK)
                text = left + (decoder.decode(block).encode() if decoder else block)
                cut = text.rfind(b"\n") + 1
                # A quoted field may hold line breaks: a block ends where all quotes are closed.
                while cut and text.count(b'"', 0, cut) % 2:
                    cut = text.rfind(b"\n", 0, cut - 1) + 1
                left = text[cut:]
                if cut:
                    yield _plain(text[:cut])
                block = raw.read(1)
            if left:
                yield _plain(left)
    except DAMAGES as error:
        what = "zip archive" if table.member else f"{kind} stream"
        raise InputError(f"{table.label}: the {what} is damaged or was cut short ({error}); fetch it again") from error


def _stream(table: Text, kind: str) -> IO[bytes]:
    """The bytes of a table, unpacked."""
    if table.member is not None:
        return zipfile.ZipFile(table.path).open(table.member)
    return cast("IO[bytes]", PACKED[kind](table.path, "rb")) if kind in PACKED else table.path.open("rb")


def _plain(text: bytes) -> bytes:
    text = text.removeprefix(codecs.BOM_UTF8)
    if b"\r" in text:
        text = text.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    try:
        text.decode()
    except UnicodeDecodeError:
        text = text.decode("cp1252", errors="replace").encode()
    return text if text.endswith(b"\n") else text + b"\n"


def _behind_record(block: bytes) -> bytes:
    """``block`` without its first record, which may hold line breaks within quotes."""
    end = block.find(b"\n") + 1
    while block.count(b'"', 0, end) % 2 and (more := block.find(b"\n", end) + 1):
        end = more
    return block[end:]


def _sniffed(table: Text, header: bool | None, decimal: str | None) -> Text:
    head = b""
    for block in _blocks(table):
        head += block
        if len(head) >= HEAD or head.count(b"\n") > 2 * SAMPLED:
            break
    text = head[:HEAD].decode(errors="ignore")
    lines = text.split("\n")[:-1] or [text]
    plain = [line for line in lines if not line.startswith("#")]
    if not any(line.strip() for line in plain):
        what = "holds comments alone" if any(line.strip() for line in lines) else "is empty"
        raise InputError(f"{table.label} {what}; give a file that holds data")
    separator = separator_of(plain[: SAMPLED + 1])
    if separator == " ":
        plain = [" ".join(line.split()) for line in plain]
    rows = [fields for _, fields in islice(records("\n".join(plain), separator), SAMPLED + 1)]
    while rows and not any(field.strip() for field in rows[-1]):
        rows.pop()
    if not rows:
        raise InputError(f"{table.label} holds blank fields alone; give a file that holds data")
    while len(rows) > 2 and (rows[-1] == [""] or (len(rows[-1]) == 1 and FOOTER.fullmatch(rows[-1][0]))):
        rows.pop()
    titles = titles_above(rows)
    rows = rows[titles:]
    require_even(table.label, rows, 1 + titles)
    rows = [[field.strip() for field in row] for row in rows]
    titled = is_header(table.label, rows) if header is None else header
    body = tuple(map(tuple, rows[1:] if titled else rows))
    decimal, thousands = marks_of(table.label, body, separator, decimal)
    names = _named(table, rows[0]) if titled else tuple(f"column_{n}" for n in range(1, len(rows[0]) + 1))
    comments = len(plain) < len(lines)
    return replace(
        table,
        separator=separator,
        decimal=decimal,
        thousands=thousands,
        comments=comments,
        titles=titles,
        header=titled,
        names=names,
        head=body,
    )


def _named(table: Text, titles: list[str]) -> tuple[str, ...]:
    """Titles; a column without one is called as pandas calls it, but the first, whose name is empty."""
    names: dict[str, int] = {}
    for number, title in enumerate(titles):
        name = title or ("" if "" not in names else f"Unnamed: {number}")
        if name in names:
            raise InputError(f"{table.label}: column {name!r} occurs twice; give each column once")
        names[name] = number
    return tuple(names)


def array_of(frame: pl.DataFrame) -> np.ndarray:
    """float64 [rows, columns], NaN where null."""
    return frame.select(pl.all().fill_null(float("nan"))).to_numpy()
