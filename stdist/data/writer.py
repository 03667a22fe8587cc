"""Writes a grid store in three phases: init, one call per local day, finalise.

Everything is written to ``OUT.partial`` and renamed at the end, so that a killed or failing preparation
leaves nothing under the final name. One writer owns whole shards: a day is written at once, so days may be
written by several processes, each day by one of them (concurrent partial shard writes lose data silently).
"""

import shutil
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import zarr
from zarr.codecs import BloscCodec, ZstdCodec

from stdist.data.imputation import Known, first_known, interpolate, last_known
from stdist.data.integrity import combined_digest, file_digests
from stdist.data.schema import (
    GridSpec,
    chunk_and_shard,
    fill_short_absences,
    observed_name,
    runs_of,
    train_mean_name,
)
from stdist.data.spans import DaySpan, Split, default_split
from stdist.data.statistics import StatisticsState
from stdist.errors import InputError

MAX_GAP = 6
"""Absent stretches of at most this many frames between present ones are imputed; longer ones are gaps."""

Segment = tuple[int, int, bool, bool]
"""[start, stop) of a run inside one day; whether it comes from the day before, goes on into the next."""


class GridWriter:
    """One store in the making; as a context manager it removes its partial output when left by an exception.

    out: final path, must not exist (InputError). recipe: what made the store, JSON. sources: the raw files,
    whose names and sizes are recorded.
    """

    def __init__(self, out: Path, spec: GridSpec, recipe: Mapping[str, Any], sources: Sequence[Path] = ()) -> None:
        self.out, self.spec = Path(out), spec
        if self.out.exists():
            raise InputError(f"{self.out} exists already; remove it or choose another name")
        self.partial = self.out.with_name(self.out.name + ".partial")
        shutil.rmtree(self.partial, ignore_errors=True)
        self.partial.parent.mkdir(parents=True, exist_ok=True)
        self._group = zarr.create_group(self.partial, zarr_format=3)
        self._group.attrs.update(
            {
                **spec.attributes(),
                "recipe": dict(recipe),
                "sources": [{"name": Path(s).name, "bytes": Path(s).stat().st_size} for s in sources],
            }
        )
        self._create_coordinates()
        self._create_channels()

    def __enter__(self) -> "GridWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            shutil.rmtree(self.partial, ignore_errors=True)

    def write_day(self, day_index: int, values: Mapping[str, np.ndarray], present: np.ndarray | None = None) -> None:
        """Write one local day, counted from 0.

        values: per channel float32 [slots_per_day, H, W], NaN = missing. present: bool [slots_per_day],
        frames that the source has; all of them by default. A frame that is not present is never read again.
        """
        slots = self._slots(day_index)
        shape = (self.spec.slots_per_day, *self.spec.shape)
        here = np.ones(shape[0], bool) if present is None else np.asarray(present, bool)
        for channel in self.spec.channels:
            day = np.where(here[:, None, None], values[channel], np.float32(np.nan)).astype(np.float32)
            if day.shape != shape:
                raise ValueError(f"day {day_index} of {channel} has shape {day.shape}, the store {shape}")
            self._array(channel)[slots] = day
            self._array(observed_name(channel))[slots] = ~np.isnan(day)
        self._array("present")[slots] = here

    def finalise(self, split: Split | None = None, max_gap: int = MAX_GAP) -> Path:
        """Impute, fit the training statistics, digest, consolidate and rename; returns the final path.

        split: the store's default split; where None, ``spans.default_split`` of the days that hold data.
        """
        present = fill_short_absences(np.asarray(self._array("present")[:]), max_gap)
        if not present.any():
            raise InputError(f"{self.out}: no frame was written; the sources hold nothing for these days")
        self._array("present")[:] = present
        days = self._segments(present)
        split = split or default_split(self.spec.days[sorted(days)])
        statistics, coverage = {}, {}
        for channel in self.spec.channels:
            coverage[channel] = self._impute(channel, days)
            if split.train is not None:
                state = self._fit(channel, sorted(days), split.train)
                if state.count:
                    fitted = state.result(split.train)
                    statistics[channel] = fitted.as_attribute()
                    self._create(train_mean_name(channel), fitted.cell_mean, ("row", "col"))
        return self._seal(split, {"train_statistics": statistics, "coverage": coverage, "max_gap": max_gap})

    # Init

    def _create(self, name: str, data: np.ndarray, dims: tuple[str, ...], **attributes: Any) -> None:
        chunks = tuple(max(1, size) for size in data.shape)
        self._group.create_array(name, data=data, chunks=chunks, dimension_names=dims, attributes=attributes)

    def _create_coordinates(self) -> None:
        spec, (height, width) = self.spec, self.spec.shape
        units = "minutes since 1970-01-01 00:00:00"
        calendar = "proleptic_gregorian"
        self._create("time", spec.minutes, ("time",), units=units, calendar=calendar, standard_name="time")
        rows = np.arange(height) if spec.rows is None else spec.rows
        cols = np.arange(width) if spec.cols is None else spec.cols
        self._create("row", np.asarray(rows, np.int64), ("row",), long_name="row id of the data")
        self._create("col", np.asarray(cols, np.int64), ("col",), long_name="column id of the data")
        inside = np.ones(spec.shape, bool) if spec.inside is None else spec.inside
        grid = ("row", "col")
        self._create("cell_id", np.asarray(spec.cell_ids, np.int64), grid, long_name="cell id of the data")
        self._create("inside", np.asarray(inside, bool), grid, long_name="cell belongs to the city")
        for name, degrees in (("latitude", spec.latitude), ("longitude", spec.longitude)):
            if degrees is not None:
                unit = "degrees_north" if name == "latitude" else "degrees_east"
                self._create(name, np.asarray(degrees, float), grid, units=unit, standard_name=name)

    def _create_channels(self) -> None:
        spec = self.spec
        chunks, shards = chunk_and_shard(spec.slots_per_day, spec.shape)
        dims = ("time", "row", "col")
        for channel in spec.channels:
            for name, dtype, fill, codec in (
                (channel, "float32", float("nan"), BloscCodec(cname="zstd", clevel=1, shuffle="shuffle")),
                (observed_name(channel), "bool", False, ZstdCodec(level=1)),
            ):
                self._group.create_array(
                    name,
                    shape=(spec.frames, *spec.shape),
                    dtype=dtype,
                    chunks=chunks,
                    shards=shards,
                    fill_value=fill,
                    compressors=codec,
                    dimension_names=dims,
                    # xarray finds the coordinates that are not dimensions by this attribute alone.
                    attributes={
                        "coordinates": "cell_id",
                        **({"units": spec.units} if name == channel else {}),
                    },
                )
        # One chunk a day, as the shards: several processes may write days at once.
        self._group.create_array(
            "present",
            shape=(spec.frames,),
            dtype="bool",
            chunks=(spec.slots_per_day,),
            fill_value=False,
            dimension_names=("time",),
            attributes={"long_name": "frame exists in the source, or fills a short absence"},
        )

    # Finalise

    def _array(self, name: str) -> zarr.Array[Any]:
        array = self._group[name]
        assert isinstance(array, zarr.Array)
        return array

    def _slots(self, day: int) -> slice:
        return slice(day * self.spec.slots_per_day, (day + 1) * self.spec.slots_per_day)

    def _read(self, name: str, where: slice) -> np.ndarray:
        return np.asarray(self._array(name)[where])

    def _segments(self, present: np.ndarray) -> dict[int, list[Segment]]:
        """Per day that holds frames: its parts of runs, in global frame indices."""
        slots, days = self.spec.slots_per_day, {}
        for day in range(len(self.spec.days)):
            first, last = day * slots, (day + 1) * slots
            parts = [(first + a, first + b) for a, b in runs_of(present[first:last])]
            if parts:
                days[day] = [
                    (
                        a,
                        b,
                        a == first and a > 0 and bool(present[a - 1]),
                        b == last and bool(present[b : b + 1].any()),
                    )
                    for a, b in parts
                ]
        return days

    def _impute(self, channel: str, days: Mapping[int, list[Segment]]) -> dict[str, int]:
        """Eq. 20 over whole runs with one day in memory: known neighbours are carried across midnight.

        First backwards, leaving on disk what is known after each day; then forwards, filling. Returns how
        many values of present frames and inside cells are missing, and how many measured ones are zero.
        """
        scratch = self.partial / "scratch"
        scratch.mkdir(exist_ok=True)
        nothing = Known.none(self.spec.shape)
        following = nothing
        for day in sorted(days, reverse=True):
            *_, goes_on = days[day][-1]
            after = following if goes_on else nothing
            np.savez(scratch / f"{day}.npz", time=after.time, value=after.value)
            start, stop, goes_back, _ = days[day][0]
            if goes_back:
                where = slice(start, stop)
                first = first_known(self._read(channel, where), self._read(observed_name(channel), where), start)
                # Only a day-long segment lets the next day's values through to the day before.
                following = (after if len(days[day]) == 1 else nothing).updated(first)

        before, missing, zeros = nothing, 0, 0
        inside = self._read("inside", slice(None))
        for day in sorted(days):
            slots = self._slots(day)
            values, observed = self._read(channel, slots), self._read(observed_name(channel), slots)
            filled = values.copy()
            with np.load(scratch / f"{day}.npz") as table:
                after = Known(table["time"], table["value"])
            for start, stop, goes_back, goes_on in days[day]:
                left, right = before if goes_back else nothing, after if goes_on else nothing
                part = slice(start - slots.start, stop - slots.start)
                missing += int((~observed[part] & inside).sum())
                zeros += int((observed[part] & (values[part] == 0)).sum())
                filled[part] = interpolate(values[part], observed[part], start, left, right)
                before = left.updated(last_known(values[part], observed[part], start))
            if not observed.all():
                self._array(channel)[slots] = filled
        shutil.rmtree(scratch)
        return {"missing": missing, "true_zeros": zeros}

    def _fit(self, channel: str, days: Sequence[int], span: DaySpan) -> StatisticsState:
        state = StatisticsState(self.spec.shape)
        for day in days:
            if span.first_day <= self.spec.days[day] <= span.last_day:
                slots = self._slots(day)
                state.add(self._read(channel, slots), self._read(observed_name(channel), slots))
        return state

    def _seal(self, split: Split, results: Mapping[str, Any]) -> Path:
        files = file_digests(self.partial)
        self._group.attrs.update({"split": split.as_attribute(), **results, "files": files})
        self._group.attrs["digest"] = combined_digest(files, dict(self._group.attrs))
        with warnings.catch_warnings():
            # Consolidated metadata is an extension of Zarr v3 that xarray and zarr both read.
            warnings.filterwarnings("ignore", message="Consolidated metadata", category=UserWarning)
            zarr.consolidate_metadata(self.partial)
        if self.out.exists():
            raise InputError(f"{self.out} appeared meanwhile; remove it or choose another name")
        self.partial.rename(self.out)
        return self.out
