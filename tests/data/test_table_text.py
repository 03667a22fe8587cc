"""Text that tables are written in: headers, separators, decimal marks, and what is refused, with its line."""

import numpy as np
import pytest

from data_prep import table_text

STEPS = {"start": "2019-01-01", "cadence": 60}
TIMED = "time,a,b\n2019-01-01 00:00,1,2\n2019-01-01 01:00,3,4\n"


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        # Whole numbers above fractions name sensors.
        ("773869,767541\n64.5,67.25\n62.5,68.75\n", [773869, 767541]),
        # The index of a frame has no name: what stands beside it are names.
        (",700,701\n0,19,20\n1,33,37\n2,5,6\n", [700, 701]),
        # A row of values: fractions, a repetition, or numbers like those below.
        ("1.5,2,3\n4,5,6\n", [0, 1, 2]),
        ("7,7,3\n4,5,6\n", [0, 1, 2]),
        ("12,5,7\n4,5,6\n4,9,1\n3,15,1\n", [0, 1, 2]),
        ("1,,0\n4,5,6\n0,2,3\n", [0, 1, 2]),
    ],
)
def test_a_first_row_of_numbers_is_never_eaten(read_table, text, ids):
    read = read_table(text, **STEPS)
    frames = text.count("\n") - (ids[0] > 2)
    assert read.ids == ids and len(read.stamps) == frames


@pytest.mark.parametrize("text", ["700,701,705\n4,5,6\n3,9,1\n", "0,1,2\n4,7,6\n0,0,1\n9,2,2\n", "5,6\n"])
def test_numbers_that_may_be_ids_or_values_are_asked_for(read_table, refused, text):
    with refused("line.*--no-header"):
        read_table(text, **STEPS)
    assert len(read_table(text, header=False, **STEPS).stamps) == text.count("\n")
    if text.count("\n") > 1:
        read = read_table(text, header=True, **STEPS)
        assert len(read.stamps) == text.count("\n") - 1 and read.ids == [int(n) for n in text.split("\n")[0].split(",")]


def test_a_row_of_stamps_and_values_is_no_header(read_table):
    read = read_table("2019-01-01 00:00,700,701\n2019-01-01 01:00,5,6\n")
    assert read.values == {"value": [[700, 701], [5, 6]]} and "no header" in read.plan.read_as


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("time;a;b\n2019-01-01 00:00;1,5;2\n2019-01-01 01:00;1.234,25;4\n", [[1.5, 2], [1234.25, 4]]),
        ("time\ta\tb\n2019-01-01 00:00\t1.5\t2\n2019-01-01 01:00\t1,234.25\t4\n", [[1.5, 2], [1234.25, 4]]),
        ('time,a,b\n2019-01-01 00:00,"1,234,567",2\n2019-01-01 01:00,"1,5",4\n', None),
        ('time,a,b\n2019-01-01 00:00,"12,345",2\n2019-01-01 01:00,7,4\n', [[12345, 2], [7, 4]]),
        ("time;a;b\n2019-01-01 00:00;1 234;2\n2019-01-01 01:00;7;4\n", [[1234, 2], [7, 4]]),
        ("time|a|b\n2019-01-01 00:00|1e3|2\n2019-01-01 01:00|+7|.5\n", [[1000, 2], [7, 0.5]]),
        ("time,a,b\n2019-01-01 00:00, 1 , 2\n2019-01-01 01:00,NULL, -\n", [[1, 2], [None, None]]),
        ("# made by hand\n#\ntime,a,b\n2019-01-01 00:00,1,2\n# later\n2019-01-01 01:00,3,4\n", [[1, 2], [3, 4]]),
        ('time,"Main St, 5",b\n2019-01-01 00:00,1,2\n2019-01-01 01:00,3,4\n', [[1, 2], [3, 4]]),
        ("time,a,b\n2019-01-01 01:00,3,4\n2019-01-01 00:00,1,2\n", [[1, 2], [3, 4]]),
        (TIMED + "Total,4,6\n", [[1, 2], [3, 4]]),
        (TIMED + ",,\n,,\n", [[1, 2], [3, 4]]),
        (TIMED + "2019-01-01 01:00,3,4\n", [[1, 2], [3, 4]]),
        (TIMED + "2019-01-01 01:00,,4\n", [[1, 2], [3, 4]]),
        ("time,a,b\n2019-01-01 01:00,,4\n2019-01-01 00:00,1,2\n2019-01-01 01:00,3,\n", [[1, 2], [3, 4]]),
        ("Unnamed: 0,time,a,b\n3,2019-01-01 00:00,1,2\n7,2019-01-01 01:00,3,4\n", [[1, 2], [3, 4]]),
        ("index,time,a,b,Total\n0,2019-01-01 00:00,1,2,3\n1,2019-01-01 01:00,3,4,7\n", [[1, 2], [3, 4]]),
        ("time,epoch,a,b\n2019-01-01 00:00,1546300800,1,2\n2019-01-01 01:00,1546304400,3,4\n", [[1, 2], [3, 4]]),
    ],
)  # fmt: skip
def test_values(read_table, refused, text, values):
    if values is None:
        with refused("'1,5' is not a finite number|line 3"):
            read_table(text)
        return
    read = read_table(text)
    assert read.values == {"value": values} and read.stamps == ["2019-01-01 00:00", "2019-01-01 01:00"]
    assert len(read.ids) == 2


@pytest.mark.parametrize(
    ("text", "options", "line"),
    [
        ("a,b\n1,2\n3\n", STEPS, "line 3: 1 columns instead of 2; the row is broken, blank, or"),
        ("a,b\n1,2\n\n3,4\n", STEPS, "line 3: 1 columns instead of 2"),
        ("a,b\n1,2\n3,4,5\n6\n", STEPS, "line 3: 3 columns instead of 2"),
        ("Of,May,2019\na,b\n1,2\n3,4\n", STEPS, "line 1: 3 columns, the lines below have 2; is the line a title"),
        ("b,c\nx,1,2\ny,3,4\n", STEPS, "line 1: 2 columns, the lines below have 3; is the line a title"),
        ("a,b\n1,2\n3,inf\n", STEPS, "line 3, column 'b': 'inf' is not a finite number"),
        ("1.5,2\n3,inf\n", STEPS, "line 2, column 2: 'inf' is not a finite number"),
        ("a,a\n1,2\n", STEPS, "column 'a' occurs twice"),
        ("a,b\n", STEPS, "holds no row below its header"),
        ("", STEPS, "is empty"),
        ("# made by hand\n", STEPS, "holds comments alone"),
        ("a,b\n1,2\n", {}, "has no column of time; .*--start"),
        ("a,b\n1,2\n", {"start": "2019-01-01"}, "has no column of time; .*--cadence"),
        ("time;a\n2019-01-01;1,234\n2019-01-02;5\n", {}, "'1,234' may be 1234 or 1.234; say --decimal"),
        ("time;a;b\n2019-01-01;1.234;2.500\n2019-01-02;5;1.100\n", {}, "'1.234' may be 1.234 or 1234; say --decimal"),
        (TIMED, {"place": "a,b,time"}, "column 'time' of --place tells the time"),
        (TIMED, STEPS, "stamps of its own in column 'time'; leave --start out"),
        (TIMED + "2019-01-01 01:00,3,5\n", {}, r"2019-01-01T01:00:00 occurs twice .* \(value of b: 4 and 5\)"),
        (TIMED + "soon,3,5\n2019-01-01 03:00,3,5\n", {}, "line 4: 'soon' is no time as the others"),
        (TIMED, {"values": "c"}, "has no column 'c' of --values; it has"),
        (TIMED, {"values": "aa"}, "did you mean 'a'?"),
        (TIMED, {"place": "a", "layout": "wide"}, "--place names the column of places"),
        ("a,b\n1,2\n", {"layout": "long"}, "no column of time, which a long table needs"),
        (";;\n;;\n", {}, "holds blank fields alone"),
        (TIMED, {"cadence": 0}, "cadence 0 min does not divide a day"),
        (TIMED, {"utc_offset": 10000}, "--utc-offset 10000 is no offset of a clock"),
        ("z,2019-01-01,2019-01-02,2019-01-32,2019-01-04\na,1,2,3,4\n", {}, "column .2019-01-32. is no time"),
        (TIMED, {"layout": "broad"}, "neither wide nor long"),
        (TIMED, {"duplicates": "first"}, "choose refuse, sum, mean"),
        (TIMED, {"missing": "none"}, "--missing 'none' are no numbers"),
        (TIMED, {"scale": 0.0}, "is not a positive number"),
        (TIMED, {"nodes": True, "height": 1}, "give one kind"),
        (TIMED, {"array": "x"}, "--array x is for npz"),
        ("time,a\n2019-01-01 00:00,1\n2019-01-01 01:00,-2\n", {"layout": "wide"}, "-2 at 2019-01-01T01:00, place a"),
        ("holiday,time,a,b\nx,2019-01-01 00:00,1,2\ny,2019-01-02 00:00,1,2\nz,2019-01-03 00:00,1,2\n"
         "v,2019-01-04 00:00,1,2\n", {"layout": "wide", "city": "x", "height": 1, "width": 3}, "2 places for 3 cells"),
        ("yr,time,a,b\n2019,2019-01-01 00:00,1,2\n2019,2019-01-01 01:00,3,4\n", {}, "may be places or values of one"),
        ("time,k,v\n2019-01-01 00:00,1,5\n2019-01-01 00:00,2,6\n2019-01-01 01:00,1,7\n2019-01-01 01:00,2,8\n", {},
         "several rows share a stamp, .*'k', 'v'.; name it with --place"),
    ],
)  # fmt: skip
def test_what_is_refused(read_table, refused, text, options, line):
    with refused(line):
        read_table(text, **options)


def test_missing_and_scale(read_table):
    read = read_table("time,a,b\n2019-01-01 00:00,-1,2e6\n2019-01-01 01:00,3e6,0\n", missing="-1", scale=1e-6)
    assert read.values == {"value": [[None, 2], [3, 0]]}
    assert read_table("time,a,b\n2019-01-01,-1,2\n2019-01-02,3,0\n", missing="-1,0").values["value"] == [
        [None, 2],
        [3, None],
    ]


def test_wide_values_are_the_places_to_take(read_table):
    text = "time,temp,a,b\n2019-01-01 00:00,-3,1,2\n2019-01-01 01:00,-4,3,4\n"
    read = read_table(text, values="b,a", layout="wide")
    assert read.ids == ["b", "a"] and read.values == {"value": [[2, 1], [4, 3]]}
    read = read_table(text, values="b,a", units="trips")
    assert (
        read.ids == ["city"] and read.values == {"b": [[2], [4]], "a": [[1], [3]]} and read.plan.spec.units == "trips"
    )


def test_blocks_of_any_size_are_one_table(read_table, monkeypatch):
    """Blocks end at line ends outside quotes, wherever the bytes of a read end."""
    rows = [f'"p\n{n % 2}",2019-01-01 {n // 2:02}:00,{n}' for n in range(40)]
    text = "id,time,v\n" + "\n".join(rows) + "\n"
    expected = read_table(text)
    assert expected.values["v"] == [[2 * n, 2 * n + 1] for n in range(20)] and expected.ids == ["p\n0", "p\n1"]
    for size in (1, 7, 64, 65):
        monkeypatch.setattr(table_text, "BLOCK", size)
        assert read_table(text).values == expected.values


def test_a_wide_table_is_read_once_and_lines_are_counted_through_blocks(read_table, refused, monkeypatch):
    monkeypatch.setattr(table_text, "BLOCK", 100)
    rows = [
        f"{stamp},{n},0.5"
        for n, stamp in enumerate(np.datetime64("2019-01-01T00:00") + np.arange(60) * np.timedelta64(1, "h"))
    ]
    read = read_table("time,a,b\n# a remark\n" + "\n".join(rows) + "\n")
    assert [row[0] for row in read.values["value"]] == list(range(60))
    rows[50] = rows[50].replace("0.5", "x")
    with refused("line 53, column 'b': 'x' is not a finite number"):
        read_table("time,a,b\n# a remark\n" + "\n".join(rows) + "\n")


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("a.pkl", b"\x80\x04\x95abc.", "is a pickle, which could run any program"),
        ("a.csv", b"\x80\x04\x95abc.", "is a pickle"),
        ("a.xlsx", b"\xd0\xcf\x11\xe0", "is an Excel workbook"),
        ("a.csv.zst", b"\x28\xb5\x2f\xfd", "is packed with zstd; unpack it first: unzstd a.csv.zst"),
        ("a.zip", b"PK\x03\x04 cut", "is a zip archive that was cut short"),
        ("a.csv.gz", b"\x1f\x8b\x08\x00cut", "gzip stream is damaged or was cut short"),
        ("a.parquet", b"PAR1", "no Parquet file, or was cut short"),
        ("a.csv", b"<!DOCTYPE html><html>", "is a page of HTML, as servers send"),
        ("a.csv", b"version https://git-lfs.github.com/spec/v1\noid x\n", "is a pointer of Git LFS"),
        ("a.h5", b"\x89HDF\r\n\x1a\n", "no HDF5 file|cut short|is damaged"),
    ],
)
def test_what_a_file_is(read_table, refused, name, content, line):
    with refused(line):
        read_table({name: content}, **STEPS)
