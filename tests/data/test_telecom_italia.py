"""The raw text of the Telecom Italia challenge: sums, round trip, and every way a file can be broken."""

from pathlib import Path

import numpy as np
import pytest

from data_prep import READERS
from data_prep.synthetic import activities, write_raw
from data_prep.telecom_text import CHANNELS
from stdist.data import open_store
from stdist.data.synthetic import SyntheticCity, generate
from stdist.errors import InputError

prepare = READERS["telecom-italia"].prepare
MIDNIGHT = 1383260400000
GOOD = f"1\t{MIDNIGHT}\t0\t0.5\t\t\t\t\n1\t{MIDNIGHT}\t39\t0.25\t1\t\t\t7.5\n"


def _write(folder: Path, text: str, name: str = "sms-call-internet-mi-2013-11-01.txt") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_sums_over_countries_by_hand(tmp_path):
    """Square 102 is row 1, column 1; square 1 at 00:10 has no row and is missing, not zero."""
    later = MIDNIGHT + 600_000
    path = _write(tmp_path, GOOD + f"102\t{MIDNIGHT}\t39\t\t\t2\t\t\n102\t{later}\t39\t\t\t\t\t4\n")
    store = open_store(prepare([path], tmp_path / "out.zarr").path)
    first = {name: store.values(name, 0, 1)[0] for name in CHANNELS}
    assert [float(first[name][0, 0]) for name in CHANNELS] == [0.75, 1, 0, 0, 7.5]
    assert first["call_in"][1, 1] == 2 and first["internet"][1, 1] == 0
    assert store.observed("internet", 0, 2)[:, 0, 0].tolist() == [True, False]
    assert store.observed("internet", 0, 2)[:, 1, 1].tolist() == [True, True]
    assert store.coverage["internet"]["true_zeros"] == 1
    # Frames without any row do not exist.
    assert store.runs == [(0, 2)] and store.times[0] == np.datetime64("2013-10-31T23:00")
    assert store.cell_ids[1, 1] == 102 and store.units == "rescaled activity"


def test_generator_to_raw_text_to_store_is_exact(tmp_path):
    """A 4 x 3 city placed at squares (20 + r) * 100 + (30 + c) + 1, over two days."""
    city = SyntheticCity(4, 3, days=2, seed=5, missing_share=0.02)
    ids = (20 + np.arange(4))[:, None] * 100 + 30 + np.arange(3) + 1
    write_raw(city, tmp_path / "raw", ids)
    store = open_store(prepare([tmp_path / "raw"], tmp_path / "out.zarr").path)
    for day, internet in generate(city):
        where = slice(day * 144, day * 144 + 144)
        for name, written in activities(city, day, internet).items():
            seen = store.observed(name, where.start, where.stop)
            np.testing.assert_array_equal(seen[:, 20:24, 30:33], ~np.isnan(written))
            assert seen.sum() == (~np.isnan(written)).sum()
            read = store.values(name, where.start, where.stop)[:, 20:24, 30:33]
            np.testing.assert_array_equal(read[~np.isnan(written)], written[~np.isnan(written)])
    lines = (tmp_path / "raw" / "sms-call-internet-mi-2013-11-01.txt").read_text().splitlines()
    countries = {line.split("\t")[2] for line in lines}
    assert len(lines) > 2 * 144 * 12 and len(countries) > 5 and any("\t\t" in line for line in lines)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", "line 1: '' is not a row"),
        (GOOD + "2\t1383260400000\t39\t1\t1\t1\n", "line 3: 6 columns instead of 8"),
        (GOOD + "2\t138326", "line 3: 2 columns instead of 8"),
        (GOOD + "2\t1383260400000\t39\t1\t1\t1\t1\t1\t1\n", "line 3: 9 columns instead of 8"),
        (
            GOOD + "2\t1383260400001\t39\t1\t1\t1\t1\t1\n",
            r"line 3: stamp off the 10-minute grid \(1383260400001\)",
        ),
        (GOOD + "2\t1383346800000\t39\t1\t1\t1\t1\t1\n", "line 3: stamp outside 2013-11-01"),
        (GOOD + "10001\t1383260400000\t39\t1\t1\t1\t1\t1\n", r"line 3: square outside 1 … 10000 \(10001\)"),
        (GOOD + "0\t1383260400000\t39\t1\t1\t1\t1\t1\n", r"line 3: square outside 1 … 10000 \(0\)"),
        (GOOD + "2\t1383260400000\t39\t1\tx\t1\t1\t1\n", "line 3, column 5: 'x' is not a finite number"),
        (GOOD + "2\t1383260400000\t39\t1\t1\t1\t1\tinf\n", "line 3, column 8: 'inf'"),
        (GOOD + "2\t1383260400000\t39\t1\t1\t-4\t1\t1\n", r"line 3: negative activity \(-4.0\)"),
        ("datetime,CellID,countrycode,smsin,smsout,callin,callout,internet\n", "hourly re-release"),
        ("1,1383260400000,39,1,1,1,1,1\n", "not a row of the raw format"),
    ],
)
def test_broken_files_are_named_with_their_line(tmp_path, text, line):
    path = _write(tmp_path, text)
    with pytest.raises(InputError, match=line) as error:
        prepare([path], tmp_path / "out.zarr")
    assert path.name in str(error.value) and "\n" not in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_two_files_of_one_day_are_both_named(tmp_path):
    paths = [_write(tmp_path, GOOD, name) for name in ("a.txt", "b.txt")]
    with pytest.raises(InputError, match=r"a\.txt and .*b\.txt both hold 2013-11-01"):
        prepare(paths, tmp_path / "out.zarr")


def test_trentino_and_missing_files_are_refused(tmp_path):
    trentino = _write(tmp_path, GOOD, "sms-call-internet-tn-2013-11-01.txt")
    (tmp_path / "empty").mkdir()
    for sources, line in (
        ([trentino], "no rectangle"),
        ([tmp_path / "absent.txt"], "is not a file"),
        ([tmp_path / "empty"], "none was found"),
        ([], "none was found"),
    ):
        with pytest.raises(InputError, match=line):
            prepare(sources, tmp_path / "out.zarr")


def test_a_missing_day_is_a_gap(tmp_path):
    third = MIDNIGHT + 2 * 86_400_000
    paths = [
        _write(tmp_path, GOOD, "a.txt"),
        _write(tmp_path, GOOD.replace(str(MIDNIGHT), str(third)), "b.txt"),
    ]
    store = open_store(prepare(paths, tmp_path / "out.zarr").path)
    assert store.runs == [(0, 1), (288, 289)] and len(store.times) == 432
    assert [source["name"] for source in store.attributes["sources"]] == ["a.txt", "b.txt"]
