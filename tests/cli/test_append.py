"""``stdist append``: files like the store's own, read as these were; what does not fit is one line."""

from pathlib import Path

import pytest

from .conftest import DAYS, SLOTS, files_below

ROWS = DAYS * SLOTS


@pytest.fixture
def write(tmp_path):
    """Writes hours [first, last) of so many places, semicolons and decimal commas, dates day first."""

    def table(name: str, first: int, last: int, places: int = 4, minutes: int = 60, add: int = 0) -> Path:
        lines = [";".join(["when", *(f"s{place}" for place in range(places))])]
        for row in range(first, last):
            day, minute = divmod(row * minutes, 1440)
            stamp = f"{day + 1:02}.11.2013 {minute // 60:02}:{minute % 60:02}"
            values = [f"{5 + add + (row * 7 + 3 * place) % 50},5" for place in range(places)]
            lines.append(";".join([stamp, *values]))
        path = tmp_path / name
        path.write_text("\n".join(lines) + "\n")
        return path

    return table


@pytest.fixture
def store(stdist, write, tmp_path) -> Path:
    path = tmp_path / "city.zarr"
    options = ["--city", "milan", "--channel", "internet", "--units", "calls", "--utc-offset", "60", "--decimal", ","]
    assert stdist("prepare", "table", write("first.csv", 0, ROWS), "--out", path, *options).code == 0
    return path


def test_files_alone_are_read_as_the_stores_own_and_the_store_grows(stdist, store, write, tmp_path):
    result = stdist("append", store, write("more.csv", ROWS, ROWS + 2 * SLOTS), "--json")
    assert result.code == 0 and result.json["new_days"] == ["2013-11-09", "2013-11-10"], result
    assert result.json["frames"] == ROWS + 2 * SLOTS and result.json["changed_days"] == []
    check = stdist("check", store, "--json").json
    assert check["ok"] and not any("not of this store" in finding["what"] for finding in check["findings"])
    # One frame tells no cadence: the store's is taken. It lies behind a gap.
    result = stdist("append", store, write("one.csv", ROWS + 4 * SLOTS, ROWS + 4 * SLOTS + 1, places=3))
    assert "1 new days (2013-11-13 to 2013-11-13), 0 changed, 1 new of 241 frames" in result.out
    assert "1 places of the store are not in the files" in result.out
    gaps = stdist("check", store, "--json").json["gaps"]
    assert [gap["first"] for gap in gaps] == ["2013-11-11T00:00", "2013-11-13T01:00"]


def test_nothing_new_leaves_every_byte(stdist, store, tmp_path):
    before = files_below(tmp_path)
    result = stdist("append", store, tmp_path / "first.csv")
    assert result.code == 0 and "nothing new; the store is as it was" in result.out
    assert files_below(tmp_path) == before


def test_places_are_matched_by_id_in_any_order(stdist, store, tmp_path):
    rows = [line.split(";") for line in (tmp_path / "first.csv").read_text().splitlines()]
    turned = tmp_path / "turned.csv"
    turned.write_text("\n".join(";".join([row[0], *row[:0:-1]]) for row in rows) + "\n")
    result = stdist("append", store, turned)
    assert result.code == 0 and "nothing new" in result.out, result


def test_what_does_not_fit_is_one_line(refused, stdist, store, write, tmp_path):
    more = write("more.csv", ROWS, ROWS + SLOTS)
    assert "1 places of the files are none of" in refused("append", store, write("five.csv", 0, SLOTS, places=5))
    assert "30 minutes apart, not 60" in refused("append", store, write("half.csv", 0, SLOTS, minutes=30))
    other = write("other.csv", 0, 2, add=1)
    line = refused("append", store, other)
    assert "other values already for 8 of the new ones, the first: internet of node s0 at 2013-11-01T00:00 is" in line
    assert "units is km, that of" in refused("append", store, more, "--units", "km")
    assert "channels are speed" in refused("append", store, more, "--channel", "speed")
    assert "the split of" in refused("append", store, more, "--train", "2013-11-01:2013-11-02")
    assert "append takes the files" in refused("append", store)
    assert "No such option: --foo" in refused("append", store, more, "--foo")
    assert "is not a grid store" in refused("append", tmp_path / "none.zarr", more)
    assert stdist("append", store, other, "--corrections").code == 0
    later = tmp_path / "later.zarr"
    assert stdist("prepare", "table", more, "--out", later, "--city", "milan", "--utc-offset", "60").code == 0
    assert "before 2013-11-09, the first of" in refused("append", later, "--channel", "value", tmp_path / "first.csv")
