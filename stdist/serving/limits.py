"""ASGI middleware that lets in requests which keep to their client's rate, have no body and bring the token."""

import base64
import binascii
import hmac
import json
import math
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from starlette.datastructures import Headers

MOST_BODY = 4096
"""Bytes of a body that are not refused; none is read."""
MOST_CLIENTS = 10_000
"""Clients whose rate is remembered; the one heard longest ago is forgotten first."""
OPEN_ROUTE = "/health"
"""Answered without the token."""

Scope = MutableMapping[str, Any]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Any, Send], Awaitable[None]]


class Rate:
    """A token bucket for each client: ``rate`` requests a second, twice as many at once after a rest."""

    def __init__(self, rate: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.rate, self.burst, self._clock = rate, max(1.0, 2 * rate), clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def wait(self, client: str) -> float:
        """Takes a request of ``client`` and returns 0, or returns the seconds until it may ask again."""
        now = self._clock()
        left, since = self._buckets.pop(client, (self.burst, now))
        left = min(self.burst, left + (now - since) * self.rate)
        taken = left >= 1
        self._buckets[client] = left - taken, now
        if len(self._buckets) > MOST_CLIENTS:
            self._buckets.popitem(last=False)
        return 0.0 if taken else (1 - left) / self.rate


class Limits:
    """Answers in place of ``app`` what is not let in: 429, 413 or 401, each with a line of JSON."""

    def __init__(self, app: App, rate: Rate | None, token: str | None) -> None:
        self._app, self._rate, self._token = app, rate, token

    async def __call__(self, scope: Scope, receive: Any, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        headers = Headers(scope=scope)
        client = (scope.get("client") or ("",))[0]
        if self._rate is not None and (seconds := self._rate.wait(client)):
            wait = str(math.ceil(seconds))
            line = f"too many requests: {self._rate.rate:g} a second are let in of one client; wait {wait} s"
            return await refuse(send, 429, line, ("retry-after", wait))
        if _body(headers) > MOST_BODY:
            return await refuse(send, 413, "no route takes a body; ask by the address alone", ("connection", "close"))
        if self._token is not None and scope["path"] != OPEN_ROUTE and not _knows(headers, self._token):
            line = "the token is missing or another; send it as `Authorization: Bearer TOKEN`"
            ways = ("www-authenticate", "Bearer"), ("www-authenticate", 'Basic realm="stdist"')
            return await refuse(send, 401, line, *ways)
        await self._app(scope, receive, send)


async def refuse(send: Send, code: int, line: str, *headers: tuple[str, str]) -> None:
    body = json.dumps({"error": line}).encode()
    fixed = ("content-type", "application/json"), ("content-length", str(len(body)))
    encoded = [(name.encode(), value.encode()) for name, value in (*fixed, *headers)]
    await send({"type": "http.response.start", "status": code, "headers": encoded})
    await send({"type": "http.response.body", "body": body})


def _body(headers: Headers) -> float:
    """Bytes that a request says will follow; one that does not say how many is refused as too many."""
    if "transfer-encoding" in headers:
        return math.inf
    length = headers.get("content-length", "0")
    return int(length) if length.isdecimal() and len(length) < 20 else math.inf


def _knows(headers: Headers, token: str) -> bool:
    """Bearer, or Basic with the token as password, which browsers ask for; compared in constant time."""
    kind, _, given = headers.get("authorization", "").partition(" ")
    if kind.lower() == "basic":
        try:
            given = base64.b64decode(given, validate=True).decode().partition(":")[2]
        except (binascii.Error, UnicodeDecodeError):
            return False
    elif kind.lower() != "bearer":
        return False
    return hmac.compare_digest(given.strip().encode(), token.encode())
