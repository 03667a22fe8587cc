"""Days appended to a store: the store of a preparation of everything, or the store as it was."""

import multiprocessing
import os
import shutil
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import zarr

from data_prep.append import Places
from stdist import folders
from stdist.data import (
    Day,
    DaySpan,
    GridSpec,
    GridStore,
    GridWriter,
    NodeSpec,
    Split,
    append,
    finalise,
    open_store,
    shards,
)
from stdist.data.append import StoreAppender
from stdist.data.audit import data_digest
from stdist.data.check import check_store
from stdist.data.metadata import GROWN_FROM
from stdist.errors import DamageError, InputError

from .killing import kill_at

DAY = np.datetime64("2024-03-01")
SLOTS = 8
SPLIT = Split(DaySpan(DAY, DAY + 2), DaySpan(DAY + 3, DAY + 3), DaySpan(DAY + 4, DAY + 5))

fork = multiprocessing.get_context("fork")


@dataclass(frozen=True)
class City:
    """values: per channel float32 [T, *shape], NaN = missing; present: bool [T]; since: of nodes."""

    values: dict[str, np.ndarray]
    present: np.ndarray
    since: np.ndarray | None = None

    @property
    def days(self) -> int:
        return len(self.present) // SLOTS

    def write(self, out: Path, days: int) -> GridStore:
        """A store of the first ``days``."""
        shape = next(iter(self.values.values())).shape[1:]
        ids = np.arange(np.prod(shape)).reshape(shape)
        more = {"since": self.since} if len(shape) == 1 else {}
        kind = GridSpec if len(shape) == 2 else NodeSpec
        spec = kind("toy", tuple(self.values), DAY, DAY + (days - 1), ids, 1440 // SLOTS, **more)
        with GridWriter(out, spec, {"reader": "test"}) as writer:
            for day in self.read(range(days)):
                writer.write_day(day.index, day.values, day.present)
            return open_store(writer.finalise(SPLIT))

    def read(self, days: range | list[int]) -> Iterator[Day]:
        for day in days:
            where = slice(day * SLOTS, (day + 1) * SLOTS)
            if self.present[where].any():
                yield Day(day, {name: v[where] for name, v in self.values.items()}, self.present[where])

    def append(self, path: Path, days: range | list[int], corrections: bool = False) -> append.Growth:
        with StoreAppender(path, corrections) as appender:
            appender.begin(DAY + max(days))
            for day in self.read(days):
                appender.add(day)
            return appender.finish()


def city(seed: int, shape: tuple[int, ...] = (2, 3), days: int = 9, channels: int = 2) -> City:
    """Values that are missing at random, for days and for ever, frames that are absent for long and for short."""
    rng = np.random.default_rng(seed)
    values = {}
    for channel in range(channels):
        of_channel = rng.integers(0, 40, (days * SLOTS, *shape)).astype(np.float32)
        of_channel[rng.random(of_channel.shape) < 0.3] = np.nan
        places = of_channel.reshape(len(of_channel), -1)
        for place in range(places.shape[1]):
            start, stop = np.sort(rng.integers(0, len(places), 2))
            if rng.random() < 0.7:
                places[start:stop, place] = np.nan
        places[:, 0] = np.nan
        values[f"channel{channel}"] = of_channel
    present = np.ones(days * SLOTS, bool)
    for length in rng.integers(1, 14, 3):
        start = rng.integers(0, len(present))
        present[start : start + length] = False
    present[[0, -1]] = True
    return City(values, present)


def require_equal(grown: GridStore, whole: GridStore) -> None:
    """Every file and attribute, but what tells that the store has grown."""
    assert grown.attributes["files"] == whole.attributes["files"]
    for name, record in whole.attributes["files"].items():
        assert (grown.path / name).stat().st_size == record["bytes"]
    told = {GROWN_FROM, "digest"}
    mine, other = ({n: v for n, v in s.attributes.items() if n not in told} for s in (grown, whole))
    assert mine == other
    report = check_store(grown.path)
    assert report.ok and not any("not of this store" in finding.what for finding in report.findings)
    assert sorted(p.name for p in grown.path.iterdir()) == sorted(p.name for p in whole.path.iterdir())


@pytest.mark.parametrize("seed", range(5))
def test_appended_days_make_the_store_of_all_days(tmp_path, seed):
    toy = city(seed)
    toy.write(tmp_path / "grown.zarr", 6)
    for days in ([6], [7, 8]):
        toy.append(tmp_path / "grown.zarr", days)
    require_equal(open_store(tmp_path / "grown.zarr"), toy.write(tmp_path / "whole.zarr", toy.days))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["grown.zarr", "whole.zarr"]


@pytest.mark.parametrize("seed", range(5))
def test_late_values_in_any_day_make_the_store_of_all_values(tmp_path, seed):
    """The first preparation lacked values and frames of old days, in training days too."""
    toy = city(seed)
    rng = np.random.default_rng(seed + 100)
    lacking = {name: np.where(rng.random(v.shape) < 0.1, np.nan, v) for name, v in toy.values.items()}
    present = toy.present.copy()
    present[rng.integers(1, 6 * SLOTS, 5)] = False
    City(lacking, present).write(tmp_path / "grown.zarr", 7)
    days = sorted({*rng.integers(0, 7, 3).tolist(), 7})
    growth = toy.append(tmp_path / "grown.zarr", days)
    assert not any(growth.corrected.values())
    toy.append(tmp_path / "grown.zarr", range(9))
    require_equal(open_store(tmp_path / "grown.zarr"), toy.write(tmp_path / "whole.zarr", toy.days))


def test_tiles_of_a_large_raster_and_nodes_that_begin_late(tmp_path):
    large = city(3, (257, 2), days=7, channels=1)
    large.write(tmp_path / "large.zarr", 6)
    large.append(tmp_path / "large.zarr", [6])
    require_equal(open_store(tmp_path / "large.zarr"), large.write(tmp_path / "whole.zarr", 7))
    nodes = city(4, (5,))
    nodes = City(nodes.values, nodes.present, np.array([0, 2, 5, 7, 8]) + DAY)
    nodes.write(tmp_path / "nodes.zarr", 6)
    nodes.append(tmp_path / "nodes.zarr", [5, 6, 7, 8])
    require_equal(open_store(tmp_path / "nodes.zarr"), nodes.write(tmp_path / "all.zarr", 9))


def _append_until(path: Path, owner: object, name: str, count: int, before: bool, exchanges: bool) -> None:
    if not exchanges:
        append.exchange = lambda *_: False
    kill_at(owner, name, count, before)
    city(1).append(path, [6, 7, 8])


POINTS = [
    ("copying", folders, "_link", 9, False, True),
    ("in the first day", shards.Shards, "write", 2, False, True),
    ("before the imputation", append, "fill_short_absences", 1, True, True),
    ("in the imputation", append, "refill", 2, False, True),
    ("no digests", append, "seal", 1, True, True),
    ("digests", zarr, "consolidate_metadata", 1, False, True),
    ("before the exchange", append, "exchange", 1, True, True),
    ("behind the exchange", append, "exchange", 1, False, True),
    ("before two renames", Path, "rename", 1, True, False),
    ("between two renames", Path, "rename", 1, False, False),
    ("behind two renames", Path, "rename", 2, False, False),
]


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> tuple[GridStore, GridStore]:
    """A store of six days, and one of all nine."""
    folder = tmp_path_factory.mktemp("whole")
    return city(1).write(folder / "six.zarr", 6), city(1).write(folder / "nine.zarr", 9)


@pytest.mark.parametrize(
    ("owner", "name", "count", "before", "exchanges"),
    [point[1:] for point in POINTS],
    ids=[point[0] for point in POINTS],
)
def test_killed_anywhere_it_leaves_the_old_store_or_the_new(tmp_path, stores, owner, name, count, before, exchanges):
    path, (six, nine) = tmp_path / "toy.zarr", stores
    shutil.copytree(six.path, path)
    process = fork.Process(target=_append_until, args=(path, owner, name, count, before, exchanges))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    if not path.exists():
        assert (name, before, count) == ("rename", False, 1)
        append.recover(path)
    done = name in ("exchange", "rename") and not before and (name == "exchange" or count == 2)
    assert open_store(path).attributes["files"] == (nine if done else six).attributes["files"]
    assert check_store(path).ok
    assert city(1).append(path, [6, 7, 8]).is_nothing == done
    require_equal(open_store(path), nine)
    assert [file.name for file in tmp_path.iterdir()] == ["toy.zarr"]


def test_other_values_are_refused_with_the_first_of_them_and_taken_as_corrections(tmp_path, stores):
    six, _ = stores
    path = shutil.copytree(six.path, tmp_path / "toy.zarr")
    toy = city(1)
    values = {name: v.copy() for name, v in toy.values.items()}
    known = ~np.isnan(values["channel1"]) & toy.present[:, None, None]
    first, second = np.argwhere(known)[[5, 9]]
    values["channel1"][*first] += 1
    values["channel1"][*second] += 1
    other = City(values, toy.present)
    slot, row, col = first
    stamp = DAY.astype("datetime64[m]") + int(slot) * 180
    cell = row * 3 + col
    with pytest.raises(InputError, match=rf"for 2 of the new.*channel1 of cell {cell} at {stamp} is .* --corrections"):
        other.append(path, range(9))
    assert open_store(path).digest == six.digest and check_store(path).ok
    growth = other.append(path, range(9), corrections=True)
    assert growth.corrected == {"channel0": 0, "channel1": 2} and growth.late == {"channel0": 0, "channel1": 0}
    require_equal(open_store(path), other.write(tmp_path / "other.zarr", 9))
    # A missing value takes none away.
    empty = City({name: np.full_like(v, np.nan) for name, v in values.items()}, toy.present)
    assert empty.append(path, range(9), corrections=True).is_nothing


def test_readers_go_on_with_the_old_bytes_or_are_told(tmp_path, stores):
    path = shutil.copytree(stores[0].path, tmp_path / "toy.zarr")
    untouched, read_before = open_store(path), open_store(path)
    toy = city(1)
    values = {name: np.where(np.arange(len(v))[:, None, None] // SLOTS == 5, 77, v) for name, v in toy.values.items()}
    old = read_before.values("channel0", 0, 6 * SLOTS)
    City(values, toy.present).append(path, [5, 6], corrections=True)
    assert np.array_equal(read_before.values("channel0", 0, SLOTS), old[:SLOTS], equal_nan=True)
    for store in (untouched, read_before):
        with pytest.raises(InputError, match=r"toy\.zarr was changed while it was read.*run it again") as error:
            store.values("channel0", 5 * SLOTS, 6 * SLOTS)
        assert not isinstance(error.value, DamageError)
    assert (open_store(path).values("channel0", 5 * SLOTS, 6 * SLOTS)[toy.present[5 * SLOTS : 6 * SLOTS]] == 77).all()


def test_a_damaged_shard_is_not_made_good(tmp_path, stores):
    path = shutil.copytree(stores[0].path, tmp_path / "toy.zarr")
    shard = path / "channel0/c/5/0/0"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(DamageError, match=r"toy\.zarr is damaged: channel0/c/5/0/0 is not as it was written"):
        city(1).append(path, [5, 6])
    assert [file.name for file in tmp_path.iterdir()] == ["toy.zarr"] and shard.read_bytes() == content


def test_what_was_fitted_on_its_days_is_known_to_be_of_the_store(tmp_path, stores):
    six, _ = stores
    path = shutil.copytree(six.path, tmp_path / "toy.zarr")
    for day in (6, 7):
        city(1).append(path, [day])
    grown = open_store(path)
    assert data_digest(grown, "channel0") == data_digest(six, "channel0") != data_digest(stores[1], "channel0")
    assert grown.is_or_was(six.digest) and grown.is_or_was(grown.digest) and len(grown.earlier_digests) == 2
    assert not grown.is_or_was(stores[1].digest) and not six.is_or_was(grown.digest) and not six.is_or_was(None)


def test_a_second_append_is_refused_and_a_failed_one_leaves_the_store(tmp_path, stores):
    path = shutil.copytree(stores[0].path, tmp_path / "toy.zarr")
    with StoreAppender(path), pytest.raises(InputError, match=rf"toy\.zarr is being written by process {os.getpid()}"):
        StoreAppender(path)
    source = tmp_path / "raw.csv"
    source.write_text("1")
    with StoreAppender(path) as appender, pytest.raises(InputError, match=r"raw\.csv changed while it was read"):
        appender.begin(DAY + 6, [source])
        for day in city(1).read([6]):
            appender.add(day)
        source.write_text("two")
        appender.finish()
    assert open_store(path).digest == stores[0].digest
    assert sorted(file.name for file in tmp_path.iterdir()) == ["raw.csv", "toy.zarr"]


def test_a_value_behind_a_gap_is_no_neighbour(tmp_path, monkeypatch):
    """Place 0 is missing over a midnight and up to a gap in the new day, behind which another segment begins."""
    monkeypatch.setattr(finalise, "MAX_GAP", 2)
    values = np.arange(9.0 * SLOTS * 2, dtype=np.float32).reshape(9 * SLOTS, 1, 2)
    values[6 * SLOTS - 3 : 6 * SLOTS + 2, 0, 0] = np.nan
    present = np.ones(9 * SLOTS, bool)
    present[6 * SLOTS + 2 : 6 * SLOTS + 6] = False
    toy = City({"flow": values}, present)
    toy.write(tmp_path / "grown.zarr", 6)
    toy.append(tmp_path / "grown.zarr", [6, 7, 8])
    require_equal(open_store(tmp_path / "grown.zarr"), toy.write(tmp_path / "whole.zarr", 9))


def test_places_of_a_grid_are_those_inside_its_city(tmp_path):
    toy = city(0)
    store = toy.write(tmp_path / "toy.zarr", 6)
    ids = np.arange(6).reshape(2, 3)

    def spec(ids: np.ndarray, inside: np.ndarray | None = None) -> GridSpec:
        return GridSpec("toy", tuple(toy.values), DAY, DAY + 5, ids, 1440 // SLOTS, inside=inside)

    assert Places.of(store, spec(ids)).positions is None
    other = np.array([[0, 1, 99], [3, 4, 5]])
    with pytest.raises(InputError, match=r"1 places of the files are none of .*, the first: 99"):
        Places.of(store, spec(other))
    places = Places.of(store, spec(other, other != 99))
    assert places.positions is not None and places.positions.tolist() == [0, 1, -1, 3, 4, 5]
    assert places.without_data == 1, "2 is of the store and not of the files"


@pytest.mark.parametrize("place", [0, 2])
def test_a_place_of_the_same_id_elsewhere_is_refused(tmp_path, place):
    def spec(latitude: np.ndarray) -> NodeSpec:
        more = {"latitude": latitude, "longitude": np.zeros(3)}
        return NodeSpec("toy", ("flow",), DAY, DAY + 2, np.arange(3), 1440 // SLOTS, **more)

    degrees = np.array([45.0, 46.0, 47.0])
    with GridWriter(tmp_path / "toy.zarr", spec(degrees), {"reader": "test"}) as writer:
        for day in range(3):
            writer.write_day(day, {"flow": np.ones((SLOTS, 3), np.float32)})
        store = open_store(writer.finalise(Split(*(DaySpan(DAY + day, DAY + day) for day in range(3)))))
    moved = degrees.copy()
    moved[place] += 1
    with pytest.raises(
        InputError, match=f"1 places of the files lie elsewhere in .*, the first: {place}, whose latitude"
    ):
        Places.of(store, spec(moved))
