"""A pool of workers on a Ray cluster: starts them, brings them weights, hands them leases, and replaces the lost.

One coroutine a worker; all of them ask one scheduler. Ray owns processes and tensors, and decides nothing.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import ObjectLostError, OutOfMemoryError, OwnerDiedError, RayError, ReferenceCountingAssertionError

from stdist.config.base import WorkersConfig
from stdist.errors import ResourceError
from stdist.orchestration.policy_workers.actor import Failed, WorkerActor
from stdist.orchestration.policy_workers.leases import Lease, Load, Note, Scheduler
from stdist.orchestration.policy_workers.members import State, Worker
from stdist.runs.workers import Result, Unit, Version, WorkerProgram, WorkKey

FAILED_STARTS = 3
"""Workers in a row, at one place, that may fail to start, or to load weights, before the run ends."""
LOST_OBJECT = (ObjectLostError, OwnerDiedError, ReferenceCountingAssertionError)
POLL_SECONDS = 5.0
"""A call that waits for results answers at least so often, so that its caller can tell waiting from hanging."""


@dataclass(frozen=True)
class Published:
    """A version without its tensors, the reference by which workers fetch these, and their size."""

    version: Version
    reference: Any
    nbytes: int


@dataclass(frozen=True)
class End:
    """The end of a worker that has to be replaced: its reason in a word, for the statistics, and in words. ``began``:
    False where it did not start, or could not load weights; the next one may meet the same."""

    reason: str
    message: str
    began: bool = True


class Pool:
    """Runs inside one event loop; every method but ``run`` is called in it.

    Args:
        make_program: called in every worker's process.
        settings: how many workers, with what, and how long a lease is.
        log: takes a line for people when a worker is lost.
    """

    def __init__(
        self,
        make_program: Callable[[], WorkerProgram],
        settings: WorkersConfig,
        resources: dict[str, float],
        note: Note = lambda event, key, **details: None,
        log: Callable[[str], None] = lambda line: None,
    ):
        self.scheduler = Scheduler(settings.lease_timeout, note)
        self.settings, self._resources, self._log = settings, resources, log
        self._program = ray.put(make_program)
        self._versions: dict[str, Published] = {}
        self._newest = ""
        self._actors: dict[str, Any] = {}
        # Two, so that an answer does not wake hundreds of workers that have nothing to do.
        self._work_came, self._answer_came = Signal(), Signal()
        self.bytes_sent = 0
        self.load_seconds: list[float] = []

    async def run(self) -> None:
        """Serves until cancelled. An error of its own, as a ledger on a full disk, ends the run of whoever waits."""
        try:
            async with asyncio.TaskGroup() as tasks:
                for _ in range(self.settings.num_workers):
                    tasks.create_task(self._keep_one())
        except ExceptionGroup as errors:
            cause = errors.exceptions[0]
            text = in_one_line(cause) or type(cause).__name__
            self.scheduler.error = ResourceError(f"the pool of workers stopped: {text}")
            self._answer_came.notify()

    def kill_workers(self) -> None:
        """Ends their processes at once, from any thread; whatever they do is nobody's any more."""
        for actor in list(self._actors.values()):
            ray.kill(actor, no_restart=True)

    # --- what the pool's user calls ---------------------------------------------------------------------------

    async def publish(self, published: Published) -> None:
        version = published.version
        self._versions[version.name], self._newest = published, version.name
        self.scheduler.publish(version.name, version.step)
        self._drop_versions()
        self._work_came.notify()

    async def resume(self, step: int) -> dict[str, int]:
        self._versions.clear()
        return self.scheduler.resume(step)

    async def submit(self, units: Sequence[Unit], oldest_step: int) -> None:
        self.scheduler.submit(units, oldest_step)
        self._work_came.notify()

    async def collect(self, keys: Sequence[WorkKey]) -> list[Result] | None:
        """None where they are not all there after POLL_SECONDS. Raises what ended the run."""
        deadline = time.monotonic() + POLL_SECONDS
        while (results := self.scheduler.collect(keys)) is None:
            if not await self._answer_came.wait(deadline - time.monotonic()):
                return None
        return results

    def status(self) -> dict[str, Any]:
        now, workers = time.monotonic(), list(self.scheduler.workers.values())
        states = {state.value: sum(w.state is state for w in workers) for state in State}
        seconds = sum(now - worker.since for worker in workers)
        return {
            "workers": {w.name: f"{w.state.value} on {w.where}" if w.where else w.state.value for w in workers},
            "states": states,
            "utilisation": sum(worker.busy for worker in workers) / seconds if seconds else 0.0,
            "lost_leases": dict(self.scheduler.lost_leases),
            "waiting": self.scheduler.waiting,
            "bytes_sent": self.bytes_sent,
            "load_seconds": sum(self.load_seconds[-len(workers) :]) / max(1, len(workers)),
        }

    # --- one worker after the other at one place --------------------------------------------------------------

    async def _keep_one(self) -> None:
        failed_starts = 0
        while self.scheduler.error is None:
            name = self.scheduler.join(time.monotonic())
            actor = WorkerActor.options(  # type: ignore[attr-defined]
                num_cpus=self._resources.get("CPU", 0),
                num_gpus=self._resources.get("GPU", 0),
                resources={k: v for k, v in self._resources.items() if k not in ("CPU", "GPU")},
            ).remote()
            self._actors[name] = actor
            worker = self.scheduler.workers[name]
            try:
                end = await self._serve(name, actor)
            except RayError as error:
                reason = "out of memory" if isinstance(error, OutOfMemoryError) else "died"
                end = End(reason, in_one_line(error), began=worker.state is not State.STARTING)
            finally:
                ray.kill(self._actors.pop(name), no_restart=True)
            failed_starts = 0 if end.began else failed_starts + 1
            if failed_starts >= FAILED_STARTS:
                self.scheduler.error = ResourceError(
                    f"{failed_starts} workers in a row could not begin, the last one: {end.message}"
                )
            where = worker.where or "a host that did not take it"
            self._log(f"lost {name} on {where}: {end.message}")
            self.scheduler.lose(name, end.reason, f"on {where}: {end.message}")
            self._work_came.notify()
            self._answer_came.notify()

    async def _serve(self, name: str, actor: Any) -> End:
        """Gives one worker work until it has to be replaced."""
        worker = self.scheduler.workers[name]
        # No limit: where the cluster is full, a worker joins when there is room.
        where = await actor.start.remote(self._program)
        if isinstance(where, Failed):
            return End("out of memory" if where.memory else "did not start", where.reason, began=False)
        worker.started(where)
        worker.since = time.monotonic()
        while True:
            order = self.scheduler.order_for(name, time.monotonic())
            if order is None:
                await self._work_came.wait(POLL_SECONDS)
            elif isinstance(order, Load):
                worker.outdated()
                if order.version == "":
                    # Its program read them itself, from files that it compared with their checksums.
                    worker.verified("")
                elif (end := await self._load(worker, actor, self._versions[order.version])) is not None:
                    return end
            elif (end := await self._work(worker, actor, order)) is not None:
                return end

    async def _load(self, worker: Worker, actor: Any, published: Published) -> End | None:
        limit, name = self.settings.lease_timeout, published.version.name
        try:
            answer = await asyncio.wait_for(
                _future(actor.load.remote(published.version, published.reference)), timeout=limit
            )
        except TimeoutError:
            return End("hung", f"did not load weights {name[:12]} within {limit:g} s", began=False)
        except LOST_OBJECT as error:
            # Who published them is gone, and publishes again when it is back.
            self._versions.pop(name, None)
            self.scheduler.withdraw(name)
            self._log(f"weights {name[:12]} were lost on their way to {worker.name}: {in_one_line(error)}")
            return None
        if isinstance(answer, Failed):
            return End("out of memory" if answer.memory else "wrong weights", answer.reason, began=False)
        self.bytes_sent += published.nbytes
        self.load_seconds.append(answer)
        worker.verified(name)
        return None

    async def _work(self, worker: Worker, actor: Any, lease: Lease) -> End | None:
        answer = _future(actor.run.remote(lease.unit.version, lease.unit.payload))
        late = False
        while True:
            done, _ = await asyncio.wait([answer], timeout=self.settings.lease_timeout)
            if done:
                break
            if late:
                return End("hung", f"has not answered for {2 * self.settings.lease_timeout:g} s")
            late = True
            worker.outdated()  # it gets nothing more before its weights were verified again
            if self.scheduler.expire(lease):
                self._log(f"{worker.name} on {worker.where} is late with {lease.unit.key}; somebody else does it")
            self._work_came.notify()
            self._answer_came.notify()
        result = answer.result()
        if isinstance(result, Failed) and result.memory:
            return End("out of memory", result.reason)
        if isinstance(result, Failed):
            self.scheduler.fail(lease, result.reason)
            self._work_came.notify()
        else:
            self.scheduler.complete(lease, *result)
        self._drop_versions()
        self._answer_came.notify()
        return None

    def _drop_versions(self) -> None:
        """Lets go of weights that no unit names."""
        for name in [n for n in self._versions if n != self._newest and not self.scheduler.needs(n)]:
            del self._versions[name]
            self.scheduler.withdraw(name)


class Signal:
    """Wakes whoever waits, in one event loop."""

    def __init__(self) -> None:
        self._waiting: set[asyncio.Future[None]] = set()

    def notify(self) -> None:
        for future in self._waiting:
            if not future.done():
                future.set_result(None)

    async def wait(self, seconds: float) -> bool:
        """Returns False where it was not notified for so long."""
        future = asyncio.get_running_loop().create_future()
        self._waiting.add(future)
        try:
            done, _ = await asyncio.wait([future], timeout=max(0.0, seconds))
        finally:
            self._waiting.remove(future)
        return bool(done)


def wait_for_answers(
    ask: Callable[[], list[Result] | None], status: Callable[[], dict[str, Any]], key: WorkKey, timeout: float
) -> list[Result]:
    """Asks, as often as :meth:`Pool.collect` answers None. Raises ResourceError where nothing moved for ``timeout``
    seconds, with the states of the workers."""
    waited, before = 0.0, None
    while (answers := ask()) is None:
        now = status()
        progress = (now["waiting"], now["lost_leases"], now["states"], now["bytes_sent"])
        waited, before = (waited + POLL_SECONDS if progress == before else 0.0), progress
        if waited >= timeout:
            workers = ", ".join(f"{name} {state}" for name, state in now["workers"].items())
            raise ResourceError(f"nothing has moved for {waited:.0f} s while {key} was waited for; workers: {workers}")
    return answers


def _future(reference: Any) -> "asyncio.Future[Any]":
    return asyncio.wrap_future(reference.future())


def in_one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return (text.partition("The actor is dead because ")[2] or text)[:300]
