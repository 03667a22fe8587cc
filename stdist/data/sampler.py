"""Which windows, and which of their cells, a rank reads next: a function of seed, epoch and position alone.

An epoch is one permutation of all windows, the same on every rank; rank r of w takes every w-th of it. So neither
the number of ranks nor that of the loader's threads changes what is learnt from, and a state that counts samples
over all ranks may be resumed with any number of them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from stdist.data.windows import Windows
from stdist.errors import InputError

WINDOWS, DAYS, CELLS = range(3)
"""What a stream of random numbers is drawn for."""


@dataclass(frozen=True, eq=False)
class Samples:
    """One rank's next batch. indices: int64 [B], numbers of windows. cells: int64 [B, C], cells of each, counted
    row by row inside the windows' region, ascending; None where all cells are meant."""

    indices: np.ndarray
    cells: np.ndarray | None


class WindowSampler:
    """Walks all windows epoch by epoch, or one pass in time order where ``shuffle`` is False.

    batch_size: windows of one rank's batch. days_at_once: take the local days in random order, and mix windows of
    about as many days at a time; for spans that do not fit ``GridStore.frame_cache``, so that a chunk is decoded about
    once an epoch. All windows of the span are mixed by default. cells_per_window: draw this many cells of each window,
    anew in every epoch, without repetition inside a window. cell_weights: float [h, w] or [n], each draw takes one of
    the cells that are left with a probability in proportion to these; all cells inside the city alike by default.

    Training (``shuffle``) ends an epoch before an incomplete global batch of ``world * batch_size`` windows: every
    rank has the same number of full batches. Evaluation hands out each window exactly once at any ``world``: none
    is repeated to pad and none dropped, ranks may have different counts, and errors must be added as sums and
    counts. Raises InputError for settings that cannot be.
    """

    def __init__(
        self,
        windows: Windows,
        batch_size: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        rank: int = 0,
        world: int = 1,
        days_at_once: int | None = None,
        cells_per_window: int | None = None,
        cell_weights: np.ndarray | None = None,
    ) -> None:
        self.windows, self.batch_size, self.seed, self.shuffle = windows, batch_size, seed, shuffle
        self.rank, self.world, self.days_at_once = rank, world, days_at_once
        self.cells_per_window = cells_per_window
        self.epoch, self.consumed = 0, 0
        """How many of an epoch's windows all ranks together have been handed."""
        if batch_size < 1 or (days_at_once is not None and days_at_once < 1):
            raise InputError(f"batch_size {batch_size}, days_at_once {days_at_once}: give at least 1")
        if not 0 <= rank < world:
            raise InputError(f"rank {rank} of {world} ranks does not exist; ranks are 0 to world - 1")
        if seed < 0:
            raise InputError(f"seed {seed} is negative; give 0 or more")
        if shuffle and len(windows) < world * batch_size:
            raise InputError(
                f"{len(windows)} windows make no global batch of {world} ranks x {batch_size}; "
                "choose a smaller batch or a longer span"
            )
        if cells_per_window is not None:
            self._weights = self._checked(cell_weights, cells_per_window)

    def _checked(self, weights: np.ndarray | None, count: int) -> np.ndarray:
        shape = self.windows.region.shape
        inside = self.windows.store.inside[self.windows.region.slices]
        given = inside.astype(float) if weights is None else np.asarray(weights, float)
        if given.shape != shape:
            raise InputError(f"cell weights have shape {given.shape}, region {self.windows.region} has {shape}")
        if not (np.isfinite(given) & (given >= 0)).all():
            raise InputError("cell weights must be finite and not negative")
        flat = (given * inside).ravel()
        if not 1 <= count <= (flat > 0).sum():
            raise InputError(f"cannot draw {count} cells a window of {(flat > 0).sum()} that have a weight above 0")
        return flat

    # What is drawn

    def order(self, epoch: int) -> np.ndarray:
        """All windows' numbers in the order of an epoch, int64 [n]."""
        if not self.shuffle:
            return np.arange(len(self.windows))
        key = _uniform(len(self.windows), self.seed, epoch, WINDOWS)
        if self.days_at_once is None:
            return np.argsort(key, kind="stable")
        days, of_day = np.unique(self.windows.origins // self.windows.store.slots_per_day, return_inverse=True)
        place = np.argsort(np.argsort(_uniform(len(days), self.seed, epoch, DAYS), kind="stable"))
        # A day's windows spread over the places of the days after it, so that days come and go one by one: groups
        # that change all at once would make the reader wait for all of their chunks at once.
        return np.argsort(place[of_day] + self.days_at_once * key, kind="stable")

    def cells(self, epoch: int, indices: np.ndarray) -> np.ndarray | None:
        """The cells drawn of windows in an epoch, int64 [B, C]; None where no number of them was set.

        Exponential races (Efraimidis and Spirakis, Weighted random sampling with a reservoir, 2006): the C
        smallest of -log(u) / weight are draws in proportion to the weights, without replacement.
        """
        count = self.cells_per_window
        if count is None:
            return None
        positive, drawn = np.flatnonzero(self._weights), []
        weights = self._weights[positive]
        for index in indices.tolist():
            arrival = -np.log1p(-_uniform(len(positive), self.seed, epoch, CELLS, index)) / weights
            drawn.append(np.sort(positive[np.argpartition(arrival, count - 1)[:count]]))
        return np.stack(drawn)

    def batches(self, epoch: int, consumed: int = 0) -> Iterator[tuple[np.ndarray, int]]:
        """This rank's batches of an epoch after ``consumed`` windows of all ranks: indices, and the count after."""
        order, step = self.order(epoch), self.world * self.batch_size
        for start in range(consumed, len(order), step):
            if self.shuffle and start + step > len(order):
                return
            share = order[start : start + step][self.rank :: self.world]
            if len(share):
                yield share.copy(), min(start + step, len(order))

    # Where it stands

    def begin(self) -> tuple[int, int]:
        """Epoch and windows consumed at which to go on: the next epoch where this one has no batch left."""
        left = len(self.windows) - self.consumed
        if self.consumed and left < (self.world * self.batch_size if self.shuffle else 1):
            self.end(self.epoch)
        return self.epoch, self.consumed

    def end(self, epoch: int) -> None:
        """Note that an epoch's last batch was handed out, and nothing is left of it."""
        self.epoch, self.consumed = epoch + 1, 0

    def __iter__(self) -> Iterator[Samples]:
        """The rest of the epoch; then the next one begins."""
        epoch, consumed = self.begin()
        for indices, after in self.batches(epoch, consumed):
            self.consumed = after
            yield Samples(indices, self.cells(epoch, indices))
        self.end(epoch)

    def __len__(self) -> int:
        """Batches of this rank in a whole epoch."""
        whole, rest = divmod(len(self.windows), self.world * self.batch_size)
        return whole + (not self.shuffle and rest > self.rank)

    def state_dict(self) -> dict[str, Any]:
        """Where the ranks stand together, JSON; the same on every rank after the same number of batches."""
        return {"epoch": self.epoch, "consumed": self.consumed, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after the samples that ``state`` counts, whatever the number of ranks was.

        Raises InputError where the state is of other windows or of another order.
        """
        for name, value in self._identity().items():
            if state.get(name) != value:
                raise InputError(
                    f"the sampler's state has {name} {state.get(name)!r}, this run {value!r}: go on with the settings "
                    "that the state was made with, or start anew"
                )
        self.epoch, self.consumed = int(state["epoch"]), int(state["consumed"])

    def _identity(self) -> dict[str, Any]:
        return {
            "windows": self.windows.contract,
            "store": self.windows.store.digest,
            "seed": self.seed,
            "shuffle": self.shuffle,
            "days_at_once": self.days_at_once,
        }


def _uniform(size: int, *key: int) -> np.ndarray:
    """Float64 in [0, 1), [size], a function of ``key`` alone.

    Made of the generator's raw bits, which numpy promises to keep; ``permutation`` and ``choice`` may change with
    its version, and a resumed epoch would then repeat windows.
    """
    return (np.random.PCG64(np.random.SeedSequence(key)).random_raw(size) >> np.uint64(11)) * 2.0**-53
