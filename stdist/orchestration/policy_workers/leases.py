"""Who does what, and until when: the scheduler of a pool, without processes and without a clock of its own.

A lease has an owner, an expiry and a fencing number, which grows with every lease; an answer counts only under the
number that its unit was leased with last. So a worker that was given up and comes back changes nothing.
"""

import heapq
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import count

from stdist.errors import InputError, ResourceError
from stdist.orchestration.policy_workers.members import State, Worker
from stdist.runs.workers import Result, Unit, WorkKey

LOST_PER_UNIT = 5
"""Workers that may be lost over one unit before the run ends: then it is the unit that breaks machines."""
FAILURES_PER_UNIT = 2
"""Errors that one unit may meet, on different tries: what fails twice is bad data."""
KEPT_BYTES = 2**28
"""Answers that were collected are kept up to this size, for a learner that has to repeat their steps."""

Note = Callable[..., None]


@dataclass(frozen=True)
class Lease:
    """``fence``: the fencing number."""

    unit: Unit
    worker: str
    fence: int
    expires: float


@dataclass(frozen=True)
class Load:
    """An order to fetch and verify a version."""

    version: str


@dataclass
class _Work:
    unit: Unit
    order: int
    lease: Lease | None = None
    result: Result | None = None
    lost: int = 0
    failures: int = 0


class Scheduler:
    """Hands units to workers, oldest first, and takes their answers back.

    Args:
        lease_seconds: after these a unit is handed to somebody else.
        note: is told every event of a unit, as the ledger writes it: ``note(event, key, **details)``.
    """

    def __init__(self, lease_seconds: float, note: Note = lambda event, key, **details: None):
        self.lease_seconds, self._note = lease_seconds, note
        self.workers: dict[str, Worker] = {}
        self.lost_leases: Counter[str] = Counter()
        self.error: Exception | None = None
        """Set when a unit has used up one of its budgets, or the pool has stopped: it ends the run."""
        self._work: dict[WorkKey, _Work] = {}
        self._steps: dict[str, int] = {"": 0}
        """Versions of the history that is being trained, with their steps."""
        self._published = {""}
        """Versions that can be fetched."""
        self._queues: dict[str, list[tuple[int, WorkKey]]] = {}
        """Heaps of the units that wait, by the version they name; some are not waiting any more."""
        self._loading: dict[str, str] = {}
        """Workers that were sent to fetch a version, and have not asked again since."""
        self._fences, self._orders, self._names = count(1), count(), count(1)
        self._leases: dict[int, Lease] = {}
        self._named: Counter[str] = Counter()
        """Units that are not done, by the version they name."""
        self._kept: OrderedDict[WorkKey, int] = OrderedDict()  # a dict's first key is slow to find behind lost ones
        self._kept_bytes = 0

    # --- versions and units -----------------------------------------------------------------------------------

    def resume(self, step: int) -> dict[str, int]:
        """See :meth:`stdist.runs.workers.WorkPool.resume`."""
        self._steps = {name: at for name, at in self._steps.items() if at <= step}
        self._published = {""}  # their tensors died with the process that published them
        return {name: at for name, at in self._steps.items() if name}

    def publish(self, version: str, step: int) -> None:
        """Units that name the version may be leased from now on."""
        self._steps[version] = step
        self._published.add(version)

    def withdraw(self, version: str) -> None:
        """The version can no longer be fetched."""
        self._published.discard(version)

    def submit(self, units: Iterable[Unit], oldest_step: int = 0) -> None:
        """See :meth:`stdist.runs.workers.WorkPool.submit`."""
        for unit in units:
            known = self._work.get(unit.key)
            if known is not None and self._serves(known, unit, oldest_step):
                continue
            if known is not None:
                self._drop(known)
            work = self._work[unit.key] = _Work(unit, next(self._orders))
            self._named[unit.version] += 1
            self._note("issued", unit.key, version=unit.version)
            self._enqueue(work)

    def _serves(self, known: _Work, unit: Unit, oldest_step: int) -> bool:
        """Whether what is known of a unit answers it: it is under way with the same weights, or was answered by weights
        of this history that are new enough."""
        if known.result is None:
            return known.unit.version == unit.version
        return self._steps.get(known.result.version, -1) >= oldest_step

    def needs(self, version: str) -> bool:
        """Whether a unit that is not done names the version."""
        return self._named[version] > 0

    # --- leases -----------------------------------------------------------------------------------------------

    def order_for(self, name: str, now: float) -> Lease | Load | None:
        """Returns the oldest unit's lease for an idle worker, or the order to fetch the weights that it needs first.

        Where others already fetch them, one for each unit that needs them, it goes on with the weights it has.
        """
        worker = self.workers[name]
        self._loading.pop(name, None)
        held = worker.version if worker.state is State.READY else None
        waiting = [work for version in list(self._queues) if (work := self._oldest(version))]
        if not waiting:
            return None
        work = min(waiting, key=lambda work: work.order)
        version = work.unit.version
        if version != held:
            own = next((other for other in waiting if other.unit.version == held), None)
            fetching = sum(other == version for other in self._loading.values())
            if own is None or fetching < len(self._queues[version]):
                self._loading[name] = version
                return Load(version)
            work = own
        heapq.heappop(self._queues[work.unit.version])
        lease = Lease(work.unit, name, next(self._fences), now + self.lease_seconds)
        work.lease = self._leases[lease.fence] = lease
        self._note("leased", work.unit.key, worker=name, fence=lease.fence)
        return lease

    def complete(self, lease: Lease, answer: bytes, seconds: dict[str, float]) -> bool:
        """Takes an answer. Returns False, and changes nothing, where the lease is not the unit's last."""
        work = self._holder(lease)
        if work is None:
            return False
        self._end(work)
        self._named[work.unit.version] -= 1
        work.result = Result(work.unit.key, work.unit.version, answer, lease.worker, seconds)
        self.workers[lease.worker].busy += sum(seconds.values())
        self._note("returned", work.unit.key, worker=lease.worker, fence=lease.fence)
        return True

    def fail(self, lease: Lease, reason: str) -> None:
        """The unit met an error that its worker survived: another try, else it is bad data."""
        work = self._holder(lease)
        if work is None:
            return
        self._requeue(work, "error")
        work.failures += 1
        if work.failures >= FAILURES_PER_UNIT:
            self.error = InputError(f"{work.unit.key} failed {work.failures} times: {reason}")

    def expire(self, lease: Lease) -> bool:
        """The lease's time is over: the unit goes to somebody else. Returns False where it was answered."""
        work = self._holder(lease)
        if work is None:
            return False
        self._requeue(work, "expired")
        self._lost_over(work, f"gave no answer within {self.lease_seconds:g} s")
        return True

    # --- workers ----------------------------------------------------------------------------------------------

    def join(self, now: float) -> str:
        """A new worker's name; names are not used again."""
        name = f"worker-{next(self._names)}"
        self.workers[name] = Worker(name, since=now)
        return name

    def lose(self, name: str, reason: str, message: str) -> None:
        """The worker is gone; what it had leased goes to somebody else. ``reason``: one word for the statistics."""
        worker = self.workers.pop(name)
        self._loading.pop(name, None)
        worker.lost()
        for lease in [lease for lease in self._leases.values() if lease.worker == name]:
            if (work := self._holder(lease)) is not None:
                self._requeue(work, reason)
                self._lost_over(work, message)

    # --- results ----------------------------------------------------------------------------------------------

    def collect(self, keys: Sequence[WorkKey]) -> list[Result] | None:
        """The results of ``keys``, None while one is missing. Raises what ended the run."""
        if self.error is not None:
            raise self.error
        # Asked after every answer, and the last units are answered last: looking there first ends soon.
        if any(self._work[key].result is None for key in reversed(keys)):
            return None
        results = [result for key in keys if (result := self._work[key].result)]
        for key in keys:
            self._keep(key)
        return results

    def close(self) -> None:
        """Voids all that was not learnt from."""
        for work in list(self._work.values()):
            if work.unit.key not in self._kept:
                self._drop(work)

    @property
    def waiting(self) -> int:
        """Units that are not answered."""
        return sum(self._named.values())

    # --- inside -----------------------------------------------------------------------------------------------

    def _oldest(self, version: str) -> _Work | None:
        """The oldest unit that waits for a worker with these weights; None while nobody can fetch them."""
        if version not in self._published:
            return None
        queue = self._queues[version]
        while queue:
            order, key = queue[0]
            work = self._work.get(key)
            if work is not None and work.order == order and work.lease is None and work.result is None:
                return work
            heapq.heappop(queue)  # replaced or answered
        del self._queues[version]
        return None

    def _enqueue(self, work: _Work) -> None:
        heapq.heappush(self._queues.setdefault(work.unit.version, []), (work.order, work.unit.key))

    def _holder(self, lease: Lease) -> _Work | None:
        """The unit that is under this lease, if it still is."""
        if lease.fence not in self._leases:
            return None
        return self._work[lease.unit.key]

    def _end(self, work: _Work) -> None:
        assert work.lease is not None
        del self._leases[work.lease.fence]
        work.lease = None

    def _requeue(self, work: _Work, reason: str) -> None:
        assert work.lease is not None
        self._note("lost", work.unit.key, worker=work.lease.worker, fence=work.lease.fence, reason=reason)
        self.lost_leases[reason] += 1
        self._end(work)
        self._enqueue(work)

    def _lost_over(self, work: _Work, message: str) -> None:
        work.lost += 1
        if work.lost >= LOST_PER_UNIT:
            self.error = ResourceError(
                f"{work.unit.key}: {work.lost} workers were lost over it, the last one {message}"
            )

    def _drop(self, work: _Work) -> None:
        """Forgets a unit that others replace, or that nobody wants any more."""
        if work.lease is not None:
            self._end(work)
        if work.result is None:
            self._named[work.unit.version] -= 1
        self._kept_bytes -= self._kept.pop(work.unit.key, 0)
        self._note("voided", work.unit.key)
        del self._work[work.unit.key]

    def _keep(self, key: WorkKey) -> None:
        """Keeps an answer that was collected, and forgets the oldest ones behind KEPT_BYTES."""
        result = self._work[key].result
        assert result is not None
        if key not in self._kept:
            self._kept[key] = len(result.answer)
            self._kept_bytes += len(result.answer)
        while self._kept_bytes > KEPT_BYTES and (oldest := next(iter(self._kept))) != key:
            self._kept_bytes -= self._kept.pop(oldest)
            del self._work[oldest]
