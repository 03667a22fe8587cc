"""The cost of comparing every file of a store with its digest: an epoch's reading with and without it.

Both sides open the store anew and hand out every window of the span once, in the same order, through the loader; the
peer's store takes every file for sound. A digest is compared once since a store was opened, so that a run of many
epochs pays in its first alone. Counted are the process's seconds of all cores, which other work on the machine disturbs
less than the clock's. Beside it:

``share``     what the comparison adds to the first epoch's reading; ``share_of_epochs`` to that of ``--epochs``
``training``  to an epoch whose batches also take a consumer 50 ms of a core each
``digest``    the store's bytes, what a core hashes of them in a second, and the share that this alone would add, which
              tells more than a difference of two sides on a machine with other work

    python benchmarks/integrity.py --json
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "2")

import hashlib
import statistics
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

from _harness import comparison, figure, parser, publish

from data_prep import READERS
from stdist.data import Windows, open_store
from stdist.data.integrity import VerifiedStore
from stdist.data.loader import WindowLoader
from stdist.data.sampler import WindowSampler

S, K, BATCH, SIDE = 12, 36, 16, 100
CONSUMER_SECONDS = 0.05


def windows_of(path: Path) -> Windows:
    store = open_store(path)
    return store.windows(store.days, S, K, channel="internet")


def epoch(path: Path, epochs: int = 1) -> int:
    """Reads every window ``epochs`` times; returns how many those were."""
    loader, count = WindowLoader(WindowSampler(windows_of(path), BATCH)), 0
    for _ in range(epochs):
        for batch in loader:
            count += len(batch.indices)
    return count


@contextmanager
def unverified() -> Iterator[None]:
    with patch.object(VerifiedStore, "_compare", lambda *_: None):
        yield


def without(path: Path, epochs: int = 1) -> int:
    with unverified():
        return epoch(path, epochs)


def in_turn(ours: Callable[[], object], peer: Callable[[], object], runs: int) -> tuple[list[float], list[float]]:
    """Seconds of all cores of each run of each side, alternating."""
    pairs = [(cpu_seconds(ours), cpu_seconds(peer)) for _ in range(runs)]
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


def cpu_seconds(call: Callable[[], object]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def measure(path: Path, options: Namespace) -> dict[str, Any]:
    if epoch(path) != without(path):
        raise SystemExit("error: the sides hand out different numbers of windows")
    ours, peer = in_turn(lambda: epoch(path), lambda: without(path), options.runs)
    content = b"".join(file.read_bytes() for file in path.rglob("*") if file.is_file())
    plain, more = statistics.median(peer), statistics.median(ours) - statistics.median(peer)
    later = (cpu_seconds(lambda: without(path, options.epochs)) - plain) / max(1, options.epochs - 1)
    hashing = min(cpu_seconds(lambda: hashlib.sha256(content).digest()) for _ in range(options.runs))
    batches = len(windows_of(path)) / BATCH
    return comparison(
        name="integrity",
        unit="seconds of a core for an epoch's reading, every file compared with its digest",
        values=ours,
        peer="the same without comparing",
        peer_values=peer,
        setting=(
            f"S = {S}, K = {K}, {SIDE} x {SIDE} cells, {options.days} days, {len(windows_of(path))} windows in batches "
            f"of {BATCH}, 2 threads"
        ),
        better="less",
        share=figure(more / plain),
        share_of_epochs={
            "epochs": options.epochs,
            "share": figure(more / (plain + (options.epochs - 1) * later)),
        },
        training={"seconds_a_batch": CONSUMER_SECONDS, "share": figure(more / (plain + batches * CONSUMER_SECONDS))},
        digest={
            "bytes": len(content),
            "bytes_per_second": figure(len(content) / hashing),
            "share": figure(hashing / plain),
        },
    )


def main() -> None:
    arguments = parser(__doc__, runs=5)
    arguments.add_argument("--days", type=int, default=28, help="days of the city (default: %(default)s)")
    arguments.add_argument("--epochs", type=int, default=5, help="epochs of a longer reading (default: %(default)s)")
    options = arguments.parse_args()
    with TemporaryDirectory() as folder:
        path = Path(folder) / "city.zarr"
        READERS["synthetic"].prepare([], path, height=SIDE, width=SIDE, days=options.days)
        publish(measure(path, options), options.json)


if __name__ == "__main__":
    main()
