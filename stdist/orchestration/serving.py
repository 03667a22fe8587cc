"""``stdist serve`` on a Ray cluster: the same app, in replicas that Ray Serve starts, watches and starts again.

One HTTP proxy on the head hands each request to a replica. A replica is the service of :mod:`stdist.serving.service`
without its port: it reads the run and the store under the very paths that the command was given, loads the model
itself, and looks for itself whether the store is another. Replicas give the same bytes for one state of the store;
around an append one may know it sooner than another, and an answer names the state that it is of.
"""

import logging
import re
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from io import StringIO
from typing import Any

from stdist import errors
from stdist.errors import InputError, ResourceError, of_the_system
from stdist.orchestration.cluster import connected, first_sentence, ray, workers_that_fit
from stdist.runs.forecast_request import ForecastRequest
from stdist.serving.service import (
    LAST_ANSWERS,
    MOST_CONNECTIONS,
    ServeRequest,
    begin,
    bound,
    ended_by_signals,
    listen,
    read_token,
    said_of,
    url_of,
)

try:
    from ray import serve as ray_serve
    from ray._common.constants import HEAD_NODE_RESOURCE_NAME
    from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_LOGGER_NAME, SERVE_NAMESPACE
    from ray.serve.config import HTTPOptions, ProxyLocation
    from ray.serve.schema import LoggingConfig
except ImportError as error:  # also where Ray is there without what its Serve needs
    raise InputError("Ray Serve is not installed; pip install 'stdist[cluster]', or leave out --ray") from error

NAME = "stdist"
"""Name of the one application that Serve runs."""
LOOK_EVERY, PATIENCE = 2.0, 60.0
"""Seconds between two looks at the cluster, and until one that does not answer is given up."""
_OURS = re.compile(r"^stdist\.errors\.(\w+): (.+)$", re.MULTILINE)
"""The error of a replica, in the traceback that Serve makes of it."""


def serve(request: ServeRequest, address: str, replicas: int, ready: Callable[[dict[str, Any]], None]) -> None:
    """:func:`stdist.serving.service.serve` on the cluster at ``address``: host and port are of its head, the rate is
    each replica's, and paths are absolute. Ends as that does, and leaves nothing on the cluster.

    Raises what that raises; InputError where the cluster cannot be joined, cannot hold the replicas, or does not see
    the run; ResourceError where Serve runs there already, or is no longer there.
    """
    token = read_token(request.token_file)
    out = sys.stdout
    with (
        redirect_stdout(StringIO()),  # on which Ray says that Serve, which was told to end, has ended
        connected(address, log_to_driver=False),
        ended_by_signals(),
        deployed(request, token, replicas) as said,
    ):
        with redirect_stdout(out):
            ready(said)
        _watch()


@contextmanager
def deployed(request: ServeRequest, token: str | None, replicas: int) -> Iterator[dict[str, Any]]:
    """Replicas on the cluster that this process is connected to, all of which answer; gives what is served and where.
    See :func:`serve`."""
    _, resources = workers_that_fit(replicas, "--replicas")
    address, number = _result(_free.remote(request.host, request.port, token))
    _require_no_serve()
    logging.getLogger(SERVE_LOGGER_NAME).setLevel(logging.CRITICAL)  # of this process; errors are raised
    deployment = Replica.options(  # type: ignore[attr-defined]
        num_replicas=replicas,
        ray_actor_options={"num_cpus": resources["CPU"], "num_gpus": resources.get("GPU", 0)},
    )
    try:
        said = _run(deployment.bind(request.forecast, request.rate, token), HTTPOptions(host=address, port=number))
        yield {"url": url_of(address, number), "replicas": replicas, **said}
    finally:
        _shutdown()


def _run(application: ray_serve.Application, options: HTTPOptions) -> dict[str, Any]:
    """Waits until all replicas answer, and returns what they serve. Raises the error that kept one from starting."""
    quiet = LoggingConfig(log_level="ERROR", enable_access_log=False)
    try:
        ray_serve.start(ProxyLocation.HeadOnly, options, logging_config=quiet)
        handle = ray_serve.run(application, name=NAME, route_prefix="/", logging_config=quiet)
        return handle.said.remote().result()
    except (RuntimeError, TimeoutError, ray.exceptions.RayError) as error:
        deployments = [each for of in ray_serve.status().applications.values() for each in of.deployments.values()]
        if found := [ours for each in deployments for ours in _OURS.findall(each.message)]:
            kind, line = found[-1]
            raise getattr(errors, kind)(line) from error
        raise ResourceError(
            f"Ray Serve did not start: {first_sentence(error)}; see /tmp/ray/session_latest/logs on its machines"
        ) from error


@ray_serve.deployment(
    name=NAME,
    max_ongoing_requests=MOST_CONNECTIONS,
    # Its own two seconds and twenty are for services whose answers take long.
    graceful_shutdown_wait_loop_s=0.1,
    graceful_shutdown_timeout_s=LAST_ANSWERS,
    # After which a replica that died is started again; requests go to the others at once.
    health_check_period_s=1,
    # A first replica that cannot start has a reason, which another try would meet again.
    max_constructor_retry_count=1,
)
@ray_serve.ingress()
class Replica:
    """One process that answers."""

    def __init__(self, request: ForecastRequest, rate: float, token: str | None) -> None:
        for path in (request.run_dir, request.store):
            if not path.exists():
                raise InputError(
                    f"{path} does not exist on {socket.gethostname()}, a machine of the Ray cluster; the run and the "
                    "store must lie at the same path on all of them"
                )
        name = ray_serve.get_replica_context().replica_id.unique_id
        try:
            self._app, first = begin(request, rate, token, _log, name)
        except (OSError, MemoryError) as error:
            raise of_the_system(error) or error from error
        self._said = said_of(first)

    def __serve_build_asgi_app__(self) -> Any:
        """Serve's name for it."""
        return self._app

    def said(self) -> dict[str, Any]:
        return self._said


def _log(line: str) -> None:
    sys.stderr.write(f"{line}\n")


@ray.remote(num_cpus=0, resources={HEAD_NODE_RESOURCE_NAME: 0.001})
def _free(host: str, port: int, token: str | None) -> tuple[str, int]:
    """On the head: the address and port that Serve can have. Serve would share one that another Serve has."""
    with bound(host, port, token) as listener:
        listen(listener, host, port)
        address, number = listener.getsockname()[:2]
        return address, number


def _result(reference: Any) -> Any:
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error


def _require_no_serve() -> None:
    """Raises ResourceError where Serve runs on the cluster: it has one address, which cannot be changed."""
    with suppress(ValueError):
        ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
        names = ", ".join(ray_serve.status().applications) or "nothing yet"
        raise ResourceError(
            f"Ray Serve runs on this cluster already and serves {names}; end that, by `serve shutdown` on the head "
            "where its command is gone, or serve without --ray"
        )


def _watch() -> None:
    """Returns never; raises ResourceError where the service is no longer on the cluster."""
    answered = time.monotonic()
    while True:
        time.sleep(LOOK_EVERY)
        try:
            applications = ray_serve.status().applications
        except ray.exceptions.RayError as error:  # Ray starts Serve's controller again, as it does replicas
            if time.monotonic() - answered > PATIENCE:
                raise ResourceError(f"the Ray cluster no longer answers: {first_sentence(error)}") from error
            continue
        if NAME not in applications:
            raise ResourceError("no longer served: another command ended Ray Serve on this cluster")
        answered = time.monotonic()


def _shutdown() -> None:
    with suppress(ray.exceptions.RayError):
        ray_serve.shutdown()
