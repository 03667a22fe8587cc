"""Rollouts by workers, without processes: versions verify themselves, staleness is bounded, training is as alone."""

import pickle
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from stdist.data import GridStore
from stdist.runs.workers import Result, Unit, Version, VersionError, WorkKey
from stdist.training.engine import TorchEngine, cosine_schedule
from stdist.training.process_group import ProcessGroup
from stdist.vision_llm.config import GRPOConfig
from stdist.vision_llm.learning import parameter_groups
from stdist.vision_llm.policy.adapters import begin_grpo
from stdist.vision_llm.policy.city_windows import CityWindows
from stdist.vision_llm.policy.model import PolicyModel
from stdist.vision_llm.rollout.pool import PoolRollouts, RolloutProgram
from stdist.vision_llm.rollout.versions import pack, probe, sent_bytes, unpack
from stdist.vision_llm.stages.grpo import GRPOStage

MakePolicy = Callable[..., PolicyModel]


def learner_of(make_policy: MakePolicy, seed: int = 0) -> PolicyModel:
    policy = make_policy(seed).eval()
    begin_grpo(policy)
    return policy


def disturb(policy: PolicyModel, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter += 0.02 * torch.randn(parameter.shape, generator=generator)


def changed(version: Version, name: str | None = None) -> Version:
    """With one bit of one tensor flipped on its way."""
    tensors = {key: tensor.copy() for key, tensor in version.tensors.items()}
    tensors[name or min(tensors)][5] ^= 1
    return replace(version, tensors=tensors)


def test_a_version_brings_every_bit_and_is_named_by_its_content(make_policy: MakePolicy) -> None:
    learner, worker = learner_of(make_policy), learner_of(make_policy)
    before = pack(learner, 3)
    disturb(learner)
    version = pack(learner, 4)
    assert version.step == 4 and version.name != before.name == pack(worker, 9).name
    trained = {name: p for name, p in learner.named_parameters() if p.requires_grad}
    indices = 8 * len(learner.rows.input)
    assert version.nbytes == sum(p.nbytes for p in trained.values()) + indices, "what changes, and nothing else"
    assert sum(sent_bytes(learner).values()) == version.nbytes - learner.rows.input.nbytes - indices
    unpack(worker, version)
    theirs = dict(worker.named_parameters())
    assert all(torch.equal(p, theirs[name]) for name, p in trained.items())
    assert np.array_equal(probe(worker), probe(learner)) and pack(worker, 4).name == version.name


def test_of_the_embedding_go_the_rows_that_changed_and_the_others_are_the_references(make_policy: MakePolicy) -> None:
    """Rows 2 and 9, then one element of 9 and 5 each: the worker's row 2 is again as the stage began with it."""
    learner, worker = learner_of(make_policy), learner_of(make_policy)
    rows, start = learner.rows.input.data, learner.rows.input.detach().clone()
    for step, changed in enumerate(([2, 9], [5, 9])):
        rows.copy_(start)
        rows[changed, : 1 if step else None] += step + 0.25
        version = pack(learner, step)
        assert version.tensors["rows.input.changed"].view(np.int64).tolist() == changed
        assert version.tensors["rows.input"].size == rows[changed].nbytes
        unpack(worker, version)
        assert torch.equal(worker.rows.input, rows)


def test_rows_travel_in_the_dtype_that_computes(make_policy: MakePolicy) -> None:
    """In half the bytes, and the worker computes what the learner does to the last bit."""
    learner, worker = (make_policy(dtype="bfloat16").eval() for _ in range(2))
    for policy in (learner, worker):
        begin_grpo(policy)
    disturb(learner)
    version = pack(learner, 1)
    assert learner.rows.output.dtype == torch.float32
    assert version.tensors["rows.output"].size == 2 * learner.rows.output.numel()
    unpack(worker, version)
    assert not torch.equal(worker.rows.output, learner.rows.output)
    assert torch.equal(worker.rows.output, learner.rows.output.bfloat16().float())
    assert np.array_equal(probe(worker), probe(learner))


def test_two_swapped_elements_are_another_content(make_policy: MakePolicy) -> None:
    policy = learner_of(make_policy)
    disturb(policy)
    name = pack(policy, 0).name
    row = policy.rows.output.data
    row[3, 0], row[3, 1] = row[3, 1].clone(), row[3, 0].clone()
    assert pack(policy, 0).name != name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_that_are_not_what_was_sent_are_refused(make_policy: MakePolicy, dtype: str) -> None:
    """A flipped bit, a tensor too few, another model's names, and frozen weights that are not the learner's."""
    learner = make_policy(dtype=dtype).eval()
    begin_grpo(learner)
    disturb(learner)
    worker = make_policy(dtype=dtype).eval()
    begin_grpo(worker)
    version = pack(learner, 1)
    with pytest.raises(VersionError, match=r"arrived with another content in rows\.output"):
        unpack(worker, changed(version, "rows.output"))
    fewer = {name: tensor for name, tensor in version.tensors.items() if name != "rows.input"}
    with pytest.raises(VersionError, match="arrived with another content"):
        unpack(worker, replace(version, tensors=fewer))
    with pytest.raises(VersionError, match=r"not of what trains here: without \S+lora"):
        plain = make_policy(dtype=dtype).requires_grad_(False)
        plain.rows.requires_grad_(True)
        plain.reference_rows = plain.rows
        plain.backbone.model.language_model.norm.weight.requires_grad_(True)
        unpack(worker, pack(plain, 1))
    unpack(worker, version)
    layer = worker.base_model.model.language_model.layers[0].mlp.down_proj
    getattr(layer, "base_layer", layer).weight.data.mul_(-3.0)
    with pytest.raises(VersionError, match=r"log-probabilities are up to \S+ from the learner's: its frozen weights"):
        unpack(worker, version)


class Pool:
    """See :class:`~stdist.runs.workers.WorkPool`: one program in this process, that runs as late as it may."""

    def __init__(self, program: RolloutProgram):
        self.program, self.loaded = program, ""
        self.versions: dict[str, Version] = {}
        self.units: dict[WorkKey, Unit] = {}
        self.learnt: list[int] = []
        self.submitted: list[tuple[int, int]] = []
        self.history: dict[str, int] = {}
        self.closed = False

    def resume(self, step: int, stage: str, every: int) -> dict[str, int]:
        assert stage == "grpo"
        return self.history

    def publish(self, version: Version) -> None:
        self.versions[version.name] = version

    def submit(self, units: list[Unit], oldest_step: int) -> None:
        for unit in units:
            self.units[unit.key] = unit
            self.submitted.append((unit.key.step, self.versions[unit.version].step))

    def collect(self, keys: list[WorkKey]) -> list[Result]:
        results = []
        for key in keys:
            unit = self.units[key]
            if self.loaded != unit.version:
                self.program.load(self.versions[unit.version])
                self.loaded = unit.version
            answer, seconds = self.program.run(unit.payload)
            results.append(Result(key, unit.version, answer, "worker-1", seconds))
        return results

    def trained(self, keys: list[WorkKey]) -> None:
        self.learnt += [key.step for key in keys]

    def status(self) -> dict:
        return {"states": {"ready": 1}, "utilisation": 0.5, "bytes_sent": 0, "load_seconds": 0.1, "lost_leases": {}}

    def close(self) -> None:
        self.closed = True


def train(
    policy: PolicyModel, store: GridStore, config: GRPOConfig, rollouts: PoolRollouts | None, first: int = 0
) -> list[dict[str, float]]:
    """Every step's scalars; the loop's part is played here."""
    cities = [CityWindows(policy, store.windows(name, 4, 3, channel="internet")) for name in ("train", "validation")]
    cell_mean = np.linspace(10.0, 190.0, 20)
    stage = GRPOStage(policy, *cities, cell_mean, config, seed=5, decoding="median", rollouts=rollouts)
    engine = TorchEngine(parameter_groups(policy, config), cosine_schedule(0, config.max_steps), 1.0)
    scalars = []
    stage.on_weights_changed(first)
    for step in range(first, config.max_steps):
        scalars.append(stage.step(step, engine.backward))
        engine.step()
        stage.on_weights_changed(step + 1)
    stage.close()
    return scalars


def config_of(**changes: object) -> GRPOConfig:
    settings = {"windows_per_step": 2, "cells_per_window": 2, "num_generations": 4, "max_steps": 6}
    return GRPOConfig(**settings | {"learning_rate": 3e-3, "save_steps": 6, "eval_steps": 6} | changes)


def pool_of(make_policy: MakePolicy, config: GRPOConfig) -> Pool:
    return Pool(RolloutProgram(learner_of(make_policy), config, seed=5))


def rollouts_of(policy: PolicyModel, config: GRPOConfig, pool: Pool, staleness: int) -> PoolRollouts:
    return PoolRollouts(policy, config, staleness, pool, ProcessGroup())


def test_on_policy_a_pool_trains_what_the_learner_trains_alone(make_policy: MakePolicy, store: GridStore) -> None:
    """Window by window in another process, of which only keys, weights and records come across."""
    config = config_of()
    alone, together = learner_of(make_policy), learner_of(make_policy)
    expected = train(alone, store, config, None)
    pool = pool_of(make_policy, config)
    scalars = train(together, store, config, rollouts_of(together, config, pool, 0))
    for ours, theirs in zip(scalars, expected, strict=True):
        for name in ("loss", "reward", "reward_std", "kl"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-5), name
        assert ours["staleness"] == 0 and ours["mismatch_kl"] == pytest.approx(0, abs=1e-4)
        assert ours["effective_samples"] == pytest.approx(1, abs=1e-3)
    assert torch.allclose(together.rows.output, alone.rows.output, atol=1e-4)
    assert pool.submitted == [(step, step) for step in range(6) for _ in range(2)]
    assert pool.learnt == [step for step in range(6) for _ in range(2)] and pool.closed


def test_staleness_is_bounded_at_admission(make_policy: MakePolicy, store: GridStore) -> None:
    """Two steps ahead, and never past the last one; each step is written by the weights of two steps before."""
    config, policy = config_of(), learner_of(make_policy)
    pool = pool_of(make_policy, config)
    scalars = train(policy, store, config, rollouts_of(policy, config, pool, 2))
    assert pool.submitted == [(step, max(0, step - 2)) for step in range(6) for _ in range(2)]
    assert [s["staleness/worst"] for s in scalars] == [0, 1, 2, 2, 2, 2]
    assert scalars[-1]["effective_samples"] < 1 and scalars[-1]["mismatch_kl"] > 1e-3
    assert pool.learnt == [step for step in range(6) for _ in range(2)]


def test_several_updates_a_rollout_publish_once_a_rollout(make_policy: MakePolicy, store: GridStore) -> None:
    config, policy = config_of(num_iterations=3, max_steps=9, save_steps=9, eval_steps=9), learner_of(make_policy)
    pool = pool_of(make_policy, config)
    scalars = train(policy, store, config, rollouts_of(policy, config, pool, 1))
    assert sorted(version.step for version in pool.versions.values()) == [0, 3, 6, 9]
    assert pool.submitted == [(0, 0), (0, 0), (3, 0), (3, 0), (6, 3), (6, 3)]
    assert [s["staleness/worst"] for s in scalars] == [0, 0, 0, 1, 1, 1, 1, 1, 1]
    assert pool.learnt == [0, 0, 3, 3, 6, 6]


def test_staleness_is_bounded_again_when_a_batch_is_handed_over(make_policy: MakePolicy, store: GridStore) -> None:
    """Answers of weights that the learner does not know, or that are too old for the step, are refused."""
    config, policy = config_of(), learner_of(make_policy)
    for known, reason in (({}, "some of weights"), ({"old": 1}, "some of weights old")):
        pool = pool_of(make_policy, config)
        pool.history = known
        collect = pool.collect
        pool.collect = lambda keys, collect=collect: [replace(r, version="old") for r in collect(keys)]
        with pytest.raises(RuntimeError, match=f"step 3 needs candidates of window .*; there are {reason}"):
            train(policy, store, config, rollouts_of(policy, config, pool, 1), first=3)


def test_answers_that_were_finished_before_a_resume_serve_it(make_policy: MakePolicy, store: GridStore) -> None:
    """The pool tells the learner that comes back which weights wrote them."""
    config, policy = config_of(), learner_of(make_policy)
    pool = pool_of(make_policy, config)
    pool.history = {"old": 2}
    collect = pool.collect
    pool.collect = lambda keys: [replace(r, version="old") if r.key.step == 3 else r for r in collect(keys)]
    scalars = train(policy, store, config, rollouts_of(policy, config, pool, 1), first=3)
    assert [s["staleness/worst"] for s in scalars] == [1, 1, 1]


def test_no_truth_is_sent_to_who_forecasts(make_policy: MakePolicy, store: GridStore) -> None:
    config, policy = config_of(max_steps=1, save_steps=1, eval_steps=1), learner_of(make_policy)
    pool = pool_of(make_policy, config)
    train(policy, store, config, rollouts_of(policy, config, pool, 0))
    for unit in pool.units.values():
        step, batch = pickle.loads(unit.payload)
        assert step == 0 and batch.truth.size == batch.observed.size == batch.answers.numel() == 0
        assert len(batch.origins) == len(batch.shared) == 1 and len(batch.prompts) == len(batch.cells) == 2
        assert len(unit.payload) < 20_000, "a window, not the batch it was cut from"
