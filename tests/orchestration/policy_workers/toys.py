"""A pool of real processes around a toy program, and a toy training on it whose weights show whatever went wrong."""

import hashlib
import json
import os
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from stdist.config.base import WorkersConfig
from stdist.runs.workers import Result, Unit, Version, VersionError, WorkerProgram, WorkKey

PATIENCE = 300
"""Seconds something may take on a crowded machine."""


class ToyProgram(WorkerProgram):
    """Answers with a hash of its weights and the payload. In ``folder`` a file named as a phase (``start``, ``load``,
    ``run``) is a trap for the first worker that comes there: it leaves its pid in ``trapped`` and waits for the
    file ``release``; ``fail-PHASE`` holds an error's name that is raised there."""

    def __init__(self, folder: Path):
        self.folder, self.weights = folder, b""
        self._pass("start")

    def load(self, version: Version) -> None:
        self._pass("load")
        weights = version.tensors["w"].tobytes()
        if hashlib.sha256(weights).hexdigest() != version.name:
            raise VersionError(f"weights {version.name[:12]} arrived with another content in w")
        self.weights = weights

    def run(self, payload: bytes) -> tuple[bytes, dict[str, float]]:
        self._pass("run")
        time.sleep(0.005)
        return hashlib.sha256(self.weights + payload).digest(), {"sample": 0.005}

    def _pass(self, phase: str) -> None:
        failing = self.folder / f"fail-{phase}"
        if failing.exists():
            name = failing.read_text()
            if name == "SIGKILL":
                os.kill(os.getpid(), signal.SIGKILL)
            raise {"MemoryError": MemoryError, "ValueError": ValueError}[name]("as it was told")
        try:
            (self.folder / phase).rename(self.folder / f"taken-{os.getpid()}")
        except FileNotFoundError:
            return
        (self.folder / "trapped.part").write_text(str(os.getpid()))
        (self.folder / "trapped.part").rename(self.folder / "trapped")
        while not (self.folder / "release").exists():
            time.sleep(0.01)


def version_of(weights: np.ndarray, step: int) -> Version:
    return Version(step, hashlib.sha256(weights.tobytes()).hexdigest(), b"", {"w": weights.view(np.uint8).copy()})


class ToyTraining:
    """Learns from hashes: any answer of other weights, lost or counted twice changes all that follows."""

    def __init__(self, folder: Path, pool: Any, steps: int = 12, windows: int = 4, staleness: int = 0):
        self.folder, self.pool, self.steps, self.windows, self.staleness = folder, pool, steps, windows, staleness
        self.checkpoint = folder / "checkpoint.json"

    def run(self, on_step: Callable[[int], None] = lambda step: None) -> list[int]:
        """From its checkpoint, which every third step leaves. Returns the last weights."""
        state = json.loads(self.checkpoint.read_text()) if self.checkpoint.exists() else {"step": 0, "w": [0] * 64}
        weights, step = np.array(state["w"], np.int64), state["step"]
        versions = self.pool.resume(step, "toy", 1)
        versions[self._publish(weights, step)] = step
        requested = step
        while step < self.steps:
            on_step(step)
            while requested <= min(step + self.staleness, self.steps - 1):
                self.pool.submit(self._units(requested, self._newest), requested - self.staleness)
                requested += 1
            keys = [unit.key for unit in self._units(step, "")]
            results = self.pool.collect(keys)
            assert all(step - self.staleness <= versions[result.version] <= step for result in results)
            weights = weights + sum(np.frombuffer(result.answer, np.uint8).astype(np.int64).sum() for result in results)
            weights = weights * np.arange(1, 65) % 1_000_003
            step += 1
            self.pool.trained(keys)
            versions[self._publish(weights, step)] = step
            if step % 3 == 0:
                part = self.checkpoint.with_suffix(".part")
                part.write_text(json.dumps({"step": step, "w": weights.tolist()}))
                part.rename(self.checkpoint)
        self.pool.close()
        return weights.tolist()

    def _publish(self, weights: np.ndarray, step: int) -> str:
        self.pool.publish(version := version_of(weights, step))
        self._newest = version.name
        return version.name

    def _units(self, step: int, version: str) -> list[Unit]:
        keys = [WorkKey(step, 10 * step + window, (1, 2, 3)) for window in range(self.windows)]
        return [Unit(key, f"{key.step}/{key.window}".encode(), version) for key in keys]


class InProcess:
    """The same training without a pool: what the undisturbed weights are."""

    def __init__(self) -> None:
        self.answers: dict[WorkKey, Result] = {}
        self.weights: dict[str, bytes] = {}

    def resume(self, step: int, stage: str, every: int) -> dict[str, int]:
        return {}

    def publish(self, version: Version) -> None:
        self.weights[version.name] = version.tensors["w"].tobytes()

    def submit(self, units: list[Unit], oldest_step: int) -> None:
        for unit in units:
            answer = hashlib.sha256(self.weights[unit.version] + unit.payload).digest()
            self.answers[unit.key] = Result(unit.key, unit.version, answer, "", {})

    def collect(self, keys: list[WorkKey]) -> list[Result]:
        return [self.answers[key] for key in keys]

    def trained(self, keys: list[WorkKey]) -> None:
        pass

    def close(self) -> None:
        pass


class ToyPool:
    """A coordinator with workers on the running cluster; ``remote`` is what a learner holds."""

    def __init__(
        self,
        folder: Path,
        workers: int,
        lease_timeout: float = 60.0,
        timeout: float = 120.0,
        resources: dict[str, float] | None = None,
    ):
        from stdist.orchestration.policy_workers.coordinator import Coordinator, RemotePool  # where Ray is installed

        self.folder, self.ledger = folder, folder / "ledger.jsonl"
        settings = WorkersConfig(num_workers=workers, lease_timeout=lease_timeout, timeout=timeout)
        program = partial(ToyProgram, folder)
        self.actor = Coordinator.remote(program, settings, resources or {"CPU": 0.1}, self.ledger)
        self.remote = RemotePool(self.actor, timeout)

    def trap(self, phase: str) -> None:
        for name in ("trapped", "release"):
            (self.folder / name).unlink(missing_ok=True)
        (self.folder / phase).touch()

    def trapped(self) -> int:
        """The pid of the worker in the trap, once it is there."""
        self.wait_for(lambda: (self.folder / "trapped").exists())
        return int((self.folder / "trapped").read_text())

    def release(self) -> None:
        (self.folder / "release").touch()

    def states(self) -> dict[int, str]:
        """The state of every worker that has told its pid."""
        workers = self.remote.status()["workers"].values()
        return {pid_of(text): text.split()[0] for text in workers if "pid" in text}

    def wait_for(self, condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < deadline, self.remote.status()
            time.sleep(0.02)


def pid_of(worker: str) -> int:
    return int(worker.partition("(pid ")[2].rstrip(")"))


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
