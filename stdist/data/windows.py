"""Windows: S steps of history and K of targets, contiguous in time, never across a gap."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from stdist.data.schema import true_segments
from stdist.data.spans import AnyRegion, DaySpan
from stdist.data.stored_arrays import StoredArrays
from stdist.errors import DamageError, InputError, is_damage

Empty = Callable[[tuple[int, ...], Any], np.ndarray]
"""Makes an array of a shape and dtype, as ``np.empty`` does; the loader's are pinned."""


@dataclass(frozen=True, eq=False)
class WindowBatch:
    """B windows of a grid; those of nodes have one axis N, n where a grid has two.

    history: float32 [B, S, H, W] of ``Windows.history_region``, imputed. target: float32 [B, K, h, w] of
    ``Windows.region``, imputed. target_observed: bool [B, K, h, w], the points that errors may count
    (docs/decisions.md, 13). origin_index: int64 [B], index of the last history step on the store's time axis.
    """

    history: np.ndarray
    target: np.ndarray
    target_observed: np.ndarray
    origin_index: np.ndarray


def window_origins(present: np.ndarray, first: int, stop: int, S: int, K: int, *, history_inside: bool) -> np.ndarray:
    """Origins (index of the last history step), int64 [n], of every window of time steps [first, stop).

    present: bool [T]. A window lies in one gap-free segment. All of it lies in [first, stop) where
    ``history_inside``, else its targets do and its history may reach back (docs/decisions.md, 12).
    """
    origins = [
        np.arange(max(start + S - 1, first + S - 1 if history_inside else first - 1), min(end, stop) - K)
        for start, end in true_segments(present)
    ]
    return np.concatenate([np.zeros(0, np.int64), *origins]).astype(np.int64)


@dataclass(eq=False)
class Windows:
    """The windows of one channel in one span, in time order.

    ``region``: cells of the targets; ``history_region``: cells of the history. ``origins``: int64 [n]. Made by
    ``GridStore.windows``; raises InputError where no window fits.
    """

    store: StoredArrays
    channel: str
    span: DaySpan
    span_name: str
    S: int
    K: int
    region: AnyRegion
    history_inside: bool
    history_region: AnyRegion
    origins: np.ndarray = field(init=False)
    _chunk_steps: int = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.S < 1 or self.K < 1:
            raise InputError(f"S = {self.S}, K = {self.K}: a window needs at least one frame of each")
        self._chunk_steps = self.store.steps_per_chunk(self.channel)
        self.origins = self._find_origins()

    def _find_origins(self) -> np.ndarray:
        first, stop = self.store.step_range(self.span)
        origins = window_origins(self.store.present, first, stop, self.S, self.K, history_inside=self.history_inside)
        if len(origins) == 0:
            # Where history may lie before the span, a segment counts from its own start to the span's end.
            segments = [(max(a, first) if self.history_inside else a, min(b, stop)) for a, b in self.store.segments]
            longest = max((b - a for a, b in segments if b > first), default=0)
            raise InputError(
                f"no window fits {self.span_name} {self.span}: its longest gap-free run has "
                f"{max(longest, 0)} frames, S + K needs {self.S + self.K}; choose other days or a smaller S or K"
            )
        return origins

    def __len__(self) -> int:
        return len(self.origins)

    def of_region(self, region: AnyRegion, history_region: AnyRegion | None = None) -> "Windows":
        """The same windows with the targets of ``region``, and the history of ``history_region``: of the same cells
        by default, so that nothing else is read. Raises InputError where one leaves the store's space."""
        seen = region if history_region is None else history_region
        shape = self.store.shape
        return replace(self, region=region.within(shape), history_region=seen.within(shape))

    @property
    def origin_times(self) -> np.ndarray:
        """UTC stamps of the origins, datetime64[ns] [n]."""
        return self.store.times[self.origins]

    @property
    def contract(self) -> str:
        """A line that says which windows these are, for the evaluation contract."""
        rule = (
            "windows lie wholly inside the span, history included"
            if self.history_inside
            else "targets lie inside the span, history may reach back before it"
        )
        return (
            f"{self.span_name} {self.span} (local days); {rule}; none crosses a gap; every start; "
            f"S={self.S}, K={self.K}, channel {self.channel}, region {self.region}: {len(self)} windows"
        )

    def read(self, indices: Sequence[int] | np.ndarray, empty: Empty = np.empty) -> WindowBatch:
        """The windows number ``indices`` (positions in ``origins``), as one batch, in arrays made by ``empty``.

        Chunks that windows share are decoded once and held in the store's ``chunk_cache``; chunks that no window
        touches are not read. Raises DamageError where the store cannot be read, or is not as it was written.
        """
        origins = self.origins[np.asarray(indices, np.int64)]
        batch = WindowBatch(
            empty((len(origins), self.S, *self.history_region.shape), np.float32),
            empty((len(origins), self.K, *self.region.shape), np.float32),
            empty((len(origins), self.K, *self.region.shape), np.bool_),
            origins,
        )
        history, target = (batch.history, origins - self.S + 1), (batch.target, origins + 1)
        inner = _within(self.region, self.history_region)
        if inner is None:
            self._fill("values", self.history_region, [(*history, ())])
            self._fill("values", self.region, [(*target, ())])
        else:
            self._fill("values", self.history_region, [(*history, ()), (*target, inner)])
        self._fill("observed", self.region, [(batch.target_observed, origins + 1, ())])
        return batch

    def _fill(
        self, what: str, region: AnyRegion, parts: Sequence[tuple[np.ndarray, np.ndarray, tuple[slice, ...]]]
    ) -> None:
        """Fills ``out`` [B, L, …] of each part, (out, first step of its rows int64 [B], cells within ``region``)."""
        step = self._chunk_steps
        chunks: dict[int, list[tuple[int, int, int]]] = {}
        for number, (out, firsts, _) in enumerate(parts):
            for row, first in enumerate(firsts.tolist()):
                for chunk in range(first // step, (first + out.shape[1] - 1) // step + 1):
                    chunks.setdefault(chunk, []).append((number, row, first))
        for chunk in sorted(chunks):
            start, stop = chunk * step, (chunk + 1) * step
            ends = [first + parts[number][0].shape[1] for number, _, first in chunks[chunk]]
            needed = max(start, min(first for *_, first in chunks[chunk])), min(stop, max(ends))
            base, values = self._steps(what, region, (start, stop), needed)
            for (number, row, first), end in zip(chunks[chunk], ends, strict=True):
                out, _, cells = parts[number]
                low, high = max(start, first), min(stop, end)
                out[row, low - first : high - first] = values[(slice(low - base, high - base), *cells)]

    def _steps(
        self, what: str, region: AnyRegion, chunk: tuple[int, int], needed: tuple[int, int]
    ) -> tuple[int, np.ndarray]:
        """Steps of one chunk through the cache, or just the ``needed`` ones where a chunk is beyond its limit."""
        cache, key = self.store.chunk_cache, (what, self.channel, region, chunk)
        size = (chunk[1] - chunk[0]) * math.prod(region.shape) * (4 if what == "values" else 1)
        if size > cache.limit:
            return needed[0], self._decode(what, region, needed)
        return chunk[0], cache.get(key, lambda: self._decode(what, region, chunk))

    def _decode(self, what: str, region: AnyRegion, steps: tuple[int, int]) -> np.ndarray:
        read = self.store.values if what == "values" else self.store.observed
        try:
            return read(self.channel, *steps, region)
        except InputError:
            raise
        except (RuntimeError, ValueError, OSError) as error:
            if not is_damage(error):
                raise
            raise DamageError(
                f"{self.store.path} is damaged: {what} of {self.channel}, frames {steps[0]} to {steps[1] - 1}, "
                f"cannot be read ({error}); `stdist check` names the file"
            ) from error


def _within(inner: AnyRegion, outer: AnyRegion) -> tuple[slice, ...] | None:
    """Slices of ``inner`` in an array of ``outer``; None where it is not all in it."""
    pairs = list(zip(inner.slices, outer.slices, strict=True))
    if any(i.start < o.start or i.stop > o.stop for i, o in pairs):
        return None
    return tuple(slice(i.start - o.start, i.stop - o.start) for i, o in pairs)
