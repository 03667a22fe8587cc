"""A connection to a Ray cluster, or one line that says why there is none."""

import logging
import os
import secrets
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

from stdist.errors import InputError, ResourceError

try:
    import ray
    from ray._private import ray_constants
    from ray.exceptions import AuthenticationError
except ModuleNotFoundError as error:
    raise InputError("Ray is not installed; pip install 'stdist[cluster]', or leave out --ray") from error

ANSWER_TIMEOUT = 10.0
"""Seconds in which the head has to answer. Ray itself would try for two minutes and then end the process."""


@contextmanager
def connected(address: str | None, log_to_driver: bool) -> Iterator[None]:
    """Ray, connected to the cluster at ``address``: HOST:PORT, ray://HOST:PORT, ``auto`` (the one this machine belongs
    to), ``local`` (one that is started here, listens to this machine alone and ends with this), None (``auto``, else
    ``local``). A connection that is there already is used, and stays.

    Raises InputError where there is no such cluster, or it refuses the token, at once; ResourceError where one that is
    started here does not come up.
    """
    if ray.is_initialized():
        yield
        return
    if address not in (None, "auto", "local"):
        _require_listener(address)
    try:
        join = partial(ray.init, log_to_driver=log_to_driver, logging_level=logging.ERROR)
        try:
            if address == "local":
                raise ConnectionError
            join(address or "auto")
        except ConnectionError:
            if address not in (None, "local"):
                raise
            _keep_token_private()
            _start(join)
    except ResourceError:
        raise
    except (AuthenticationError, ConnectionError, RuntimeError, ValueError, SystemExit) as error:
        # SystemExit is Ray's own way out where the head says nothing that it understands.
        raise InputError(
            f"cannot join the Ray cluster at {address or 'this machine'}: {first_sentence(error)}; see that one runs "
            "there (`ray status`), with this version of Ray, and that RAY_AUTH_MODE and RAY_AUTH_TOKEN_PATH are those "
            "of its head"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def _start(join: Callable[..., object]) -> None:
    """Starts a cluster of this process. Raises ResourceError where Ray's own processes do not come up."""
    try:
        with _on_loopback():
            join("local", include_dashboard=False)  # nobody looks at it
    except Exception as error:
        if type(error) is not Exception:
            raise
        # Of the bare class is what Ray raises after it has waited for its processes in vain.
        raise ResourceError(
            f"Ray did not start on this machine: {first_sentence(error)}; run the same command again, and see "
            "/tmp/ray/session_latest/logs where that does not help"
        ) from error


@contextmanager
def _on_loopback() -> Iterator[None]:
    """A cluster that is started inside listens on 127.0.0.1, as Ray does on a Mac; elsewhere it takes this machine's
    address and listens on all of them, and any address that it is told for the loopback it replaces by that one."""
    name = ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR
    before, was = os.environ.get(name), ray_constants.ENABLE_RAY_CLUSTER
    # The first is for the processes that the cluster consists of.
    os.environ[name], ray_constants.ENABLE_RAY_CLUSTER = "0", False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = was
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _keep_token_private() -> None:
    """Makes Ray's own token file, which Ray would make readable for everybody, and takes others' right to one that is
    there."""
    if {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys():
        return
    path = Path.home() / ".ray" / "auth_token"
    with suppress(OSError):  # Ray says what is wrong with it
        if path.exists():
            if path.stat().st_mode & 0o077:
                path.chmod(0o600)
        elif os.environ.get("RAY_AUTH_MODE", "token").lower() == "token":
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                file.write(secrets.token_hex(32))


def default_resources() -> dict[str, float]:
    """What a learner or a worker takes where nobody says: a core, and a GPU where the cluster has any."""
    return {"CPU": 1.0, "GPU": 1.0} if ray.cluster_resources().get("GPU") else {"CPU": 1.0}


def require_workers(workers: int | None) -> None:
    """Raises InputError for a number of workers that is none; None leaves it to the cluster."""
    if workers is not None and workers < 1:
        raise InputError(f"--workers is {workers}; give at least 1, or leave it out")


def workers_that_fit(workers: int | None, option: str = "--workers") -> tuple[int, dict[str, float]]:
    """Returns how many workers the cluster holds, or ``workers`` of them, and what each takes.

    Raises InputError, naming what is missing, where it does not hold so many; ``option`` is what gave the number.
    """
    resources, cluster = default_resources(), ray.cluster_resources()
    scarcest = min(resources, key=lambda kind: cluster.get(kind, 0))
    has = int(cluster.get(scarcest, 0))
    if not has or (workers or 0) > has:
        wanted = f"{option} {workers} need" if workers else "a worker needs"
        raise InputError(f"{wanted} a {scarcest} each and the cluster has {has}; lower {option}, or see `ray status`")
    return workers or has, resources


def _require_listener(address: str) -> None:
    try:
        url = urlsplit(address if "://" in address else f"//{address}")
        host, port = url.hostname, url.port
    except ValueError:
        host = port = None
    if not host or not port:
        raise InputError(f"{address} is no address of a Ray cluster; write HOST:6379, ray://HOST:10001, auto or local")
    try:
        socket.create_connection((host, port), timeout=ANSWER_TIMEOUT).close()
    except OSError as error:
        raise InputError(
            f"nothing answers at {address} ({error.strerror or error}); check host and port, `ray status` on the head"
        ) from error


def first_sentence(error: BaseException) -> str:
    """Returns the first sentence of what may be pages."""
    text = " ".join(str(error).split())
    return type(error).__name__ if isinstance(error, SystemExit) or not text else text.split(". ")[0].rstrip(".")
