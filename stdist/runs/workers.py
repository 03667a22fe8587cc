"""Work that other processes do for a run: units go out by key, results come back, each counted once.

A unit's result depends on its payload and on the version of the weights it names alone: whoever does it, once or again,
gives the same. So work that was lost is repeated, and nothing but its key has to be remembered.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np


class WorkKey(NamedTuple):
    """Names a unit: of a training by its step, window and cells, of a sweep by its windows and cells (step 0)."""

    step: int
    window: int
    cells: tuple[int, ...]

    def __str__(self) -> str:
        return f"step {self.step}, window {self.window}, {len(self.cells)} cells"


@dataclass(frozen=True)
class Unit:
    """Work for one worker. ``payload``: for the worker's program. ``version``: name of the weights that do it, the ones
    the program started with where empty."""

    key: WorkKey
    payload: bytes
    version: str = ""


@dataclass(frozen=True)
class Result:
    """What a worker answered. ``seconds`` by phase; ``version``: of the weights it held."""

    key: WorkKey
    version: str
    answer: bytes
    worker: str
    seconds: Mapping[str, float]


@dataclass(frozen=True, eq=False)
class Version:
    """Weights as they travel, whole or not at all.

    Attributes:
        step: updates made. name: digest of the content; no two contents have one.
        manifest: what the receiver checks them by, for its program alone. tensors: their bytes, uint8.
    """

    step: int
    name: str
    manifest: bytes
    tensors: Mapping[str, np.ndarray]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())


class VersionError(RuntimeError):
    """Weights did not arrive as they were sent, or do not compute what they compute at home."""


class WorkerProgram(ABC):
    """What runs in a worker's process; made there, once."""

    @abstractmethod
    def load(self, version: Version) -> None:
        """Replaces the weights. Raises VersionError where they are not, bit for bit, what was sent, or where the
        program computes something else with them than the sender did."""

    @abstractmethod
    def run(self, payload: bytes) -> tuple[bytes, dict[str, float]]:
        """A unit's answer, and seconds by phase."""


class WorkPool(Protocol):
    """A pool of workers, as its user sees it. Every wait has a limit; where it is passed ResourceError says what was
    waited for."""

    def resume(self, step: int, stage: str, every: int) -> dict[str, int]:
        """Called before anything else: the user goes on from ``step`` updates of ``stage``, and makes ``every`` updates
        on the answers of a step. What was learnt from this step on counts as void. Returns the versions that the pool
        remembers up to there, by name, with their steps."""
        ...

    def publish(self, version: Version) -> None:
        """Has workers fetch and verify the weights that units to come will name."""
        ...

    def submit(self, units: Sequence[Unit], oldest_step: int) -> None:
        """Queues units. One that is known by its key is not done again if its answer's weights are of ``oldest_step``
        updates or later, in the history that is being trained."""
        ...

    def collect(self, keys: Sequence[WorkKey]) -> list[Result]:
        """The results of units that were submitted, once all are there."""
        ...

    def trained(self, keys: Sequence[WorkKey]) -> None:
        """Notes that the weights have learnt from these units."""
        ...

    def status(self) -> dict[str, Any]:
        """Workers by state, utilisation, leases lost by reason, bytes sent: since the pool began."""
        ...

    def close(self) -> None:
        """The training has ended: what is still in flight counts as void."""
        ...
