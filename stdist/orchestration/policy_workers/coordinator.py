"""The pool of a training: an actor of its own beside the learners, so that none of them takes it along when it dies."""

import asyncio
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from stdist.config.base import WorkersConfig
from stdist.errors import ResourceError
from stdist.orchestration.policy_workers.ledger import Ledger
from stdist.orchestration.policy_workers.pool import POLL_SECONDS, Pool, Published, in_one_line, wait_for_answers
from stdist.runs.workers import Result, Unit, Version, WorkerProgram, WorkKey

T = TypeVar("T")


@ray.remote(num_cpus=0, max_restarts=0, max_task_retries=0)
class Coordinator:
    """A :class:`Pool` and the ledger of what it did. Ends with the driver that made it."""

    def __init__(
        self,
        make_program: Callable[[], WorkerProgram],
        settings: WorkersConfig,
        resources: dict[str, float],
        ledger: Path,
    ):
        self._path = ledger
        self._ledger: Ledger | None = None
        self._serving: asyncio.Task[None] | None = None
        self._pool = Pool(make_program, settings, resources, self._note, _log)

    async def resume(self, step: int, stage: str, every: int) -> dict[str, int]:
        # Ledger and workers begin with the stage: a refused run leaves nothing behind, and what workers load was
        # trained by the stages before.
        if self._serving is None:
            self._ledger = Ledger(self._path)
            self._serving = asyncio.create_task(self._pool.run())
        self._open_ledger.resume(step, stage, every)
        return await self._pool.resume(step)

    async def publish(self, version: Version, nbytes: int, reference: list[Any]) -> None:
        await self._pool.publish(Published(version, reference[0], nbytes))

    async def submit(self, units: Sequence[Unit], oldest_step: int) -> None:
        await self._pool.submit(units, oldest_step)

    async def collect(self, keys: Sequence[WorkKey]) -> list[Result] | None:
        return await self._pool.collect(keys)

    async def trained(self, keys: Sequence[WorkKey]) -> None:
        for key in keys:
            self._open_ledger.note("trained", key)
        self._open_ledger.flush()

    async def status(self) -> dict[str, Any]:
        return self._pool.status()

    async def close(self) -> None:
        self._pool.scheduler.close()
        self._open_ledger.flush()

    def _note(self, event: str, key: WorkKey, **details: Any) -> None:
        self._open_ledger.note(event, key, **details)

    @property
    def _open_ledger(self) -> Ledger:
        assert self._ledger is not None, "resume comes first"
        return self._ledger


class RemotePool:
    """The coordinator as a learner sees it: see :class:`stdist.runs.workers.WorkPool`.

    Args:
        timeout: seconds without an answer after which a wait ends with ResourceError.
    """

    def __init__(self, coordinator: Any, timeout: float):
        self._coordinator, self._timeout = coordinator, timeout

    def resume(self, step: int, stage: str, every: int) -> dict[str, int]:
        return self._answer(self._coordinator.resume.remote(step, stage, every), "the pool to resume")

    def publish(self, version: Version) -> None:
        # The reference in a list: as an argument of its own Ray would bring the coordinator the tensors.
        reference = [ray.put(dict(version.tensors))]
        bare = replace(version, tensors={})
        self._answer(self._coordinator.publish.remote(bare, version.nbytes, reference), "the pool to take weights")

    def submit(self, units: Sequence[Unit], oldest_step: int) -> None:
        self._answer(self._coordinator.submit.remote(units, oldest_step), "the pool to take work")

    def collect(self, keys: Sequence[WorkKey]) -> list[Result]:
        def ask() -> list[Result] | None:
            return self._answer(self._coordinator.collect.remote(keys), f"answers of {keys[0]}")

        return wait_for_answers(ask, self.status, keys[0], self._timeout)

    def trained(self, keys: Sequence[WorkKey]) -> None:
        self._answer(self._coordinator.trained.remote(keys), "the ledger")

    def status(self) -> dict[str, Any]:
        return self._answer(self._coordinator.status.remote(), "the pool's status")

    def close(self) -> None:
        self._answer(self._coordinator.close.remote(), "the pool to close")

    def _answer(self, reference: "ray.ObjectRef[T]", what: str) -> T:
        try:
            return ray.get(reference, timeout=self._timeout + POLL_SECONDS)
        except GetTimeoutError:
            raise ResourceError(f"waited {self._timeout:.0f} s for {what}, and nobody answered") from None
        except RayTaskError as error:
            raise error.cause from None
        except RayActorError as error:
            raise ResourceError(
                f"the process that hands out rollouts is gone ({in_one_line(error)}); run the same command to go on"
            ) from None


def _log(line: str) -> None:
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()
