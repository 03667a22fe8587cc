"""The raw text of the Telecom Italia challenge: sums, round trip, and every way a file can be broken."""

import gzip
import pickle
from pathlib import Path

import numpy as np
import pytest

from data_prep import READERS, telecom_rows
from data_prep.telecom_rows import CHANNELS
from stdist.data import open_store
from stdist.data.synthetic import SyntheticCity, generate
from stdist.errors import InputError

plan, prepare = READERS["telecom-italia"].plan, READERS["telecom-italia"].prepare
MIDNIGHT = 1383260400000
GOOD = f"1\t{MIDNIGHT}\t0\t0.5\t\t\t\t\n1\t{MIDNIGHT}\t39\t0.25\t1\t\t\t7.5\n"


def _write(folder: Path, text: str, name: str = "sms-call-internet-mi-2013-11-01.txt") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def _days(sources):
    """What the parts of a plan yield."""
    made = plan(sources)
    return [day for part in made.parts for day in made.read(part)]


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
    assert store.segments == [(0, 2)] and store.times[0] == np.datetime64("2013-10-31T23:00")
    assert store.cell_ids[1, 1] == 102 and store.units == "rescaled activity"


def test_generator_to_raw_text_to_store_is_exact(tmp_path, raw_telecom):
    """A 4 x 3 city placed at squares (20 + r) * 100 + (30 + c) + 1, over two days."""
    city = SyntheticCity(4, 3, days=2, seed=5, missing_share=0.02)
    ids = (20 + np.arange(4))[:, None] * 100 + 30 + np.arange(3) + 1
    raw_telecom.write_raw(city, tmp_path / "raw", ids)
    store = open_store(prepare([tmp_path / "raw"], tmp_path / "out.zarr").path)
    for day, internet in generate(city):
        where = slice(day * 144, day * 144 + 144)
        for name, written in raw_telecom.activities(city, day, internet).items():
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
        (GOOD + "2\t1383260400000\t39\t1\t1\t1\t1\n", "line 3: 7 columns instead of 8"),
        # Seven columns and nine: as many separators as two whole rows have.
        (GOOD + "2\t1383260400000\t3\t1\t1\t1\t1\n3\t1383260400000\t3\t1\t1\t1\t1\t1\t1\n", "line 3: 7 columns"),
        (GOOD + "\n" + GOOD, "line 3: 1 columns instead of 8"),
        (GOOD + "x\t1383260400000\t39\t1\t1\t1\t1\t1\n", "line 3, column 1: 'x' is not a whole number"),
        (GOOD + "2\t1383260400000\t\t1\t1\t1\t1\t1\n", "line 3, column 3: '' is not a whole number"),
        (GOOD + "2\t1383260400\t39\t1\t1\t1\t1\t1\n", "line 3, column 2: '1383260400' is no epoch in milliseconds"),
        (GOOD + GOOD, "line 3: square, slot and country 0 are those of line 1"),
        (GOOD + "2\t1383260400000\t39\t1\t1\t1\t1\t7.5\r\n", r"line 3, column 8: '7.5\\r' is not a finite"),
        ("1\t13832604\t39\t1\t1\t1\t1\t1\n", "line 1: .* is not a row of the raw format"),
        (GOOD + "2\t1383260400000\t39\t1\t1\t1\n", "line 3: 6 columns instead of 8"),
        (GOOD + "2\t138326", "line 3: 2 columns instead of 8"),
        (GOOD + "2\t1383260400000\t39\t1\t1\t1\t1\t1\t1\n", "line 3: 9 columns instead of 8"),
        (
            GOOD + "2\t1383260400001\t39\t1\t1\t1\t1\t1\n",
            r"line 3: stamp off the 10-minute grid \(1383260400001\)",
        ),
        (GOOD + "2\t1383346800000\t39\t1\t1\t1\t1\t1\n", "line 3: stamp outside 2013-11-01"),
        (GOOD + "2\t1383259800000\t39\t1\t1\t1\t1\t1\n", "line 3: stamp outside 2013-11-01"),
        (
            GOOD + "123456789\t1383260400000\t39\t1\t1\t1\t1\t1\n",
            "line 3, column 1: '123456789' is negative or has too many digits",
        ),
        (GOOD + "10001\t1383260400000\t39\t1\t1\t1\t1\t1\n", r"line 3: square outside 1 … 10000 \(10001\)"),
        (GOOD + "0\t1383260400000\t39\t1\t1\t1\t1\t1\n", r"line 3: square outside 1 … 10000 \(0\)"),
        (GOOD + "2\t1383260400000\t39\t1\tx\t1\t1\t1\n", "line 3, column 5: 'x' is not a finite number"),
        (GOOD + "2\t1383260400000\t39\t1\t1\t1\t1\tinf\n", "line 3, column 8: 'inf'"),
        (GOOD + "2\t1383260400000\t39\tNaN\t1\t1\t1\t1\n", "line 3, column 4: 'NaN'"),
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


def test_other_files_are_refused(tmp_path):
    trentino = _write(tmp_path, GOOD, "sms-call-internet-tn-2013-11-01.txt")
    milan = _write(tmp_path, GOOD)
    (tmp_path / "empty").mkdir()
    (tmp_path / "released").mkdir()
    _write(tmp_path / "released", "datetime,CellID,countrycode,smsin,smsout,callin,callout,internet\n", "mi.csv")
    (tmp_path / "noise.txt.gz").write_bytes(b"not gzip")
    for sources, options, line in (
        ([trentino], {}, "no rectangle; give --geometry trentino-grid.geojson"),
        ([trentino, milan], {}, "mi-2013.* is of Milan, .*tn-2013.* of Trentino; prepare one store per city"),
        ([milan], {"city": "trentino"}, "mi-2013.* is of milan, not of trentino; check --city"),
        ([tmp_path / "absent.txt"], {}, "is not a file"),
        ([tmp_path / "empty"], {}, "none was found"),
        ([tmp_path / "released"], {}, r"mi\.csv is the hourly re-release"),
        ([tmp_path / "noise.txt.gz"], {}, r"noise\.txt\.gz, line 1: no gzip stream"),
        ([], {}, "none was found"),
    ):
        with pytest.raises(InputError, match=line):
            plan(sources, **options)


def test_gzip_reads_as_its_text_and_a_cut_stream_is_named(tmp_path, raw_telecom):
    city = SyntheticCity(2, 2, days=1, seed=3)
    [path] = raw_telecom.write_raw(city, tmp_path / "raw", np.array([[1, 2], [101, 102]]))
    packed = tmp_path / "gz" / (path.name + ".gz")
    packed.parent.mkdir()
    packed.write_bytes(gzip.compress(path.read_bytes()))
    [written], [read] = ([*_days([source])] for source in (path.parent, packed.parent))
    for name in CHANNELS:
        np.testing.assert_array_equal(written.values[name], read.values[name])
    packed.write_bytes(packed.read_bytes()[:-3000])
    with pytest.raises(InputError, match=r"mi-2013-11-01\.txt\.gz, after line \d+: the gzip stream is .*cut short"):
        [*_days([packed])]


def test_rows_in_any_order_make_the_same_day(tmp_path, raw_telecom, monkeypatch):
    """Sorted by time or shuffled, in blocks that part the rows of a pair: sums and repeated rows do not care."""
    city = SyntheticCity(2, 3, days=1, seed=4)
    [path] = raw_telecom.write_raw(city, tmp_path, np.arange(1, 7).reshape(2, 3))
    [as_written] = _days([path])
    lines = path.read_text().splitlines(keepends=True)
    monkeypatch.setattr(telecom_rows, "BLOCK", 5000)
    rng = np.random.default_rng(0)
    for order in (np.arange(len(lines)), rng.permutation(len(lines))):
        path.write_text("".join(lines[i] for i in order))
        [again] = _days([path])
        for name in CHANNELS:
            np.testing.assert_allclose(again.values[name], as_written.values[name], rtol=2e-7)
    path.write_text("".join([*lines, lines[700]]))
    with pytest.raises(InputError, match=f"line {len(lines) + 1}: .* are those of line 701; give each row once"):
        [*_days([path])]
    path.write_text("".join([*lines[:900], lines[900][:4], "\n", *lines[901:]]))
    with pytest.raises(InputError, match="line 901: 2 columns instead of 8"):
        [*_days([path])]


def test_trentino_lies_where_its_polygons_do(tmp_path, geometry_files):
    """24 squares of a 6 x 6 rectangle, scrambled ids: values, ids and centres by cell, nothing outside."""
    squares = geometry_files.odd_city()
    geometry = geometry_files.write_geometry(tmp_path / "trentino-grid.geojson", squares)
    rows = [f"{number}\t{MIDNIGHT}\t39\t\t\t\t\t{number}.5\n" for number in squares]
    path = _write(tmp_path, "".join(rows), "sms-call-internet-tn-2013-11-01.txt")
    store = open_store(prepare([path], tmp_path / "out.zarr", geometry=geometry).path)
    assert store.city == "trentino" and store.shape == (6, 6) and store.inside.sum() == 24
    internet, observed = store.values("internet", 0, 1)[0], store.observed("internet", 0, 1)[0]
    for number, place in squares.items():
        assert store.cell_ids[place] == number and internet[place] == number + 0.5
        longitude, latitude = geometry_files.corner(place[0] + 0.5, place[1] + 0.5)
        assert float(store.dataset.latitude[place]) == pytest.approx(latitude, abs=1e-6)
        assert float(store.dataset.longitude[place]) == pytest.approx(longitude, abs=1e-6)
    assert np.array_equal(observed, store.inside) and (store.cell_ids[~store.inside] == -1).all()
    assert store.coverage["internet"] == {"missing": 0, "true_zeros": 0}
    assert [source["name"] for source in store.attributes["sources"]] == [path.name, geometry.name]

    other = next(number for number in range(38, 400) if number not in squares)
    for wrong in (other, 400, 0):
        path.write_text("".join(rows) + f"{wrong}\t{MIDNIGHT}\t39\t\t\t\t\t1.5\n")
        with pytest.raises(InputError, match=rf"line 25: square outside those of trentino-grid.geojson \({wrong}\)"):
            prepare([path], tmp_path / "wrong.zarr", geometry=geometry)


def test_the_city_is_the_files_or_the_given_one(tmp_path):
    milan, bare = _write(tmp_path, GOOD), _write(tmp_path, GOOD, "day.txt")
    assert plan([milan]).spec.city == plan([bare]).spec.city == "milan"
    assert plan([bare], city="toytown").spec.city == "toytown"
    assert plan([bare], city="toytown").spec.cell_ids[99, 99] == 10000


def test_a_missing_day_is_a_gap(tmp_path):
    third = MIDNIGHT + 2 * 86_400_000
    paths = [
        _write(tmp_path, GOOD, "a.txt"),
        _write(tmp_path, GOOD.replace(str(MIDNIGHT), str(third)), "b.txt"),
    ]
    store = open_store(prepare(paths, tmp_path / "out.zarr").path)
    assert store.segments == [(0, 1), (288, 289)] and len(store.times) == 432
    assert [source["name"] for source in store.attributes["sources"]] == ["a.txt", "b.txt"]


def test_a_missing_day_is_reported(tmp_path):
    files = [_write(tmp_path, GOOD.replace(str(MIDNIGHT), str(MIDNIGHT + n * 86_400_000)), f"{n}.txt") for n in (0, 2)]
    made = plan(files)
    assert [part.days for part in made.parts] == [(0,), (2,)]
    assert prepare(files, tmp_path / "out.zarr").absent_days == ("2013-11-02",)


def test_a_plan_travels_to_another_process(tmp_path):
    made = pickle.loads(pickle.dumps(plan([_write(tmp_path, GOOD)])))
    [day] = made.read(made.parts[0])
    assert day.index == 0 and day.values["sms_in"][0, 0, 0] == 0.75 and day.present.sum() == 1
