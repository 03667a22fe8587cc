"""Days appended to a store: the store of a preparation of everything, or the store as it was."""

import multiprocessing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from stdist.data import Day, DaySpan, GridSpec, GridStore, GridWriter, NodeSpec, Split, append, open_store
from stdist.data.append import StoreAppender
from stdist.data.check import check_store
from stdist.data.metadata import GROWN_FROM

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


@pytest.mark.parametrize("seed", range(12))
def test_appended_days_make_the_store_of_all_days(tmp_path, seed):
    toy = city(seed)
    toy.write(tmp_path / "grown.zarr", 6)
    for days in ([6], [7, 8]):
        toy.append(tmp_path / "grown.zarr", days)
    require_equal(open_store(tmp_path / "grown.zarr"), toy.write(tmp_path / "whole.zarr", toy.days))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["grown.zarr", "whole.zarr"]


@pytest.mark.parametrize("seed", range(12))
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
