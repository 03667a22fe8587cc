"""Windows: S history frames and K target frames, contiguous in time, never across a gap."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from stdist.data.schema import runs_of
from stdist.data.spans import DaySpan, Region
from stdist.errors import InputError

if TYPE_CHECKING:
    from stdist.data.store import GridStore

CACHE_BYTES = 2**30
"""A span whose values take at most this much is held in memory; a larger one is read from disk by window."""


@dataclass(frozen=True, eq=False)
class WindowBatch:
    """B windows. history: float32 [B, S, H, W], the whole grid, imputed. target: float32 [B, K, h, w] of the
    region, imputed; target_observed: bool, same shape, the points that errors may count (docs/decisions.md,
    13). origin_index: int64 [B], index of the last history frame on the store's time axis.
    """

    history: np.ndarray
    target: np.ndarray
    target_observed: np.ndarray
    origin_index: np.ndarray


def window_origins(present: np.ndarray, first: int, stop: int, S: int, K: int, *, history_inside: bool) -> np.ndarray:
    """Origins (index of the last history frame), int64 [n], of every window of frames [first, stop).

    present: bool [T]. A window lies in one run of present frames. All of it lies in [first, stop) where
    ``history_inside``, else its targets do and its history may reach back (docs/decisions.md, 12).
    """
    origins = [
        np.arange(max(start + S - 1, first + S - 1 if history_inside else first - 1), min(end, stop) - K)
        for start, end in runs_of(present)
    ]
    return np.concatenate([np.zeros(0, np.int64), *origins]).astype(np.int64)


@dataclass(eq=False)
class Windows:
    """The windows of one channel in one span, in time order.

    ``origins``: int64 [n]. Made by ``GridStore.windows``; raises InputError where no window fits.
    """

    store: "GridStore"
    channel: str
    span: DaySpan
    span_name: str
    S: int
    K: int
    region: Region
    history_inside: bool
    origins: np.ndarray = field(init=False)
    _cache: tuple[int, np.ndarray, np.ndarray] | None = field(init=False, default=None, repr=False)

    def __post_init__(self) -> None:
        if self.S < 1 or self.K < 1:
            raise InputError(f"S = {self.S}, K = {self.K}: a window needs at least one frame of each")
        first, stop = self.store.frames_of(self.span)
        self.origins = window_origins(
            self.store.present, first, stop, self.S, self.K, history_inside=self.history_inside
        )
        if len(self.origins) == 0:
            # Where history may lie before the span, a run counts from its own start to the span's end.
            runs = [(max(a, first) if self.history_inside else a, min(b, stop)) for a, b in self.store.runs]
            longest = max((b - a for a, b in runs if b > first), default=0)
            raise InputError(
                f"no window fits {self.span_name} {self.span}: its longest gap-free run has "
                f"{max(longest, 0)} frames, "
                f"S + K needs {self.S + self.K}; choose other days or a smaller S or K"
            )

    def __len__(self) -> int:
        return len(self.origins)

    def __getstate__(self) -> dict[str, Any]:
        # Up to a GiB of cached values stays behind: whoever gets a copy reads the store itself.
        return {**self.__dict__, "_cache": None}

    @property
    def origin_times(self) -> np.ndarray:
        """UTC stamps of the last history frames, datetime64[ns] [n]."""
        return self.store.times[self.origins]

    @property
    def contract(self) -> str:
        """What these windows are, for the evaluation contract."""
        rule = (
            "windows lie wholly inside the span, history included"
            if self.history_inside
            else "targets lie inside the span, history may reach back before it"
        )
        return (
            f"{self.span_name} {self.span} (local days); {rule}; none crosses a gap; every start; "
            f"S={self.S}, K={self.K}, channel {self.channel}, region {self.region}: {len(self)} windows"
        )

    def read(self, indices: Sequence[int] | np.ndarray) -> WindowBatch:
        """The windows number ``indices`` (positions in ``origins``), as one batch."""
        origins = self.origins[np.asarray(indices, np.int64)]
        rows, cols = self.region.slices
        lowest, highest = int(self.origins[0]) - self.S + 1, int(self.origins[-1]) + self.K + 1
        H, W = self.store.shape
        if (highest - lowest) * H * W * 5 > CACHE_BYTES:
            return self._read_from_disk(origins)
        if self._cache is None:
            self._cache = (
                lowest,
                self.store.values(self.channel, lowest, highest),
                self.store.observed(self.channel, lowest, highest, self.region),
            )
        base, values, observed = self._cache
        history = (origins - base)[:, None] + np.arange(1 - self.S, 1)
        target = (origins - base)[:, None] + np.arange(1, self.K + 1)
        return WindowBatch(values[history], values[:, rows, cols][target], observed[target], origins)

    def _read_from_disk(self, origins: np.ndarray) -> WindowBatch:
        store, channel, region = self.store, self.channel, self.region
        history = [store.values(channel, o - self.S + 1, o + 1) for o in origins]
        target = [store.values(channel, o + 1, o + 1 + self.K, region) for o in origins]
        observed = [store.observed(channel, o + 1, o + 1 + self.K, region) for o in origins]
        return WindowBatch(np.stack(history), np.stack(target), np.stack(observed), origins)
