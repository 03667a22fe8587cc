"""Constrained sampling: a forecast is numerals and the end token, nothing else can be said."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import Qwen2_5_VLForConditionalGeneration

from stdist.vision_llm import Policy
from stdist.vision_llm.kernels.prefix import Prefix
from stdist.vision_llm.kernels.token_losses import head_logits
from stdist.vision_llm.policy.city_windows import PolicyBatch
from stdist.vision_llm.policy.model import PolicyModel
from stdist.vision_llm.rollout import sampler
from stdist.vision_llm.rollout.sampler import Completions, Sampler, at_quantile, nucleus
from stdist.vision_llm.stages.grpo import candidate_tree, completion_log_probs
from stdist.vision_llm.tree import prefix_tree


@pytest.fixture(scope="module")
def prefix(policy: PolicyModel, batch: PolicyBatch) -> Prefix:
    return policy.prefix(batch.shared, batch.grids)


@pytest.fixture
def talkative(make_policy: Callable[..., PolicyModel]) -> PolicyModel:
    """A policy whose rows a test may change."""
    return make_policy().eval()


Lean = Callable[[PolicyModel, PolicyBatch, float], None]


def uniforms(seed: int, sequences: int, tokens: int) -> Tensor:
    return torch.rand(sequences, tokens, generator=torch.Generator().manual_seed(seed))


# --- the inverse distribution function ------------------------------------------------------------------------


def test_at_quantile_is_the_inverse_distribution_function() -> None:
    """Against numpy: the first column whose cumulative probability exceeds the level."""
    rng = np.random.default_rng(0)
    probabilities = rng.dirichlet(np.full(7, 0.4), size=200)
    levels = rng.random(200)
    ours = at_quantile(torch.from_numpy(probabilities), torch.from_numpy(levels)[:, None])[:, 0]
    expected = [int(np.argmax(np.cumsum(row) > level)) for row, level in zip(probabilities, levels, strict=True)]
    assert ours.tolist() == expected


def test_at_quantile_never_draws_what_has_no_probability() -> None:
    """At level 0 the leading zeros, at the highest level below 1 the trailing ones, are passed over."""
    probabilities = torch.tensor([[0.0, 0.0, 0.25, 0.0, 0.75, 0.0, 0.0]])
    highest = 1 - 2**-24
    for level, expected in ((0.0, 2), (0.2499, 2), (0.25, 4), (0.5, 4), (highest, 4)):
        assert at_quantile(probabilities, torch.tensor([[level]])).item() == expected
    # Sums that rounding pushed off 1, on either side.
    for scale in torch.linspace(0.99999, 1.00001, 41):
        assert at_quantile(probabilities * scale, torch.tensor([[highest]])).item() == 4


def test_median_of_a_distribution() -> None:
    probabilities = torch.tensor([[0.2, 0.25, 0.1, 0.45], [0.6, 0.1, 0.1, 0.2], [0.0, 0.0, 0.0, 1.0]])
    assert at_quantile(probabilities, torch.full((3, 1), 0.5)).tolist() == [[2], [0], [3]]


# --- what is generated ---------------------------------------------------------------------------------------------


def first_step(policy: PolicyModel, batch: PolicyBatch, prefix: Prefix) -> Tensor:
    """Log-probabilities of the numerals right after each prompt, ``[cells, numerals]``."""
    hidden, _ = policy.branch(prefix, batch.prompts)
    return head_logits(hidden[:, -1], policy.answer_head)[:, :-1].log_softmax(-1)


def test_only_numerals_and_the_end_are_ever_generated(
    talkative: PolicyModel, batch: PolicyBatch, lean_towards_end: Lean
) -> None:
    """Every text row, the image pad's above all, screams along the hidden states; none is heard."""
    lean_towards_end(talkative, batch, 2.0)
    with torch.no_grad():
        hidden, _ = talkative.branch(talkative.prefix(batch.shared, batch.grids), batch.prompts)
        loud = hidden[:, -1].mean(0) * 100
        for token in range(talkative.first_numeral_id):
            if token != talkative.end_id:
                talkative.base_model.lm_head.weight[token] = loud
        said = head_logits(hidden[:, -1], talkative.full_head).argmax(-1)
        assert (said < talkative.first_numeral_id).all() and (said != talkative.end_id).all()
    prefix, n = talkative.prefix(batch.shared, batch.grids), len(talkative.vocabulary)
    for decoding in ("greedy", "median", "sample"):
        sampler = Sampler(talkative, decoding, num_generations=4, allow_eos=True)
        completions = sampler.generate(prefix, batch.prompts, 6, uniforms(0, 24, 6) if decoding == "sample" else None)
        assert completions.answer_ids.min() >= 0 and completions.answer_ids.max() <= n
        numerals = completions.answer_ids < n
        assert torch.equal(numerals.sum(1), completions.lengths)
        decoded = torch.from_numpy(talkative.vocabulary.decode(completions.answer_ids[numerals].numpy())).float()
        assert torch.equal(completions.values[numerals], decoded)


def test_greedy_is_the_chain_of_most_likely_numerals(policy: PolicyModel, batch: PolicyBatch, prefix: Prefix) -> None:
    """Each step recomputed naively, by a whole forward over everything generated so far."""
    completions = Sampler(policy, "greedy").generate(prefix, batch.prompts, 5)
    ids = batch.prompts
    for step in range(5):
        hidden, _ = policy.branch(prefix, ids)
        log_p = head_logits(hidden[:, -1], policy.answer_head)[:, :-1].log_softmax(-1)
        best = log_p.argmax(-1)
        assert torch.equal(completions.answer_ids[:, step], best)
        assert torch.allclose(completions.log_probs[:, step], log_p.max(-1).values, atol=1e-4)
        ids = torch.cat([ids, best[:, None] + policy.first_numeral_id], dim=1)


@pytest.mark.parametrize("allow_eos", [False, True])
def test_greedy_equals_transformers_generate_under_the_same_mask(
    talkative: PolicyModel,
    batch: PolicyBatch,
    lean_towards_end: Lean,
    plain_model: Callable[[PolicyModel], Qwen2_5_VLForConditionalGeneration],
    plain_inputs: Callable[..., dict[str, Tensor]],
    allow_eos: bool,
) -> None:
    """Token for token, each cell a sequence of its own with its window's images; text may not be said."""
    lean_towards_end(talkative, batch, 3.0)
    prefix = talkative.prefix(batch.shared, batch.grids)
    completions = Sampler(talkative, "greedy", allow_eos=allow_eos).generate(prefix, batch.prompts, 6)
    lengths = completions.mask.sum(1).tolist()
    assert (len(set(lengths)) > 1 and min(lengths) < 6) if allow_eos else lengths == [6] * 6
    model, first, end = plain_model(talkative), talkative.first_numeral_id, talkative.end_id
    text = [token for token in range(first) if token != end or not allow_eos]
    for cell, length in enumerate(lengths):
        inputs = plain_inputs(talkative, batch, cell, batch.prompts.new_zeros(0))
        said = model.generate(
            **inputs, max_new_tokens=6, do_sample=False, suppress_tokens=text, eos_token_id=end, pad_token_id=end
        )[0, inputs["input_ids"].shape[1] :]
        choices = completions.answer_ids[cell, :length]
        ids = torch.where(choices == len(talkative.vocabulary), end, choices + first)
        assert said.tolist() == ids.tolist()


def test_median_decoding_halves_each_step(policy: PolicyModel, batch: PolicyBatch, prefix: Prefix) -> None:
    """At most half of the probability lies strictly below the value generated, at most half strictly above."""
    completions = Sampler(policy, "median").generate(prefix, batch.prompts, 1)
    probabilities = first_step(policy, batch, prefix).exp().numpy()
    for row in range(6):
        value = policy.vocabulary.values[completions.answer_ids[row, 0]]
        assert probabilities[row][policy.vocabulary.values < value].sum() <= 0.5 + 1e-5
        assert probabilities[row][policy.vocabulary.values > value].sum() <= 0.5 + 1e-5


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_samples_follow_their_probabilities(
    policy: PolicyModel, batch: PolicyBatch, prefix: Prefix, temperature: float
) -> None:
    """χ² over 20 bins of about equal probability: 4,000 draws of one cell, mean 19, standard deviation 6.2."""
    one = prefix.part(0, 1)
    sampler = Sampler(policy, "sample", num_generations=4000, temperature=temperature)
    draws = sampler.generate(one, batch.prompts[:1], 1, uniforms(0, 4000, 1))
    hidden, _ = policy.branch(one, batch.prompts[:1])
    p = (head_logits(hidden[:, -1], policy.answer_head)[0, :-1] / temperature).softmax(-1).numpy()
    shuffled = np.random.default_rng(0).permutation(len(p))  # bins that value order cannot fill by accident
    bins = np.empty(len(p), int)
    bins[shuffled] = np.minimum((p[shuffled].cumsum() * 20).astype(int), 19)
    expected = np.bincount(bins, p, 20) * 4000
    seen = np.bincount(bins[draws.answer_ids[:, 0].numpy()], minlength=20)
    assert ((seen - expected) ** 2 / expected).sum() < 19 + 4 * 6.2
    chosen = np.log(p[draws.answer_ids[:, 0].numpy()])
    assert np.allclose(draws.log_probs[:, 0].numpy(), chosen, atol=1e-4)


def test_a_sequences_uniforms_alone_say_what_it_draws(policy: PolicyModel, batch: PolicyBatch, prefix: Prefix) -> None:
    """The same numbers for another candidate of the cell draw the same tokens; other numbers others."""
    sampler, drawn = Sampler(policy, "sample", num_generations=3), uniforms(1, 18, 4)
    tokens = sampler.generate(prefix, batch.prompts, 4, drawn).answer_ids.view(6, 3, 4)
    assert not torch.equal(tokens[:, 0], tokens[:, 1])
    turned = drawn.view(6, 3, 4).roll(1, dims=1)
    again = sampler.generate(prefix, batch.prompts, 4, turned.flatten(0, 1)).answer_ids.view(6, 3, 4)
    assert torch.equal(again, tokens.roll(1, dims=1))


def test_candidates_of_a_cell_are_consecutive_and_continue_its_own_prompt(
    policy: PolicyModel, batch: PolicyBatch, prefix: Prefix
) -> None:
    alone = Sampler(policy, "greedy").generate(prefix, batch.prompts, 4)
    together = Sampler(policy, "greedy", num_generations=3).generate(prefix, batch.prompts, 4)
    assert torch.equal(together.answer_ids, alone.answer_ids.repeat_interleave(3, 0))


# --- the end -----------------------------------------------------------------------------------------------------


def test_without_allow_eos_exactly_max_tokens_numerals_are_generated(
    talkative: PolicyModel, batch: PolicyBatch, lean_towards_end: Lean
) -> None:
    lean_towards_end(talkative, batch, 50.0)
    prefix = talkative.prefix(batch.shared, batch.grids)
    for decoding in ("greedy", "median", "sample"):
        drawn = uniforms(0, 6, 5) if decoding == "sample" else None
        completions = Sampler(talkative, decoding).generate(prefix, batch.prompts, 5, drawn)
        assert completions.mask.all() and (completions.lengths == 5).all() and completions.answer_ids.shape == (6, 5)
        assert (completions.answer_ids < len(talkative.vocabulary)).all()


def test_with_allow_eos_a_certain_end_comes_first(
    talkative: PolicyModel, batch: PolicyBatch, lean_towards_end: Lean
) -> None:
    lean_towards_end(talkative, batch, 100.0)
    sampler = Sampler(talkative, "greedy", allow_eos=True)
    completions = sampler.generate(talkative.prefix(batch.shared, batch.grids), batch.prompts, 5)
    assert completions.answer_ids.tolist() == [[len(talkative.vocabulary)]] * 6, "and nobody decodes on"
    assert completions.mask.all() and (completions.lengths == 0).all() and (completions.values == 0).all()


@pytest.fixture
def some_that_ended(talkative: PolicyModel, batch: PolicyBatch, lean_towards_end: Lean) -> Callable[..., Completions]:
    """Five candidates of up to six tokens for each of six cells."""
    lean_towards_end(talkative, batch, 6.0)

    def write(temperature: float = 1.0, top_p: float = 1.0) -> Completions:
        sampler = Sampler(talkative, "sample", 5, temperature, top_p, allow_eos=True)
        prefix = talkative.prefix(batch.shared, batch.grids)
        return sampler.generate(prefix, batch.prompts, 6, uniforms(3, 30, 6))

    return write


def test_mask_lengths_and_values_of_sequences_that_end(
    talkative: PolicyModel, some_that_ended: Callable[..., Completions]
) -> None:
    completions = some_that_ended()
    end = len(talkative.vocabulary)
    ended = (completions.answer_ids == end).any(1)
    assert 3 < ended.sum() < 27 and len(completions.lengths.unique()) > 3, "the seed must give both kinds"
    for row in range(30):
        choices = completions.answer_ids[row].tolist()
        length = choices.index(end) if end in choices else len(choices)
        assert completions.lengths[row] == length
        assert completions.mask[row].tolist() == [position <= length for position in range(6)]
        assert choices[length:] == [end] * (6 - length)  # an ended sequence stays ended
        assert (completions.values[row, length:] == 0).all() and (completions.log_probs[row, length + 1 :] == 0).all()
        assert (completions.log_probs[row, : min(length + 1, 6)] < 0).all()


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (1.3, 1.0), (0.8, 0.6)])
def test_log_probs_equal_those_of_one_forward_over_the_finished_text(
    talkative: PolicyModel,
    batch: PolicyBatch,
    some_that_ended: Callable[..., Completions],
    temperature: float,
    top_p: float,
) -> None:
    """What was sampled token by token from a cache is what the learner sees: ratio 1 before the first update. A
    nucleus narrows the draw; the log-probability is still that among all choices."""
    completions = some_that_ended(temperature, top_p)
    tree = candidate_tree(talkative, batch, completions)
    again = completion_log_probs(talkative, tree, completions, temperature, sizes=[2, 4, 7])
    assert torch.allclose(again, completions.log_probs, atol=1e-4)
    assert (again[~completions.mask] == 0).all()


# --- the nucleus -------------------------------------------------------------------------------------------------


def naive_nucleus(p: list[float], top_p: float) -> set[int]:
    """Holtzman et al. 2020: the most likely choices, one after another, until their probabilities reach top_p."""
    inside, total = set(), 0.0
    for choice in sorted(range(len(p)), key=lambda i: -p[i]):
        if total >= top_p:
            break
        inside.add(choice)
        total += p[choice]
    return inside


def test_the_nucleus_is_the_fewest_most_likely_choices() -> None:
    p = torch.tensor([[0.1, 0.5, 0.15, 0.25], [0.25, 0.25, 0.25, 0.25], [0.0, 1.0, 0.0, 0.0]])
    assert nucleus(p, 0.6).tolist() == [[0.0, 0.5, 0.0, 0.25], [0.25, 0.25, 0.25, 0.0], [0.0, 1.0, 0.0, 0.0]]
    random = torch.from_numpy(np.random.default_rng(0).dirichlet(np.full(40, 0.3), size=100))
    for top_p in (1e-9, 0.3, 0.9, 1.0):
        cut = nucleus(random, top_p)
        for row, kept in zip(random, cut, strict=True):
            inside = naive_nucleus(row.tolist(), top_p)
            assert set(kept.nonzero().flatten().tolist()) == inside
            assert torch.equal(kept[sorted(inside)], row[sorted(inside)])


def test_nothing_outside_the_nucleus_is_ever_drawn(
    talkative: PolicyModel, batch: PolicyBatch, some_that_ended: Callable[..., Completions]
) -> None:
    """Every choice of 30 candidates is in the nucleus of a distribution computed from their text, at the temperature;
    without the cut some would not be."""
    outside = {}
    for top_p in (0.5, 1.0):
        completions = some_that_ended(0.9, top_p)
        tree = candidate_tree(talkative, batch, completions)
        states = torch.empty(30, completions.answer_ids.shape[1], talkative.rows.input.shape[1])

        def visit(rows: slice, of_rows: Tensor, states: Tensor = states) -> Tensor:
            states[rows] = of_rows
            return states

        prefix_tree.forward(talkative, tree, visit, [9, 9, 9])
        p = (head_logits(states.flatten(0, 1), talkative.answer_head) / 0.9).softmax(-1).view(*states.shape[:2], -1)
        drawn = [(p[i, t].tolist(), int(completions.answer_ids[i, t])) for i, t in completions.mask.nonzero().tolist()]
        # A hair wider, since probabilities of another pass differ in their last digits.
        outside[top_p] = sum(choice not in naive_nucleus(row, 0.5 + 1e-4) for row, choice in drawn)
        assert len({choice for _, choice in drawn}) > 10
    assert outside[0.5] == 0 < outside[1.0]


# --- all steps in one pass ---------------------------------------------------------------------------------------


def test_direct_is_the_mean_behind_blanks(policy: PolicyModel, batch: PolicyBatch, prefix: Prefix) -> None:
    """Step k is read where k − 1 blanks stand for the answers before it; the end token has no share in the mean."""
    direct = Sampler(policy, "direct").forecast(prefix, batch.prompts)[:, 0]
    assert direct.shape == (6, 3)
    for step in range(3):
        blanks = batch.prompts.new_full((6, step), policy.blank_id)
        hidden, _ = policy.branch(prefix, torch.cat([batch.prompts, blanks], dim=1))
        p = head_logits(hidden[:, -1], policy.answer_head).double()[:, :-1].softmax(-1).numpy()
        expected = [sum(q * v for q, v in zip(row, policy.vocabulary.values, strict=True)) for row in p]
        assert direct[:, step].tolist() == pytest.approx(expected, rel=1e-3)


def test_logits_of_a_few_sequences_at_a_time_change_nothing(
    policy: PolicyModel, batch: PolicyBatch, prefix: Prefix, monkeypatch: pytest.MonkeyPatch
) -> None:
    makers = [lambda: Sampler(policy, "greedy").generate(prefix, batch.prompts, 3).answer_ids]
    makers += [lambda: Sampler(policy, "direct").forecast(prefix, batch.prompts)]
    together = [make() for make in makers]
    calls: list[int] = []
    logits = sampler.head_logits
    monkeypatch.setattr(sampler, "head_logits", lambda hidden, head: calls.append(len(hidden)) or logits(hidden, head))
    monkeypatch.setattr(sampler, "LOGIT_BYTES", 4 * 1801 * 4)
    greedy, direct = [make() for make in makers]
    assert calls == [4, 2] * 3 + [3] * 6, "six cells of a step, and one cell's three steps"
    assert torch.equal(greedy, together[0])
    torch.testing.assert_close(direct, together[1], rtol=1e-4, atol=1e-2)


def test_a_vocabulary_larger_than_the_budget_is_read_one_sequence_at_a_time(
    policy: PolicyModel, batch: PolicyBatch, prefix: Prefix, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The least there can be, where even one sequence's logits are more than the budget."""
    calls: list[int] = []
    logits = sampler.head_logits
    monkeypatch.setattr(sampler, "head_logits", lambda hidden, head: calls.append(len(hidden)) or logits(hidden, head))
    monkeypatch.setattr(sampler, "LOGIT_BYTES", 1)
    Sampler(policy, "greedy").generate(prefix, batch.prompts, 2)
    Sampler(policy, "direct").forecast(prefix, batch.prompts)
    assert calls == [1] * 6 * 2 + [3] * 6, "of one step, and one cell's three steps"


def test_policy_forecast_is_the_samplers(policy: PolicyModel, batch: PolicyBatch, prefix: Prefix) -> None:
    """The notebook's call: frames [S, H, W] in units, positions of cells, local time of the last frame."""
    prompts, first = batch.prompts[:3], policy.first_numeral_id
    hour = policy.vocabulary.decode(batch.shared[0][batch.shared[0] >= first].numpy() - first)[0]
    origin = np.datetime64("2013-11-01T00:00") + np.timedelta64(int(hour), "h")  # window 0 is of the first day
    frames = batch.grids[0].numpy()
    ours = Policy(policy).forecast(frames, [(0, 1), (2, 2), (4, 2)], origin, decoding="greedy")
    one = policy.prefix(batch.shared[:1], batch.grids[:1])
    assert ours.shape == (3, 3)
    assert np.array_equal(ours, Sampler(policy, "greedy").generate(one, prompts, 3).values.numpy())


def test_policy_forecast_names_cells_by_the_datas_own_ids(make_policy: Callable[..., PolicyModel]) -> None:
    """A block cut out of a city starts at row 41: its prompts say 41, whatever the position in the array."""
    policy = make_policy()
    setting = policy.spec.setting
    policy.set_task(policy.spec.model_copy(update={"setting": setting.model_copy(update={"first_cell": (41, 7)})}))
    frames = np.random.default_rng(0).uniform(1, 100, (setting.history, 5, 4)).astype(np.float32)
    origin = np.datetime64("2013-11-05T09:00")
    shared = torch.tensor([policy.prompts.shared(origin)])
    prompts = policy.prompts.cells(np.array([43]), np.array([8]), frames[:, 2, 1][None])
    prefix = policy.prefix(shared, torch.from_numpy(frames)[None])
    expected = Sampler(policy, "direct").forecast(prefix, torch.from_numpy(prompts))
    assert np.array_equal(
        Policy(policy).forecast(frames, [(2, 1)], origin, decoding="direct"), expected[:, 0].detach().numpy()
    )
