"""Rollouts by workers: a learner's side of the seam, and the program in a worker's process."""

import pickle
import time
from collections import defaultdict
from dataclasses import replace

import numpy as np
import torch

from stdist.runs.workers import Unit, Version, WorkerProgram, WorkKey, WorkPool
from stdist.training.process_group import ProcessGroup
from stdist.vision_llm.config import GRPOConfig
from stdist.vision_llm.policy.city_windows import PolicyBatch
from stdist.vision_llm.policy.model import PolicyModel
from stdist.vision_llm.rollout.rollouts import Candidates, LocalRollouts, Weights
from stdist.vision_llm.rollout.versions import pack, unpack


class PoolRollouts:
    """See :class:`~stdist.vision_llm.rollout.rollouts.Rollouts`: a pool's workers sample, window by window.

    All learners have one; the main one publishes the weights. A window is one unit, whatever the number of workers: who
    samples it can change no number.
    """

    def __init__(
        self, policy: PolicyModel, config: GRPOConfig, max_staleness: int, pool: WorkPool, group: ProcessGroup
    ):
        self.policy, self.config, self.max_staleness = policy, config, max_staleness
        self.pool, self.group = pool, group
        self.versions: dict[str, int] = {}
        self.metrics: dict[str, float] = {}
        self._newest = ""
        self._keys: dict[int, list[WorkKey]] = {}
        self._learning: list[WorkKey] = []
        self._begun = False
        self._sync_seconds = 0.0

    def update_weights(self, step: int, weights: Weights) -> None:
        began = time.perf_counter()
        if not self._begun:
            known = self.pool.resume(step, "grpo", self.config.num_iterations) if self.group.is_main else {}
            self.versions, self._begun = self.group.broadcast_object(known), True
        self._note_learnt()
        name = ""
        if self.group.is_main:
            version = pack(self.policy, step)
            self.pool.publish(version)
            name = version.name
        self._newest = self.group.broadcast_object(name)
        oldest = step - self.config.num_iterations * self.max_staleness
        self.versions = {n: at for n, at in self.versions.items() if at >= oldest} | {self._newest: step}
        self._sync_seconds = time.perf_counter() - began

    def request(self, step: int, batch: PolicyBatch) -> None:
        cells, units = tuple(batch.cells.tolist()), []
        for i, window in enumerate(batch.origins.tolist()):
            request = pickle.dumps((step, _one_window(batch, i)))
            units.append(Unit(WorkKey(step, window, cells), request, self._newest))
        self._keys[step] = [unit.key for unit in units]
        self.pool.submit(units, step - self.config.num_iterations * self.max_staleness)

    def generate(self, step: int, batch: PolicyBatch) -> list[Candidates]:
        began = time.perf_counter()
        keys = self._keys.pop(step)
        results = self.pool.collect(keys)
        self._learning = keys
        candidates: list[Candidates] = []
        seconds: dict[str, float] = defaultdict(float)
        for result in results:
            candidates += [replace(record, weights=result.version) for record in pickle.loads(result.answer)]
            for phase, spent in result.seconds.items():
                seconds[f"worker_seconds/{phase}"] += spent
        stale = [(step - self.versions.get(result.version, step)) / self.config.num_iterations for result in results]
        self.metrics = {
            "seconds/wait": time.perf_counter() - began,
            "seconds/sync": self._sync_seconds,
            "staleness": float(np.mean(stale)),
            "staleness/worst": float(max(stale)),
            **seconds,
            **self._pool_metrics(),
        }
        return candidates

    def close(self) -> None:
        self._note_learnt()
        self.group.all_gather_object(None)  # whoever closes voids what was not noted as learnt
        if self.group.is_main:
            self.pool.close()

    def _note_learnt(self) -> None:
        if self._learning:
            self.pool.trained(self._learning)
        self._learning = []

    def _pool_metrics(self) -> dict[str, float]:
        status = self.pool.status()
        return {
            "workers/ready": float(status["states"]["ready"]),
            "workers/utilisation": float(status["utilisation"]),
            "workers/bytes_sent": float(status["bytes_sent"]),
            "workers/load_seconds": float(status["load_seconds"]),
            "workers/lost_leases": float(sum(status["lost_leases"].values())),
        }


class RolloutProgram(WorkerProgram):
    """A policy that samples what it is asked, with the weights that it was brought.

    Args:
        policy: as the learner's at the stage's start, its adapter in place.
    """

    def __init__(self, policy: PolicyModel, config: GRPOConfig, seed: int):
        self.policy = policy
        self._rollouts = LocalRollouts(policy, config, seed)

    def load(self, version: Version) -> None:
        unpack(self.policy, version)

    def run(self, payload: bytes) -> tuple[bytes, dict[str, float]]:
        step, batch = pickle.loads(payload)
        device = self.policy.device
        batch = replace(batch, shared=batch.shared.to(device), prompts=batch.prompts.to(device))
        records = self._rollouts.sample(step, batch, "")
        return pickle.dumps(records), self._rollouts.seconds


def _one_window(batch: PolicyBatch, i: int) -> PolicyBatch:
    """What a worker needs of one window, on the CPU: no truth goes to who forecasts."""
    cells = len(batch.cells)
    nothing = np.zeros((1, cells, 0))
    return PolicyBatch(
        batch.shared[i : i + 1].cpu().clone(),  # a view would take its whole batch along
        batch.grids[i : i + 1].cpu().clone(),
        batch.prompts[i * cells : (i + 1) * cells].cpu().clone(),
        torch.zeros(cells, 0, dtype=torch.long),
        nothing,
        nothing,
        batch.cells,
        batch.origins[i : i + 1],
    )
