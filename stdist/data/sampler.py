"""The order in which ranks read windows: a function of seed, epoch and position alone.

An epoch is one permutation of all windows, the same on every rank; rank r of w takes every w-th of it. So neither
the number of ranks nor that of the loader's threads changes what is learnt from, and an epoch that was left after so
many windows of all ranks goes on with any number of ranks.
"""

from collections.abc import Iterator

import numpy as np

from stdist.data.windows import Windows
from stdist.errors import InputError

WINDOWS, DAYS = range(2)
"""Purposes of random numbers, each a stream of its own."""


class WindowSampler:
    """Walks all windows epoch by epoch, or one pass in time order where ``shuffle`` is False.

    batch_size: windows of one rank's batch. days_at_once: take the local days in random order, and mix windows of
    about as many days at a time, so that a chunk is decoded about once an epoch where the span does not fit the store's
    ``chunk_cache``. All windows of the span are mixed by default.

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
    ) -> None:
        self.windows, self.batch_size, self.seed, self.shuffle = windows, batch_size, seed, shuffle
        self.rank, self.world, self.days_at_once = rank, world, days_at_once
        self.epoch, self.consumed = 0, 0
        """The epoch, and how many of its windows all ranks together have been handed; set both to go on from there."""
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

    def order(self, epoch: int) -> np.ndarray:
        """All windows' numbers in the order of an epoch, int64 [n]."""
        if not self.shuffle:
            return np.arange(len(self.windows))
        key = uniform(len(self.windows), self.seed, epoch, WINDOWS)
        if self.days_at_once is None:
            return np.argsort(key, kind="stable")
        days, of_day = np.unique(self.windows.origins // self.windows.store.slots_per_day, return_inverse=True)
        place = np.argsort(np.argsort(uniform(len(days), self.seed, epoch, DAYS), kind="stable"))
        # A day's windows spread over the places of the days after it, so that days come and go one by one: groups
        # that change all at once would make the reader wait for all of their chunks at once.
        return np.argsort(place[of_day] + self.days_at_once * key, kind="stable")

    def batches(self, epoch: int, consumed: int = 0) -> Iterator[tuple[np.ndarray, int]]:
        """This rank's batches of an epoch after ``consumed`` windows of all ranks: indices, and the count after."""
        order, step = self.order(epoch), self.world * self.batch_size
        for start in range(consumed, len(order), step):
            if self.shuffle and start + step > len(order):
                return
            share = order[start : start + step][self.rank :: self.world]
            if len(share):
                yield share.copy(), min(start + step, len(order))

    def begin(self) -> tuple[int, int]:
        """Epoch and windows consumed at which to go on: the next epoch where this one has no batch left."""
        left = len(self.windows) - self.consumed
        if self.consumed and left < (self.world * self.batch_size if self.shuffle else 1):
            self.end(self.epoch)
        return self.epoch, self.consumed

    def end(self, epoch: int) -> None:
        """Note that an epoch's last batch was handed out, and nothing is left of it."""
        self.epoch, self.consumed = epoch + 1, 0

    def __len__(self) -> int:
        """Batches of this rank in an epoch."""
        full, rest = divmod(len(self.windows), self.world * self.batch_size)
        return full + (not self.shuffle and rest > self.rank)


def uniform(size: int, *key: int) -> np.ndarray:
    """Float64 in [0, 1), [size], a function of ``key`` alone.

    Made of the generator's raw bits, which numpy promises to keep; ``permutation`` and ``choice`` may change with
    its version, and a resumed epoch would then repeat windows.
    """
    return (np.random.PCG64(np.random.SeedSequence(key)).random_raw(size) >> np.uint64(11)) * 2.0**-53
