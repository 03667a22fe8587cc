"""``stdist serve``: from a run and a store to a service that answers until it is told to end.

What a replica on a Ray cluster has in common with it, see :mod:`stdist.orchestration.serving`, is here too.
"""

import ipaddress
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stdist.errors import InputError, Interrupted, ResourceError
from stdist.runs.forecast_request import NEXT, ForecastRequest
from stdist.serving.city import CityForecast, CityForecaster
from stdist.serving.forecasts import CityForecasts

try:
    import uvicorn
    from fastapi import FastAPI

    from stdist.serving.app import ROUTES, make_app
    from stdist.serving.metrics import Metrics
except ImportError as error:
    raise InputError(f"stdist serve needs FastAPI ({error}): pip install 'stdist[serve]'") from error

TOKEN = "STDIST_SERVE_TOKEN"
"""Name of the environment's variable that may hold the token."""
SHORTEST_TOKEN, MOST_RATE = 16, 1e6
LAST_ANSWERS = 5
"""Seconds that answers under way have when the service is told to end."""
MOST_CONNECTIONS = 2000


@dataclass(frozen=True)
class ServeRequest:
    """The arguments of ``stdist serve``: a finished run, a store, ids of places (the run's own where None), address and
    port, the file of the token, and requests a second of one client, any number where 0. Raises InputError for a rate
    that is none."""

    run_dir: Path
    store: Path
    places: str | None
    host: str
    port: int
    token_file: Path | None
    rate: float

    def __post_init__(self) -> None:
        if not 0 <= self.rate <= MOST_RATE:
            raise InputError(f"--rate is {self.rate}; give requests a second up to {MOST_RATE:g}, or 0 for any")

    @property
    def forecast(self) -> ForecastRequest:
        """The request for what is served."""
        return ForecastRequest(self.run_dir, self.store, None, NEXT, Path(), places=self.places)


def serve(request: ServeRequest, ready: Callable[[dict[str, Any]], None], log: Callable[[str], None]) -> None:
    """Answers until SIGTERM, or until Ctrl-C, which raises Interrupted. ``ready`` is told what is served and where once
    the first forecast is made and the port answers.

    Raises InputError as ``stdist forecast --next``, for a token that is none and for a host that other machines reach
    without a token; ResourceError where the port is in use.
    """
    host, port, token = request.host, request.port, read_token(request.token_file)
    # uvicorn hands a signal on when it has ended
    with ended_by_signals(), bound(host, port, token) as listener:
        app, first = begin(request.forecast, request.rate, token, log)
        config = uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            server_header=False,
            limit_concurrency=MOST_CONNECTIONS,
            timeout_graceful_shutdown=LAST_ANSWERS,
        )
        address, number = listener.getsockname()[:2]
        listen(listener, host, port)
        ready({"url": url_of(address, number), **said_of(first)})
        uvicorn.Server(config).run(sockets=[listener])


def begin(
    request: ForecastRequest, rate: float, token: str | None, log: Callable[[str], None], replica: str | None = None
) -> tuple[FastAPI, CityForecast]:
    """Makes the first forecast; returns the app that answers with it and with those that follow, and the forecast.
    ``replica``: see :class:`stdist.serving.metrics.Metrics`."""
    forecaster = CityForecaster(request, log)
    began = time.monotonic()
    first = forecaster.make()
    metrics = Metrics(lambda: forecasts.city.origin, ROUTES, replica)
    forecasts = CityForecasts(forecaster, first, metrics.made, log)
    metrics.made(time.monotonic() - began)
    return make_app(forecasts, metrics, rate, token), first


def url_of(address: str, port: int) -> str:
    return f"http://{f'[{address}]' if ':' in address else address}:{port}"


def said_of(first: CityForecast) -> dict[str, Any]:
    """Returns how many places are served, what their forecast rests on, and the levels of its quantiles."""
    return {"places": len(first.ids), **first.of_next, "levels": list(first.header.levels)}


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Ends what is done inside: at SIGTERM the process with exit code 0, and Ctrl-C raises Interrupted."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted("no longer served") from None
    finally:
        signal.signal(signal.SIGTERM, before)


def read_token(file: Path | None) -> str | None:
    """The token of ``file``, else of the environment; None where there is neither. Raises InputError for one that is
    short or does not fit into a header."""
    where = str(file) if file is not None else TOKEN
    token = file.read_text("ascii", "replace").strip() if file is not None else os.environ.get(TOKEN)
    if token is None:
        return None
    if len(token) < SHORTEST_TOKEN or not all("!" <= letter <= "~" for letter in token):
        raise InputError(
            f"{where}: a token is {SHORTEST_TOKEN} or more letters, digits or signs without a space; make one by "
            "`openssl rand -hex 32`"
        )
    return token


def bound(host: str, port: int, token: str | None) -> socket.socket:
    """A socket that has the port before anything is computed; it refuses connections until it listens."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        raise InputError(f"--host {host}: {getattr(error, 'strerror', None) or error}; give an address") from None
    if token is None and not ipaddress.ip_address(str(address[0]).partition("%")[0]).is_loopback:
        raise InputError(f"--host {host} is reached from other machines: give --token-file FILE or set {TOKEN}")
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        with _in_use(host, port):
            listener.bind(address)
    except ResourceError:
        listener.close()
        raise
    return listener


def listen(listener: socket.socket, host: str, port: int) -> None:
    """Raises ResourceError where another socket that had the port bound listens by now."""
    with _in_use(host, port):
        listener.listen(MOST_CONNECTIONS)


@contextmanager
def _in_use(host: str, port: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ResourceError(
            f"port {port} of {host} cannot be had ({error.strerror}); end what has it, or give another --port"
        ) from None
