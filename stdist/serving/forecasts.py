"""The one forecast that all requests share.

The rule. A forecast is of one state of the store and the run, whole, and names the last frame that it was made from.
Whether there is another state is looked at before a request, once in ``LOOK_EVERY`` seconds. Where there is, one
computation begins, however many requests arrive, and they wait for it, ``PATIENCE`` seconds at most: then they get the
forecast before, which says that it is superseded. A state of which no forecast can be made leaves the one before, with
the reason, and is tried again every ``RETRY_AFTER`` seconds, or as soon as it is another.
"""

import asyncio
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol, TypeVar

from stdist.errors import InputError, ResourceError, of_the_system
from stdist.serving.city import CityForecast, State

LOOK_EVERY, RETRY_AFTER = 1.0, 10.0
PATIENCE = 10.0
T = TypeVar("T")


class Forecaster(Protocol):
    """See :class:`stdist.serving.city.CityForecaster`."""

    def state(self) -> State: ...

    def make(self) -> CityForecast: ...


@dataclass(frozen=True)
class Latest:
    """A forecast; whether the store or the run is another by now; why there is no forecast of that, if there cannot be
    one; whether it was there without waiting."""

    city: CityForecast
    superseded: bool
    problem: str | None
    hit: bool


class CityForecasts:
    """``first``: the forecast to begin with. ``made``: told of each later one, and its seconds. ``log``: takes a line
    for people. Its methods are called by one event loop."""

    def __init__(
        self,
        forecaster: Forecaster,
        first: CityForecast,
        made: Callable[[float], None],
        log: Callable[[str], None],
        patience: float = PATIENCE,
    ) -> None:
        self._forecaster, self._made, self._log, self.patience = forecaster, made, log, patience
        self.city = first
        self.problem: str | None = None
        self._failed: State | None = None
        self._looked = self._retry_at = float("-inf")
        self._work: asyncio.Task[None] | None = None

    async def latest(self) -> Latest:
        """The forecast of the store as it is, or the one before."""
        self.look()
        work = self._work
        if work is not None:
            await asyncio.wait([work], timeout=self.patience)
        return Latest(self.city, self._work is not None or self.problem is not None, self.problem, work is None)

    def look(self) -> None:
        """Begins a computation where there is another state."""
        now = time.monotonic()
        if self._work is not None or now - self._looked < LOOK_EVERY:
            return
        self._looked = now
        try:
            state = self._forecaster.state()
        except (InputError, OSError) as error:
            self.problem = _line(error)
            return
        if state == self.city.state:
            self.problem = None
        elif state != self._failed or now >= self._retry_at:
            self._work = asyncio.create_task(self._renew(state))

    async def _renew(self, state: State) -> None:
        began = time.monotonic()
        try:
            self.city = await _in_daemon(self._forecaster.make)
            self.problem = self._failed = None
            self._made(time.monotonic() - began)
            self._log(f"forecast anew, behind {self.city.of_next['origin']} local time")
        except Exception as error:
            if not isinstance(error, InputError | ResourceError | OSError | MemoryError):
                traceback.print_exception(error)  # a bug; the forecast before is as right as it was
            self.problem, self._failed, self._retry_at = _line(error), state, time.monotonic() + RETRY_AFTER
            self._log(f"no newer forecast: {self.problem}")
        finally:
            self._work = None


def _line(error: Exception) -> str:
    said = error if isinstance(error, InputError | ResourceError) else of_the_system(error)
    return " ".join(str(said).split()) if said else f"a bug, {type(error).__name__}; see the service's standard error"


def _in_daemon(call: Callable[[], T]) -> "asyncio.Future[T]":
    """Calls in a thread that no end of the process waits for."""
    result: Future[T] = Future()

    def run() -> None:
        try:
            result.set_result(call())
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=run, name="forecast", daemon=True).start()
    return asyncio.wrap_future(result)
