"""Whatever happens to workers, a training's weights are those of an undisturbed one, and its ledger is whole.

Processes are killed for real, in a state that is asserted; the program is a toy whose answers hash its weights.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread

import psutil
import pytest
from toys import InProcess, ToyPool, ToyTraining, kill, pid_of

from stdist.errors import InputError, ResourceError
from stdist.orchestration.policy_workers.proof import prove

pytest.importorskip("ray", reason="Ray is not installed: pip install 'stdist[cluster]'")
MakePool = Callable[..., ToyPool]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[int]]:
    def weights(**options: int) -> list[int]:
        return ToyTraining(tmp_path_factory.mktemp("alone"), InProcess(), **options).run()

    return weights


class Running(Thread):
    """A toy training in a thread; ``weights`` once it has ended well."""

    def __init__(self, training: ToyTraining):
        super().__init__(daemon=True)
        self.training, self.error = training, None
        self.start()

    def run(self) -> None:
        try:
            self.result = self.training.run()
        except Exception as error:
            self.error = error

    @property
    def weights(self) -> list[int]:
        self.join(timeout=300)
        assert not self.is_alive(), "it hangs"
        assert self.error is None, self.error
        return self.result


def require_whole(pool: ToyPool, steps: int = 12) -> None:
    pool.wait_for(lambda: pool.ledger.exists())
    proof = prove(pool.ledger, range(steps))
    assert proof.problems == [] and proof.trained == steps * 4 * 3


@pytest.mark.parametrize("staleness", [0, 2])
def test_a_pool_learns_what_one_process_learns(
    make_pool: MakePool, undisturbed: Callable[..., list[int]], tmp_path: Path, staleness: int
) -> None:
    pool = make_pool(workers=2)
    assert ToyTraining(tmp_path, pool.remote, staleness=staleness).run() == undisturbed(staleness=staleness)
    require_whole(pool)
    assert pool.remote.status()["lost_leases"] == {}


@pytest.mark.parametrize(("phase", "state"), [("run", "ready"), ("load", "stale"), ("start", "starting")])
def test_a_worker_killed_at_work_in_a_sync_or_at_its_start_is_replaced(
    make_pool: MakePool, undisturbed: Callable[..., list[int]], tmp_path: Path, phase: str, state: str
) -> None:
    pool = make_pool(workers=2)
    pool.trap(phase)
    training = Running(ToyTraining(tmp_path, pool.remote))
    victim = pool.trapped()
    assert pool.states().get(victim, "starting") == state
    kill(victim)
    pool.release()
    assert training.weights == undisturbed()
    require_whole(pool)
    assert pool.remote.status()["lost_leases"] == ({"died": 1} if phase == "run" else {})
    assert victim not in pool.states()


def test_all_workers_but_one_may_die_at_once(
    make_pool: MakePool, undisturbed: Callable[..., list[int]], tmp_path: Path
) -> None:
    pool = make_pool(workers=3)

    def all_but_one(step: int) -> None:
        if step == 5:
            pool.wait_for(lambda: len(pool.states()) == 3)
            assert "ready" in pool.states().values()
            for pid in list(pool.states())[1:]:
                kill(pid)

    assert ToyTraining(tmp_path, pool.remote).run(all_but_one) == undisturbed()
    require_whole(pool)


def test_a_worker_that_was_stopped_past_its_lease_changes_nothing_when_it_comes_back(
    make_pool: MakePool, undisturbed: Callable[..., list[int]], tmp_path: Path
) -> None:
    """SIGSTOP in mid-work, past the lease; another one answers; SIGCONT: its own answer is none, and it works again
    only behind another verified sync."""
    pool = make_pool(workers=2, lease_timeout=2.0)
    pool.trap("run")
    training = Running(ToyTraining(tmp_path, pool.remote, steps=12))
    victim = pool.trapped()
    assert pool.states()[victim] == "ready"
    os.kill(victim, signal.SIGSTOP)
    pool.release()
    pool.wait_for(lambda: pool.remote.status()["lost_leases"].get("expired") == 1)
    assert pool.states()[victim] == "stale"
    os.kill(victim, signal.SIGCONT)
    assert training.weights == undisturbed()
    require_whole(pool)
    lines = [line for line in pool.ledger.read_text().splitlines() if '"returned"' in line]
    assert len(lines) == 12 * 4, "the late answer is in no line"
    assert pool.remote.status()["lost_leases"] == {"expired": 1} and victim in pool.states()


def test_a_worker_that_hangs_for_good_is_replaced(
    make_pool: MakePool, undisturbed: Callable[..., list[int]], tmp_path: Path
) -> None:
    pool = make_pool(workers=2, lease_timeout=1.0)
    pool.trap("run")
    training = Running(ToyTraining(tmp_path, pool.remote))
    victim = pool.trapped()
    assert training.weights == undisturbed()
    require_whole(pool)
    pool.wait_for(lambda: not psutil.pid_exists(victim) or psutil.Process(victim).status() == psutil.STATUS_ZOMBIE)


def test_a_worker_out_of_memory_is_replaced_and_its_host_is_named(
    make_pool: MakePool, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """It counts as a lost machine, not as bad data; where every worker lacks memory the run ends and says so."""
    pool = make_pool(workers=1)
    (tmp_path / "fail-run").write_text("MemoryError")
    with pytest.raises(ResourceError, match=r"5 workers were lost over it, the last one on \S+ \(pid \d+\): MemoryErr"):
        ToyTraining(tmp_path, pool.remote).run()
    assert pool.remote.status()["lost_leases"] == {"out of memory": 5}


def test_an_error_of_the_data_ends_the_run_with_its_own_words(make_pool: MakePool, tmp_path: Path) -> None:
    pool = make_pool(workers=2)
    (tmp_path / "fail-run").write_text("ValueError")
    with pytest.raises(InputError, match=r"step 0, window \d, 3 cells failed 2 times: ValueError: as it was told"):
        ToyTraining(tmp_path, pool.remote).run()


def test_weights_of_a_wrong_digest_are_never_worked_with(make_pool: MakePool, tmp_path: Path) -> None:
    """Every worker that meets them is replaced, and the run ends before one answer was given."""
    pool = make_pool(workers=1)
    training = ToyTraining(tmp_path, pool.remote)
    publish = pool.remote.publish

    def corrupt(version) -> None:
        version.tensors["w"][17] ^= 1
        publish(version)

    pool.remote.publish = corrupt
    with pytest.raises(ResourceError, match=r"3 workers in a row could not begin, the last one: weights .* arrived"):
        training.run()
    assert '"returned"' not in pool.ledger.read_text()


@pytest.mark.parametrize("how", ["ValueError", "SIGKILL"])
def test_workers_that_cannot_start_end_the_run(make_pool: MakePool, tmp_path: Path, how: str) -> None:
    """Whether they say so or die of it: nobody starts processes for ever."""
    pool = make_pool(workers=1)
    (tmp_path / "fail-start").write_text(how)
    with pytest.raises(ResourceError, match="3 workers in a row could not begin, the last one: "):
        ToyTraining(tmp_path, pool.remote).run()


def test_a_learner_that_dies_in_an_update_loses_no_finished_answer(
    make_pool: MakePool, undisturbed: Callable[..., list[int]], tmp_path: Path
) -> None:
    """Another one resumes behind its checkpoint, two steps back, and finds their answers; workers stay."""
    for staleness in (0, 1):
        pool = make_pool(workers=2)
        (tmp_path / "checkpoint.json").unlink(missing_ok=True)
        pool.ledger.unlink(missing_ok=True)

        def die(step: int) -> None:
            if step == 8:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            ToyTraining(tmp_path, pool.remote, staleness=staleness).run(die)
        workers = set(pool.states())
        assert ToyTraining(tmp_path, pool.remote, staleness=staleness).run() == undisturbed(staleness=staleness)
        require_whole(pool)
        assert workers and workers <= set(pool.states())
        lines = pool.ledger.read_text()
        assert lines.count('"returned"') == 12 * 4, "nothing was made twice"
        assert lines.count('"trained"') == 12 * 4 + 2 * 4, "two steps were learnt again"


def test_a_pool_that_dies_with_its_driver_is_resumed_by_another(
    make_pool: MakePool, undisturbed: Callable[..., list[int]], tmp_path: Path
) -> None:
    pool = make_pool(workers=2)

    def die(step: int) -> None:
        if step == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ToyTraining(tmp_path, pool.remote).run(die)
    import ray

    ray.kill(pool.actor)
    with pytest.raises(ResourceError, match="the process that hands out rollouts is gone"):
        for _ in range(600):  # Ray does not wait for the end of what it kills
            pool.remote.status()
            time.sleep(0.1)
    with pool.ledger.open("a") as ledger:
        ledger.write('{"event": "leas')  # it was writing
    again = make_pool(workers=1)
    assert ToyTraining(tmp_path, again.remote).run() == undisturbed()
    require_whole(again)


def test_a_ledger_on_a_full_disk_ends_the_run(make_pool: MakePool, tmp_path: Path) -> None:
    pool = make_pool(workers=1)
    pool.remote.status()
    processes = [p for p in psutil.process_iter(["cmdline", "create_time"]) if p.info["cmdline"]]
    coordinators = [p for p in processes if p.info["cmdline"][0].startswith("ray::Coordinator")]
    newest = max(coordinators, key=lambda process: process.info["create_time"])
    newest.rlimit(psutil.RLIMIT_FSIZE, (2000, 2000))
    with pytest.raises((ResourceError, OSError), match="File too large"):
        ToyTraining(tmp_path, pool.remote).run()


def test_nobody_works_where_nothing_moves(make_pool: MakePool, tmp_path: Path) -> None:
    """A wait has a limit, and says what it waited for and in what state the workers are."""
    pool = make_pool(workers=1, timeout=4.0)
    pool.trap("start")
    with pytest.raises(ResourceError, match=r"nothing has moved for \d+ s while step 0, window 0.*worker-1 starting"):
        ToyTraining(tmp_path, pool.remote).run()


@contextmanager
def node_of_its_own(resource: str) -> Iterator["subprocess.Popen[bytes]"]:
    """A second raylet of the running cluster, the only one with ``resource``."""
    import ray

    command = [str(Path(sys.executable).parent / "ray"), "start", "--block", "--disable-usage-stats", "--num-cpus=1"]
    where = [f"--address={ray.get_runtime_context().gcs_address}", f"--resources={json.dumps({resource: 1})}"]
    ports = ["--object-store-memory=100000000", "--min-worker-port=0", "--max-worker-port=0"]
    process = subprocess.Popen([*command, *where, *ports], stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        yield process
    finally:
        for child in [*psutil.Process(process.pid).children(recursive=True), process]:
            child.kill()
        process.wait()


@pytest.mark.slow
def test_a_lost_node_takes_its_worker_along_and_another_one_joins(
    make_pool: MakePool, undisturbed: Callable[..., list[int]], tmp_path: Path
) -> None:
    """A raylet is killed with a worker on it in mid-work; a new node brings a worker that finishes the run."""
    pool = make_pool(workers=1, resources={"far": 1})
    with node_of_its_own("far") as first:
        pool.trap("run")
        training = Running(ToyTraining(tmp_path, pool.remote))
        victim = pool.trapped()
        assert pool.states()[victim] == "ready"
        for child in psutil.Process(first.pid).children(recursive=True):
            child.kill()
        pool.release()
        pool.wait_for(lambda: victim not in pool.states())
        with node_of_its_own("far"):
            assert training.weights == undisturbed()
    require_whole(pool)
    assert pool.remote.status()["lost_leases"] == {"died": 1}


@pytest.mark.slow
@pytest.mark.parametrize("staleness", [0, 1])
def test_a_hundred_kills_at_random(
    make_pool: MakePool, undisturbed: Callable[..., list[int]], tmp_path: Path, staleness: int
) -> None:
    chance, pool, kills = random.Random(staleness), make_pool(workers=3), 0
    training = Running(ToyTraining(tmp_path, pool.remote, steps=1200, staleness=staleness))
    states: set[str] = set()
    while kills < 100 and training.is_alive():
        time.sleep(chance.uniform(0.05, 0.6))
        workers = list(pool.remote.status()["workers"].values())
        up = [text for text in workers if "pid" in text]
        if not up:
            continue
        victim = chance.choice(up)
        try:
            kill(pid_of(victim))
        except ProcessLookupError:
            continue
        kills += 1
        states.add(victim.split()[0])
    assert training.weights == undisturbed(steps=1200, staleness=staleness)
    require_whole(pool, steps=1200)
    assert kills == 100 and states == {"ready", "stale"}
