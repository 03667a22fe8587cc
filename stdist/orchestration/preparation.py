"""A preparation on a Ray cluster: one task per part.

A part owns whole shards and gives the same bytes whenever it is run, so that the part of a process that died is simply
run again. Tasks read the sources and write the store under the very paths the command was given: both lie on a file
system that all machines share, and stdist is installed on all of them.
"""

from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager

from stdist.data.parts import Executor, Part, PartResult, RunPart
from stdist.orchestration.cluster import connected, first_sentence, ray

MAX_RETRIES = 3
"""Processes in a row that may die of one part."""


@contextmanager
def ray_executor(address: str) -> Iterator[Executor]:
    """An ``Executor`` on the cluster at ``address``, see :func:`stdist.orchestration.cluster.connected`.

    The executor raises what a part raises, and ``BrokenProcessPool`` where ``MAX_RETRIES + 1`` processes died of a part
    (or memory ran out: Ray's message says so); parts that still run then are stopped.
    """
    with connected(address, log_to_driver=False):
        yield _run_parts


def _run_parts(run_part: RunPart, parts: list[Part]) -> Iterator[PartResult]:
    shared = ray.put(run_part)
    waiting = {_run.options(name=part.name, max_retries=MAX_RETRIES).remote(shared, part): part for part in parts}
    try:
        while waiting:
            (reference, *_), _ = ray.wait(list(waiting), num_returns=1)
            yield _result(reference, waiting.pop(reference))
    finally:
        for reference in waiting:
            ray.cancel(reference, force=True)


@ray.remote(num_cpus=1, runtime_env={"env_vars": {"POLARS_MAX_THREADS": "1"}})
def _run(run_part: RunPart, part: Part) -> PartResult:
    return run_part(part)


def _result(reference: "ray.ObjectRef[PartResult]", part: Part) -> PartResult:
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error
    except ray.exceptions.RayError as error:
        raise BrokenProcessPool(f"part {part.name}: {first_sentence(error)}") from error
