"""A pool of workers in simulated time: the scheduler of real ones, with the clock and the costs of a cluster that need
not be there.

Processes are generators that yield the seconds they take, or what they wait for; workers follow ``Pool``, learners the
GRPO stage and its rollouts. Left out: workers of different speed, units that fail, loads that time out, learners that
are lost, evaluations and checkpoints.
"""

import heapq
import random
from collections import Counter, defaultdict
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import count
from math import inf

from stdist.orchestration.policy_workers.leases import Lease, Load, Scheduler
from stdist.orchestration.policy_workers.members import Worker
from stdist.runs.workers import Unit, WorkKey

ANSWER = bytes(2**17)
"""The answer of every unit: as large as 240 candidates of 37 numerals, so that the scheduler forgets as it would."""
DIES = -1
"""In place of a turn: the worker that is at this place then is lost."""


@dataclass(frozen=True)
class Cluster:
    """What a training costs on workers and one group of learners.

    Attributes:
        sample_seconds: mean of a unit's. sample_spread: standard deviation of its logarithm (log-normal).
        load_seconds: to fetch and verify a version. start_seconds: of a worker, up to its first load.
        train_seconds: of a step, with packing and publishing the version that it makes.
        max_staleness: steps that workers may be ahead of the weights.
        hang_probability: of a unit, never to be answered by the worker that has it.
        groups_per_unit: cells of a window.
    """

    workers: int
    windows_per_step: int
    sample_seconds: float
    load_seconds: float
    train_seconds: float
    start_seconds: float = 0.0
    sample_spread: float = 0.0
    max_staleness: int = 1
    hang_probability: float = 0.0
    lease_seconds: float = 120.0
    groups_per_unit: int = 1


@dataclass(frozen=True)
class Loss:
    """The worker at ``place`` (0 … workers - 1) dies at ``second``."""

    second: float
    place: int


def random_losses(per_hour: float, workers: int, hours: float, seed: int = 0) -> list[Loss]:
    """Losses at exponential distances, ``per_hour`` of all workers together, at any place alike."""
    chance, second, losses = random.Random(seed), 0.0, list[Loss]()
    while per_hour and (second := second + chance.expovariate(per_hour / 3600)) < hours * 3600:
        losses.append(Loss(second, chance.randrange(workers)))
    return losses


@dataclass(frozen=True)
class Outcome:
    """What a simulated training did.

    Attributes:
        trained_at: seconds at which each step had been learnt from.
        worker_idle, learner_idle: share of their seconds spent waiting. A worker that starts, loads or hangs is not
            idle.
        lost_seconds: under leases that no answer counted for. lost_work: their share of the seconds under all leases
            that ended.
        lost_leases: by reason. loads: of versions, by all workers.
        exactly_once: every unit of a trained step was returned once, and no other one twice.
    """

    seconds: float
    trained_at: Sequence[float]
    groups_per_step: int
    worker_idle: float
    learner_idle: float
    lost_seconds: float
    lost_work: float
    lost_leases: dict[str, int]
    loads: int
    exactly_once: bool

    @property
    def steps_per_hour(self) -> float:
        return 3600 * len(self.trained_at) / self.seconds

    @property
    def groups_per_hour(self) -> float:
        return self.steps_per_hour * self.groups_per_step


def simulate(cluster: Cluster, hours: float, losses: Iterable[Loss] = (), seed: int = 0) -> Outcome:
    """Simulates the first ``hours`` of a training. Raises what would end it, see :attr:`Scheduler.error`."""
    simulation = _Simulation(cluster, seed)
    simulation.run(3600 * hours, losses)
    return simulation.outcome()


class _Wish(Enum):
    """What a process waits for."""

    WORK = "something to do"
    ANSWERS = "answers"


class _LostError(Exception):
    """Thrown into the process of a worker that dies."""


_Steps = Generator[float | _Wish, None, None]


class _Process:
    """``turn``: its next wake-up; others that are on their way to it are void."""

    def __init__(self, steps: _Steps):
        self.steps, self.turn = steps, 0


class _Simulation:
    def __init__(self, cluster: Cluster, seed: int):
        self.cluster, self._chance, self.now = cluster, random.Random(seed), 0.0
        self.scheduler = Scheduler(cluster.lease_seconds, self._note)
        self._order = count()
        self._due: list[tuple[float, int, _Process, int]] = []
        self._waiting: dict[_Wish, list[tuple[_Process, int]]] = {wish: [] for wish in _Wish}
        self._versions: list[str] = []
        self._trained_at: list[float] = []
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._loads = 0
        self._returned: Counter[WorkKey] = Counter()
        """Of units that were not learnt from yet."""
        self._once = True

    def run(self, seconds: float, losses: Iterable[Loss]) -> None:
        places = [_Process(self._keep_one()) for _ in range(self.cluster.workers)]
        processes = [_Process(self._learn()), *places]
        for process in processes:
            self._wake(process, 0.0, process.turn)
        for loss in losses:
            self._wake(places[loss.place], loss.second, DIES)
        while self.scheduler.error is None and self._due[0][0] <= seconds:
            self.now, _, process, turn = heapq.heappop(self._due)
            if turn == DIES or turn == process.turn:
                self._go_on(process, turn == DIES)
        if self.scheduler.error is not None:
            raise self.scheduler.error
        self.now = seconds
        for process in processes:
            process.steps.close()

    def outcome(self) -> Outcome:
        cluster, spent = self.cluster, self._seconds
        return Outcome(
            seconds=self.now,
            trained_at=self._trained_at,
            groups_per_step=cluster.windows_per_step * cluster.groups_per_unit,
            # Sums of many seconds may be more than the whole, in the last digits.
            worker_idle=max(0.0, 1 - spent["workers"] / (cluster.workers * self.now)),
            learner_idle=max(0.0, 1 - spent["learners"] / self.now),
            lost_seconds=spent["lost"],
            lost_work=spent["lost"] / spent["leases"] if spent["leases"] else 0.0,
            lost_leases=dict(self.scheduler.lost_leases),
            loads=self._loads,
            exactly_once=self._once and set(self._returned.values()) <= {1},
        )

    # --- time -------------------------------------------------------------------------------------------------

    def _wake(self, process: _Process, second: float, turn: int) -> None:
        # Numbered: what is due at one time happens in the order in which it was planned.
        heapq.heappush(self._due, (second, next(self._order), process, turn))

    def _go_on(self, process: _Process, dies: bool) -> None:
        process.turn += 1
        wish = process.steps.throw(_LostError()) if dies else next(process.steps)
        if isinstance(wish, _Wish):
            self._waiting[wish].append((process, process.turn))
        else:
            self._wake(process, self.now + wish, process.turn)

    def _notify(self, wish: _Wish) -> None:
        waiting, self._waiting[wish] = self._waiting[wish], []
        for process, turn in waiting:
            self._wake(process, self.now, turn)

    def _spend(self, who: str, seconds: float) -> _Steps:
        """``seconds`` of work, or what was done of it when it was cut short."""
        began = self.now
        try:
            yield seconds
        finally:
            self._seconds[who] += self.now - began

    # --- workers, as in Pool ----------------------------------------------------------------------------------

    def _keep_one(self) -> _Steps:
        while True:
            name = self.scheduler.join(self.now)
            try:
                yield from self._serve(self.scheduler.workers[name])
                reason = "hung"
            except _LostError:
                reason = "died"
            self.scheduler.lose(name, reason, reason)
            self._notify(_Wish.WORK)

    def _serve(self, worker: Worker) -> _Steps:
        yield from self._spend("workers", self.cluster.start_seconds)
        worker.started("a simulated host")
        hangs = False
        while not hangs:
            order = self.scheduler.order_for(worker.name, self.now)
            if order is None:
                yield _Wish.WORK
            elif isinstance(order, Load):
                worker.outdated()
                yield from self._spend("workers", self.cluster.load_seconds)
                worker.verified(order.version)
                self._loads += 1
            else:
                hangs = yield from self._work(worker, order)

    def _work(self, worker: Worker, lease: Lease) -> Generator[float | _Wish, None, bool]:
        """Returns whether the worker hangs."""
        began, limit, seconds = self.now, self.cluster.lease_seconds, self._sample_seconds()
        try:
            yield from self._spend("workers", min(seconds, limit))
            if seconds > limit:
                worker.outdated()
                if self.scheduler.expire(lease):
                    self._notify(_Wish.WORK)
                yield from self._spend("workers", min(seconds, 2 * limit) - limit)
        except _LostError:
            self._end_lease(began, False)
            raise
        hangs = seconds > 2 * limit
        counts = not hangs and self.scheduler.complete(lease, ANSWER, {"sample": seconds})
        self._end_lease(began, counts)
        if counts:
            self._drop_versions()
            self._notify(_Wish.ANSWERS)
        return hangs

    def _sample_seconds(self) -> float:
        cluster = self.cluster
        if self._chance.random() < cluster.hang_probability:
            return inf
        # The mean of a log-normal is exp(mu + spread^2 / 2).
        spread = cluster.sample_spread
        return cluster.sample_seconds * self._chance.lognormvariate(-(spread**2) / 2, spread)

    def _end_lease(self, began: float, counts: bool) -> None:
        self._seconds["leases"] += self.now - began
        if not counts:
            self._seconds["lost"] += self.now - began

    # --- learners, as in GRPOStage and PoolRollouts -----------------------------------------------------------

    def _learn(self) -> _Steps:
        cluster, requested = self.cluster, dict[int, list[WorkKey]]()
        for step in count():
            version = f"weights of {step}"
            self.scheduler.publish(version, step)
            self._versions.append(version)
            self._drop_versions()
            for ahead in range(step, step + cluster.max_staleness + 1):
                if ahead not in requested:
                    requested[ahead] = [WorkKey(ahead, window, (0,)) for window in range(cluster.windows_per_step)]
                    units = [Unit(key, b"", version) for key in requested[ahead]]
                    self.scheduler.submit(units, ahead - cluster.max_staleness)
            self._notify(_Wish.WORK)
            keys = requested.pop(step)
            while self.scheduler.collect(keys) is None:
                yield _Wish.ANSWERS
            yield from self._spend("learners", cluster.train_seconds)
            self._trained_at.append(self.now)
            self._once &= all(self._returned.pop(key, 0) == 1 for key in keys)

    def _drop_versions(self) -> None:
        for version in self._versions[:-1]:
            if not self.scheduler.needs(version):
                self._versions.remove(version)
                self.scheduler.withdraw(version)

    def _note(self, event: str, key: WorkKey, **details: object) -> None:
        if event == "returned":
            self._returned[key] += 1
            self._once &= key.step >= len(self._trained_at)
