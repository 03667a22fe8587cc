"""Reads a grid store: a Zarr v3 group that plain ``xarray.open_zarr`` opens too."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import xarray
import zarr

from stdist.data.frame_cache import FrameCache
from stdist.data.integrity import ROOT_METADATA, combined_digest, damaged_files, require_whole
from stdist.data.schema import (
    FORMAT,
    FORMAT_VERSION,
    MINUTES_PER_DAY,
    observed_name,
    runs_of,
    tiles_of,
    train_mean_name,
)
from stdist.data.spans import AnyRegion, DaySpan, Split, parse_region, whole
from stdist.data.statistics import Statistics, StatisticsState
from stdist.data.windows import Windows
from stdist.errors import InputError


def open_store(path: str | Path) -> "GridStore":
    """Open a grid store.

    Reads metadata and file sizes only. Raises InputError with one line where the path is no grid store, or
    names the file that is missing or cut short.
    """
    root = Path(path)
    attributes = read_attributes(root)
    require_whole(root, attributes["files"])
    return GridStore(root, attributes)


def read_attributes(root: Path) -> dict[str, Any]:
    """The attributes of a finished store, looking at nothing else. Raises InputError where there is none."""
    metadata = root / ROOT_METADATA
    if not metadata.is_file():
        what = "holds no zarr.json" if root.is_dir() else "is not a folder" if root.exists() else "does not exist"
        raise InputError(f"{root} is not a grid store: it {what}; make one with `stdist prepare`")
    try:
        attributes = json.loads(metadata.read_text())["attributes"]
    except (ValueError, KeyError) as error:
        raise InputError(f"{root} is damaged: {ROOT_METADATA} is cut short; prepare or copy it again") from error
    if attributes.get("format") != FORMAT:
        raise InputError(f"{root} is a Zarr group but not a grid store; make one with `stdist prepare`")
    if attributes["format_version"] != FORMAT_VERSION:
        raise InputError(f"{root} has format version {attributes['format_version']}, this program reads 1")
    if "digest" not in attributes:
        raise InputError(f"{root} was never finished; remove it and prepare it again")
    return attributes


@dataclass(eq=False)
class GridStore:
    """A city's traffic over T frames, on a grid of H rows and W columns or at N nodes. Made by ``open_store``.

    ``path``; ``attributes``: the store's own (recipe, sources, files, …).
    """

    path: Path
    attributes: dict[str, Any]

    @cached_property
    def dataset(self) -> xarray.Dataset:
        """The whole store, lazily."""
        return xarray.open_zarr(self.path, consolidated=True, chunks=None)

    @cached_property
    def _group(self) -> zarr.Group:
        return zarr.open_group(self.path, mode="r")

    @cached_property
    def _arrays(self) -> dict[str, zarr.Array[Any]]:
        # Kept, because opening an array again costs as much as reading a small region of it.
        return dict(self._group.arrays())

    def _array(self, name: str) -> zarr.Array[Any]:
        return self._arrays[name]

    @cached_property
    def frame_cache(self) -> FrameCache:
        """Decoded frames, shared by all windows of this store; set its ``limit`` where memory is scarce or plenty."""
        return FrameCache()

    def frames_per_chunk(self, channel: str) -> int:
        """Frames that are decoded together, and so best read together."""
        return self._array(self._known(channel)).chunks[0]

    @property
    def channels(self) -> tuple[str, ...]:
        return tuple(self.attributes["channels"])

    @property
    def city(self) -> str:
        return self.attributes["city"]

    @property
    def units(self) -> str:
        return self.attributes["units"]

    @property
    def digest(self) -> str:
        """One sha256 over every file and attribute, as recorded; ``verify`` computes it again."""
        return self.attributes["digest"]

    @property
    def default_split(self) -> Split:
        return Split.parse(**self.attributes["split"])

    @property
    def cadence(self) -> np.timedelta64:
        return np.timedelta64(self.attributes["cadence_minutes"], "m")

    @property
    def slots_per_day(self) -> int:
        return MINUTES_PER_DAY // self.attributes["cadence_minutes"]

    @property
    def dims(self) -> tuple[str, ...]:
        """Names of the axes of space: ``("row", "col")`` or ``("node",)``."""
        return tuple(self.attributes.get("dims", ("row", "col")))

    @property
    def shape(self) -> tuple[int, ...]:
        """(H, W) of a grid, (N,) of nodes."""
        return self._array("inside").shape

    @cached_property
    def times(self) -> np.ndarray:
        """UTC stamps of all frames, datetime64[ns] [T]."""
        return np.asarray(self._array("time")[:]).astype("datetime64[m]").astype("datetime64[ns]")

    @property
    def local_times(self) -> np.ndarray:
        """Local stamps of all frames, datetime64[ns] [T]."""
        return self.times + np.timedelta64(self.attributes["utc_offset_minutes"], "m")

    @cached_property
    def cell_ids(self) -> np.ndarray:
        """The data's own ids: of cells int64 [H, W], of nodes int64 or str [N]."""
        if self.dims != ("node",):
            return np.asarray(self._array("cell_id")[:])
        ids = np.asarray(self._array("node")[:])
        return ids if ids.dtype.kind == "i" else np.array(ids.tolist(), str)

    @cached_property
    def inside(self) -> np.ndarray:
        """Cells that belong to the city, bool [H, W]; all nodes do, bool [N]."""
        return np.asarray(self._array("inside")[:])

    @cached_property
    def since(self) -> np.ndarray | None:
        """First local day of each node, datetime64[D] [N]; None where all are there from the start."""
        return np.asarray(self._array("since")[:]).astype("datetime64[D]") if "since" in self._group else None

    @property
    def adjacency(self) -> np.ndarray | None:
        """Weights of the graph, float32 [N, N], from a node (row) to its neighbour; None where there is none."""
        return np.asarray(self._array("adjacency")[:]) if "adjacency" in self._group else None

    @property
    def static(self) -> dict[str, np.ndarray]:
        """What does not change with time, float32 [H, W] or [N] by name."""
        names = [name for name in self._group.array_keys() if name.startswith("static_")]
        return {name.removeprefix("static_"): np.asarray(self._array(name)[...]) for name in sorted(names)}

    @cached_property
    def present(self) -> np.ndarray:
        """Frames that exist, bool [T]; a run of them is what a window may lie in."""
        return np.asarray(self._array("present")[:])

    @property
    def runs(self) -> list[tuple[int, int]]:
        """Half-open frame indices of every gap-free run."""
        return runs_of(self.present)

    @property
    def coverage(self) -> dict[str, dict[str, int]]:
        """Per channel, over present frames and what belongs to the city by then: ``missing`` (imputed) and
        ``true_zeros``."""
        return self.attributes["coverage"]

    def values(self, channel: str, start: int, stop: int, region: AnyRegion | None = None) -> np.ndarray:
        """Frames [start, stop) of a channel, imputed, float32 [T, h, w] or [T, n]; NaN where one is not present."""
        return self._read(self._known(channel), start, stop, region)

    def observed(
        self, channel: str, start: int | None = None, stop: int | None = None, region: AnyRegion | None = None
    ) -> np.ndarray:
        """Which values of frames [start, stop) were measured and not imputed, bool [T, h, w] or [T, n]."""
        last = len(self.present) if stop is None else stop
        return self._read(observed_name(self._known(channel)), start or 0, last, region)

    def _known(self, channel: str) -> str:
        if channel not in self.channels:
            raise InputError(f"{self.path} has no channel {channel!r}; it has {', '.join(self.channels)}")
        return channel

    def _read(self, name: str, start: int, stop: int, region: AnyRegion | None) -> np.ndarray:
        where = self.region(region).slices
        return np.asarray(self._array(name)[(slice(int(start), int(stop)), *where)])

    def region(self, region: AnyRegion | str | None = None) -> AnyRegion:
        """A region of the store, all of it by default; InputError where it leaves the store's space."""
        return whole(self.shape) if region is None else parse_region(region).within(self.shape)

    def frames_of(self, span: DaySpan) -> tuple[int, int]:
        """Half-open frame indices of a span of local days; InputError where it leaves the store's days."""
        first, last = (np.datetime64(self.attributes[name], "D") for name in ("first_day", "last_day"))
        if span.first_day < first or span.last_day > last:
            raise InputError(f"span {span} leaves the days of {self.path}, {first}:{last}; choose days within")
        days = [int((day - first).astype(int)) for day in (span.first_day, span.last_day)]
        return days[0] * self.slots_per_day, (days[1] + 1) * self.slots_per_day

    def statistics(self, channel: str, span: DaySpan, region: AnyRegion | None = None) -> Statistics:
        """Statistics fitted on the observed values of exactly ``span`` and ``region``, all of the store by default;
        the stored ones where they are theirs. Raises InputError where there is no observed value.
        """
        stored, where = self.attributes["train_statistics"].get(self._known(channel)), self.region(region)
        if stored and DaySpan.parse(stored["span"]) == span and where == whole(self.shape):
            scalars = {name: stored[name] for name in ("mean", "std", "maximum", "count")}
            return Statistics(**scalars, cell_mean=np.asarray(self._array(train_mean_name(channel))[:]), span=span)
        first, stop = self.frames_of(span)
        state = StatisticsState(where.shape)
        days = [slice(start, start + self.slots_per_day) for start in range(first, stop, self.slots_per_day)]
        present = [day for day in days if self.present[day].any()]
        for tile in tiles_of(self.slots_per_day, where.shape):
            part = StatisticsState(tuple(side.stop - side.start for side in tile))
            corner = [axis.start for axis in where.slices]
            cells = [slice(o + side.start, o + side.stop) for o, side in zip(corner, tile, strict=True)]
            for day in present:
                part.add(*(np.asarray(self._array(n)[(day, *cells)]) for n in (channel, observed_name(channel))))
            state.merge(part, tile)
        if state.count == 0:
            raise InputError(f"span {span} of {self.path} holds no observed value of {channel}; choose other days")
        return state.result(span)

    def windows(
        self,
        span: DaySpan | str,
        S: int,
        K: int,
        *,
        channel: str,
        region: AnyRegion | None = None,
        history_region: AnyRegion | None = None,
        history_inside: bool | None = None,
        name: str = "span",
    ) -> Windows:
        """Windows of a span of local days, or of the default split's ``train``, ``validation`` or ``test``.

        history_inside: whether the history must lie inside the span too; by default it must, except for
        ``"validation"`` and ``"test"`` (docs/decisions.md, 12). region: cells of the targets, the whole grid
        by default. history_region: cells of the history, the whole grid by default. name: what the contract
        calls a span of days. Raises InputError where no window fits.
        """
        if history_inside is None:
            history_inside = not (isinstance(span, str) and span in ("validation", "test"))
        where, seen = (whole(self.shape) if r is None else r.within(self.shape) for r in (region, history_region))
        name, days = (span, self.default_split.named(span)) if isinstance(span, str) else (name, span)
        return Windows(self, self._known(channel), days, name, S, K, where, history_inside, seen)

    def verify(self) -> list[str]:
        """Names of files whose bytes are not the recorded ones; reads everything. Empty for a whole store."""
        damaged = damaged_files(self.path, self.attributes["files"])
        if combined_digest(self.attributes["files"], self.attributes) != self.digest:
            damaged.append(ROOT_METADATA)
        return damaged
