"""The scheduler alone: every unit answered once, whoever dies, hangs or comes back late."""

import random

import pytest

from stdist.errors import InputError, ResourceError
from stdist.orchestration.policy_workers import leases
from stdist.orchestration.policy_workers.leases import Lease, Load, Scheduler
from stdist.orchestration.policy_workers.members import State, Worker
from stdist.runs.workers import Unit, WorkKey


def unit(step: int, window: int = 0, version: str = "") -> Unit:
    return Unit(WorkKey(step, window, (1, 2)), b"", version)


class Book(list):
    """The ledger's events, as (event, step)."""

    def __call__(self, event: str, key: WorkKey, **details: object) -> None:
        self.append((event, key.step))


def ready(scheduler: Scheduler, version: str = "") -> str:
    name = scheduler.join(0.0)
    worker = scheduler.workers[name]
    worker.started("here")
    worker.verified(version)
    return name


def lease(scheduler: Scheduler, worker: str, now: float = 0.0) -> Lease:
    order = scheduler.order_for(worker, now)
    assert isinstance(order, Lease)
    return order


def test_units_go_out_oldest_first_and_come_back_once() -> None:
    scheduler = Scheduler(10.0, book := Book())
    scheduler.submit([unit(0), unit(1)])
    one, other = ready(scheduler), ready(scheduler)
    first, second = lease(scheduler, one, now=5.0), lease(scheduler, other)
    assert (first.unit.key.step, second.unit.key.step) == (0, 1) and second.fence > first.fence
    assert first.expires == 15.0 and scheduler.order_for(one, 0.0) is None
    assert scheduler.collect([unit(0).key]) is None
    assert scheduler.complete(first, b"a", {"sample": 2.0})
    (result,) = scheduler.collect([unit(0).key])
    assert result.answer == b"a" and result.worker == one and scheduler.workers[one].busy == 2.0
    assert scheduler.collect([unit(0).key, unit(1).key]) is None and scheduler.waiting == 1
    assert book == [("issued", 0), ("issued", 1), ("leased", 0), ("leased", 1), ("returned", 0)]


def test_a_late_answer_under_an_old_fencing_number_changes_nothing() -> None:
    scheduler = Scheduler(10.0, book := Book())
    scheduler.submit([unit(0)])
    slow, other = ready(scheduler), ready(scheduler)
    old = lease(scheduler, slow)
    assert scheduler.expire(old) and not scheduler.expire(old)
    new = lease(scheduler, other)
    assert new.fence > old.fence
    assert not scheduler.complete(old, b"late", {})
    assert scheduler.complete(new, b"new", {}) and not scheduler.complete(old, b"late", {})
    assert scheduler.collect([unit(0).key])[0].answer == b"new"
    assert [event for event, _ in book].count("returned") == 1 and scheduler.lost_leases == {"expired": 1}


def test_what_a_lost_worker_had_goes_out_again_before_newer_work() -> None:
    scheduler = Scheduler(10.0)
    scheduler.submit([unit(0), unit(1)])
    one, other = ready(scheduler), ready(scheduler)
    gone = lease(scheduler, one)
    scheduler.lose(one, "died", "killed")
    assert one not in scheduler.workers and scheduler.lost_leases == {"died": 1}
    assert lease(scheduler, other).unit.key.step == 0
    assert not scheduler.complete(gone, b"", {})


def test_machines_and_data_have_budgets_of_their_own() -> None:
    """A unit that outlives LOST_PER_UNIT - 1 workers and one error is still done; one more of either ends the run."""
    scheduler = Scheduler(10.0)
    scheduler.submit([unit(3)])
    for _ in range(leases.LOST_PER_UNIT - 1):
        lease(scheduler, worker := ready(scheduler))
        scheduler.lose(worker, "died", "killed on node-7")
    survivor = ready(scheduler)
    scheduler.fail(lease(scheduler, survivor), "ValueError: no such cell")
    assert scheduler.error is None and scheduler.collect([unit(3).key]) is None
    lease(scheduler, survivor)
    scheduler.lose(survivor, "died", "killed on node-7")
    with pytest.raises(ResourceError, match=r"step 3, .*: 5 workers were lost over it, the last one killed on node-7"):
        scheduler.collect([unit(3).key])

    scheduler = Scheduler(10.0)
    scheduler.submit([unit(3)])
    for _ in range(leases.FAILURES_PER_UNIT):
        scheduler.fail(lease(scheduler, ready(scheduler)), "ValueError: no such cell")
    with pytest.raises(InputError, match=r"step 3, .* failed 2 times: ValueError: no such cell"):
        scheduler.collect([unit(3).key])


def test_no_worker_gets_work_for_weights_that_it_has_not_verified() -> None:
    scheduler = Scheduler(10.0)
    scheduler.submit([unit(0, version="a")])
    worker = ready(scheduler, "b")
    assert scheduler.order_for(worker, 0.0) is None, "nobody can fetch a yet"
    scheduler.publish("a", 0)
    assert scheduler.order_for(worker, 0.0) == Load("a")
    scheduler.workers[worker].outdated()
    assert scheduler.order_for(worker, 0.0) == Load("a")
    scheduler.workers[worker].verified("a")
    assert scheduler.needs("a")
    scheduler.complete(lease(scheduler, worker), b"", {})
    assert not scheduler.needs("a")


def test_one_old_unit_does_not_send_all_workers_back_to_old_weights() -> None:
    """Its worker died when the others had the next weights: one of them goes back, unless it dies too."""
    scheduler = Scheduler(10.0)
    scheduler.publish("old", 0)
    scheduler.submit([unit(0, version="old")])
    gone = ready(scheduler, "old")
    lease(scheduler, gone)
    scheduler.publish("new", 1)
    scheduler.submit([unit(1, window, "new") for window in range(3)])
    back, other, third = (ready(scheduler, "new") for _ in range(3))
    scheduler.lose(gone, "died", "")
    assert scheduler.order_for(back, 0.0) == Load("old")
    assert lease(scheduler, other).unit.key == (1, 0, (1, 2))
    scheduler.workers[back].outdated()
    scheduler.lose(back, "died", "")
    assert scheduler.order_for(third, 0.0) == Load("old")
    scheduler.workers[third].outdated()
    scheduler.workers[third].verified("old")
    assert lease(scheduler, third).unit.version == "old" and lease(scheduler, other).unit.key.window == 1
    assert scheduler.order_for(third, 0.0) == Load("new")


def test_work_waits_while_its_weights_cannot_be_fetched() -> None:
    scheduler = Scheduler(10.0)
    scheduler.publish("a", 0)
    scheduler.submit([unit(0, version="a")])
    worker = ready(scheduler, "a")
    scheduler.withdraw("a")
    assert scheduler.order_for(worker, 0.0) is None
    scheduler.publish("a", 0)
    assert isinstance(scheduler.order_for(worker, 0.0), Lease)


def test_a_learner_that_comes_back_finds_what_was_finished_and_nothing_of_other_weights() -> None:
    """It resumes at step 2. Answers by weights of its own history serve again, as do those by later weights once these
    are published again with the same content; answers by weights of a history that is gone are made anew."""
    scheduler = Scheduler(10.0)
    worker = ready(scheduler, "w0")
    for step, version in enumerate(["w0", "w1", "w2", "w3"]):
        scheduler.publish(version, step)
        scheduler.submit([unit(step, version=version)])
        scheduler.workers[worker].outdated()
        scheduler.workers[worker].verified(version)
        scheduler.complete(lease(scheduler, worker), version.encode(), {})
        assert scheduler.collect([unit(step).key])
    assert scheduler.resume(2) == {"w0": 0, "w1": 1, "w2": 2}
    scheduler.publish("w2", 2)
    scheduler.submit([unit(2, version="w2")], oldest_step=2)
    assert scheduler.collect([unit(2).key])[0].answer == b"w2"
    scheduler.publish("x3", 3)
    scheduler.submit([unit(3, version="x3")], oldest_step=3)
    assert scheduler.collect([unit(3).key]) is None
    scheduler.workers[worker].outdated()
    scheduler.workers[worker].verified("x3")
    assert lease(scheduler, worker).unit.version == "x3"

    scheduler.resume(2)
    scheduler.submit([unit(2, version="y2")], oldest_step=1)
    assert scheduler.collect([unit(2).key])[0].answer == b"w2", "one step old is new enough"


def test_answers_of_a_history_that_is_gone_serve_no_step_however_old_weights_may_be() -> None:
    scheduler = Scheduler(10.0)
    scheduler.publish("w1", 1)
    scheduler.submit([unit(1, version="w1")])
    scheduler.complete(lease(scheduler, ready(scheduler, "w1")), b"w1", {})
    assert scheduler.resume(0) == {}
    scheduler.submit([unit(1, version="x0")], oldest_step=0)
    assert scheduler.collect([unit(1).key]) is None


def test_queued_work_is_replaced_where_its_weights_are_gone() -> None:
    scheduler = Scheduler(10.0, book := Book())
    scheduler.submit([unit(5, version="old")])
    scheduler.submit([unit(5, version="old")])
    assert book == [("issued", 5)]
    scheduler.submit([unit(5, version="new")])
    scheduler.publish("old", 4)
    worker = ready(scheduler, "old")
    assert scheduler.order_for(worker, 0.0) is None
    scheduler.publish("new", 5)
    assert scheduler.order_for(worker, 0.0) == Load("new")
    assert book == [("issued", 5), ("voided", 5), ("issued", 5)] and not scheduler.needs("old")


def test_collected_answers_are_kept_within_their_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "KEPT_BYTES", 8)
    scheduler, keys = Scheduler(10.0), [unit(step).key for step in range(4)]
    worker = ready(scheduler)
    for step in range(4):
        scheduler.submit([unit(step)])
        scheduler.complete(lease(scheduler, worker), b"four", {})
        scheduler.collect([keys[step]])
    assert scheduler.collect(keys[2:])
    scheduler.submit([unit(2), unit(1)])
    assert lease(scheduler, worker).unit.key == keys[1], "the oldest ones are forgotten, and made again"


def test_closing_voids_what_nobody_learnt_from() -> None:
    scheduler = Scheduler(10.0, book := Book())
    scheduler.submit([unit(0), unit(1), unit(2)])
    worker = ready(scheduler)
    scheduler.complete(lease(scheduler, worker), b"", {})
    scheduler.collect([unit(0).key])
    running = lease(scheduler, worker)
    scheduler.close()
    assert book[-2:] == [("voided", 1), ("voided", 2)] and scheduler.waiting == 0
    assert not scheduler.complete(running, b"", {})


@pytest.mark.parametrize("seed", range(20))
def test_whatever_happens_each_unit_is_answered_once(seed: int) -> None:
    """Workers die, hang, come back late and meet errors in any order; budgets aside, nothing is lost or doubled."""
    chance = random.Random(seed)
    scheduler = Scheduler(10.0, book := Book())
    units = [unit(step) for step in range(60)]
    scheduler.submit(units)
    running: list[Lease] = []
    late: list[Lease] = []
    lost = dict.fromkeys(range(60), 0)
    while scheduler.waiting:
        worker = ready(scheduler)
        order = scheduler.order_for(worker, 0.0)
        if isinstance(order, Lease):
            running.append(order)
        one = running.pop(chance.randrange(len(running)))
        event = chance.choice(["answer", "answer", "die", "expire"])
        step = one.unit.key.step
        if event == "answer" or lost[step] == leases.LOST_PER_UNIT - 1:
            assert scheduler.complete(one, str(one.fence).encode(), {})
        else:
            lost[step] += 1
            scheduler.lose(one.worker, "died", "") if event == "die" else scheduler.expire(one)
            late.append(one)
        if late and chance.random() < 0.3:
            gone = chance.choice(late)
            assert gone.worker not in scheduler.workers or not scheduler.complete(gone, b"late", {})
    assert sorted(step for event, step in book if event == "returned") == list(range(60))
    assert all(result.answer != b"late" for result in scheduler.collect([u.key for u in units]))


def test_no_path_leads_to_ready_but_a_verified_version() -> None:
    """Every transition from every state: READY is reached from STALE alone, and only by ``verified``."""
    for state in State:
        for name, arguments in (("started", ["host"]), ("outdated", []), ("lost", []), ("verified", ["v"])):
            worker = Worker("w", state)
            try:
                getattr(worker, name)(*arguments)
            except RuntimeError:
                continue
            assert (worker.state is State.READY) == (name == "verified")
            assert name != "verified" or state is State.STALE
            assert name != "started" or state is State.STARTING
            assert (worker.version is not None) == (name == "verified")
