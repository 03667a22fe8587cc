"""Stage 4 (Vision-LLMs for Spatiotemporal Traffic Forecasting, Eq. 17–19): who is the reference, and what moves."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor

from stdist.data import GridStore
from stdist.errors import DivergenceError
from stdist.training.engine import TorchEngine, cosine_schedule
from stdist.training.process_group import ProcessGroup
from stdist.vision_llm.config import GRPOConfig
from stdist.vision_llm.kernels.token_losses import head_logits
from stdist.vision_llm.learning import parameter_groups
from stdist.vision_llm.policy.adapters import active_adapter, adapter_names, add_lora, as_reference, begin_grpo
from stdist.vision_llm.policy.city_windows import CityWindows, PolicyBatch
from stdist.vision_llm.policy.model import PolicyModel
from stdist.vision_llm.rollout.rollouts import Candidates, Rollouts, Weights
from stdist.vision_llm.rollout.sampler import Completions
from stdist.vision_llm.stages.grpo import GRPOStage, candidate_tree, completion_log_probs

MakePolicy = Callable[..., PolicyModel]


def disturb(policy: PolicyModel, seed: int = 9, adapter: str = "default", scale: float = 0.2) -> None:
    """A LoRA adapter starts as nothing; this makes it say something, and something else for every seed."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in policy.backbone.named_parameters():
        if f"lora_B.{adapter}" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * scale)


def sft_model(make_policy: MakePolicy, with_adapter: bool) -> PolicyModel:
    policy = make_policy()
    if with_adapter:
        add_lora(policy)
        disturb(policy)
    return policy.eval()


def logits_of(policy: PolicyModel, batch: PolicyBatch) -> Tensor:
    with torch.no_grad():
        hidden, _ = policy.branch(policy.prefix(batch.shared, batch.grids), batch.prompts)
        return head_logits(hidden[:, -1], policy.answer_head)


def stage_of(
    policy: PolicyModel,
    store: GridStore,
    rollouts: Rollouts | None = None,
    group: ProcessGroup = ProcessGroup(),
    **changes: object,
) -> GRPOStage:
    cities = [CityWindows(policy, store.windows(name, 4, 3, channel="internet")) for name in ("train", "validation")]
    settings = {"windows_per_step": 2, "cells_per_window": 2, "eval_windows": 2, "num_generations": 4} | changes
    cell_mean = np.linspace(0.0, 190.0, 20)
    config = GRPOConfig(**settings)
    return GRPOStage(policy, *cities, cell_mean, config, seed=5, decoding="median", group=group, rollouts=rollouts)


def step(stage: GRPOStage, number: int, backward: Callable[[Tensor], None] = lambda loss: None) -> dict[str, float]:
    """A step as the loop makes it; without seconds, which differ every time."""
    stage.on_weights_changed(number)
    return {name: value for name, value in stage.step(number, backward).items() if not name.startswith("seconds")}


@pytest.mark.parametrize("with_adapter", [True, False])
def test_the_reference_is_the_sft_model_and_stays_it(
    make_policy: MakePolicy, store: GridStore, batch: PolicyBatch, with_adapter: bool
) -> None:
    """docs/decisions.md, reference model: with an SFT adapter "adapter off" would be another one."""
    policy = sft_model(make_policy, with_adapter)
    sft = logits_of(policy, batch)
    begin_grpo(policy)
    assert torch.allclose(logits_of(policy, batch), sft, atol=1e-5), "the policy starts as the SFT model"
    trained = policy.rows
    with as_reference(policy):
        assert policy.rows is not trained
        before = logits_of(policy, batch)
    assert policy.rows is trained and active_adapter(policy) == "grpo"
    assert torch.equal(before, sft), "the reference is the SFT model, bit for bit"
    if with_adapter:
        with policy.backbone.disable_adapter():
            assert not torch.allclose(logits_of(policy, batch), sft, atol=1e-2)

    stage = stage_of(policy, store)
    engine = TorchEngine(parameter_groups(policy, GRPOConfig(learning_rate=0.01)), cosine_schedule(0, 3), 1.0)
    frozen = {name: p.detach().clone() for name, p in policy.named_parameters() if not p.requires_grad}
    for number in range(3):
        step(stage, number, engine.backward)
        engine.step()
    with as_reference(policy):
        assert torch.equal(logits_of(policy, batch), sft)
    assert (logits_of(policy, batch) - sft).abs().max() > 1e-2, "the policy has learned something else"
    parameters = dict(policy.named_parameters())
    assert all(torch.equal(parameters[name], value) for name, value in frozen.items())
    moving = {name for name in parameters if name not in frozen}
    assert moving == {"rows.input", "rows.output"} | {n for n in parameters if "lora_" in n and ".grpo." in n}


def test_the_second_adapter_starts_as_a_copy_of_the_first(make_policy: MakePolicy) -> None:
    policy = sft_model(make_policy, with_adapter=True)
    begin_grpo(policy)
    parameters = dict(policy.backbone.named_parameters())
    copies = [name for name in parameters if ".grpo." in name]
    assert len(copies) == 4 * 7 * 2 and adapter_names(policy) == ["default", "grpo"]
    for name in copies:
        original = parameters[name.replace(".grpo.", ".default.")]
        assert torch.equal(parameters[name], original) and parameters[name].data_ptr() != original.data_ptr()
        assert parameters[name].requires_grad and not original.requires_grad


@pytest.mark.parametrize("with_adapter", [True, False])
def test_adapters_start_from_the_seed_alone(make_policy: MakePolicy, with_adapter: bool) -> None:
    """Not from what torch drew before: two runs of one config are one trajectory."""

    def adapters(seed: int, drawn_before: int) -> Tensor:
        torch.rand(drawn_before)
        policy = make_policy()
        if with_adapter:
            add_lora(policy, seed=seed)
        begin_grpo(policy, seed)
        return torch.cat([p.flatten() for n, p in policy.backbone.named_parameters() if "lora_A" in n])

    first = adapters(1, 0)
    assert torch.equal(first, adapters(1, 5)) and not torch.equal(first, adapters(2, 0))


def test_the_policy_comes_back_even_from_an_error(make_policy: MakePolicy) -> None:
    policy = sft_model(make_policy, with_adapter=True)
    begin_grpo(policy)
    rows = policy.rows
    with pytest.raises(KeyError), as_reference(policy):
        raise KeyError
    assert policy.rows is rows and active_adapter(policy) == "grpo"
    trains = {name for name, p in policy.named_parameters() if p.requires_grad}
    assert {"rows.input", "rows.output"} < trains and not any(".default." in name for name in trains)


def test_first_step_has_no_kl_and_clips_nothing(
    make_policy: MakePolicy, store: GridStore, batch: PolicyBatch, lean_towards_end: Callable[..., None]
) -> None:
    """And a candidate that knows no end is cut four tokens behind K = 3 (docs/decisions.md, 7)."""
    policy = sft_model(make_policy, with_adapter=True)
    lean_towards_end(policy, batch, -1e4)
    begin_grpo(policy)
    scalars = step(stage_of(policy, store), 0, torch.Tensor.backward)
    assert scalars["kl"] == pytest.approx(0, abs=1e-6) and scalars["clip_ratio"] == 0
    assert policy.rows.output.grad.abs().max() > 0
    assert scalars["right_length"] == 0 and scalars["tokens_per_candidate"] == 7


@torch.no_grad()
def sequence_log_probs(policy: PolicyModel, batch: PolicyBatch, completions: Completions, temperature: float) -> Tensor:
    """The definition: log-softmax over what can be said, of every candidate as a sequence of its own."""
    answer_ids = completions.answer_ids
    ids = torch.where(answer_ids == len(policy.vocabulary), policy.end_id, answer_ids + policy.first_numeral_id)
    prompts = batch.prompts.repeat_interleave(len(ids) // len(batch.prompts), 0)
    hidden, _ = policy.branch(policy.prefix(batch.shared, batch.grids), torch.cat([prompts, ids[:, :-1]], dim=1))
    logits = head_logits(hidden[:, prompts.shape[1] - 1 :].flatten(0, 1), policy.answer_head) / temperature
    return logits.log_softmax(-1).gather(1, completions.answer_ids.reshape(-1, 1)).view(ids.shape)


def test_kl_is_to_the_reference_and_the_ratio_to_the_weights_that_wrote(
    make_policy: MakePolicy, store: GridStore
) -> None:
    """Two updates on one rollout, of a policy that is not its reference, and that moves in between: every figure by its
    definition from three sets of log-probabilities. Then the next rollout comes."""
    policy = sft_model(make_policy, with_adapter=True)
    begin_grpo(policy)
    disturb(policy, seed=1, adapter="grpo")
    settings = {"num_iterations": 2, "beta": 0.3, "epsilon": 0.1, "epsilon_high": 0.25, "temperature": 0.7}
    rollouts = FixedRollouts(
        policy, lambda batch, written: sequence_log_probs(policy, batch, written, 0.7) * written.mask
    )
    stage = stage_of(policy, store, rollouts, **settings)
    first = step(stage, 0)
    disturb(policy, seed=2, adapter="grpo")
    second = step(stage, 1)

    ((batch, completions),) = rollouts.generated
    old, mask = completions.log_probs, completions.mask
    new = sequence_log_probs(policy, batch, completions, 0.7)
    with as_reference(policy):
        reference = sequence_log_probs(policy, batch, completions, 0.7)
    rewards = stage._reward(batch, completions).reward.view(-1, 4)
    a = (rewards - rewards.mean(1, keepdim=True)).view(-1, 1)
    for scalars, now in ((first, old), (second, new)):
        ratio, r = (now - old).exp(), reference - now
        kl = r.exp() - r - 1
        low, high = (ratio < 0.9) & (a < 0), (ratio > 1.25) & (a > 0)
        loss = 0.3 * kl - torch.where(low, 0.9 * a, torch.where(high, 1.25 * a, ratio * a))
        expected = ((loss * mask).sum(1) / mask.sum(1)).mean()
        assert scalars["loss"] == pytest.approx(expected.item(), rel=1e-3)
        assert scalars["kl"] == pytest.approx(kl[mask].mean().item(), rel=1e-3) and scalars["kl"] > 0.01
        for name, clipped in (("/low", low), ("/high", high), ("", low | high)):
            share = clipped[mask].float().mean().item()
            assert scalars[f"clip_ratio{name}"] == pytest.approx(share, abs=1e-6)
            assert (share > 0.02) == (scalars is second), "both sides clip once the policy has moved"

    step(stage, 2)
    assert len(rollouts.generated) == 2 and not np.array_equal(rollouts.generated[1][0].truth, batch.truth)


class Learner(ProcessGroup):
    """One of two learners in threads of one process."""

    things: ClassVar[list[object]] = [None, None]
    meeting: ClassVar[Barrier] = Barrier(2, timeout=60)

    def all_gather_object(self, thing):
        self.things[self.rank] = thing
        self.meeting.wait()
        gathered = list(self.things)
        self.meeting.wait()
        return gathered


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "gspo"])
def test_two_learners_have_the_gradient_of_one(make_policy: MakePolicy, store: GridStore, loss_type: str) -> None:
    """The mean of their gradients, whatever their micro-batches; one's candidates are shorter than the other's. DAPO
    divides by the tokens of both, GRPO and GSPO by their candidates."""
    windows: list[int] = []

    def cut(window: int) -> int:
        windows.append(window)
        return 0 if window == windows[0] else 2

    def stage_in(group: ProcessGroup, memory: float) -> GRPOStage:
        policy = sft_model(make_policy, with_adapter=True)
        begin_grpo(policy)
        disturb(policy, seed=1, adapter="grpo")
        rollouts = FixedRollouts(policy, cut=cut)
        return stage_of(policy, store, rollouts, group, loss_type=loss_type, beta=0.2, activation_memory=memory)

    def gradients(stage: GRPOStage) -> tuple[dict[str, float], Tensor]:
        scalars = step(stage, 0, torch.Tensor.backward)
        return scalars, torch.cat([p.grad.flatten() for p in stage.policy.parameters() if p.grad is not None])

    alone, gradient = gradients(stage_in(ProcessGroup(), 1.0))
    stages = [stage_in(Learner(0, 2), 1.0), stage_in(Learner(1, 2), 1e-9)]
    with ThreadPoolExecutor(2) as threads:
        (first, one), (second, two) = threads.map(gradients, stages)
    assert len({stage.rollouts.generated[0][1].mask.sum().item() for stage in stages}) == 2
    assert ((one + two) / 2 - gradient).norm() / gradient.norm() < 1e-5
    for name in ("loss", "kl", "clip_ratio"):
        assert (first[name] + second[name]) / 2 == pytest.approx(alone[name], rel=1e-4, abs=1e-6), name


def test_dr_grpo_divides_by_what_candidates_may_write_and_not_by_what_they_did(
    make_policy: MakePolicy, store: GridStore
) -> None:
    """Sixteen candidates may write K + 4 = 7 tokens each; these wrote 4 · (4 + 4 + 4 + 3) = 60, none more than four.
    The sums of Dr. GRPO and of DAPO, and all of their log-probabilities, are the same."""

    def loss_of(loss_type: str) -> float:
        policy = sft_model(make_policy, with_adapter=True)
        begin_grpo(policy)
        disturb(policy, seed=1, adapter="grpo")
        stage = stage_of(policy, store, FixedRollouts(policy), loss_type=loss_type, beta=0.2)
        return step(stage, 0)["loss"]

    dapo = loss_of("dapo")
    assert abs(dapo) > 0.01 and loss_of("dr_grpo") * (16 * 7) == pytest.approx(dapo * 60, rel=1e-4)


def test_micro_batches_add_up_to_the_whole_step(make_policy: MakePolicy, store: GridStore) -> None:
    """All activations in memory, or no more than one sequence's at a time: the same scalars and the same gradient."""
    runs, gradients, calls = [], [], []
    for memory in (1.0, 1e-9):
        policy = sft_model(make_policy, with_adapter=True)
        begin_grpo(policy)
        stage = stage_of(policy, store, FixedRollouts(policy), windows_per_step=3, activation_memory=memory, beta=0.1)
        backwards: list[Tensor] = []

        def backward(loss: Tensor, backwards: list[Tensor] = backwards) -> None:
            backwards.append(loss.detach())
            loss.backward()

        runs.append(step(stage, 0, backward))
        gradients.append(torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None]))
        calls.append(len(backwards))
    assert calls == [3, 3 * 2 * 4 + 3 * 2 + 3], "candidates' backwards, then their cells', then the windows'"
    assert runs[0] == pytest.approx(runs[1], rel=1e-4, abs=1e-5)
    assert (gradients[0] - gradients[1]).norm() / gradients[0].norm() < 1e-5


def test_a_step_reports_its_tokens_and_those_it_saved(make_policy: MakePolicy, store: GridStore) -> None:
    """V + C·(T + G·K) a window where one sequence per candidate computes C·G·(V + T + K)."""
    policy = sft_model(make_policy, with_adapter=True)
    begin_grpo(policy)
    scalars = step(stage_of(policy, store, rollouts := FixedRollouts(policy)), 0, torch.Tensor.backward)
    batch, _ = rollouts.generated[0]
    v, t, k = batch.shared.shape[1], batch.prompts.shape[1], 3
    assert scalars["tokens"] == 2 * (v + 2 * (t + 4 * k))
    assert scalars["tokens_saved"] == 2 * (2 * 4 * (v + t + k)) - scalars["tokens"]


def fixed_candidates(
    policy: PolicyModel, batch: PolicyBatch, cut: Callable[[int], int] = lambda window: 2
) -> Completions:
    """Four candidates a cell: the truth, it times 1.1, it times 1.5, and it cut after ``cut`` of its window values."""
    n, end = len(batch.answers), len(policy.vocabulary)
    truth = batch.truth.reshape(n, 3)
    last = torch.tensor([cut(window) for window in batch.origins.tolist()]).repeat_interleave(len(batch.cells))
    lengths = torch.cat([torch.full((n, 3), 3), last[:, None]], 1)
    encoded = torch.stack([torch.from_numpy(policy.vocabulary.encode(truth * x)) for x in (1.0, 1.1, 1.5, 1.0)], 1)
    written = torch.arange(4) < lengths[..., None]
    answer_ids = torch.nn.functional.pad(encoded, (0, 1)).masked_fill(~written, end).view(-1, 4)
    lengths = lengths.flatten()
    mask = torch.arange(4) <= lengths[:, None]
    decoded = torch.from_numpy(policy.vocabulary.decode(answer_ids.clamp(max=end - 1).numpy())).float()
    values = decoded * (answer_ids < end)
    return Completions(answer_ids, mask, torch.full(mask.shape, -6.0) * mask, values, lengths)


class FixedRollouts:
    """``fixed_candidates`` of every batch, with the log-probabilities that they are given, and a list of them."""

    def __init__(
        self,
        policy: PolicyModel,
        log_probs: Callable[[PolicyBatch, Completions], Tensor] | None = None,
        cut: Callable[[int], int] = lambda window: 2,
    ) -> None:
        self.policy, self.log_probs, self.cut = policy, log_probs, cut
        self.generated: list[tuple[PolicyBatch, Completions]] = []
        self.versions: dict[str, int] = {}
        self.max_staleness, self.metrics = 0, {}

    def update_weights(self, step: int, weights: Weights) -> None:
        self.weights, self.versions = weights.digest, {weights.digest: step}

    def request(self, step: int, batch: PolicyBatch) -> None:
        pass

    def close(self) -> None:
        pass

    def generate(self, step: int, batch: PolicyBatch) -> list[Candidates]:
        completions = fixed_candidates(self.policy, batch, self.cut)
        if self.log_probs:
            completions.log_probs = self.log_probs(batch, completions)
        self.generated.append((batch, completions))
        keys = [(step, window, cell, self.weights) for window in batch.origins for cell in batch.cells]
        arrays = (completions.answer_ids, completions.log_probs, completions.lengths)
        groups = zip(*(x.view(-1, 4, *x.shape[1:]).numpy() for x in arrays), strict=True)
        return [Candidates(*key, *group) for key, group in zip(keys, groups, strict=True)]


def test_rewards_use_each_cells_own_normalizer(make_policy: MakePolicy, store: GridStore) -> None:
    """d of Eq. 19 (docs/decisions.md): the cell's training mean, the window's, or the city's; floored at 5 %."""
    policy = make_policy()
    batch = CityWindows(policy, store.windows("train", 4, 3, channel="internet")).batch(
        np.array([3, 9]), np.array([0, 7])
    )
    completions = fixed_candidates(policy, batch)
    truth = batch.truth.reshape(4, 3)
    predicted = completions.values.view(4, 4, 4)[..., :3].numpy()
    normalizers = {
        "cell_mean": np.tile([0.05 * 95.0, 70.0], 2),  # cell 0 is at rest
        "window_mean": truth.mean(1),
        "city_mean": np.full(4, 95.0),
    }
    for name, normalizer in normalizers.items():
        stage = stage_of(policy, store, normalizer=name, half_score=0.3)
        rewards = stage._reward(batch, completions).reward.view(4, 4).numpy()
        d = np.maximum(normalizer, 0.05 * 95.0)
        for candidate, length in enumerate((3, 3, 3, 2)):
            error = np.sqrt(((predicted[:, candidate] - truth) ** 2)[:, :length].mean(1)) / d
            expected = 0.5 ** (error / 0.3) - 0.5 * (3 - length) / 3
            assert np.allclose(rewards[:, candidate], expected, atol=1e-5), name
    assert (rewards[:, 0] > rewards[:, 1]).all() and (rewards[:, 1] > rewards[:, 2]).all()


def test_a_step_depends_on_its_number_alone(make_policy: MakePolicy, store: GridStore) -> None:
    policy = sft_model(make_policy, with_adapter=True)
    begin_grpo(policy)
    stage = stage_of(policy, store)
    runs = [step(stage, number) for number in (3, 4, 3)]
    assert runs[0] == runs[2] != runs[1]
    assert stage.evaluate() == stage.evaluate()


def test_updates_on_one_rollout_are_on_one_batch(make_policy: MakePolicy, store: GridStore) -> None:
    """Two updates a rollout: batches follow each other, none is left out, and people are told of the one that is
    learned from; a run goes on where a rollout begins, as if it had not been stopped."""
    policy = sft_model(make_policy, with_adapter=False)
    begin_grpo(policy)
    stage = stage_of(policy, store, rollouts := FixedRollouts(policy), num_iterations=2)
    scalars = [step(stage, number) for number in range(4)]
    first, second = (batch.origins.tolist() for batch, _ in rollouts.generated)
    assert [first, second] == [stage.batches(number).origins.tolist() for number in (0, 1)] and first != second
    described = [stage.batches.describe(number) for number in (0, 0, 1, 1)]
    assert [stage.describe_batch(number) for number in range(4)] == described
    assert stage.resumable_every == 2
    assert step(stage_of(policy, store, FixedRollouts(policy), num_iterations=2), 2) == scalars[2]


def test_learning_raises_the_likelihood_of_the_better_candidate(make_policy: MakePolicy, store: GridStore) -> None:
    """The gradient step goes the right way: truth up, the candidate 50 % off down."""
    policy = sft_model(make_policy, with_adapter=False)
    begin_grpo(policy)

    def log_probs(batch: PolicyBatch, completions: Completions) -> Tensor:
        tree = candidate_tree(policy, batch, completions)
        return completion_log_probs(policy, tree, completions, 1.0, sizes=[2, 4, 16])

    stage = stage_of(policy, store, rollouts := FixedRollouts(policy, log_probs))
    engine = TorchEngine(parameter_groups(policy, GRPOConfig(learning_rate=1e-3)), cosine_schedule(0, 10), 1.0)
    before = None
    for number in range(4):
        step(stage, number, engine.backward)
        engine.step()
        totals = log_probs(*rollouts.generated[0]).sum(1).view(-1, 4).mean(0)
        before = totals if before is None else before
    assert (totals - before)[0] > (totals - before)[2]
    assert totals[0] > before[0] and totals[2] < before[2]


def test_a_reward_that_is_no_number_ends_the_run_and_names_the_windows(
    make_policy: MakePolicy, store: GridStore
) -> None:
    policy = sft_model(make_policy, with_adapter=False)
    begin_grpo(policy)
    stage = stage_of(policy, store, FixedRollouts(policy))
    stage.cell_mean = np.full_like(stage.cell_mean, np.nan)
    with pytest.raises(DivergenceError, match=r"grpo: a reward is nan on windows at 2013-11-\d\dT\d\d:\d\d, "):
        step(stage, 0)


def test_candidates_of_other_weights_are_refused(make_policy: MakePolicy, store: GridStore) -> None:
    """Whoever samples must have the weights of this moment: the ratio and the clip stand on it."""
    policy = sft_model(make_policy, with_adapter=False)
    begin_grpo(policy)
    stage = stage_of(policy, store, rollouts := FixedRollouts(policy))
    step(stage, 0)
    policy.rows.output.data[3, 5] += 1
    step(stage, 1)
    rollouts.weights = "those of step 1"
    rollouts.update_weights = lambda step, weights: rollouts.versions.update({weights.digest: step})
    policy.rows.output.data[3, 5] += 1
    with pytest.raises(RuntimeError, match=r"step 2 needs candidates of window \d+, cell \d+ by weights"):
        step(stage, 2)


def test_a_step_that_is_made_again_learns_from_the_same_candidates(make_policy: MakePolicy, store: GridStore) -> None:
    """Memory ends in the backward pass: what was drawn stays, the micro-batches shrink, the scalars are the same."""
    policy = sft_model(make_policy, with_adapter=True)
    begin_grpo(policy)
    stage = stage_of(policy, store, rollouts := FixedRollouts(policy), windows_per_step=3, beta=0.1)
    expected = step(stage, 0, torch.Tensor.backward)
    policy.zero_grad()
    fresh = stage_of(policy, store, rollouts := FixedRollouts(policy), windows_per_step=3, beta=0.1)

    def no_memory(loss: Tensor) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        step(fresh, 0, no_memory)
    before = fresh._rollout
    for _ in range(12):
        assert fresh.halve_memory()
    calls: list[Tensor] = []
    again = step(fresh, 0, lambda loss: calls.append(loss.detach()) or loss.backward())
    assert len(rollouts.generated) == 1 and fresh._rollout.completions is before.completions
    assert len(calls) > 3 and again == pytest.approx(expected, rel=1e-4, abs=1e-5)
