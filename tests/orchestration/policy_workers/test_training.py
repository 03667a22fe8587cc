"""GRPO with its rollouts on workers, through ``stdist train``: what is killed changes no bit of the final weights."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from threading import Thread

import psutil
import pytest
from safetensors.torch import load_file

from stdist.errors import InputError
from stdist.orchestration.policy_workers.proof import prove_run
from stdist.runs.recipes import load_config

pytest.importorskip("ray", reason="Ray is not installed: pip install 'stdist[cluster]'")
pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: pip install 'stdist[cluster]'")

STEPS, GROUPS = 6, 2 * 2
WORKERS = [
    *["stages=[sft,grpo]", "sft.max_steps=2", "sft.save_steps=2", "sft.eval_steps=2", f"grpo.max_steps={STEPS}"],
    *["grpo.save_steps=2", "grpo.eval_steps=6", "rollouts.num_workers=1"],
]
PATIENCE = 300


def train(runs, name: str, *overrides: str) -> list[str]:
    """Returns what the driver said."""
    from stdist.orchestration import learners

    said: list[str] = []
    learners.train(load_config(runs.config, [f"name={name}", *workers_with(*overrides)]), said.append)
    return said


def workers_with(*overrides: str) -> list[str]:
    """WORKERS, but for the keys of ``overrides``: a key is given once."""
    keys = {override.partition("=")[0] for override in overrides}
    return [*(given for given in WORKERS if given.partition("=")[0] not in keys), *overrides]


@pytest.fixture(scope="module")
def undisturbed(local_ray: None, runs) -> str:
    train(runs, "pool-undisturbed")
    return "pool-undisturbed"


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


class Saboteur(Thread):
    """Kills the processes called ``name`` once the run has learnt from ``step``; ``victims`` are their pids."""

    def __init__(self, folder: Path, name: str, step: int, act: Callable[[int], None] = kill):
        super().__init__(daemon=True)
        self.ledger, self.name_of_victim, self.at, self.act = folder / "rollouts" / "ledger.jsonl", name, step, act
        self.victims: list[int] = []
        self.start()

    def run(self) -> None:
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline and not self.reached():
            time.sleep(0.005)
        for pid in pids_of(self.name_of_victim):
            self.victims.append(pid)
            self.act(pid)

    def reached(self) -> bool:
        return self.ledger.exists() and any(
            line["event"] == "trained" and line["step"] == self.at
            for line in map(json.loads, self.ledger.read_text().split("\n")[:-1])
        )


def pids_of(name: str) -> list[int]:
    processes = [p for p in psutil.process_iter(["cmdline"]) if p.info["cmdline"]]
    return [p.pid for p in processes if p.info["cmdline"][0].startswith(name)]


def steps_of(runs, name: str) -> list[dict[str, float]]:
    """What the log says of GRPO's steps."""
    return [line for line in runs.log(name) if line["stage"] == "grpo" and "event" not in line]


def require_whole(runs, name: str) -> None:
    proof = prove_run(runs / name)
    assert proof.problems == [] and (proof.steps, proof.trained) == (STEPS, STEPS * GROUPS)


def require_same_weights(runs, name: str, undisturbed: str) -> None:
    for stage, path in runs.results(undisturbed).items():
        ours = runs.results(name)[stage]
        files = sorted(p.relative_to(path) for p in path.rglob("*.safetensors") if "trainer_state" not in p.parts)
        assert files and all((ours / file).read_bytes() == (path / file).read_bytes() for file in files), stage


def test_a_run_on_workers_ends_in_a_report_and_a_whole_ledger(runs, undisturbed: str) -> None:
    require_whole(runs, undisturbed)
    assert (runs / undisturbed / "report" / "index.html").exists()
    steps = steps_of(runs, undisturbed)
    assert [line["staleness/worst"] for line in steps] == [0.0] * STEPS
    assert all(abs(line["mismatch_kl"]) < 1e-4 and line["workers/ready"] == 1 for line in steps)


def test_a_worker_killed_in_mid_run_changes_no_bit(runs, undisturbed: str) -> None:
    saboteur = Saboteur(runs / "pool-killed", "ray::WorkerActor", step=2)
    train(runs, "pool-killed")
    assert len(saboteur.victims) == 1
    require_whole(runs, "pool-killed")
    require_same_weights(runs, "pool-killed", undisturbed)


@pytest.mark.slow
def test_a_learner_killed_in_mid_run_changes_no_bit_and_workers_stay(runs, undisturbed: str) -> None:
    """It comes back behind the checkpoint of step 2 and finds the answers of the steps that it repeats."""
    workers: list[int] = []

    def act(pid: int) -> None:
        workers.extend(pids_of("ray::WorkerActor"))
        os.kill(pid, signal.SIGKILL)

    saboteur = Saboteur(runs / "pool-learner", "ray::RayTrainWorker", step=2, act=act)
    train(runs, "pool-learner")
    assert len(saboteur.victims) == len(workers) == 1
    require_whole(runs, "pool-learner")
    require_same_weights(runs, "pool-learner", undisturbed)
    ledger = (runs / "pool-learner" / "rollouts" / "ledger.jsonl").read_text()
    assert ledger.count('"resumed"') == 2 and ledger.count('"returned"') == STEPS * 2, "nothing was sampled twice"


@pytest.mark.slow
def test_a_killed_driver_takes_all_along_and_the_same_command_goes_on(runs, undisturbed: str) -> None:
    import ray

    def start() -> "subprocess.Popen[bytes]":
        address = ray.get_runtime_context().gcs_address
        command = [sys.executable, "-c", "from stdist.cli import main; main()", "train", str(runs.config)]
        environment = os.environ | {"RAY_ADDRESS": address, "HF_HUB_OFFLINE": "1"}
        return subprocess.Popen([*command, "name=pool-driver", *WORKERS], env=environment)

    driver = start()
    saboteur = Saboteur(runs / "pool-driver", "ray::Coordinator", step=2, act=lambda pid: driver.kill())
    driver.wait(PATIENCE)
    assert driver.returncode == -signal.SIGKILL and saboteur.victims
    deadline = time.monotonic() + 60
    while pids_of("ray::WorkerActor") or pids_of("ray::RayTrainWorker"):
        assert time.monotonic() < deadline, "they go on without their driver"
        time.sleep(0.1)
    assert start().wait(PATIENCE) == 0
    require_whole(runs, "pool-driver")
    require_same_weights(runs, "pool-driver", undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
def test_sharded_learners_train_what_one_trains(runs, undisturbed: str, stage: int) -> None:
    """ZeRO-1 and ZeRO-3: whoever trains no longer samples, and may shard its weights."""
    name = f"pool-zero-{stage}"
    train(runs, name, "learners.engine=deepspeed", f"learners.zero_stage={stage}")
    require_whole(runs, name)
    ours, theirs = (
        [line for line in runs.log(run) if line["stage"] == "grpo" and "event" not in line]
        for run in (name, undisturbed)
    )
    for mine, other in zip(ours, theirs, strict=True):
        # Advantages add up to nothing, and so does the loss: its own size is no measure.
        assert mine["loss"] == pytest.approx(other["loss"], abs=1e-6)
        for scalar in ("reward", "reward_std", "grad_norm", "tokens"):
            assert mine[scalar] == pytest.approx(other[scalar], rel=1e-3, abs=1e-5), scalar
    for stage, path in runs.results(undisturbed).items():
        weights, expected = (load_file(p / "model.safetensors") for p in (runs.results(name)[stage], path))
        distance = sum(float((weights[key] - expected[key]).square().sum()) for key in expected)
        length = sum(float(tensor.square().sum()) for tensor in expected.values())
        assert distance**0.5 < 1e-4 * length**0.5, stage


@pytest.mark.slow
def test_workers_that_run_ahead(runs, undisturbed: str) -> None:
    """One step: each batch but the first is one update old, and the log says so."""
    train(runs, "pool-ahead", "rollouts.max_staleness=1")
    require_whole(runs, "pool-ahead")
    steps = steps_of(runs, "pool-ahead")
    assert [line["staleness/worst"] for line in steps] == [0.0] + [1.0] * (STEPS - 1)
    assert steps[-1]["effective_samples"] < 1


def test_workers_that_the_cluster_cannot_hold_are_refused_at_once(local_ray: None, runs) -> None:
    with pytest.raises(
        InputError, match=r"learners.num_workers 1 and rollouts.num_workers 2 need 3 CPU and the cluster"
    ):
        train(runs, "pool-too-many", "rollouts.num_workers=2")
    assert not (runs / "pool-too-many").exists()


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("grpo.num_generations=1", "a group of 1 has no baseline"),
        ("grpo.half_score=0", "greater than 0"),
        ("rollouts.num_workers=-1", "greater than or equal to 0"),
        ("rollouts.num_workers=3", "only 2 windows can be in flight"),
        ("rollouts.lease_timeout=0", "greater than 0"),
    ],
)
def test_settings_that_cannot_work_are_refused(runs, override: str, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        load_config(runs.config, workers_with(override))
