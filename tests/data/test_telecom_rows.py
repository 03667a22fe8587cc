"""Blocks of raw text as arrays: the same numbers as Python's, and nothing else is read as a row."""

import gzip
import io

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep import telecom_rows
from data_prep.telecom_rows import CHANNELS, blocks, explain, read_rows
from stdist.errors import InputError

STAMP = 1383260400000
UNUSUAL = ["5", "1e-3", "6.2E-06", "+1.5", ".5", "5.", "12345678.25", "0", "1e3"]

digits = st.text("0123456789", min_size=1, max_size=7)
plain = st.builds(lambda whole, rest: f"{whole}.{rest}", digits, st.text("0123456789", max_size=22))
number = st.one_of(st.just(""), plain, st.floats(0, 1e6, allow_nan=False).map(repr), st.sampled_from(UNUSUAL))
row = st.tuples(st.integers(1, 99_999_999), st.integers(0, 143), st.integers(0, 9_999_999), *[number] * 5)


def _lines(rows) -> bytes:
    return "".join(
        "\t".join((str(square), str(STAMP + 600_000 * slot), str(country), *numbers)) + "\n"
        for square, slot, country, *numbers in rows
    ).encode()


def _assert_are(read: pl.DataFrame | None, lines: bytes) -> None:
    """The rows are what Python makes of the lines, to the last bit."""
    assert read is not None
    fields = [line.split(b"\t") for line in lines[:-1].split(b"\n")]
    for column, name in enumerate(("square", "stamp", "country")):
        assert read[name].to_list() == [int(line[column]) for line in fields]
    expected = [[float(field) if field else None for field in line[3:]] for line in fields]
    assert [list(row) for row in read.select(CHANNELS).rows()] == expected


@given(st.lists(row, min_size=1, max_size=30))
def test_rows_are_what_python_reads(rows):
    lines = _lines(rows)
    _assert_are(read_rows(lines), lines)


@given(
    st.lists(row, min_size=1, max_size=4),
    st.lists(st.tuples(st.integers(0, 10_000), st.sampled_from(list(b"\t\n. 0-5eE+x\r\0,\xff"))), max_size=3),
)
def test_a_damaged_text_is_never_read_as_something_else(rows, damages):
    """Whatever bytes are overwritten: either every line is still a row and read as Python reads it, or none is."""
    lines = bytearray(_lines(rows))
    for at, byte in damages:
        lines[at % len(lines)] = byte
    if not lines.endswith(b"\n"):
        lines += b"\n"
    damaged = bytes(lines)
    read = read_rows(damaged)
    if read is None:
        with pytest.raises(InputError, match=r"^raw\.txt, line \d+"):
            explain(_NAMED, damaged, 1)
    else:
        assert not any(telecom_rows._problem(line.split(b"\t")) for line in damaged[:-1].split(b"\n"))
        _assert_are(read, damaged)


class _Named:
    def __str__(self) -> str:
        return "raw.txt"


_NAMED = _Named()


@pytest.mark.parametrize("written", ["nan", "inf", "-1.5", "1_0", "1.2.3", "1e", "0x1", "1e999", " 1.5", "-0.5e-3"])
def test_what_is_no_activity_is_no_row(written):
    assert read_rows(f"1\t{STAMP}\t39\t\t{written}\t\t\t0.25\n".encode()) is None


@pytest.mark.parametrize("ends", [b"", b"\n"])
def test_blocks_cut_at_line_ends_and_lose_nothing(monkeypatch, ends):
    """Any size of block, one that is shorter than a line too, and a last line without its end."""
    lines = _lines([(i, i % 144, 39, f"{i}.25", "", "", "", "") for i in range(1, 60)]).rstrip(b"\n")
    for size in (200, 333, 4096):
        monkeypatch.setattr(telecom_rows, "BLOCK", size)
        parts = list(blocks(io.BytesIO(lines + ends)))
        assert b"".join(parts) == lines + b"\n" and all(part.endswith(b"\n") for part in parts)
        assert len(parts) > 1 or len(lines) < size
    monkeypatch.setattr(telecom_rows, "BLOCK", 16)
    assert b"".join(blocks(io.BytesIO(lines))) == lines + b"\n"
    assert list(blocks(io.BytesIO(b""))) == []


def test_blocks_of_a_gzip_stream_are_those_of_its_text(tmp_path):
    lines = _lines([(i, 5, 39, "", "", "", "", f"{i}.5") for i in range(1, 500)])
    path = tmp_path / "raw.txt.gz"
    path.write_bytes(gzip.compress(lines))
    with telecom_rows.open_raw(path) as file:
        assert b"".join(blocks(file)) == lines
