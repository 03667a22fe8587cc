"""Simulated trainings whose figures fit on paper; and, with everything going wrong, every unit answered once."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from stdist.errors import ResourceError
from stdist.orchestration.policy_workers.leases import Lease, Scheduler
from stdist.orchestration.policy_workers.simulation import Cluster, Loss, random_losses, simulate
from stdist.runs.workers import WorkKey

SECOND = 1 / 3600
PAPER = Cluster(workers=4, windows_per_step=10, sample_seconds=10, load_seconds=2, train_seconds=20, max_staleness=0)
ROUGH = Cluster(
    workers=6,
    windows_per_step=13,
    sample_seconds=20,
    load_seconds=3,
    train_seconds=25,
    start_seconds=40,
    sample_spread=0.6,
    hang_probability=0.004,
    lease_seconds=60,
)


def test_on_policy_phases_follow_each_other() -> None:
    """Ten units on four workers are three rounds: a step takes 2 + 3 · 10 + 20 s, the first one 5 s to start too."""
    outcome = simulate(replace(PAPER, start_seconds=5, groups_per_unit=3), 525 * SECOND)
    assert outcome.trained_at == pytest.approx(5 + 52 * np.arange(1, 11))
    assert outcome.learner_idle == pytest.approx(1 - 200 / 525)
    assert outcome.worker_idle == pytest.approx(1 - (4 * 5 + 10 * (4 * 2 + 10 * 10)) / (4 * 525))
    assert outcome.loads == 40 and outcome.lost_work == 0 and outcome.exactly_once
    assert outcome.steps_per_hour == pytest.approx(10 / 525 * 3600)
    assert outcome.groups_per_hour == pytest.approx(outcome.steps_per_hour * 30)


@pytest.mark.parametrize(("train_seconds", "worker_idle", "learner_idle"), [(30, 8 / 30, 0), (15, 0, 7 / 22)])
@pytest.mark.parametrize("max_staleness", [1, 2])
def test_one_step_ahead_the_slower_phase_sets_the_pace(max_staleness, train_seconds, worker_idle, learner_idle) -> None:
    """Eight units on four workers take 2 + 2 · 10 s, while learners train on the step before."""
    cluster = replace(PAPER, windows_per_step=8, train_seconds=train_seconds, max_staleness=max_staleness)
    outcome = simulate(cluster, 2)
    assert np.diff(outcome.trained_at)[10:] == pytest.approx(max(22, train_seconds))
    assert outcome.worker_idle == pytest.approx(worker_idle, abs=0.01)
    assert outcome.learner_idle == pytest.approx(learner_idle, abs=0.01)


def test_what_a_killed_worker_had_done_of_its_unit_is_lost() -> None:
    """Up at 3 s, loaded at 5 s, killed at 9 s: 4 s are lost, and the next worker answers at 9 + 3 + 2 + 10 s. Killed
    while it loads, it had no unit."""
    cluster = Cluster(1, 1, sample_seconds=10, load_seconds=2, train_seconds=5, start_seconds=3)
    outcome = simulate(cluster, 24 * SECOND, [Loss(9, 0)])
    assert outcome.lost_seconds == pytest.approx(4) and outcome.lost_work == pytest.approx(4 / 14)
    assert outcome.lost_leases == {"died": 1} and outcome.loads == 2
    assert simulate(cluster, 29 * SECOND, [Loss(9, 0)]).trained_at == pytest.approx([29])
    loading = simulate(cluster, 24 * SECOND, [Loss(4, 0)])
    assert loading.lost_seconds == 0 and loading.lost_leases == {}
    assert loading.trained_at == pytest.approx([4 + 3 + 2 + 10 + 5])


def test_others_do_what_a_killed_worker_leaves() -> None:
    """Of six workers four would be done at 112 s; of two that die at 106 s the idle ones take the units at once."""
    cluster = replace(PAPER, workers=6, windows_per_step=4, start_seconds=100)
    outcome = simulate(cluster, 136 * SECOND, [Loss(106, 1), Loss(106, 3)])
    assert outcome.trained_at == pytest.approx([136]) and outcome.lost_seconds == pytest.approx(2 * 4)


def test_a_worker_that_hangs_is_replaced_after_two_leases() -> None:
    """The first unit hangs by this seed: it begins at 5 s, and the next worker starts at 5 + 2 · 20 s. At 62 s learners
    have trained for 2 s."""
    cluster = Cluster(
        1, 1, 10, load_seconds=2, train_seconds=5, start_seconds=3, hang_probability=0.5, lease_seconds=20
    )
    outcome = simulate(cluster, 62 * SECOND, seed=1)
    assert outcome.lost_seconds == pytest.approx(2 * 20) and outcome.lost_leases == {"expired": 1}
    assert outcome.learner_idle == pytest.approx(1 - 2 / 62)
    assert simulate(cluster, 65 * SECOND, seed=1).trained_at == pytest.approx([45 + 3 + 2 + 10 + 5])


@pytest.mark.parametrize(("sample_seconds", "hang_probability"), [(30, 0), (10, 1)])
def test_a_unit_that_nobody_answers_in_time_ends_the_training(sample_seconds: float, hang_probability: float) -> None:
    cluster = replace(PAPER, lease_seconds=20, sample_seconds=sample_seconds, hang_probability=hang_probability)
    with pytest.raises(ResourceError, match=r"5 workers were lost over it, the last one gave no answer within 20 s"):
        simulate(cluster, 1)


def test_late_answers_count_for_nothing_and_hung_workers_are_replaced() -> None:
    """A lease in which half of the units are done: no answer is counted twice, and workers that were late load anew."""
    rough = replace(ROUGH, lease_seconds=25, sample_spread=0.3)
    outcome = simulate(rough, 2)
    assert outcome.exactly_once and outcome.lost_leases.keys() == {"expired"}
    calm = simulate(replace(rough, lease_seconds=600, hang_probability=0), 2)
    assert calm.lost_leases == {} and calm.lost_work == 0
    assert outcome.lost_work > 0.05 and outcome.loads / len(outcome.trained_at) > calm.loads / len(calm.trained_at)


def test_the_seed_decides_everything() -> None:
    losses = random_losses(2, ROUGH.workers, 3, seed=4)
    assert simulate(ROUGH, 3, losses, seed=1) == simulate(ROUGH, 3, losses, seed=1)
    assert simulate(ROUGH, 3, losses, seed=1).trained_at != simulate(ROUGH, 3, losses, seed=2).trained_at


@pytest.mark.parametrize("max_staleness", [0, 1, 3])
@pytest.mark.parametrize("seed", range(3))
def test_every_unit_is_answered_once_whoever_dies_or_hangs(seed: int, max_staleness: int) -> None:
    cluster = replace(ROUGH, max_staleness=max_staleness)
    outcome = simulate(cluster, 2, random_losses(20, cluster.workers, 2, seed), seed)
    assert outcome.exactly_once and outcome.lost_leases["died"] > 10 and outcome.lost_leases["expired"] > 0
    calm = simulate(replace(cluster, hang_probability=0, lease_seconds=600), 2, seed=seed)
    assert 0 < outcome.steps_per_hour < calm.steps_per_hour and calm.lost_work == 0


@pytest.mark.parametrize("again", [5, 35], ids=["before its step is trained", "afterwards"])
def test_an_answer_that_counts_twice_shows(again: int, monkeypatch: pytest.MonkeyPatch) -> None:
    complete = Scheduler.complete

    def twice(self: Scheduler, lease: Lease, answer: bytes, seconds: dict[str, float]) -> bool:
        if lease.fence == again:
            self._note("returned", WorkKey(0, 4, (0,)))
        return complete(self, lease, answer, seconds)

    monkeypatch.setattr(Scheduler, "complete", twice)
    assert not simulate(PAPER, 1).exactly_once


def test_the_spread_keeps_the_mean() -> None:
    """2,000 units one after the other: their sum is within four standard deviations of 2,000 means."""
    cluster = Cluster(1, 2000, sample_seconds=1, load_seconds=0, train_seconds=0, sample_spread=0.5, max_staleness=0)
    deviation = np.sqrt(2000 * (np.exp(0.25) - 1))
    assert simulate(cluster, 1).trained_at[0] == pytest.approx(2000, abs=4 * deviation)


def test_losses_have_their_rate_and_hit_every_place() -> None:
    losses = random_losses(2, workers=3, hours=500)
    assert len(losses) == pytest.approx(1000, abs=4 * np.sqrt(1000)) and {loss.place for loss in losses} == {0, 1, 2}
    assert all(0 < loss.second < 500 * 3600 for loss in losses) and random_losses(0, 3, 500) == []


def test_it_needs_neither_ray_nor_torch() -> None:
    code = "import sys, stdist.orchestration.policy_workers.simulation; print({'ray', 'torch'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
