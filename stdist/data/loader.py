"""Batches of windows, read ahead by threads, as tensors that a device takes without waiting.

Threads and not the processes of ``torch.utils.data.DataLoader``: decoding and copying release the interpreter's
lock, threads share one cache of decoded chunks where every process would fill its own, and a batch is written
once, where it is used, instead of passing between processes. Measured with two threads against its two processes on
two cores, in batches of 16 windows of 48 grids of 100 x 100 cells: 920 to 2,000 windows a second against 150.
"""

import math
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stdist.data.sampler import WindowSampler
from stdist.data.windows import Windows
from stdist.errors import InputError

# Batches that were handed out and are still held, so that their memory is freed when the consumer has long let go.
KEPT = 2


@dataclass(frozen=True, eq=False)
class TensorBatch:
    """``WindowBatch`` as tensors.

    history: float32 [B, S, H, W]. target: float32 [B, K, h, w]; target_observed: bool, same shape. Of nodes:
    [B, S, N] and [B, K, n]. origin_index: int64 [B]. indices: numbers of the windows, int64 [B].
    """

    history: Tensor
    target: Tensor
    target_observed: Tensor
    origin_index: Tensor
    indices: Tensor

    def to(self, device: torch.device | str) -> "TensorBatch":
        """On ``device``; from pinned memory the copy runs beside what the device computes."""
        return TensorBatch(*(getattr(self, field.name).to(device, non_blocking=True) for field in fields(self)))


class WindowLoader:
    """Iterates a sampler's batches in its order, whatever the number of threads.

    threads: readers. prefetch: batches beyond the one handed out last that are being read or wait. Where CUDA is there
    tensors are page-locked, for copies that do not stop the device. One iteration is the rest of an epoch. A thread's
    exception is raised where its batch would have been handed out. When an iteration ends, breaks off or fails, its
    threads end too.
    """

    def __init__(self, sampler: WindowSampler, *, threads: int = 2, prefetch: int = 2) -> None:
        if threads < 1 or prefetch < 1:
            raise InputError(f"threads {threads}, prefetch {prefetch}: give at least 1 of each")
        self.sampler, self.threads, self.prefetch = sampler, threads, prefetch
        self.pin_memory = torch.cuda.is_available()

    def __iter__(self) -> Iterator[TensorBatch]:
        epoch, consumed = self.sampler.begin()
        batches = self.sampler.batches(epoch, consumed)
        ahead: deque[tuple[Future[TensorBatch], int]] = deque()
        used: deque[TensorBatch] = deque()
        pool = ThreadPoolExecutor(self.threads, thread_name_prefix="window-loader")

        def read_one_more() -> None:
            for indices, after in islice(batches, 1):
                ahead.append((pool.submit(self._read, indices), after))

        try:
            for _ in range(self.prefetch):
                read_one_more()
            while ahead:
                reading, after = ahead.popleft()
                batch = reading.result()
                read_one_more()
                # Giving 30 MB back to the system takes milliseconds that a thread has and the consumer has not.
                used.append(batch)
                if len(used) > KEPT:
                    pool.submit([used.popleft()].clear)
                # What was read ahead does not count: the sampler stands after the batches that were handed out.
                self.sampler.consumed = after
                yield batch
            self.sampler.end(epoch)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _read(self, indices: np.ndarray) -> TensorBatch:
        batch = self.sampler.windows.read(indices, self._empty)
        return TensorBatch(
            history=torch.from_numpy(batch.history),
            target=torch.from_numpy(batch.target),
            target_observed=torch.from_numpy(batch.target_observed),
            origin_index=torch.from_numpy(batch.origin_index),
            indices=torch.from_numpy(indices),
        )

    def _empty(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        if not self.pin_memory:
            # numpy asks for huge pages, torch does not: a batch is written in half the time.
            return np.empty(shape, dtype)
        kind = {np.dtype(np.float32): torch.float32, np.dtype(np.bool_): torch.bool}[np.dtype(dtype)]
        return torch.empty(shape, dtype=kind, pin_memory=True).numpy()


class StepLoader:
    """A training's batches by the number of the step, epoch after epoch; read ahead while steps follow each other.

    batch_size: windows of one rank, of ``world`` ranks. Days come in random order where the span does not fit the
    store's cache; see ``WindowSampler``.
    """

    def __init__(self, windows: Windows, batch_size: int, *, seed: int, rank: int, world: int) -> None:
        self._sampler = WindowSampler(
            windows, batch_size, seed=seed, rank=rank, world=world, days_at_once=_days_that_fit(windows)
        )
        self._loader = WindowLoader(self._sampler)
        self._batches: Iterator[TensorBatch] = iter(())

    @property
    def steps_per_epoch(self) -> int:
        return len(self._sampler)

    def batch(self, step: int) -> TensorBatch:
        """This rank's windows of a step, counted from 0."""
        position = self._position(step)
        if (self._sampler.epoch, self._sampler.consumed) != position:
            self._batches = iter(())
            self._sampler.epoch, self._sampler.consumed = position
        batch = next(self._batches, None)
        if batch is None:
            self._batches = iter(self._loader)
            batch = next(self._batches)
        return batch

    def indices(self, step: int) -> np.ndarray:
        """Numbers of the windows of ``batch``, int64 [B]."""
        return next(self._sampler.batches(*self._position(step)))[0]

    def _position(self, step: int) -> tuple[int, int]:
        epoch, number = divmod(step, self.steps_per_epoch)
        return epoch, number * self._sampler.world * self._sampler.batch_size


def _days_that_fit(windows: Windows) -> int | None:
    """As many days as half of the store's cache holds, None where it holds the whole span."""
    store = windows.store
    day = store.slots_per_day * math.prod(windows.history_region.shape) * 5  # a float32 and a bool
    days = store.chunk_cache.limit // (2 * day)
    return None if days >= len(windows.span) else max(2, days)
