"""The window behind which nobody has looked yet: the last frames of a store, or of any moment in it."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from stdist.data.spans import AnyRegion, DaySpan
from stdist.data.store import GridStore
from stdist.data.windows import Empty, WindowBatch, Windows
from stdist.errors import InputError
from stdist.zones import skips


@dataclass(eq=False)
class NextWindow(Windows):
    """One window that ends its history with the frame number ``origin``; nobody who reads it sees its targets, whether
    the store holds them or not. ``span``: the local days of the targets. Made by :func:`next_window`."""

    origin: int = field(kw_only=True)

    def _find_origins(self) -> np.ndarray:
        stretch = next(((start, stop) for start, stop in self.store.segments if start <= self.origin < stop), None)
        stamp = self.store.local_times[self.origin].astype("datetime64[m]")
        if stretch is None:
            raise InputError(f"{self.store.path} has no frame at {stamp}; choose one that it has")
        if (frames := self.origin + 1 - stretch[0]) < self.S:
            raise InputError(
                f"the gap-free run that ends at {stamp} has {frames} frames, S needs {self.S}; choose a later "
                "--origin, or add what is missing before it"
            )
        return np.array([self.origin], np.int64)

    @property
    def contract(self) -> str:
        (first,) = self.store.local(self.store.times[[self.origin]] + self.store.cadence)
        return (
            f"{self.K} steps from {first.astype('datetime64[m]')} local time on, from the {self.S} frames before; "
            f"channel {self.channel}, region {self.region}"
        )

    def missing(self) -> int:
        """Values of the history that were not observed and are imputed, of places of the city."""
        first = self.origin + 1 - self.S
        observed = self.store.observed(self.channel, first, self.origin + 1, self.history_region)
        return int((~observed & self.store.inside[self.history_region.slices]).sum())

    def read(self, indices: Sequence[int] | np.ndarray, empty: Empty = np.empty) -> WindowBatch:
        """Reads the windows numbered ``indices``; targets are 0 and were not observed."""
        origins = self.origins[np.asarray(indices, np.int64)]
        history = empty((len(origins), self.S, *self.history_region.shape), np.float32)
        self._fill("values", self.history_region, [(history, origins - self.S + 1, ())])
        shape = len(origins), self.K, *self.region.shape
        target, observed = empty(shape, np.float32), empty(shape, np.bool_)
        target[...], observed[...] = 0, False
        return WindowBatch(history, target, observed, origins)


def next_window(
    store: GridStore,
    S: int,
    K: int,
    *,
    channel: str,
    region: AnyRegion | None = None,
    history_region: AnyRegion | None = None,
    origin: np.datetime64 | None = None,
) -> NextWindow:
    """The window whose history ends at ``origin``, a local time, or with the last frame of the store; of a time that
    comes twice, since clocks are set back, with the later frame.

    Raises InputError where there is no such frame, or no S frames without a gap up to it.
    """
    frames = np.flatnonzero(store.present)
    number = int(frames[-1])
    if origin is not None:
        local = store.local_times[frames]
        if not (there := np.flatnonzero(local == origin)).size:
            first, last = local[[0, -1]].astype("datetime64[m]")
            skipped = (
                f", which clocks skip in {store.timezone}" if store.timezone and skips(origin, store.timezone) else ""
            )
            raise InputError(
                f"{store.path} has no frame at {origin}{skipped}; its frames are of {first} to {last} local time"
            )
        number = int(frames[there[-1]])
    targets = store.local(store.times[number] + store.cadence * np.array([1, K]))
    days = DaySpan(*targets.astype("datetime64[D]"))
    regions = store.region(region), store.region(history_region)
    return NextWindow(
        store, store.require_channel(channel), days, "next", S, K, regions[0], False, regions[1], origin=number
    )
