"""Seconds of one core for a day of raw Telecom Italia text, against pandas ``read_csv``, ``groupby.sum`` and ``pivot``.

The text is of a synthetic Milan in the genuine format: 10,000 squares, 144 slots, 3.6 rows of country codes a pair,
70 bytes a row. Both sides make of it what a store takes, five float32 arrays (144, 10000) with NaN where a pair has
no row, in turn, in one process held to one core (pandas starts threads of its own), and must agree to 1e-6. The peer
checks nothing; we check every row. Beside it:

``read_csv``   seconds to read the same blocks with polars and do nothing else: what no reader through polars beats
``one_pivot``  the peer with one pivot for all five tables, in turn with ours again
``fresh``      of both, in a process of its own as a task of a preparation has: seconds of its first day without
               imports, and peak of memory
``tasks``      how many times faster two tasks on two cores read and write two days than one task on one, in processes
               that have had a first day; seconds of both
``size``       bytes of the store on disk, per byte of raw text and of raw float32

    python benchmarks/ingest.py --json
    python benchmarks/ingest.py --json --rows 10
"""

import os

os.environ["OMP_NUM_THREADS"] = os.environ["POLARS_MAX_THREADS"] = "1"

import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
from _harness import comparison, cost_in_fresh_process, figure, in_turn, parser, publish, seconds
from _raw_telecom import write_raw

from data_prep import prepare, telecom_italia
from data_prep.preparation import local_processes
from data_prep.telecom_rows import CHANNELS, SCHEMA, SLOT_MS, SLOTS_PER_DAY, blocks, day_start_ms
from stdist.data import GridWriter
from stdist.data.synthetic import SyntheticCity

SIDE, FIRST_DAY, TASKS = 100, "2013-11-01", 2
DAYS = 2 * TASKS
"""One for each task to start with, and one to be measured."""

Values = dict[str, np.ndarray]


def ours(path: Path) -> Values:
    """The reader's own day, float32 [144, 10000] per channel."""
    plan = telecom_italia.plan([path])
    [day] = plan.read(plan.parts[0])
    return {name: values.reshape(SLOTS_PER_DAY, -1) for name, values in day.values.items()}


def parse(path: Path) -> None:
    with path.open("rb") as file:
        for block in blocks(file):
            pl.read_csv(block, separator="\t", has_header=False, schema=SCHEMA, quote_char=None)


def peer(path: Path) -> Values:
    """The same with pandas, as one writes it: a table at a time."""
    sums = _sums(path)
    return {name: _grid(sums.pivot(index="stamp", columns="square", values=name)) for name in CHANNELS}


def peer_pivoting_once(path: Path) -> Values:
    """The same with pandas, all tables in one pivot, which finds squares and stamps once instead of five times."""
    tables = _sums(path).pivot(index="stamp", columns="square", values=list(CHANNELS))
    return {name: _grid(tables[name]) for name in CHANNELS}


def _sums(path: Path) -> pd.DataFrame:
    rows = pd.read_csv(path, sep="\t", header=None, names=["square", "stamp", "country", *CHANNELS])
    return rows.groupby(["square", "stamp"])[list(CHANNELS)].sum().reset_index()


def _grid(table: pd.DataFrame) -> np.ndarray:
    stamps = day_start_ms(np.datetime64(FIRST_DAY, "D")) + SLOT_MS * np.arange(SLOTS_PER_DAY)
    return table.reindex(index=stamps, columns=np.arange(1, SIDE**2 + 1)).to_numpy(np.float32)


def in_fresh_process(side: Callable[[Path], Values], path: Path) -> Callable[[], list[str]]:
    return lambda: list(side(path))


def seconds_of_tasks(paths: list[Path], tasks: int, out: Path) -> float:
    """Seconds in which ``tasks`` processes read and write ``TASKS`` days, after a first day each."""
    plan = telecom_italia.plan(paths)
    with (
        GridWriter(out, plan.spec, plan.recipe, plan.sources, plan.parts) as writer,
        local_processes(tasks) as execute,
    ):
        run = writer.part_writer(plan.read)
        begin, rest = plan.parts[:tasks], plan.parts[tasks : tasks + TASKS]
        list(execute(run, begin))
        return seconds(lambda: list(execute(run, rest)))


def store_bytes(path: Path, out: Path) -> int:
    """Size on disk of a store of one day."""
    prepare(telecom_italia.plan([path]), out)
    return sum(file.stat().st_size for file in out.rglob("*") if file.is_file())


def require_agreement(path: Path) -> None:
    values = ours(path)
    for side in (peer, peer_pivoting_once):
        for name, expected in side(path).items():
            if not np.allclose(values[name], expected, rtol=1e-6, atol=0, equal_nan=True):
                raise SystemExit(f"error: {name} is not what pandas makes of it")


def measure(runs: int, rows: int) -> dict[str, Any]:
    cores = os.sched_getaffinity(0)
    with TemporaryDirectory() as name:
        folder = Path(name)
        city = SyntheticCity(rows, SIDE, FIRST_DAY, days=DAYS, seed=1)
        paths = write_raw(city, folder / "raw", np.arange(1, rows * SIDE + 1).reshape(rows, SIDE))
        path, text = paths[0], paths[0].stat().st_size
        require_agreement(path)
        os.sched_setaffinity(0, {max(cores)})
        our_seconds, peer_seconds = in_turn(partial(ours, path), partial(peer, path), runs)
        beside_once, once_seconds = in_turn(partial(ours, path), partial(peer_pivoting_once, path), runs)
        parse_seconds = [seconds(partial(parse, path)) for _ in range(runs)]
        fresh = {side.__name__: cost_in_fresh_process(in_fresh_process, side, path) for side in (ours, peer)}
        os.sched_setaffinity(0, cores)
        one, two = ([seconds_of_tasks(paths, n, folder / f"{n}-{run}") for run in range(runs)] for n in (1, TASKS))
        stored = store_bytes(path, folder / "day.zarr")
        lines = sum(block.count(b"\n") for block in iter(partial(path.open("rb").read, 1 << 24), b""))
    raw = len(CHANNELS) * SLOTS_PER_DAY * rows * SIDE * 4
    return comparison(
        name="ingest",
        unit="seconds a day, one core",
        values=our_seconds,
        peer="pandas read_csv, groupby.sum and pivot",
        peer_values=peer_seconds,
        setting=(
            f"{text:,} bytes, {lines:,} rows, {rows * SIDE} squares, polars {pl.__version__}, pandas {pd.__version__}"
        ),
        better="less",
        megabytes_per_second=figure(text / 1e6 / statistics.median(our_seconds)),
        read_csv=figure(statistics.median(parse_seconds)),
        one_pivot={
            "peer_value": figure(statistics.median(once_seconds)),
            "ratio": figure(statistics.median(once_seconds) / statistics.median(beside_once)),
        },
        fresh={name: {"seconds": figure(cost.seconds), "peak_bytes": cost.peak_bytes} for name, cost in fresh.items()},
        tasks={
            "times_faster": figure(statistics.median(one) / statistics.median(two)),
            "seconds": [[figure(value) for value in values] for values in (one, two)],
        },
        size={
            "bytes": stored,
            "per_text_byte": figure(stored / text),
            "per_float32_byte": figure(stored / raw),
        },
    )


def main() -> None:
    arguments = parser(__doc__, runs=5)
    arguments.add_argument("--rows", type=int, default=SIDE, help="rows of 100 squares (default: %(default)s)")
    options = arguments.parse_args()
    publish(measure(options.runs, options.rows), options.json)


if __name__ == "__main__":
    main()
