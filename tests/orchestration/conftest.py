"""Trainings by several learners, and what two of them must have in common."""

import itertools
import json
import logging
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from stdist.errors import Interrupted

HERE = Path(__file__).parent
PATIENCE = 300
"""Seconds something may take on a crowded machine."""
COMMON = {"logging_steps": 1, "eval_steps": 10, "save_steps": 3, "warmup_steps": 2, "learning_rate": 1e-3}
ALIGNMENT = COMMON | {"trainable": "full", "max_steps": 4, "train_batch_size": 4, "eval_examples": 1}
FORECAST = COMMON | {"max_steps": 8, "windows_per_step": 2, "cells_per_window": 2, "eval_windows": 2}
CONFIG: dict[str, Any] = {
    "name": "run",
    "stages": ["alignment", "sft"],
    "reuse_alignment": False,
    "data": {"history": 3, "horizon": 2, "region": "0:2,0:2"},
    "numerals": {"mantissa_digits": 2},
    "policy": {"base": "tiny"},
    "alignment": ALIGNMENT,
    "arithmetic": ALIGNMENT,
    "sft": FORECAST | {"trainable": "full"},
    "grpo": FORECAST | {"num_generations": 2},
}


TOKEN = secrets.token_hex(16)
"""Ray reads a process's token once."""


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    """A real cluster of this process, of two cores; with a token of its own: nothing goes into the user's home."""
    ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'stdist[cluster]'")
    with pytest.MonkeyPatch.context() as environment:
        # Ray sets it where it is absent, and knows no other way to tell its own processes.
        environment.setenv("RAY_AUTH_MODE", "")
        environment.delenv("RAY_AUTH_MODE")
        environment.setenv("RAY_AUTH_TOKEN", TOKEN)
        # Ray's own workers are nice to others, and starve where other tests run beside them.
        environment.setenv("RAY_worker_niceness", "0")
        ray.init(
            "local",  # whatever cluster a test left a note of on this machine
            num_cpus=2,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            object_store_memory=100 * 2**20,
        )
        try:
            yield
        finally:
            ray.shutdown()


class Runs:
    """A folder with ``config.yaml`` and the runs that are made with it, in ``runs/NAME``."""

    def __init__(self, folder: Path, tree: dict[str, Any], store: Path):
        self.folder, self.config = folder, folder / "config.yaml"
        tree = tree | {"data": tree["data"] | {"store": str(store)}, "output_dir": str(folder / "runs")}
        self.config.write_text(yaml.safe_dump(tree))

    def __truediv__(self, name: str) -> Path:
        return self.folder / "runs" / name

    def log(self, name: str) -> list[dict[str, Any]]:
        """Losses, scalars and evaluations, without wall-clock times and which process trained from where."""
        entries = [json.loads(line) for line in (self / name / "log.jsonl").read_text().splitlines()]
        steps = [entry for entry in entries if entry.get("event") != "start"]
        return [{k: v for k, v in e.items() if k != "time" and not k.startswith("seconds/")} for e in steps]

    def losses(self, name: str) -> dict[str, list[tuple[int, float, float]]]:
        """Of every stage: step, loss and gradient norm."""
        found: dict[str, list[tuple[int, float, float]]] = {}
        for entry in self.log(name):
            if "event" not in entry:
                found.setdefault(entry["stage"], []).append((entry["step"], entry["loss"], entry["grad_norm"]))
        return found

    def results(self, name: str) -> dict[str, Path]:
        """Every stage's resulting checkpoint."""
        stages = (self / name / "checkpoints").iterdir()
        return {s.name: s / json.loads((s / "finished.json").read_text())["checkpoint"] for s in stages}

    def require_same(self, name: str, undisturbed: str) -> None:
        """Bit for bit: every line of the log, every stage's weights and optimizer."""
        assert self.log(name) == self.log(undisturbed)
        ours, theirs = self.results(name), self.results(undisturbed)
        assert ours.keys() == theirs.keys()
        for stage, path in theirs.items():
            assert (ours[stage] / "model.safetensors").read_bytes() == (path / "model.safetensors").read_bytes(), stage
            assert _optimizer(ours[stage]) == _optimizer(path), stage

    def require_close(self, name: str, undisturbed: str) -> None:
        """The same steps, losses and weights within a relative 1e-5."""
        ours, theirs = self.losses(name), self.losses(undisturbed)
        for stage, lines in theirs.items():
            assert [step for step, *_ in ours[stage]] == [step for step, *_ in lines], stage
            assert [loss for _, loss, _ in ours[stage]] == pytest.approx([loss for _, loss, _ in lines], rel=1e-5), (
                stage
            )
        for stage, path in self.results(undisturbed).items():
            weights, expected = (load_file(p / "model.safetensors") for p in (self.results(name)[stage], path))
            # All as one vector: of a gradient that is rounding alone, AdamW makes a whole step in a single weight.
            distance = sum(float((weights[key] - expected[key]).square().sum()) for key in expected)
            length = sum(float(tensor.square().sum()) for tensor in expected.values())
            assert distance**0.5 < 1e-5 * length**0.5, stage


def _optimizer(checkpoint: Path) -> dict[str, bytes]:
    """All tensors of all learners, but for the state of torch's global generator, which nothing draws from."""
    tensors: dict[str, bytes] = {}
    for shard in (checkpoint / "trainer_state").glob("*.safetensors"):
        tensors |= {k: v.numpy().tobytes() for k, v in load_file(shard).items() if k != "torch_rng"}
    return tensors


class Learners:
    """Learners in processes of their own without Ray, which live through many trainings: see learner.py."""

    def __init__(self, runs: Runs, world: int, folder: Path):
        self.runs, self.folder = runs, folder
        self.processes = [
            subprocess.Popen(
                [sys.executable, str(HERE / "learner.py"), str(rank), str(world), str(folder)],
                env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=(folder / f"stderr-{rank}.txt").open("w"),
                text=True,
            )
            for rank in range(world)
        ]

    def begin(self, name: str, *overrides: str, trap: str | None = None, full: int | None = None) -> None:
        """``trap``: see traps.py. ``full``: files of the last learner can grow to so many bytes."""
        if trap:
            (self.folder / "trap").write_text(trap)
        for process in self.processes:
            size = full if process is self.processes[-1] else None
            order = {"config": str(self.runs.config), "overrides": [f"name={name}", *overrides], "file_size": size}
            assert process.stdin
            process.stdin.write(json.dumps(order) + "\n")
            process.stdin.flush()

    def end(self) -> list[dict[str, Any]]:
        return [json.loads(process.stdout.readline()) for process in self.processes]  # type: ignore[union-attr]

    def train(self, name: str, *overrides: str, **options: Any) -> list[dict[str, Any]]:
        """Each learner's answer."""
        self.begin(name, *overrides, **options)
        return self.end()

    def finish(self, name: str, *overrides: str) -> list[str]:
        """Trains to the end. Returns what the first learner said."""
        answers = self.train(name, *overrides)
        assert [answer["error"] for answer in answers] == [None] * len(answers)
        return answers[0]["said"]

    def close(self) -> None:
        for process in self.processes:
            process.send_signal(signal.SIGKILL)
            process.communicate()


@pytest.fixture(scope="session")
def city(tmp_path_factory) -> Path:
    """A store of a generated city: 3 × 3 cells, eight days of hourly frames."""
    from data_prep import READERS, prepare

    path = tmp_path_factory.mktemp("city") / "city.zarr"
    prepare(READERS["synthetic"].plan([], height=3, width=3, days=8, cadence=60, seed=1), path)
    return path


@pytest.fixture(scope="session")
def runs(tmp_path_factory, city) -> Runs:
    return Runs(tmp_path_factory.mktemp("learners"), CONFIG, city)


@pytest.fixture(scope="session")
def alone(runs) -> Callable[..., None]:
    """Trains in this process, with plain torch; a Ctrl-C comes where step ``interrupt_in``, counted over all
    stages, is logged, so that step is the last."""
    from stdist.runs import recipes
    from stdist.runs.recipes import load_config

    def train(name: str, *overrides: str, interrupt_in: int | None = None) -> None:
        steps = itertools.count(1)

        def report(scalars: dict[str, float]) -> None:
            if next(steps) == interrupt_in:
                os.kill(os.getpid(), signal.SIGINT)

        with pytest.raises(Interrupted) if interrupt_in else nullcontext():
            recipes.train(load_config(runs.config, [f"name={name}", *overrides]), lambda line: None, report)

    return train


@pytest.fixture(scope="session")
def begin_learners(tmp_path_factory) -> Iterator[Callable[[dict[str, Any], Path, int], Learners]]:
    """Starts so many learners of a configuration and its store; their runs are ``learners.runs``."""
    started: list[Learners] = []

    def begin(tree: dict[str, Any], store: Path, world: int) -> Learners:
        runs = Runs(tmp_path_factory.mktemp("learners"), tree, store)
        started.append(Learners(runs, world, tmp_path_factory.mktemp("processes")))
        return started[-1]

    yield begin
    for learners in started:
        learners.close()


@pytest.fixture(scope="session")
def two(runs, tmp_path_factory) -> Iterator[Learners]:
    """Two learners."""
    learners = Learners(runs, 2, tmp_path_factory.mktemp("two"))
    yield learners
    learners.close()


@pytest.fixture(scope="session")
def undisturbed(two) -> str:
    """The run that others are compared with: two learners without Ray."""
    two.finish("undisturbed", "learners.engine=deepspeed", "learners.num_workers=2", "learners.zero_stage=2")
    return "undisturbed"
