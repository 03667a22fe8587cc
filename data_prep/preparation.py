"""Plans of stores, and their execution: init, parts in any order and in any process, finalise."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from stdist.data import Day, GridSpec, GridStore, GridWriter, NodeSpec, Part, Split, open_store
from stdist.data.parts import Executor, PartResult, RunPart
from stdist.data.writer import serially
from stdist.errors import InputError, Interrupted, ResourceError, of_the_system
from stdist.progress import Progress


@dataclass(frozen=True, eq=False)
class Plan:
    """A preparation before any value is read. Picklable.

    recipe: what made the store, JSON. sources: raw files (or folders that are one data set), whose names,
    sizes and digests the store keeps. split: the store's default split; where None,
    ``stdist.data.spans.default_split`` of the days that hold data. read: yields the days of one part; a
    top-level function, a ``functools.partial`` of one, or a method of a picklable object. read_as: how the sources
    were understood, where a reader had to choose; said: what else the user should know of them.
    """

    spec: GridSpec | NodeSpec
    recipe: dict[str, Any]
    sources: list[Path]
    split: Split | None
    parts: list[Part]
    read: Callable[[Part], Iterator[Day]]
    read_as: str = ""
    said: tuple[str, ...] = ()


@dataclass(frozen=True)
class PrepareSummary:
    """A written store, in numbers. ``frames``: time steps that exist; ``runs``: gap-free segments of them; ``missing``:
    per channel, values of these steps that the source lacks, now imputed; ``true_zeros``: measured zeros;
    ``absent_days``: local days between the first and the last without any step; ``unseen``: per channel, cells without
    any observed value, and without one in training that are scored."""

    path: Path
    city: str
    channels: tuple[str, ...]
    frames: int
    runs: int
    cells: int
    missing: dict[str, int]
    true_zeros: dict[str, int]
    absent_days: tuple[str, ...]
    unseen: dict[str, dict[str, int]]
    digest: str

    @classmethod
    def of(cls, store: GridStore) -> "PrepareSummary":
        days = np.arange(store.days.first_day, store.days.last_day + np.timedelta64(1, "D"))
        return cls(
            path=store.path,
            city=store.city,
            channels=store.channels,
            frames=int(store.present.sum()),
            runs=len(store.segments),
            cells=int(store.inside.sum()),
            missing={name: counts["missing"] for name, counts in store.coverage.items()},
            true_zeros={name: counts["true_zeros"] for name, counts in store.coverage.items()},
            absent_days=tuple(map(str, np.setdiff1d(days, store.local_days[store.present]))),
            unseen=store.unseen,
            digest=store.digest,
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        lists = {"channels": list(self.channels), "absent_days": list(self.absent_days)}
        return vars(self) | {"path": str(self.path)} | lists


def prepare(
    plan: Plan,
    out: Path,
    workers: int = 1,
    progress: Progress | None = None,
    executor: Executor | None = None,
) -> PrepareSummary:
    """Write the store ``out``, or finish what an interrupted preparation of the same plan left to do.

    workers: processes of this machine (a script that asks for more than one needs the usual
    ``if __name__ == "__main__"``). executor: runs the parts elsewhere. progress: called with (days, in all).
    Raises InputError for bad input; ResourceError for a full disk, memory that does not do and a dead worker, and
    Interrupted on Ctrl-C, which leave what is done.
    """
    if workers < 1:
        raise InputError(f"{workers} workers cannot prepare {out}; give at least one")
    out = Path(out)
    with _explained(out), GridWriter(out, plan.spec, plan.recipe, plan.sources, plan.parts) as writer:
        sizes = {part.name: len(part.days) * len(part.tiles or [None]) for part in plan.parts}
        finished, total = writer.done, sum(sizes.values())
        left, done = [part for part in plan.parts if part.name not in finished], sum(sizes[name] for name in finished)
        tell = progress or (lambda _done, _total: None)
        if done:
            tell(done, total)
        # Days are told one by one in this process, part by part elsewhere.
        days = count(done + 1)
        in_process = executor is None and workers == 1
        processes = nullcontext(executor or serially) if executor or in_process else local_processes(workers)
        with processes as run:
            run_part = writer.part_writer(plan.read, (lambda: tell(next(days), total)) if in_process else None)
            for result in run(run_part, left):
                done += sizes[result.name]
                if next(days) <= done:
                    tell(done, total)
                days = count(done + 1)
            writer.finalise(plan.split, executor=run)
    return PrepareSummary.of(open_store(out))


@contextmanager
def _explained(out: Path) -> Iterator[None]:
    """Turns what stops a preparation, but not its restart, into one line."""
    again = "what is done is kept, the same command goes on from there"
    try:
        yield
    except BrokenProcessPool as error:
        raise ResourceError(
            f"a worker process of {out} died, perhaps killed for want of memory; {again}; give fewer --workers"
        ) from error
    except (OSError, MemoryError, RuntimeError) as error:
        if isinstance(error, ResourceError) or not isinstance(said := of_the_system(error), ResourceError):
            raise
        raise ResourceError(f"{out}.partial: {said}; {again}") from error
    except KeyboardInterrupt:
        raise Interrupted(f"the preparation of {out} was stopped; {again}") from None


@contextmanager
def local_processes(workers: int) -> Iterator[Executor]:
    """An ``Executor`` on ``workers`` processes, fresh interpreters that share the cores and end with this one.

    What a part raises is raised here, after the parts in hand were finished and noted. Raises
    ``BrokenProcessPool`` where a process dies.
    """
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_follow_parent)
    limited = "POLARS_MAX_THREADS" in os.environ
    # Read where polars is imported, which in a worker is before any code of ours.
    os.environ.setdefault("POLARS_MAX_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))

    def execute(run_part: RunPart, parts: list[Part]) -> Iterator[PartResult]:
        left, running = iter(parts), set[Future[PartResult]]()
        while True:
            # No more than one part a worker at a time: nothing waits in a queue that Ctrl-C would have to empty.
            while len(running) < workers and (part := next(left, None)) is not None:
                running.add(pool.submit(run_part, part))
            if not running:
                return
            finished, running = wait(running, return_when=FIRST_COMPLETED)
            for future in finished:
                yield future.result()

    try:
        yield execute
    finally:
        pool.shutdown(cancel_futures=True)
        if not limited:
            del os.environ["POLARS_MAX_THREADS"]


def _follow_parent() -> None:
    """Ctrl-C is the parent's to handle; where the parent dies, its workers must not write on."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end, daemon=True).start()
