"""New days in a finished store, written beside it and put in its place in one step.

The rule. A value that the store lacks is taken. One that it has stays where the new one is equal; another one is
refused, or takes its place where the caller says that it corrects. A missing new value takes nothing away. Frames that
a short absence now lies between are present as in a preparation, longer absences are gaps, and imputed values follow
from what is observed on both sides. So a store of A to which B was appended holds the files, byte for byte, that a
preparation of A and B with A's split writes. Its split stays A's, and with it the training statistics, which are fitted
anew only where a value of a training day is new. ``sources`` has B's files behind A's, and ``grown_from`` tells what
the store was before: digests, so that a run of A's days is still known to be of this data (``audit``).

Atomic. All happens in the folder ``STORE.append``: a copy of the store whose shards are hard links, into which what
changes is written under new inodes, then sealed with new digests and exchanged with the store (``folders.exchange``).
Killed before that, the store is what it was; after it, what it became; what lies in ``STORE.append`` is removed by the
next append. A file system without such an exchange takes two renames: a kill between them leaves no store, and the next
append puts the old one back. Readers that have the store open go on: unchanged files have their bytes, and a changed
one is told from a damaged one by ``integrity.VerifiedStore``, in one line.
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import zarr

from stdist.data.audit import data_digest
from stdist.data.coordinates import Coordinate, create_array, present_coordinate, time_coordinate
from stdist.data.finalise import MAX_GAP, count_unseen, seal
from stdist.data.integrity import ROOT_METADATA, SourceRecord, require_unchanged
from stdist.data.metadata import GROWN_FROM
from stdist.data.parts import Day, Tile
from stdist.data.recorded_shards import RecordedShards
from stdist.data.refill import Version, days_to_fill, refill
from stdist.data.schema import fill_short_absences, observed_name, train_mean_name
from stdist.data.spans import DaySpan, all_cells
from stdist.data.statistics import fit_statistics
from stdist.data.store import open_store
from stdist.errors import InputError
from stdist.files import require_working_folder
from stdist.folders import copy_linked, exchange
from stdist.locks import WriterLock


@dataclass
class Growth:
    """Counts of what is new in a store. ``new_days``: local days that had no frame before; ``changed_days``: others
    that changed; ``new_frames``: time steps that did not exist; per channel ``late``: values that frames of the store
    lacked, ``corrected``: other values than the store had. ``first_conflict``: the place and time of the first of
    these, for people."""

    new_days: list[str] = field(default_factory=list)
    changed_days: list[str] = field(default_factory=list)
    new_frames: int = 0
    late: dict[str, int] = field(default_factory=dict)
    corrected: dict[str, int] = field(default_factory=dict)
    first_conflict: str = ""

    @property
    def is_nothing(self) -> bool:
        return not self.new_days and not self.changed_days


class StoreAppender:
    """Appends days to the store ``path``: a context manager, which holds the store for this process, takes days by
    ``begin`` and ``add``, and leaves the store as it was unless ``finish`` was reached.

    old: the store as it was. corrections: other values than the store's take their place. Raises InputError where
    ``path`` is no store or another process appends to it, DamageError where it is damaged.
    """

    def __init__(self, path: Path, corrections: bool = False) -> None:
        self.path, self.corrections = path.resolve(), corrections
        self._lock = lock_store(self.path)
        try:
            self.old = open_store(self.path)
        except BaseException:
            self._close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def begin(self, last_day: np.datetime64, sources: Sequence[Path] = ()) -> None:
        """last_day: the last local day that may be added. sources: the raw files, all of whose bytes are read."""
        self._sources = [SourceRecord.of(Path(source)) for source in sources]
        self.growth = Growth()
        old = self.old
        last_day = max(old.axis_days.last_day, last_day)
        steps = (int((last_day - old.axis_days.first_day).astype(int)) + 1) * old.slots_per_day
        self._copy(str(last_day), steps)
        self._old = RecordedShards(self.path, old.attributes)
        self._changed: dict[tuple[str, int], set[int]] = {}
        self._fresh: dict[str, set[int]] = {channel: set() for channel in old.channels}
        self._fitted: list[str] = []
        self._before = np.zeros(steps, bool)
        self._before[: len(old.present)] = old.present
        self._present = self._before.copy()
        for channel in old.channels:
            self.growth.late[channel] = self.growth.corrected[channel] = 0

    def _copy(self, last_day: str, steps: int) -> None:
        """Makes the working copy, with the axis of time of all days; of small arrays every byte is compared first."""
        old, work = self.old, working_folder(self.path) / "store"
        series = [name for channel in old.channels for name in (channel, observed_name(channel))]
        if work.parent.exists():
            shutil.rmtree(work.parent)
        copy_linked(self.path, work, old.attributes["files"], lambda file: "/c/" in file)
        attributes = {**old.attributes, "last_day": last_day}
        group = zarr.create_group(work, zarr_format=3, attributes=attributes)
        self._new = RecordedShards(work, attributes, named=self.path)
        self._new.require_sound("inside", "since")
        for file in list(old.attributes["files"]):
            if file.endswith(f"/{ROOT_METADATA}"):
                self._new.require_file(file)
        first, cadence = old.times[0].astype("datetime64[m]").astype(np.int64), old.attributes["cadence_minutes"]
        minutes = first + np.arange(steps, dtype=np.int64) * cadence
        if steps != len(old.times):
            create_array(group, time_coordinate(minutes))
            for name in series:
                array = group[name]
                assert isinstance(array, zarr.Array)
                array.resize((steps, *array.shape[1:]))

    def add(self, day: Day) -> None:
        """Takes in a day, or a tile of one, counted from the store's first day."""
        shards, slots = self._new, self.old.slots_per_day
        where = shards.slots(day.index)
        present = np.ones(slots, bool) if day.present is None else np.asarray(day.present, bool)
        self._present[where] |= present
        for number, tile in enumerate(shards.tiles):
            if day.tile is not None and day.tile != tile:
                continue
            inner = tile if day.tile is None else tuple(slice(None) for _ in tile)
            keep = present.reshape(-1, *(1 for _ in tile)) & shards.exists(day.index, tile)
            for channel in shards.channels:
                values = np.where(keep, day.values[channel][(slice(None), *inner)], np.float32(np.nan))
                self._merge(channel, day.index, number, tile, values.astype(np.float32))

    def _merge(self, channel: str, day: int, number: int, tile: Tile, values: np.ndarray) -> None:
        """values: float32 [slots_per_day, *tile], NaN = missing."""
        shards = self._new
        had, stored = shards.read(observed_name(channel), day, tile), shards.read(channel, day, tile)
        seen = ~np.isnan(values)
        late, other = seen & ~had, seen & had & (values != stored)
        if other.any():
            self._note_conflict(channel, day, tile, values, stored, other)
        if not late.any() and not (other.any() and self.corrections):
            return
        self.growth.late[channel] += int(late[self._before[shards.slots(day)]].sum())
        self._changed.setdefault((channel, number), set()).add(day)
        self._fresh[channel].add(day)
        merged = np.where(seen, values, np.where(had, stored, np.float32(np.nan)))
        shards.write(channel, day, tile, merged)
        if late.any():
            shards.write(observed_name(channel), day, tile, had | seen)

    def _note_conflict(
        self, channel: str, day: int, tile: Tile, values: np.ndarray, stored: np.ndarray, other: np.ndarray
    ) -> None:
        if not any(self.growth.corrected.values()):
            slot, *place = np.argwhere(other)[0].tolist()
            cell = tuple(side.start + index for side, index in zip(tile, place, strict=True))
            stamp = self.old.local_times[self.old.slots_per_day * day + slot].astype("datetime64[m]")
            self.growth.first_conflict = (
                f"{channel} of {'node' if len(cell) == 1 else 'cell'} {self.old.cell_ids[cell]} at {stamp} is "
                f"{values[slot, *place]:g} and was {stored[slot, *place]:g}"
            )
        self.growth.corrected[channel] += int(other.sum())

    def finish(self) -> Growth:
        """Imputes, counts, seals and puts the store in its place, if anything is new; returns what was.

        Raises InputError where values are other than the store's and are no corrections, or a source changed while it
        was read.
        """
        growth, old = self.growth, self.old
        if not self.corrections and (count := sum(growth.corrected.values())):
            raise InputError(
                f"{self.path} has other values already for {count} of the new ones, the first: "
                f"{growth.first_conflict}; give --corrections where the new ones are right"
            )
        present = fill_short_absences(self._present, old.attributes.get("max_gap", MAX_GAP))
        by_day = (flags.reshape(-1, old.slots_per_day) for flags in (self._before, present))
        before, after = by_day
        moved = set(np.flatnonzero((before != after).any(axis=1)).tolist())
        every = moved.union(*self._changed.values())
        first = old.axis_days.first_day
        growth.new_days = [str(first + day) for day in sorted(every) if not before[day].any()]
        growth.changed_days = [str(first + day) for day in sorted(every) if before[day].any()]
        growth.new_frames = int((present & ~self._before).sum())
        if growth.is_nothing:
            return growth
        require_unchanged(self._sources)
        create_array(self._new.group, present_coordinate(present))
        files, attributes = self._computed(present, moved)
        seal(self._new.path, files, attributes)
        put_in_place(self.path)
        return growth

    def _computed(self, present: np.ndarray, moved: set[int]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Records of all shards, and the attributes that depend on what is new."""
        old = self.old
        new = RecordedShards(self._new.path, self._new.attributes, named=self.path)
        new.take_over(self._new)
        coverage, statistics, unseen = {}, dict(old.attributes["train_statistics"]), {}
        for channel in old.channels:
            coverage[channel] = dict(old.coverage[channel])
            for number, tile in enumerate(new.tiles):
                changed = moved | self._changed.get((channel, number), set())
                was = Version.of(self._old, old.present, channel, tile)
                version = Version.of(new, present, channel, tile)
                days = days_to_fill(was, version, changed)
                counts, minus = {}, was.coverage(days)
                counts = refill(version, days, old.default_split, self._scratch / f"{channel} {number}")
                for name in coverage[channel]:
                    coverage[channel][name] += counts[name] - minus[name]
            self._fit(new, channel, statistics)
            unseen[channel] = self._unseen(new, channel)
        shutil.rmtree(self._scratch, ignore_errors=True)
        sources = [source.as_attribute() for source in self._sources]
        known = old.attributes["sources"]
        series = {name for channel in old.channels for name in (channel, observed_name(channel))}
        attributes = {
            "train_statistics": statistics,
            "coverage": coverage,
            "unseen": unseen,
            "sources": [*known, *(source for source in sources if source not in known)],
            GROWN_FROM: {
                "digests": [*old.earlier_digests, old.digest],
                "data": {channel: data_digest(old, channel) for channel in old.channels},
            },
        }
        again = ("time", "present", *self._fitted)
        files = {
            name: record
            for name, record in new.records.items()
            if (array := name.split("/")[0]) not in again and not (array in series and name.endswith(ROOT_METADATA))
        }
        return files, attributes

    def _fit(self, new: RecordedShards, channel: str, statistics: dict[str, Any]) -> None:
        """Fits the training statistics again where a training day has a new value."""
        train = self.old.default_split.train
        if train is None or not self._has_fresh(new, channel, train):
            return
        new.require_sound(channel, observed_name(channel))
        fitted = fit_statistics(new, channel, train, all_cells(new.shape))
        statistics[channel] = fitted.as_attribute()
        create_array(new.group, Coordinate(train_mean_name(channel), fitted.cell_mean, new.dims))
        self._fitted.append(train_mean_name(channel))

    def _unseen(self, new: RecordedShards, channel: str) -> dict[str, int]:
        """Counts again what can have changed: of cells without a value, where there are some; of those without one in
        training, where a day of the split has a new value."""
        split, counts = self.old.default_split, dict(self.old.unseen.get(channel, {}))
        touched = any(self._has_fresh(new, channel, span) for span in (split.train, split.validation, split.test))
        train, scoring = new.within(split.train), new.within(split.validation) | new.within(split.test)
        if counts and not counts["never_observed"] and not touched:
            return counts
        seen, scored, trained = (np.zeros(new.shape, bool) for _ in range(3))
        for day in range(len(self._present) // new.slots_per_day):
            slots = new.slots(day)
            for tile in new.tiles:
                observed = new.read(observed_name(channel), day, tile)
                seen[tile] |= observed.any(axis=0)
                scored[tile] |= observed[scoring[slots]].any(axis=0)
                trained[tile] |= observed[train[slots]].any(axis=0)
        return count_unseen(new.inside, seen, scored, trained)

    def _has_fresh(self, new: RecordedShards, channel: str, span: DaySpan | None) -> bool:
        """Returns whether a shard with a new value has time steps of ``span``."""
        within = new.within(span)
        return any(within[new.slots(day)].any() for day in self._fresh[channel])

    @property
    def _scratch(self) -> Path:
        return working_folder(self.path) / "scratch"

    def _close(self) -> None:
        if self.path.exists():  # else the old store lies there
            shutil.rmtree(working_folder(self.path), ignore_errors=True)
        self._lock.close()


def working_folder(path: Path) -> Path:
    return path.with_name(path.name + ".append")


def lock_store(path: Path) -> WriterLock:
    """Holds a store for this process, and puts back what a kill took away; raises InputError where another has it."""
    lock = WriterLock(path.with_name(path.name + ".append.lock"), path)
    try:
        folder = working_folder(path)
        ours = {"store", "scratch", "old"}
        require_working_folder(folder, is_ours=folder.is_dir() and {file.name for file in folder.iterdir()} <= ours)
        if not path.exists() and (folder / "old").is_dir():
            (folder / "old").rename(path)
    except BaseException:
        lock.close()
        raise
    return lock


def recover(path: Path) -> None:
    """Puts the store ``path`` back where an append was killed between its two renames."""
    if not path.exists() and (working_folder(path) / "old").is_dir():
        lock_store(path).close()


def put_in_place(path: Path) -> None:
    """Exchanges a store with its finished working copy."""
    folder = working_folder(path)
    if not exchange(folder / "store", path):
        path.rename(folder / "old")
        try:
            (folder / "store").rename(path)
        except BaseException:
            (folder / "old").rename(path)
            raise
