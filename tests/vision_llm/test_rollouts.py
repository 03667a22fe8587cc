"""The seam between learners and samplers, and what a step learns from: draws, digests, records, batches."""

import pickle
import random
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from stdist.data import GridStore, Region
from stdist.data.sampler import WindowSampler, uniform
from stdist.training.process_group import ProcessGroup
from stdist.vision_llm.config import GRPOConfig, SFTConfig
from stdist.vision_llm.policy.adapters import begin_grpo
from stdist.vision_llm.policy.city_windows import CityWindows, PolicyBatch
from stdist.vision_llm.policy.model import PolicyModel
from stdist.vision_llm.rollout.rollouts import LocalRollouts, Weights, completions_of, uniforms
from stdist.vision_llm.stages.batches import StepBatches

MakePolicy = Callable[..., PolicyModel]
MakeBatch = Callable[..., PolicyBatch]
CONFIG = GRPOConfig(num_generations=3)


def rollouts_of(policy: PolicyModel, seed: int = 4) -> LocalRollouts:
    rollouts = LocalRollouts(policy, CONFIG, seed)
    rollouts.update_weights(0, Weights.of(policy))
    return rollouts


@pytest.fixture(scope="module")
def ending(make_policy: MakePolicy, make_batch: MakeBatch, lean_towards_end: Callable[..., None]) -> PolicyModel:
    """A policy that ends its candidates sooner or later."""
    policy = make_policy().eval()
    lean_towards_end(policy, make_batch(policy), 6.0)
    return policy


def test_draws_belong_to_step_window_cell_and_candidate_alone(ending: PolicyModel, make_batch: MakeBatch) -> None:
    """Whoever samples any part of a step writes the same candidates; another step or seed others."""
    together = {(c.window, c.cell): c for c in rollouts_of(ending).generate(7, make_batch(ending))}
    assert len(together) == 6 and len({c.lengths.tobytes() for c in together.values()}) > 1
    part = make_batch(ending, windows=(31,), cells=(18, 1))
    for candidates in rollouts_of(ending).generate(7, part):
        same = together[candidates.window, candidates.cell]
        width = min(candidates.answer_ids.shape[1], same.answer_ids.shape[1])
        assert np.array_equal(candidates.answer_ids[:, :width], same.answer_ids[:, :width])
        assert np.array_equal(candidates.lengths, same.lengths)
        assert np.allclose(candidates.log_probs[:, :width], same.log_probs[:, :width], atol=1e-5)
        assert len({row.tobytes() for row in same.answer_ids}) == 3
    for others in (rollouts_of(ending).generate(8, part), rollouts_of(ending, seed=5).generate(7, part)):
        assert not any(
            np.array_equal(c.answer_ids[:, :1], together[c.window, c.cell].answer_ids[:, :1]) for c in others
        )


def test_uniform_numbers_are_quantiles_and_stay_what_they_are() -> None:
    """A float64 below 1 may round to 1 in float32; and no version of numpy may change a draw."""
    drawn = uniforms([(4, 7, 31, 18, 0), (4, 7, 31, 18, 1)], 100_000)
    assert drawn.dtype == torch.float32 and drawn.min() >= 0 and drawn.max() < 1
    assert torch.equal(drawn * 2**24, (drawn * 2**24).round()) and abs(drawn.mean() - 0.5) < 0.005
    assert drawn[0, :3].tolist() == pytest.approx([0.4739454985, 0.3779957891, 0.1766599417], abs=1e-7)


def test_the_digest_is_of_every_name_dtype_shape_and_value() -> None:
    tensors = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(2)}
    digest = Weights(tensors).digest
    assert Weights({name: x.clone() for name, x in reversed(tensors.items())}).digest == digest
    others = [
        {"a": tensors["a"], "c": tensors["b"]},
        {"a": tensors["a"], "b": tensors["b"].double()},
        {"a": tensors["a"].view(3, 2), "b": tensors["b"]},
        {"a": tensors["a"] + torch.tensor([0, 0, 1e-6]), "b": tensors["b"]},
        {"a": tensors["a"]},
    ]
    assert digest not in (digests := {Weights(other).digest for other in others}) and len(digests) == 5


def test_another_worker_given_the_weights_writes_the_same(make_policy: MakePolicy, make_batch: MakeBatch) -> None:
    """Adapter and numerals' rows are what changed: with them a fresh policy of the same base is the learner's."""
    learner, worker = make_policy(), make_policy()
    for policy in (learner, worker):
        begin_grpo(policy)
    with torch.no_grad():
        for parameter in learner.parameters():
            if parameter.requires_grad:
                parameter += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    weights = Weights.of(learner)
    assert {name.split(".")[0] for name in weights.tensors} == {"rows", "backbone"}
    sent = pickle.loads(pickle.dumps({name: x.cpu() for name, x in weights.tensors.items()}))
    assert Weights.of(worker).digest != weights.digest
    worker.load_state_dict(sent, strict=False)
    batch = make_batch(learner, windows=(0,), cells=(1, 10))
    ours, theirs = (rollouts_of(policy).generate(2, batch) for policy in (learner, worker))
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.weights == other.weights == weights.digest
        assert np.array_equal(mine.answer_ids, other.answer_ids) and np.array_equal(mine.log_probs, other.log_probs)


def test_records_come_back_as_the_samplers_completions(ending: PolicyModel, make_batch: MakeBatch) -> None:
    """In the batch's order whatever theirs is, pickled or not; what is behind the end is no part of them."""
    batch, rollouts = make_batch(ending), rollouts_of(ending)
    records = rollouts.generate(7, batch)
    assert [(r.window, r.cell) for r in records] == [(w, c) for w in batch.origins for c in batch.cells]
    records = pickle.loads(pickle.dumps(records))
    for record in records:
        assert record.answer_ids.shape[0] == record.log_probs.shape[0] == len(record.lengths) == 3
    shuffled = random.Random(0).sample(records, len(records))
    made = completions_of(shuffled, 7, batch, {records[0].weights}, ending)
    end = len(ending.vocabulary)
    assert torch.equal(made.answer_ids, torch.from_numpy(np.concatenate([r.answer_ids for r in records])))
    for row, length in enumerate(made.lengths.tolist()):
        written = made.answer_ids[row][made.mask[row]]
        assert (written[:length] < end).all() and len(written) == min(length + 1, made.mask.shape[1])
        assert made.values[row, :length].tolist() == pytest.approx(
            ending.vocabulary.decode(written[:length].numpy()).tolist(), rel=1e-6
        )
        assert (made.values[row, length:] == 0).all() and (made.log_probs[row][~made.mask[row]] == 0).all()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda records: records[1:], "there are none"),
        (lambda records: [replace(records[0], step=6), *records[1:]], "there are none"),
        (
            lambda records: [replace(records[0], weights="f" * 64), *records[1:]],
            "there are some of weights ffffffffffff",
        ),
    ],
)
def test_records_of_other_work_are_refused(
    ending: PolicyModel, make_batch: MakeBatch, change: Callable[..., list], reason: str
) -> None:
    batch = make_batch(ending, windows=(0,), cells=(1,))
    records = rollouts_of(ending).generate(7, batch)
    with pytest.raises(RuntimeError, match=reason):
        completions_of(change(records), 7, batch, {records[0].weights}, ending)


def test_a_steps_batch_belongs_to_seed_stage_and_step(policy: PolicyModel, store: GridStore) -> None:
    """Windows are shared out among learners, cells and blanks are not; and no version of numpy may change a draw."""
    windows = store.windows("train", 4, 3, channel="internet", region=Region(0, 5, 1, 3))
    config = SFTConfig(windows_per_step=4, cells_per_window=3)

    def batches(stage: str, seed: int = 6, rank: int = 0, size: int = 1) -> StepBatches:
        return StepBatches(CityWindows(policy, windows), config, stage, seed, ProcessGroup(rank, size))

    of_sft = batches("sft")
    batch, blanks = of_sft(2), of_sft.blanks(2, of_sft(2), 0.5).reshape(4, 3)
    assert len(set(batch.origins.tolist())) == 4 and batch.cells.tolist() == [0, 5, 9]
    assert np.array_equal(blanks, [uniform(3, 6, 0, 2, 1, window) < 0.5 for window in batch.origins.tolist()])
    assert batch.truth.shape == (4, 3, 3) and len(batch.prompts) == 12
    for rank in range(2):
        mine = batches("sft", rank=rank, size=2)
        part = mine(2)
        assert part.origins.tolist() == batch.origins[rank::2].tolist() and part.cells.tolist() == [0, 5, 9]
        assert np.array_equal(mine.blanks(2, part, 0.5).reshape(2, 3), blanks[rank::2])
        assert torch.equal(part.prompts, batch.prompts.view(4, 3, -1)[rank::2].flatten(0, 1))
    draws = [of_sft.cells(step).tolist() for step in range(20)]
    assert all(cells == sorted(set(cells)) for cells in draws) and {c for cells in draws for c in cells} == set(
        range(10)
    )
    others = [batches("grpo"), batches("sft", seed=7)]
    assert all([other.cells(step).tolist() for step in range(20)] != draws for other in others)


def test_a_steps_windows_are_those_that_the_seeds_order_deals_it(policy: PolicyModel, store: GridStore) -> None:
    """Four windows a step of an epoch's 90, in that order; what is left of it, 2, is left out; and a batch is described
    by the windows that are read for it."""
    city = CityWindows(policy, store.windows("train", 4, 3, channel="internet"))
    assert len(city) == 22 * 4 + 2
    batches = StepBatches(city, GRPOConfig(windows_per_step=4), "grpo", 6, ProcessGroup())
    sampler = WindowSampler(city.windows, 4, seed=6)
    for step, epoch, first in ((2, 0, 8), (0, 0, 0), (21, 0, 84), (23, 1, 4)):
        dealt = sampler.order(epoch)[first : first + 4]
        assert batches(step).origins.tolist() == city.windows.origins[dealt].tolist()
        assert batches.describe(step) == city.describe(dealt)
