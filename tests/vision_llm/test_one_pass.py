"""Candidates whose steps are drawn behind blanks: against sequences of their own, one distribution at a time."""

import pickle
import statistics
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from stdist.data import GridStore
from stdist.data.sampler import uniform
from stdist.vision_llm.config import GRPOConfig
from stdist.vision_llm.kernels.token_losses import head_logits, shared_log_probs
from stdist.vision_llm.policy.adapters import add_lora, as_reference, begin_grpo
from stdist.vision_llm.policy.city_windows import CityWindows, PolicyBatch
from stdist.vision_llm.policy.model import PolicyModel
from stdist.vision_llm.rollout.pool import RolloutProgram, _one_window
from stdist.vision_llm.rollout.rollouts import Candidates, LocalRollouts, Weights, completions_of
from stdist.vision_llm.rollout.sampler import Completions, Sampler
from stdist.vision_llm.stages.grpo import SCORINGS, GRPOStage, completion_log_probs
from stdist.vision_llm.stages.reward import group_advantages

MakePolicy = Callable[..., PolicyModel]
MakeBatch = Callable[..., PolicyBatch]
SEED, K, G = 4, 3, 5


def config(**changes: object) -> GRPOConfig:
    settings: dict[str, object] = {
        "candidates": "direct",
        "num_generations": G,
        "temperature": 0.8,
        "windows_per_step": 2,
        "cells_per_window": 2,
        "eval_windows": 2,
    }
    return GRPOConfig.model_validate(settings | changes)


def sample(policy: PolicyModel, batch: PolicyBatch, step: int = 7, seed: int = SEED, **changes: object):
    return LocalRollouts(policy, config(**changes), seed).sample(step, batch, "these")


def naive_log_probs(policy: PolicyModel, batch: PolicyBatch, cell: int, step: int, temperature: float) -> Tensor:
    """Of all numerals at one step of one cell of the batch: a sequence that ends where the step is predicted."""
    window = cell // len(batch.cells)
    prefix = policy.prefix(batch.shared[window : window + 1], batch.grids[window : window + 1])
    blanks = batch.prompts.new_full((1, step), policy.blank_id)
    hidden, _ = policy.branch(prefix, torch.cat([batch.prompts[cell : cell + 1], blanks], dim=1))
    return (head_logits(hidden[:, -1], policy.answer_head[:1]) / temperature).log_softmax(-1)[0]


def learner(make_policy: MakePolicy) -> PolicyModel:
    """A policy in GRPO that is no longer its reference."""
    policy = make_policy().eval()
    add_lora(policy)
    begin_grpo(policy)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return policy.eval()


def test_log_probs_of_many_targets_are_those_of_each() -> None:
    """With gradients: against log-softmax over all logits, in float64."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(6, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    rows = torch.randn(11, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(11, (6, 4), generator=generator)
    weights = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    ours = shared_log_probs(hidden, rows, targets, 0.7)
    naive = (hidden @ rows.T / 0.7).log_softmax(-1).gather(1, targets)
    torch.testing.assert_close(ours, naive)
    for got, expected in zip(
        torch.autograd.grad((ours * weights).sum(), [hidden, rows]),
        torch.autograd.grad((naive * weights).sum(), [hidden, rows]),
        strict=True,
    ):
        torch.testing.assert_close(got, expected)


def test_every_step_is_drawn_by_itself_at_its_key(policy: PolicyModel, batch: PolicyBatch) -> None:
    """The inverse of each step's distribution over values, at uniforms of (seed, step, window, cell, candidate)."""
    values = np.array(policy.vocabulary.values)
    order = np.argsort(values, kind="stable")
    records = sample(policy, batch)
    assert [(r.window, r.cell) for r in records] == [(w, c) for w in batch.origins for c in batch.cells]
    for number, record in enumerate(records):
        assert record.answer_ids.shape == (G, K) and record.lengths.tolist() == [K] * G
        quantiles = [uniform(K, SEED, 7, record.window, record.cell, g) for g in range(G)]
        for step in range(K):
            log_p = naive_log_probs(policy, batch, number, step, 0.8)
            cumulative = np.cumsum(log_p.double().exp().numpy()[order])
            for g in range(G):
                drawn = record.answer_ids[g, step]
                assert drawn == order[np.argmax(cumulative > quantiles[g][step] * cumulative[-1])]
                assert record.log_probs[g, step] == pytest.approx(log_p[drawn].item(), abs=1e-4)
        assert len({row.tobytes() for row in record.answer_ids}) == G


def test_draws_belong_to_seed_step_window_cell_and_candidate_alone(policy: PolicyModel, make_batch: MakeBatch) -> None:
    together = {(r.window, r.cell): r for r in sample(policy, make_batch(policy))}
    part = make_batch(policy, windows=(31,), cells=(18, 1))
    for record in sample(policy, part, num_generations=3):
        same = together[record.window, record.cell]
        assert np.array_equal(record.answer_ids, same.answer_ids[:3])
        assert np.allclose(record.log_probs, same.log_probs[:3], atol=1e-5)
    for others in (sample(policy, part, step=8), sample(policy, part, seed=5)):
        assert not any(np.array_equal(r.answer_ids, together[r.window, r.cell].answer_ids) for r in others)


def test_a_worker_writes_the_same(policy: PolicyModel, batch: PolicyBatch) -> None:
    request = pickle.dumps((7, _one_window(batch, 1)))
    theirs: list[Candidates] = pickle.loads(RolloutProgram(policy, config(), SEED).run(request)[0])
    for mine, other in zip(sample(policy, batch)[len(batch.cells) :], theirs, strict=True):
        assert (mine.window, mine.cell) == (other.window, other.cell)
        assert np.array_equal(mine.answer_ids, other.answer_ids)
        assert np.allclose(mine.log_probs, other.log_probs, atol=1e-5)


def test_the_mean_of_candidates_is_near_the_one_pass_forecast(policy: PolicyModel, batch: PolicyBatch) -> None:
    """At temperature 1 the forecast is the mean of what is drawn; medians of both, heavy tails left aside."""
    many = completions_of(sample(policy, batch, num_generations=400, temperature=1.0), 7, batch, ["these"], policy)
    prefix = policy.prefix(batch.shared, batch.grids)
    forecast = Sampler(policy, "direct").forecast(prefix, batch.prompts)[:, 0]
    groups = many.values.view(6, 400, K)
    error = (groups.mean(1) - forecast) / (groups.std(1) / 20)
    assert error.abs().max() < 4.5


@pytest.mark.parametrize("sizes", [[2, 6], [1, 1]])
def test_log_probs_of_the_stage_are_the_samplers_and_the_naive(
    make_policy: MakePolicy, make_batch: MakeBatch, sizes: list[int]
) -> None:
    policy = learner(make_policy)
    batch, scoring = make_batch(policy), SCORINGS["direct"]
    completions = completions_of(sample(policy, batch), 7, batch, ["these"], policy)
    tree = scoring.tree(policy, batch, completions)
    assert [len(level) for level in tree.levels] == [6] and tree.levels[0].ids.shape[1] == batch.prompts.shape[
        1
    ] + K - 1

    def again() -> Tensor:
        return completion_log_probs(policy, tree, completions, 0.8, sizes, scoring.log_probs)

    torch.testing.assert_close(again(), completions.log_probs, rtol=0, atol=1e-4)
    with as_reference(policy):
        reference = again()
        naive = torch.stack([naive_log_probs(policy, batch, cell, step, 0.8) for cell in range(6) for step in range(K)])
    targets = completions.answer_ids.view(6, G, K).transpose(1, 2).reshape(6 * K, G)
    expected = naive.gather(1, targets).view(6, K, G).transpose(1, 2).reshape(6 * G, K)
    torch.testing.assert_close(reference, expected, rtol=0, atol=1e-4)
    assert (reference - completions.log_probs).abs().mean() > 0.01


def stage_of(policy: PolicyModel, store: GridStore, **changes: object) -> GRPOStage:
    cities = [CityWindows(policy, store.windows(name, 4, K, channel="internet")) for name in ("train", "validation")]
    return GRPOStage(policy, *cities, np.linspace(50.0, 190.0, 20), config(**changes), seed=SEED, decoding="direct")


@pytest.mark.parametrize("memory", [1.0, 1e-9])
@pytest.mark.parametrize(
    ("loss_type", "reward", "scale"),
    [("grpo", "squared_error", "group"), ("dr_grpo", "eq17", "none"), ("grpo", "error_of_mean", "group")],
)
def test_the_gradient_is_that_of_one_sequence_per_draw(
    make_policy: MakePolicy, store: GridStore, memory: float, loss_type: str, reward: str, scale: str
) -> None:
    """Mean over candidates and their K tokens of β·k3 − A·ratio; every log-probability by a pass of its own."""
    policy = learner(make_policy)
    stage = stage_of(
        policy, store, activation_memory=memory, loss_type=loss_type, reward=reward, beta=0.3, scale_rewards=scale
    )
    stage.on_weights_changed(0)
    batch = stage.batches(0)
    weights = Weights.of(policy).digest
    records = LocalRollouts(policy, stage.config, SEED).sample(0, batch, weights)
    completions: Completions = completions_of(records, 0, batch, [weights], policy)

    scalars = stage.step(0, torch.Tensor.backward)
    trained = [p for p in policy.parameters() if p.requires_grad]
    ours = torch.cat([p.grad.flatten() for p in trained if p.grad is not None])
    policy.zero_grad()

    rewards = stage._reward(batch, completions).reward.view(-1, G)
    advantages = group_advantages(rewards, scale).flatten()[:, None].expand(-1, K).tolist()
    if reward == "error_of_mean":
        advantages = naive_credit(stage, batch, completions)
    total = torch.zeros(())
    for i in range(len(advantages)):
        for step in range(K):
            token = completions.answer_ids[i, step]
            log_p = naive_log_probs(policy, batch, i // G, step, 0.8)[token]
            with as_reference(policy), torch.no_grad():
                r = naive_log_probs(policy, batch, i // G, step, 0.8)[token]
            difference = r - log_p
            total = (
                total + 0.3 * (difference.exp() - difference - 1) - advantages[i][step] * (log_p - log_p.detach()).exp()
            )
    total = total / (len(advantages) * K)
    total.backward()
    naive = torch.cat([p.grad.flatten() for p in trained if p.grad is not None])
    assert scalars["loss"] == pytest.approx(total.item(), rel=1e-3, abs=1e-5)
    assert (ours - naive).norm() / naive.norm() < 1e-3
    assert scalars["right_length"] == 1 and scalars["tokens_per_candidate"] == K and abs(scalars["mismatch_kl"]) < 1e-4
    v, t = batch.shared.shape[1], batch.prompts.shape[1]
    assert scalars["tokens"] == 2 * (v + 2 * (t + K - 1)), "no tokens of candidates"
    assert scalars["tokens_saved"] == 2 * 2 * G * (v + t + K - 1) - scalars["tokens"]
    assert ("reward_under_0.05" in scalars) == (reward == "eq17")


def naive_credit(
    stage: GRPOStage, batch: PolicyBatch, completions: Completions, scaled: bool = True
) -> list[list[float]]:
    """Of each candidate and step: minus 2 (m − y)(x − m) / d², m the mean of the others' draws, less its group's mean
    and, if ``scaled``, over its group's deviation; the error of the group's mean, (x̄ − y)² / d², is the whole group's
    and drops out."""
    values, truth = completions.values.tolist(), batch.truth.reshape(-1, K).tolist()
    credit = [[0.0] * K for _ in values]
    for group, y in enumerate(truth):
        members = range(group * G, group * G + G)
        d = stage.cell_mean[batch.cells][group % len(batch.cells)]
        for step in range(K):
            for i in members:
                others = sum(values[j][step] for j in members if j != i) / (G - 1)
                credit[i][step] = -2 * (others - y[step]) * (values[i][step] - others) / d**2
            of_group = [credit[i][step] for i in members]
            for i in members:
                deviation = statistics.stdev(of_group) + 1e-4 if scaled else 1.0
                credit[i][step] = (credit[i][step] - statistics.mean(of_group)) / deviation
    return credit


def test_each_steps_credit_is_over_its_cells_d_squared(make_policy: MakePolicy, store: GridStore) -> None:
    """Without a group's deviation to divide by; draws like the city's, since a numeral from far up outweighs them."""
    stage = stage_of(learner(make_policy), store, reward="error_of_mean")
    batch = stage.batches(0)
    records = LocalRollouts(stage.policy, stage.config, SEED).sample(0, batch, "these")
    completions = completions_of(records, 0, batch, ["these"], stage.policy)
    drawn = np.random.default_rng(0).uniform(20, 200, completions.values.shape)
    completions = replace(completions, values=torch.from_numpy(drawn).float())
    rewards = stage._reward(batch, completions).reward.view(-1, G)
    credit = stage._advantages(batch, completions, rewards)
    expected = torch.tensor(naive_credit(stage, batch, completions, scaled=False))
    torch.testing.assert_close(credit, expected.float(), rtol=1e-3, atol=1e-4)
    assert (credit.view(-1, G, K).sum(1).abs() < 1e-3).all() and credit.abs().max() > 0.1


def test_a_chain_cannot_be_judged_step_by_step() -> None:
    with pytest.raises(ValidationError, match="set candidates: direct"):
        GRPOConfig(candidates="chain", reward="error_of_mean")


def test_evaluation_draws_in_one_pass_too(make_policy: MakePolicy, store: GridStore) -> None:
    stage = stage_of(learner(make_policy), store)
    metrics = stage.evaluate()
    assert metrics == stage.evaluate() and 0 < metrics["reward"] < 1 and metrics["nrmse"] > 0
