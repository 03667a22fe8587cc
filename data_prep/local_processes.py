"""Parts on several processes of this machine."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager

from stdist.data.parts import Executor, Part, PartResult, RunPart


@contextmanager
def local_processes(workers: int) -> Iterator[Executor]:
    """An ``Executor`` on ``workers`` processes, fresh interpreters that share the cores and end with this one.

    What a part raises is raised here, after the parts in hand were finished and noted. Raises
    ``BrokenProcessPool`` where a process dies.
    """
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_follow_parent)
    given = "POLARS_MAX_THREADS" in os.environ
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
        if not given:
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
