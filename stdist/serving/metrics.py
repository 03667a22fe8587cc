"""Counters of the service, in Prometheus' text format."""

import time
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from typing import Any

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric, ProcessCollector, generate_latest

BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)


class Metrics:
    """The counters of one service, in a registry of its own. ``last_frame``: UTC of the last frame of what is
    served. ``replica``: a label of every line, where one address is answered by one of several processes, each of which
    knows its own counters alone."""

    def __init__(
        self, last_frame: Callable[[], np.datetime64], routes: frozenset[str], replica: str | None = None
    ) -> None:
        self._routes, self._replica = routes, replica
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)

        def of(kind: Any, name: str, what: str, *labels: str, **more: Any) -> Any:
            return kind(f"stdist_{name}", what, labels, registry=self.registry, **more)

        self.requests = of(Counter, "requests", "Requests answered", "route", "code")
        self.seconds = of(Histogram, "request_seconds", "Seconds until an answer", "route", buckets=BUCKETS)
        self.forecasts = of(Counter, "forecasts", "Forecasts of all places that were computed")
        self.forecast_seconds = of(Gauge, "forecast_seconds", "Seconds that the newest of them took")
        self.hits = of(Counter, "cache_hits", "Requests whose forecast was there already")
        of(Gauge, "data_age_seconds", "Seconds since the last frame").set_function(lambda: age(last_frame()))

    def made(self, seconds: float) -> None:
        """Counts a forecast of all places."""
        self.forecasts.inc()
        self.forecast_seconds.set(seconds)

    def answered(self, path: str, code: int, seconds: float) -> None:
        """Counts a request; the label of a path that is no route is ``other``: their number stays what it is."""
        route = path if path in self._routes else "other"
        self.requests.labels(route, str(code)).inc()
        self.seconds.labels(route).observe(seconds)

    def text(self) -> bytes:
        return generate_latest(self)

    def collect(self) -> Iterator[Metric]:
        """All that ``registry`` collects, with the replica's label."""
        of = {} if self._replica is None else {"replica": self._replica}
        for family in self.registry.collect():
            family.samples = [sample._replace(labels={**sample.labels, **of}) for sample in family.samples]
            yield family


class Counted:
    """Middleware that counts what ``app`` answers."""

    def __init__(self, app: Callable[..., Awaitable[None]], metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        code, began = 500, time.perf_counter()

        async def sent(message: MutableMapping[str, Any]) -> None:
            nonlocal code
            if message["type"] == "http.response.start":
                code = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, sent)
        finally:
            self._metrics.answered(scope["path"], code, time.perf_counter() - began)


def age(stamp: np.datetime64) -> float:
    """Seconds since a UTC stamp."""
    return time.time() - float(stamp.astype("datetime64[ms]").astype(np.int64)) / 1000
