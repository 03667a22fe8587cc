"""The arrays of a grid store: axes, places, and values by channel, time steps and region."""

import math
import warnings
from dataclasses import replace
from functools import cached_property
from typing import Any, cast

import numpy as np
import xarray
import zarr

from stdist.data.chunk_cache import ChunkCache
from stdist.data.integrity import ROOT_METADATA, VerifiedStore
from stdist.data.metadata import StoreMetadata
from stdist.data.schema import observed_name, true_segments
from stdist.data.spans import AnyRegion, DaySpan, all_cells, parse_region
from stdist.errors import InputError
from stdist.files import own_file
from stdist.memory import fits


class StoredArrays(StoreMetadata):
    """A store of T time steps on a grid of H rows and W columns or at N nodes, whose arrays are read when asked for.

    Reading raises DamageError, naming the file, where it is not as it was written.
    """

    @cached_property
    def _files(self) -> VerifiedStore:
        return VerifiedStore(self.path, self.attributes["files"], self.attributes["digest"])

    @cached_property
    def dataset(self) -> xarray.Dataset:
        """All arrays, lazily."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Object at")  # files of somebody else
            # Consolidated metadata is a copy that no digest covers.
            return xarray.open_zarr(self._files, consolidated=False, chunks=None)

    @cached_property
    def _arrays(self) -> dict[str, zarr.Array[Any]]:
        # Kept, because opening an array again costs as much as reading a small region of it.
        with own_file(self.path, "`stdist check` names the file; prepare or copy the store again"):
            group = zarr.open_group(self._files, mode="r", use_consolidated=False)
            metadata = [file for file in self.attributes["files"] if file.endswith(f"/{ROOT_METADATA}")]
            names = [file.removesuffix(f"/{ROOT_METADATA}") for file in metadata]
            arrays = {name: cast("zarr.Array[Any]", group[name]) for name in names}
            self._require_shapes({name: array.shape for name, array in arrays.items()})
        return arrays

    def _require_shapes(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Raises ValueError where an array has another shape than the attributes and the store's space call for, or
        space is more than memory holds: before anything of that shape is made."""
        space = shapes["inside"]
        if len(space) != len(self.dims) or not fits(math.prod(space)):
            raise ValueError(f"array inside has shape {space}")
        steps = len(self.axis_days) * self.slots_per_day
        names = [name for channel in self.channels for name in (channel, observed_name(channel))]
        expected = {"time": (steps,), "present": (steps,), **{name: (steps, *space) for name in names}}
        for name, shape in expected.items():
            if shapes[name] != shape:
                raise ValueError(f"array {name} has shape {shapes[name]}, not {shape}")

    def _all(self, name: str) -> np.ndarray:
        return np.asarray(self._arrays[name][...])

    @cached_property
    def chunk_cache(self) -> ChunkCache:
        """Decoded chunks, shared by all windows of this store; set its ``limit`` where memory is scarce or plenty."""
        return ChunkCache()

    def steps_per_chunk(self, channel: str) -> int:
        """Time steps that are decoded together, and so best read together."""
        return self._arrays[self.require_channel(channel)].chunks[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """(H, W) of a grid, (N,) of nodes."""
        return self._arrays["inside"].shape

    @cached_property
    def times(self) -> np.ndarray:
        """UTC stamps of all time steps, datetime64[ns] [T]."""
        return self._all("time").astype("datetime64[m]").astype("datetime64[ns]")

    @cached_property
    def local_times(self) -> np.ndarray:
        """Local stamps of all time steps, datetime64[ns] [T]: where clocks are set back some come twice."""
        return self.local(self.times)

    @cached_property
    def local_slots(self) -> np.ndarray:
        """Slots of the wall clock since 1970-01-01T00:00, int64 [T]: whole cadences, whatever clocks are set by."""
        return (self.local_times.astype("datetime64[m]").astype(np.int64)) // self.attributes["cadence_minutes"]

    @property
    def slot_times(self) -> np.ndarray:
        """Local stamps at which the time steps' slots begin, datetime64[m] [T]: ``local_times``, but where clocks are
        changed by no whole slot."""
        return (self.local_slots * self.attributes["cadence_minutes"]).astype("datetime64[m]")

    @property
    def days(self) -> DaySpan:
        """All local days of the time axis; with a time zone those from the first frame to the last."""
        if self.timezone is None:
            return self.axis_days
        frames = np.flatnonzero(self.present)
        return DaySpan(*self.local_days[frames[[0, -1]]])

    def within(self, span: DaySpan | None) -> np.ndarray:
        """Time steps on the local days of a span, bool [T]; none of None."""
        if span is None:
            return np.zeros(len(self.local_days), bool)
        return (span.first_day <= self.local_days) & (self.local_days <= span.last_day)

    def step_range(self, span: DaySpan) -> tuple[int, int]:
        """Half-open time steps of a span; InputError where it leaves the store's days."""
        if span.first_day < self.local_days[0] or span.last_day > self.local_days[-1]:
            raise InputError(f"span {span} leaves the days of {self.path}, {self.days}; choose days within")
        start, stop = np.searchsorted(self.local_days, [span.first_day, span.last_day + np.timedelta64(1, "D")])
        return int(start), int(stop) if span.steps is None else int(start) + span.steps

    @cached_property
    def cell_ids(self) -> np.ndarray:
        """The data's own ids: of cells int64 [H, W], of nodes int64 or str [N]."""
        ids = self._all("node" if self.dims == ("node",) else "cell_id")
        return ids if ids.dtype.kind == "i" else np.array(ids.tolist(), str)

    @cached_property
    def inside(self) -> np.ndarray:
        """Cells that belong to the city, bool [H, W]; all nodes do, bool [N]."""
        return self._all("inside")

    @cached_property
    def since(self) -> np.ndarray | None:
        """First local day of each node, datetime64[D] [N]; None where all exist from the start."""
        return self._all("since").astype("datetime64[D]") if "since" in self._arrays else None

    @property
    def adjacency(self) -> np.ndarray | None:
        """Weights of the graph, float32 [N, N], from a node (row) to its neighbour; None where there is none."""
        return self._all("adjacency") if "adjacency" in self._arrays else None

    @cached_property
    def present(self) -> np.ndarray:
        """Time steps that exist, bool [T]; a window lies in one stretch of them."""
        return self._all("present")

    @property
    def segments(self) -> list[tuple[int, int]]:
        """Half-open time steps of every gap-free stretch."""
        return true_segments(self.present)

    def first_part(self, span: DaySpan, share: float) -> DaySpan:
        """The first ``share``, in (0, 1], of a span's time steps that exist, to the nearest one and at least one: the
        few-shot span (docs/decisions.md, 12). InputError where the span leaves the store's days."""
        start, stop = self.step_range(span)
        exist = np.flatnonzero(self.present[start:stop])
        if share == 1 or len(exist) == 0:
            return span
        steps = int(exist[max(1, round(share * len(exist))) - 1]) + 1
        whole = DaySpan(span.first_day, self.local_days[start + steps - 1])
        return whole if self.step_range(whole)[1] == start + steps else replace(whole, steps=steps)

    def values(self, channel: str, start: int, stop: int, region: AnyRegion | None = None) -> np.ndarray:
        """Steps [start, stop) of a channel, imputed, float32 [T, h, w] or [T, n]; NaN where one is not present."""
        return self._read(self.require_channel(channel), start, stop, region)

    def observed(
        self, channel: str, start: int | None = None, stop: int | None = None, region: AnyRegion | None = None
    ) -> np.ndarray:
        """Values of steps [start, stop) that were measured and not imputed, bool [T, h, w] or [T, n]."""
        last = len(self.present) if stop is None else stop
        return self._read(observed_name(self.require_channel(channel)), start or 0, last, region)

    def _read(self, name: str, start: int, stop: int, region: AnyRegion | None) -> np.ndarray:
        cells = self.region(region).slices
        return np.asarray(self._arrays[name][(slice(int(start), int(stop)), *cells)])

    def region(self, region: AnyRegion | str | None = None) -> AnyRegion:
        """A region of the store, all of it by default; InputError where it leaves the store's space."""
        return all_cells(self.shape) if region is None else parse_region(region).within(self.shape)
