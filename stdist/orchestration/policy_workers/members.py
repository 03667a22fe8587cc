"""The life of a worker: starting → stale → ready → lost. No path leads to ready but a verified version."""

from dataclasses import dataclass
from enum import Enum


class State(Enum):
    """``STALE``: up, and whatever weights it holds count for nothing. ``READY``: holds a version that was verified."""

    STARTING = "starting"
    STALE = "stale"
    READY = "ready"
    LOST = "lost"


@dataclass
class Worker:
    """One process, from its start to its loss; a restarted one is another worker. ``busy``: seconds at work."""

    name: str
    state: State = State.STARTING
    version: str | None = None
    where: str = ""
    busy: float = 0.0
    since: float = 0.0

    def started(self, where: str) -> None:
        """Its process is up on host ``where``, with nobody's weights."""
        self._require(State.STARTING)
        self.state, self.where = State.STALE, where

    def verified(self, version: str) -> None:
        """It holds ``version``, compared with what was sent. The only way to READY."""
        self._require(State.STALE)
        self.state, self.version = State.READY, version

    def outdated(self) -> None:
        """Its weights are about to change, or are not trusted any more."""
        self._require(State.READY, State.STALE)
        self.state, self.version = State.STALE, None

    def lost(self) -> None:
        self.state, self.version = State.LOST, None

    def _require(self, *states: State) -> None:
        if self.state not in states:
            raise RuntimeError(f"worker {self.name} is {self.state.value}, not {states[0].value}")
