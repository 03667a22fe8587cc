"""Sweeps: forecasts of a whole region by a pool of workers, in the order and with the values of one process.

Workers read the store and the checkpoint themselves; they are sent places and send back forecasts. The process that
began the sweep writes them, so a sweep that was killed goes on like any forecast, with any number of workers.
"""

import asyncio
import pickle
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import groupby
from typing import Any

from stdist.config.base import WorkersConfig
from stdist.data import Windows
from stdist.evaluation import Chunk
from stdist.orchestration.cluster import connected, require_workers, workers_that_fit
from stdist.orchestration.policy_workers.pool import Pool, wait_for_answers
from stdist.runs.forecast_request import ForecastRequest
from stdist.runs.forecasting import Prediction
from stdist.runs.recipes import forecast, read_run_config, recipe_of
from stdist.runs.workers import Result, Unit, Version, WorkerProgram, WorkKey

CHUNKS_PER_UNIT = 8
"""Chunks of the same windows that a worker forecasts in a row: it encodes the windows once for them."""
AHEAD = 4
"""Units a worker that are handed out before their turn to be written."""


def sweep(
    request: ForecastRequest, workers: int | None, address: str | None, log: Callable[[str], None]
) -> dict[str, Any]:
    """``stdist forecast`` with ``workers`` actors (as many as the cluster has room for if None) on the cluster at
    ``address``, else on one of this machine's own; the file is the one that a single process writes, byte for byte.

    Raises InputError where the cluster cannot hold the workers, and what :func:`stdist.runs.recipes.forecast` raises.
    """
    require_workers(workers)
    read_run_config(request.run_dir)
    paths = {name: getattr(request, name).absolute() for name in ("run_dir", "store", "out")}
    request = replace(request, **paths)
    with connected(address or "local", log_to_driver=False):
        count, resources = workers_that_fit(workers)
        settings = WorkersConfig(num_workers=count)
        log(f"{settings.num_workers} workers with {resources} each")
        with _serving(Pool(partial(SweepProgram, request), settings, resources, log=log)) as pool:
            return forecast(request, log, partial(_predict, pool, settings))


class SweepProgram(WorkerProgram):
    """A predictor in a worker's process, with the windows that the request asks for."""

    def __init__(self, request: ForecastRequest):
        config = read_run_config(request.run_dir)
        opened = recipe_of(config).open_sweep(config, request)
        self._predictor, self._windows = opened.predictor, opened.windows

    def load(self, version: Version) -> None:
        raise NotImplementedError("a sweep's weights are the checkpoint's")

    def run(self, payload: bytes) -> tuple[bytes, dict[str, float]]:
        began = time.perf_counter()
        predictions = list(self._predictor.predict(self._windows, pickle.loads(payload)))
        return pickle.dumps(predictions), {"forecast": time.perf_counter() - began}


class _ServedPool:
    """A pool whose event loop runs in a thread of its own, called from another."""

    def __init__(self, pool: Pool, loop: asyncio.AbstractEventLoop):
        self._pool, self._loop = pool, loop

    def submit(self, units: list[Unit]) -> None:
        self._call(self._pool.submit(units, 0))

    def collect(self, key: WorkKey) -> Result:
        def ask() -> list[Result] | None:
            return self._call(self._pool.collect([key]))

        return wait_for_answers(ask, self._pool.status, key, self._pool.settings.timeout)[0]

    def _call(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()


@contextmanager
def _serving(pool: Pool) -> Iterator[_ServedPool]:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    serving = asyncio.run_coroutine_threadsafe(_begin(pool), loop).result()
    try:
        yield _ServedPool(pool, loop)
    finally:
        pool.kill_workers()
        asyncio.run_coroutine_threadsafe(_end(serving), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()


async def _begin(pool: Pool) -> "asyncio.Task[None]":
    return asyncio.create_task(pool.run())


async def _end(serving: "asyncio.Task[None]") -> None:
    serving.cancel()
    await asyncio.wait([serving])


def _predict(
    pool: _ServedPool, settings: WorkersConfig, windows: Windows, chunks: Iterable[Chunk]
) -> Iterator[Prediction]:
    """See :class:`stdist.runs.forecasting.Predictor`: all chunks in their order, made by the pool."""
    units = [
        Unit(WorkKey(0, part[0].windows.start, (part[0].cells.start,)), pickle.dumps(part))
        for _, of_windows in groupby(chunks, key=lambda chunk: chunk.windows.start)
        for part in _parts(list(of_windows))
    ]
    ahead = AHEAD * settings.num_workers
    pool.submit(units[:ahead])
    for number, unit in enumerate(units):
        result = pool.collect(unit.key)
        pool.submit(units[number + ahead : number + ahead + 1])
        yield from pickle.loads(result.answer)


def _parts(chunks: list[Chunk]) -> list[list[Chunk]]:
    return [chunks[first : first + CHUNKS_PER_UNIT] for first in range(0, len(chunks), CHUNKS_PER_UNIT)]
