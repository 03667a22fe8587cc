"""Blocks of raw text as arrays: the same numbers as Python's, and nothing else is read as a row."""

import gzip
import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep import telecom_rows
from data_prep.digits import PAD, decimals
from data_prep.telecom_rows import Rows, blocks, explain, read_rows
from stdist.errors import InputError

STAMP = 1383260400000
UNUSUAL = ["5", "1e-3", "6.2E-06", "+1.5", ".5", "5.", "12345678.25", "0", "1e3"]

digits = st.text("0123456789", min_size=1, max_size=7)
plain = st.builds(lambda whole, rest: f"{whole}.{rest}", digits, st.text("0123456789", max_size=22))
number = st.one_of(st.just(""), plain, st.floats(0, 1e6, allow_nan=False).map(repr), st.sampled_from(UNUSUAL))
row = st.tuples(st.integers(1, 99_999_999), st.integers(0, 143), st.integers(0, 9_999_999), *[number] * 5)


def _text(lines: bytes) -> tuple[np.ndarray, int]:
    length = -(-(len(lines) + 2 * PAD) // 8) * 8
    # What lies around the lines must not matter.
    text = np.full(length, ord("7"), np.uint8)
    text[PAD : PAD + len(lines)] = np.frombuffer(lines, np.uint8)
    return text, PAD + len(lines)


def _lines(rows) -> bytes:
    return "".join(
        "\t".join((str(square), str(STAMP + 600_000 * slot), str(country), *numbers)) + "\n"
        for square, slot, country, *numbers in rows
    ).encode()


def _assert_are(read: Rows | None, lines: bytes) -> None:
    """The rows are what Python makes of the lines: whole numbers exactly, activities to two last places."""
    assert read is not None
    fields = [line.split(b"\t") for line in lines[:-1].split(b"\n")]
    for column, name in enumerate(("square", "stamp", "country")):
        assert getattr(read, name).tolist() == [int(line[column]) for line in fields]
    table = np.full((len(fields), 5), np.nan)
    table[read.row, read.channel] = read.activity
    expected = [[float(field) if field else np.nan for field in line[3:]] for line in fields]
    np.testing.assert_allclose(table, expected, rtol=5e-16, atol=1e-16)


@given(st.lists(row, min_size=1, max_size=30))
def test_rows_are_what_python_reads(rows):
    lines = _lines(rows)
    _assert_are(read_rows(*_text(lines)), lines)


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
    read = read_rows(*_text(damaged))
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
    assert read_rows(*_text(f"1\t{STAMP}\t39\t\t{written}\t\t\t0.25\n".encode())) is None


def test_sixteen_digits_after_the_dot_count():
    """By hand: 0.0813…882 has seventeen; what is cut off is below 1e-16."""
    lines = b"0.08136262351125882\n11.028366381681026\n7.5\n"
    text, _ = _text(lines)
    start = np.array([0, 20, 39]) + PAD
    read = decimals(text, start, np.array([1, 22, 40]) + PAD, np.array([19, 38, 42]) + PAD)
    np.testing.assert_allclose(read, [0.08136262351125882, 11.028366381681026, 7.5], rtol=2e-16 / 0.08, atol=0)
    assert read[2] == 7.5


@pytest.mark.parametrize("ends", [b"", b"\n"])
def test_blocks_cut_at_line_ends_and_lose_nothing(monkeypatch, ends):
    """Any size of block, one that is shorter than a line too, and a last line without its end."""
    lines = _lines([(i, i % 144, 39, f"{i}.25", "", "", "", "") for i in range(1, 60)]).rstrip(b"\n")
    for size in (200, 333, 4096):
        monkeypatch.setattr(telecom_rows, "BLOCK", size)
        parts = [text[PAD:stop].tobytes() for text, stop in blocks(io.BytesIO(lines + ends))]
        assert b"".join(parts) == lines + b"\n" and all(part.endswith(b"\n") for part in parts)
        assert len(parts) >= len(lines) / size
    monkeypatch.setattr(telecom_rows, "BLOCK", 16)
    assert b"".join(text[PAD:stop].tobytes() for text, stop in blocks(io.BytesIO(lines))) == lines + b"\n"
    assert list(blocks(io.BytesIO(b""))) == []


def test_blocks_of_a_gzip_stream_are_those_of_its_text(tmp_path):
    lines = _lines([(i, 5, 39, "", "", "", "", f"{i}.5") for i in range(1, 500)])
    path = tmp_path / "raw.txt.gz"
    path.write_bytes(gzip.compress(lines))
    with telecom_rows.open_raw(path) as file:
        assert b"".join(text[PAD:stop].tobytes() for text, stop in blocks(file)) == lines
