"""Leases granted and returned per second by the scheduler of policy workers; and what it makes of 2 to 512 GPUs.

A million groups, 16 cells a unit, are queued; workers take leases and return answers, all of it written to a ledger as
the coordinator writes it. The peer is a queue as one would build it without a scheduler, a table in SQLite that is
updated at each lease and at each answer, its writes left to the system as the ledger's are. Both hand out the same
units in the same order; seconds are the processor's. Then trainings of a 7B are simulated with the same scheduler
(policy_workers/simulation.py), undisturbed and with one worker lost an hour; their costs are those of docs/scaling.md.

    python benchmarks/policy_scheduler.py --json
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"

import sqlite3
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from _harness import comparison, figure, parser, publish

from stdist.orchestration.policy_workers.leases import Lease, Scheduler
from stdist.orchestration.policy_workers.ledger import Ledger
from stdist.orchestration.policy_workers.simulation import Cluster, random_losses, simulate
from stdist.runs.workers import Unit, WorkKey

GROUPS, CELLS, WORKERS = 1_000_000, 16, 64
UNITS = [Unit(WorkKey(0, window, tuple(range(CELLS))), b"", "") for window in range(GROUPS // CELLS)]
GPUS = (2, 8, 32, 64, 128, 512)
WINDOWS_A_LEARNER = 4

Work = Callable[[], list[int]]
"""Takes every unit and answers it. Returns the windows in the order of their answers."""


def scheduler(folder: Path) -> Work:
    ledger = Ledger(folder / "ledger.jsonl")
    pool = Scheduler(600.0, ledger.note)
    pool.submit(UNITS)
    names = [pool.join(0.0) for _ in range(WORKERS)]
    for name in names:
        pool.workers[name].started("here")
        pool.workers[name].verified("")

    def work() -> list[int]:
        windows = []
        while pool.waiting:
            for lease in [pool.order_for(name, 0.0) for name in names]:
                if isinstance(lease, Lease) and pool.complete(lease, b"", {"sample": 1.0}):
                    windows.append(lease.unit.key.window)
        ledger.flush()
        return windows

    return work


def sqlite_queue(folder: Path) -> Work:
    database = sqlite3.connect(folder / "queue.db", isolation_level=None)
    database.execute("PRAGMA journal_mode = WAL")
    database.execute("PRAGMA synchronous = OFF")
    database.execute(
        "CREATE TABLE work "
        "(window INTEGER PRIMARY KEY, cells TEXT, worker TEXT, fence INTEGER, expires REAL, answer BLOB)"
    )
    database.execute("CREATE INDEX queued ON work (window) WHERE worker IS NULL")
    rows = [(unit.key.window, str(unit.key.cells)) for unit in UNITS]
    database.execute("BEGIN")
    database.executemany("INSERT INTO work VALUES (?, ?, NULL, 0, NULL, NULL)", rows)
    database.execute("COMMIT")

    def take(worker: str) -> tuple[int, int] | None:
        return database.execute(
            "UPDATE work SET worker = ?, fence = fence + 1, expires = 600 WHERE window = "
            "(SELECT window FROM work WHERE worker IS NULL ORDER BY window LIMIT 1) RETURNING window, fence",
            (worker,),
        ).fetchone()

    def work() -> list[int]:
        windows = []
        while leases := [lease for i in range(WORKERS) if (lease := take(f"worker-{i}"))]:
            for lease in leases:
                answered = "UPDATE work SET answer = x'' WHERE window = ? AND fence = ? AND answer IS NULL"
                if database.execute(answered, lease).rowcount:
                    windows.append(lease[0])
        database.close()
        return windows

    return work


def rates(prepare: Callable[[Path], Work]) -> tuple[float, float]:
    """Leases granted and returned in a second of the processor, and in a second of the clock."""
    with TemporaryDirectory() as folder:
        work = prepare(Path(folder))
        began, before = time.perf_counter(), time.process_time()
        windows = work()
        rate = len(UNITS) / (time.process_time() - before), len(UNITS) / (time.perf_counter() - began)
        if windows != [unit.key.window for unit in UNITS]:
            raise SystemExit("error: units were not handed out oldest first, each once")
    return rate


def on_gpus(gpus: int, hours: float) -> dict[str, Any]:
    """A training with a worker for every three learners, with and without losses; seconds of a 7B on paper."""
    workers = max(1, gpus // 4)
    cluster = Cluster(
        workers,
        windows_per_step=WINDOWS_A_LEARNER * (gpus - workers),
        sample_seconds=0.71,
        sample_spread=0.2,
        load_seconds=2.5,
        train_seconds=11.5,
        start_seconds=120,
        groups_per_unit=30,
    )
    began = time.process_time()
    calm = simulate(cluster, hours)
    losses = random_losses(1, workers, hours)
    lossy = simulate(cluster, hours, losses)
    if not (calm.exactly_once and lossy.exactly_once):
        raise SystemExit("error: a unit was not answered exactly once")
    return {
        "gpus": gpus,
        "workers": workers,
        "steps_an_hour": figure(calm.steps_per_hour),
        "groups_an_hour": figure(calm.groups_per_hour),
        "workers_idle": figure(calm.worker_idle),
        "learners_idle": figure(calm.learner_idle),
        "one_lost_an_hour": {
            "lost_workers": len(losses),
            "share_of_undisturbed": figure(lossy.steps_per_hour / calm.steps_per_hour),
            "workers_idle": figure(lossy.worker_idle),
            "learners_idle": figure(lossy.learner_idle),
            "lost_work": figure(lossy.lost_work),
            "lost_leases": lossy.lost_leases,
        },
        "processor_seconds": figure(time.process_time() - began),
    }


def main() -> None:
    arguments = parser(__doc__, runs=7)
    arguments.add_argument("--hours", type=float, default=4, help="simulated (default: %(default)s)")
    options = arguments.parse_args()
    rates(scheduler), rates(sqlite_queue)
    pairs = [(rates(scheduler), rates(sqlite_queue)) for _ in range(options.runs)]
    publish(
        comparison(
            name="policy_scheduler",
            unit="leases granted and returned per second of one core",
            values=[ours[0] for ours, _ in pairs],
            peer="a table in SQLite, one statement a lease and one an answer",
            peer_values=[peer[0] for _, peer in pairs],
            setting=f"{GROUPS} groups in {len(UNITS)} units, {WORKERS} workers, SQLite {sqlite3.sqlite_version}",
            better="more",
            by_the_clock=figure(statistics.median(ours[1] for ours, _ in pairs)),
            peer_by_the_clock=figure(statistics.median(peer[1] for _, peer in pairs)),
            simulated_hours=options.hours,
            simulated=[on_gpus(gpus, options.hours) for gpus in GPUS],
        ),
        options.json,
    )


if __name__ == "__main__":
    main()
