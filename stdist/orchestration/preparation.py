"""A preparation on a Ray cluster: one task per part.

A part owns whole shards and gives the same bytes whenever it is run, so that the part of a dead worker is simply run
again. Workers read the sources and write the store under the very paths the command was given: both lie on a file
system that all machines share, and stdist is installed on all of them.
"""

import logging
import socket
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from urllib.parse import urlsplit

from stdist.data.parts import Executor, Part, PartResult, RunPart
from stdist.errors import InputError

try:
    import ray
    from ray.exceptions import AuthenticationError, RayError, RayTaskError
except ModuleNotFoundError as error:
    raise InputError("Ray is not installed; pip install 'stdist[cluster]', or leave out --ray") from error

MAX_RETRIES = 3
"""How many workers in a row may die of one part."""
PATIENCE = 10.0
"""Seconds in which the head has to answer. Ray itself would try for two minutes and then end the process."""


@contextmanager
def ray_executor(address: str) -> Iterator[Executor]:
    """An ``Executor`` on the cluster at ``address``: HOST:PORT, ray://HOST:PORT, ``auto`` (the one this machine
    belongs to) or ``local`` (one that is started here and ends with this). A connection that is there already is used.

    Raises InputError where there is no such cluster, or it refuses the token, at once. The executor raises what a part
    raises, and ``BrokenProcessPool`` where ``MAX_RETRIES + 1`` workers died of a part (or memory ran out: Ray's message
    says so); parts that still run then are stopped.
    """
    mine = not ray.is_initialized()
    if mine:
        connect(address, log_to_driver=False)
    try:
        yield _run_parts
    finally:
        if mine:
            ray.shutdown()


def connect(address: str | None, log_to_driver: bool) -> None:
    """Joins a cluster, see ``ray_executor``; None: the one this machine belongs to, else one that is started here.

    Raises InputError where it cannot be joined, at once.
    """
    if address not in (None, "auto", "local"):
        _require_listener(address)
    try:
        # A dashboard is started with a cluster of one's own only, and there nobody looks at it.
        dashboard = False if address in (None, "local") else None
        ray.init(address, include_dashboard=dashboard, log_to_driver=log_to_driver, logging_level=logging.ERROR)
    except (AuthenticationError, ConnectionError, RuntimeError, ValueError, SystemExit) as error:
        # SystemExit is Ray's own way out where the head says nothing that it understands.
        raise InputError(
            f"cannot join the Ray cluster at {address or 'this machine'}: {_sentence(error)}; see that one runs there "
            "(`ray status`), with this version of Ray, and that RAY_AUTH_MODE and RAY_AUTH_TOKEN_PATH are those of its "
            "head"
        ) from error


def _require_listener(address: str) -> None:
    url = urlsplit(address if "://" in address else f"//{address}")
    try:
        host, port = url.hostname, url.port
    except ValueError:
        host = port = None
    if not host or not port:
        raise InputError(f"{address} is no address of a Ray cluster; write HOST:6379, ray://HOST:10001, auto or local")
    try:
        socket.create_connection((host, port), timeout=PATIENCE).close()
    except OSError as error:
        raise InputError(
            f"nothing answers at {address} ({error.strerror or error}); check host and port, `ray status` on the head"
        ) from error


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
    except RayTaskError as error:
        raise error.cause from error
    except RayError as error:
        raise BrokenProcessPool(f"part {part.name}: {_sentence(error)}") from error


def _sentence(error: BaseException) -> str:
    """The first one of what may be pages."""
    text = " ".join(str(error).split())
    return type(error).__name__ if isinstance(error, SystemExit) or not text else text.split(". ")[0].rstrip(".")
