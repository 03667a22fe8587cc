"""Random windows of a city through the loader, against ``np.memmap`` of the same float32 values.

Both sides hand out the same batches in the same order. ``value`` is the steady state with the city's decoded frames in
the store's cache, as up to about 21,000 frames of 100 x 100 cells are by default. Beside it, all in windows a second:

``beyond_memory``  the cache holds a quarter of the span: windows in any order, most of which are decoded anew, and
                   with ``days_at_once``, which decodes each chunk about once an epoch
``cold``           first reads of both, the files dropped from the system's page cache (as far as an unprivileged
                   process can), the store's cache empty
``region``         seconds of one window of 11 x 11 cells of a large raster, against reading whole frames of it; both
                   without the store's cache, files in the page cache
``consumer``       share of the time in which a consumer that takes 50 ms a batch is busy, after its first batch: with
                   all in memory, from an empty cache on, and beyond memory with ``days_at_once``
``size``           bytes of the store on disk, per byte of raw float32

Both stores are made first, which takes longer than the measurement; ``--folder`` keeps them for another time.

    python benchmarks/windows.py --json
    python benchmarks/windows.py --json --days 6 --large 300 --windows 320
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "2")

import statistics
import time
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import zarr
from _harness import comparison, figure, in_turn, parser, publish, seconds

from data_prep import READERS
from stdist.data import DaySpan, GridStore, Region, Windows, open_store
from stdist.data.loader import WindowLoader
from stdist.data.sampler import WindowSampler

S, K, BATCH, SIDE = 12, 36, 16, 100
CONSUMER_SECONDS, CONSUMER_BATCHES = 0.05, 60


def city(folder: Path, side: int, days: int) -> Path:
    """A store of a synthetic city of side x side cells, made unless it is there."""
    out = folder / f"city-{side}-{days}.zarr"
    if not out.exists():
        READERS["synthetic"].prepare([], out, height=side, width=side, days=days)
    return out


def all_windows(path: Path, share: float = 1.0) -> Windows:
    """Every window of a store opened anew, whose cache may hold ``share`` of the values and masks."""
    store = open_store(path)
    store.chunk_cache.limit = int(share * store.present.size * store.inside.size * 5)
    days = DaySpan.parse([store.attributes["first_day"], store.attributes["last_day"]])
    return store.windows(days, S, K, channel="internet")


def raw_copy(store: GridStore) -> Path:
    """The store's values as one file of float32 beside it."""
    out = store.path.with_suffix(".float32")
    if not out.exists():
        with out.open("wb") as file:
            for day in range(0, store.present.size, store.slots_per_day):
                file.write(store.values("internet", day, day + store.slots_per_day).tobytes())
    return out


def memmap_batches(raw: Path, windows: Windows, count: int) -> Iterator[np.ndarray]:
    """The windows that a sampler of seed 0 hands out first, [B, S + K, H, W] each."""
    frames = np.memmap(raw, np.float32, "r").reshape(-1, *windows.store.shape)
    origins = windows.origins[WindowSampler(windows, BATCH).order(0)[:count]]
    for batch in np.split(origins, range(BATCH, count, BATCH)):
        yield np.stack([frames[o - S + 1 : o + K + 1] for o in batch])


def loader_batches(windows: Windows, count: int, days_at_once: int | None = None) -> Iterator[Any]:
    loader = WindowLoader(WindowSampler(windows, BATCH, days_at_once=days_at_once))
    for number, batch in enumerate(loader, 1):
        yield batch
        if number * BATCH >= count:
            return


def consume(batches: Iterator[Any]) -> int:
    return sum(1 for _ in batches)


def drop_from_page_cache(path: Path) -> None:
    for file in [path] if path.is_file() else (file for file in path.rglob("*") if file.is_file()):
        handle = os.open(file, os.O_RDONLY)
        try:
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)


def cold(path: Path, raw: Path, count: int) -> dict[str, Any]:
    """Windows a second of first reads, one run a side."""
    windows = all_windows(path)
    drop_from_page_cache(path)
    ours = count / seconds(lambda: consume(loader_batches(windows, count)))
    drop_from_page_cache(raw)
    peer = count / seconds(lambda: consume(memmap_batches(raw, windows, count)))
    return {"windows": count, "value": figure(ours), "peer_value": figure(peer), "ratio": figure(ours / peer)}


def beyond_memory(path: Path, count: int, days_at_once: int, peer: float) -> dict[str, Any]:
    result: dict[str, Any] = {"cache_share": 0.25}
    for name, days, runs_of in (("any_order", None, max(BATCH, count // 10)), ("days_at_once", days_at_once, count)):
        windows = all_windows(path, 0.25)
        consume(loader_batches(windows, runs_of, days))
        rate = runs_of / seconds(lambda w=windows, n=runs_of, d=days: consume(loader_batches(w, n, d)))
        result[name] = {"value": figure(rate), "ratio": figure(rate / peer)}
    return result | {"days": days_at_once}


def region(path: Path, side: int, runs: int) -> dict[str, Any]:
    """One window's seconds: an 11 x 11 region in the middle, and whole frames with the same targets cut out."""
    middle = side // 2
    cells = Region(middle - 5, middle + 6, middle - 5, middle + 6)
    frames = all_windows(path, 0.0).of_region(cells, Region(0, side, 0, side))
    alone = frames.of_region(cells)
    indices = iter(np.random.default_rng(0).permutation(len(frames)).tolist() * 2)
    if not np.array_equal(alone.read([0]).history, frames.read([0]).history[(..., *cells.slices)]):
        raise SystemExit("error: a region alone is not what whole frames hold there")
    ours, peer = in_turn(lambda: alone.read([next(indices)]), lambda: frames.read([next(indices)]), runs)
    seconds_ours, seconds_peer = statistics.median(ours), statistics.median(peer)
    return {
        "cells": str(cells),
        "raster": f"{side} x {side}",
        "seconds": figure(seconds_ours),
        "whole_frames_seconds": figure(seconds_peer),
        "ratio": figure(seconds_peer / seconds_ours),
    }


def busy(batches: Iterator[Any]) -> dict[str, float]:
    """Of a consumer that is busy for 50 ms with every batch; the first batch's wait is told apart."""
    first = seconds(lambda: next(batches))
    start, worked = time.perf_counter(), seconds(lambda: time.sleep(CONSUMER_SECONDS))
    for _ in batches:
        worked += seconds(lambda: time.sleep(CONSUMER_SECONDS))
    return {"busy_share": figure(worked / (time.perf_counter() - start)), "first_batch_seconds": figure(first)}


def size(path: Path, raw: Path) -> dict[str, float]:
    def bytes_below(folder: Path) -> int:
        return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())

    floats = raw.stat().st_size
    return {
        "raw_float32_bytes": floats,
        "store_bytes": bytes_below(path),
        "store_per_raw": figure(bytes_below(path) / floats),
        "values_per_raw": figure(bytes_below(path / "internet") / floats),
        "masks_per_raw": figure(bytes_below(path / "observed_internet") / floats),
    }


def measure(folder: Path, options: Namespace) -> dict[str, Any]:
    path, large = city(folder, SIDE, options.days), city(folder, options.large, 1)
    windows = all_windows(path)
    raw, count = raw_copy(windows.store), min(options.windows, len(windows)) // BATCH * BATCH
    first, peer_first = next(loader_batches(windows, BATCH)), next(memmap_batches(raw, windows, BATCH))
    if not np.array_equal(np.concatenate((first.history, first.target), axis=1), peer_first):
        raise SystemExit("error: the sides hand out different windows")
    # Before the steady state, so that nothing is in memory by then.
    first_reads = cold(path, raw, count // 10 // BATCH * BATCH or BATCH)
    consume(loader_batches(windows, len(windows)))
    ours, peer = in_turn(
        lambda: consume(loader_batches(windows, count)),
        lambda: consume(memmap_batches(raw, windows, count)),
        options.runs,
    )
    rates, peer_rates = [count / s for s in ours], [count / s for s in peer]
    peer_rate = statistics.median(peer_rates)
    waited = CONSUMER_BATCHES * BATCH
    return comparison(
        name="windows",
        unit="random windows a second, in memory",
        values=rates,
        peer="np.memmap of the same float32 values",
        peer_values=peer_rates,
        setting=(
            f"S = {S}, K = {K}, {SIDE} x {SIDE} cells, {options.days} days, batches of {BATCH}, {count} windows a run, "
            f"2 threads, zarr {zarr.__version__}, numpy {np.__version__}"
        ),
        better="more",
        beyond_memory=beyond_memory(path, count, options.days_at_once, peer_rate),
        cold=first_reads,
        region=region(large, options.large, options.runs),
        consumer={
            "in_memory": busy(loader_batches(windows, waited)),
            "from_an_empty_cache": busy(loader_batches(all_windows(path), waited)),
            "beyond_memory": busy(loader_batches(all_windows(path, 0.25), waited, options.days_at_once)),
        },
        size=size(path, raw),
    )


def main() -> None:
    arguments = parser(__doc__, runs=5)
    arguments.add_argument("--days", type=int, default=62)
    arguments.add_argument("--windows", type=int, default=3200, help="windows of a run (default: %(default)s)")
    arguments.add_argument("--days-at-once", type=int, default=4, help="beyond memory (default: %(default)s)")
    arguments.add_argument("--large", type=int, default=1000, help="side of the large raster (default: %(default)s)")
    arguments.add_argument("--folder", type=Path, help="where the stores are kept (default: a temporary folder)")
    options = arguments.parse_args()
    with TemporaryDirectory() as temporary:
        publish(measure(options.folder or Path(temporary), options), options.json)


if __name__ == "__main__":
    main()
