"""Continuous batching over cells: the same candidates as all at once, no work for finished ones, no copied keys."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from stdist.data import GridStore
from stdist.vision_llm.config import GRPOConfig
from stdist.vision_llm.policy.city_windows import CityWindows, PolicyBatch
from stdist.vision_llm.policy.model import PolicyModel
from stdist.vision_llm.rollout import decode_batch
from stdist.vision_llm.rollout.decode_batch import DecodeBatch
from stdist.vision_llm.rollout.decode_memory import DecodeMemory, Family
from stdist.vision_llm.rollout.forecaster import validation_errors
from stdist.vision_llm.rollout.recorded_step import RECORDINGS
from stdist.vision_llm.rollout.rollouts import LocalRollouts
from stdist.vision_llm.rollout.sampler import Completions, Decoding, Sampler

MAX_TOKENS = 6


@dataclass
class Call:
    """One call of the decoder: how many sequences, and what the batch says of them."""

    sequences: int
    numbers: list[int]
    steps: list[int]


@pytest.fixture
def talkative(make_policy: Callable[..., PolicyModel]) -> PolicyModel:
    """A policy whose rows a test may change."""
    return make_policy().eval().requires_grad_(False)


@pytest.fixture
def let_end(
    talkative: PolicyModel,
    make_batch: Callable[..., PolicyBatch],
    lean_towards_end: Callable[[PolicyModel, PolicyBatch, float], None],
) -> Callable[[str], None]:
    """From here on candidates of a decoding end at different times."""
    return lambda decoding: lean_towards_end(talkative, make_batch(talkative), 2.8 if decoding == "greedy" else 6.0)


@pytest.fixture
def make_cells(talkative: PolicyModel, make_batch: Callable[..., PolicyBatch]) -> Callable[[int], PolicyBatch]:
    return lambda windows: make_batch(talkative, windows=(0, 9, 31)[:windows], cells=(1, 3, 7, 10, 18))


@pytest.fixture
def calls(talkative: PolicyModel, monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    """Every call of the decoder from here on."""
    recorded: list[Call] = []
    feed = DecodeBatch.feed

    def spy(batch: DecodeBatch, ids: Tensor) -> Tensor:
        recorded.append(Call(len(ids), batch.number.tolist(), batch.step.tolist()))
        return feed(batch, ids)

    monkeypatch.setattr(DecodeBatch, "feed", spy)
    return recorded


def complete(
    policy: PolicyModel, cells: PolicyBatch, decoding: Decoding, g: int, max_tokens: int = MAX_TOKENS
) -> Completions:
    return generate(Sampler(policy, decoding, g, allow_eos=True), cells, max_tokens)


def generate(sampler: Sampler, cells: PolicyBatch, max_tokens: int = MAX_TOKENS) -> Completions:
    prefix, uniforms = sampler.policy.prefix(cells.shared, cells.grids), None
    if sampler.decoding == "sample":
        shape = len(cells.prompts) * sampler.num_generations, max_tokens
        uniforms = torch.rand(shape, generator=torch.Generator().manual_seed(5))
    return sampler.generate(prefix, cells.prompts, max_tokens, uniforms)


def assert_same(ours: Completions, theirs: Completions) -> None:
    assert torch.equal(ours.answer_ids, theirs.answer_ids) and torch.equal(ours.mask, theirs.mask)
    assert torch.equal(ours.values, theirs.values) and torch.equal(ours.lengths, theirs.lengths)
    torch.testing.assert_close(ours.log_probs, theirs.log_probs, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("windows", "decoding", "g"),
    [(1, "sample", 2), (2, "greedy", 1), (2, "sample", 4), (3, "greedy", 1), (3, "sample", 2), (3, "sample", 4)],
)
def test_a_small_batch_writes_what_a_large_one_writes(
    talkative: PolicyModel,
    let_end: Callable[[str], None],
    make_cells: Callable[[int], PolicyBatch],
    calls: list[Call],
    monkeypatch: pytest.MonkeyPatch,
    windows: int,
    decoding: Decoding,
    g: int,
) -> None:
    let_end(decoding)
    calls.clear()
    cells = make_cells(windows)
    together = complete(talkative, cells, decoding, g)
    assert all(0 not in call.steps for call in calls[1:]), "all are let in at once"
    calls.clear()
    most = 3 if g == 1 else 6
    monkeypatch.setattr(decode_batch, "MOST_SEQUENCES", most)
    monkeypatch.setattr(decode_batch, "PREFILL_TOKENS", 2 * cells.prompts.shape[1])
    completions = complete(talkative, cells, decoding, g)
    assert_same(completions, together)
    tokens = completions.mask.sum(1).tolist()
    assert len(set(tokens)) > 1, "candidates end at different times"
    assert_no_holes(calls, tokens, most)


def assert_no_holes(calls: list[Call], tokens: list[int], most: int) -> None:
    """A call's sequences are the unfinished candidates of the batch, each once. ``tokens``: how many each writes; the
    last one is never read."""
    seen: dict[int, list[int]] = {}
    for index, call in enumerate(calls):
        assert call.sequences == len(call.numbers) == len(set(call.numbers)) <= most
        for number, step in zip(call.numbers, call.steps, strict=True):
            assert step == len(seen.setdefault(number, [])), "from its first token on, one by one"
            seen[number].append(index)
    for number, length in enumerate(tokens):
        at = seen.get(number, [])
        assert len(at) == length - 1, "none is decoded behind its end"
        assert at == list(range(at[0], at[0] + len(at))) if at else length == 1, "none waits once it is in the batch"


def test_cells_are_let_in_while_others_still_run(
    talkative: PolicyModel,
    let_end: Callable[[str], None],
    make_cells: Callable[[int], PolicyBatch],
    calls: list[Call],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Fifteen candidates in a batch of five take fewer calls than three batches, each run to its longest one's end."""
    let_end("sample")
    calls.clear()
    monkeypatch.setattr(decode_batch, "MOST_SEQUENCES", 5)
    completions = complete(talkative, make_cells(3), "sample", 1, max_tokens=24)
    assert len([call for call in calls if 0 in call.steps and max(call.steps) > 0]) >= 3
    assert any(len({number // 5 for number in call.numbers}) > 1 for call in calls), "cells of two windows at a time"
    reads = completions.mask.sum(1) - 1
    assert int(reads.sum()) / 5 <= len(calls) < int(reads.view(3, 5).amax(1).sum())


# --- recorded steps --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("windows", "g", "most", "sizes"),
    [
        (1, 3, 6, [6]),
        (3, 3, 1024, [45]),  # all at once
        (3, 1, 10, [10]),  # two windows, then one with the same recording
        (3, 3, 6, [6]),  # a third of a window at a time
    ],
)
def test_a_step_of_fixed_size_writes_the_same(
    talkative: PolicyModel,
    let_end: Callable[[str], None],
    make_cells: Callable[[int], PolicyBatch],
    monkeypatch: pytest.MonkeyPatch,
    graphs: Any,
    windows: int,
    g: int,
    most: int,
    sizes: list[int],
) -> None:
    """As it is recorded for GPUs: rows of finished candidates run on, and nobody reads what they write."""
    let_end("sample")
    cells = make_cells(windows)
    with monkeypatch.context() as patch:
        patch.delitem(RECORDINGS, "cpu")
        expected = complete(talkative, cells, "sample", g)
    graphs.sizes.clear()
    monkeypatch.setattr(decode_batch, "MOST_SEQUENCES", most)
    assert_same(complete(talkative, cells, "sample", g), expected)
    assert graphs.sizes == sizes


def test_one_graph_serves_every_window_and_ends_with_its_sampler(
    talkative: PolicyModel, make_batch: Callable[..., PolicyBatch], graphs: Any
) -> None:
    sampler = Sampler(talkative, "greedy")
    for window in range(12):
        generate(sampler, make_batch(talkative, windows=(window,)), max_tokens=2)
    assert graphs.sizes == [3] and len(graphs.alive) == 1
    generate(sampler, make_batch(talkative, windows=(0,), cells=(1, 2, 3, 4)), max_tokens=2)
    assert graphs.sizes == [3, 4] and len(graphs.alive) == 1, "a larger one takes the place of what has no room"
    sampler.release()
    assert len(graphs.alive) == 0


def test_what_the_last_batch_left_behind_is_not_read(
    talkative: PolicyModel, make_cells: Callable[[int], PolicyBatch], graphs: Any
) -> None:
    """A value that is masked counts zero times, and zero times infinity is no number."""
    sampler, cells = Sampler(talkative, "greedy"), make_cells(1)
    expected = generate(sampler, cells)
    assert sampler._recorded is not None
    for buffer in sampler._recorded.memory.own_values:
        buffer.fill_(torch.inf)
    assert_same(generate(sampler, cells), expected)
    assert len(graphs.sizes) == 1


def test_weights_that_moved_are_recorded_anew(
    talkative: PolicyModel, make_cells: Callable[[int], PolicyBatch], graphs: Any
) -> None:
    """A graph reads weights where they lay; changed in place they are the weights that it reads."""
    sampler, cells = Sampler(talkative, "greedy"), make_cells(1)
    generate(sampler, cells)
    talkative.rows.output.data.mul_(2)
    generate(sampler, cells)
    assert len(graphs.sizes) == 1
    talkative.rows.input.data = talkative.rows.input.data.clone()
    generate(sampler, cells)
    assert len(graphs.sizes) == 2 and len(graphs.alive) == 1


def test_a_learner_samples_with_one_graph_and_trains_with_none(
    talkative: PolicyModel, make_batch: Callable[..., PolicyBatch], graphs: Any
) -> None:
    """A worker, which only samples, keeps it; what an evaluation recorded ends with the evaluation."""
    rollouts = LocalRollouts(talkative, GRPOConfig(num_generations=2), seed=0)
    for window in range(3):
        rollouts.sample(window, make_batch(talkative, windows=(window,)), "")
    assert graphs.sizes == [6] and len(graphs.alive) == 1
    rollouts.versions = {"now": 0}
    rollouts.generate(0, make_batch(talkative, windows=(0,)))
    assert graphs.sizes == [6] and len(graphs.alive) == 0


def test_a_sweep_over_many_windows_has_one_graph(
    talkative: PolicyModel, store: GridStore, monkeypatch: pytest.MonkeyPatch, graphs: Any
) -> None:
    """Nine windows of 20 cells, four windows at a time, of which two decode at once."""
    monkeypatch.setattr(decode_batch, "MOST_SEQUENCES", 40)
    city = CityWindows(talkative, store.windows("validation", 4, 3, channel="internet"))
    validation_errors(talkative, city, np.arange(9), 4, "median")
    assert graphs.sizes == [40] and len(graphs.alive) == 0


@pytest.mark.gpu
@pytest.mark.parametrize("windows", [1, 3])
@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_a_recorded_graph_writes_what_single_steps_write(
    make_policy: Callable[..., PolicyModel],
    make_batch: Callable[..., PolicyBatch],
    monkeypatch: pytest.MonkeyPatch,
    windows: int,
    gradient_checkpointing: bool,
) -> None:
    """In float32, where another batch size changes last digits only; the policy is in training mode, as in a run."""
    policy = make_policy(gradient_checkpointing=gradient_checkpointing).cuda().train()
    cells = make_batch(policy, windows=(0, 9, 31)[:windows], cells=(1, 3, 7, 10, 18))
    monkeypatch.setattr(decode_batch, "MOST_SEQUENCES", 10)
    sampler = Sampler(policy, "greedy", allow_eos=True)
    recorded = [generate(sampler, cells) for _ in range(2)]
    monkeypatch.delitem(RECORDINGS, "cuda")
    expected = complete(policy, cells, "greedy", 1)
    for completions in recorded:
        assert_same(completions, expected)


# --- memory --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("windows", [1, 2])
def test_no_shared_key_is_copied_for_a_sequence(
    talkative: PolicyModel,
    make_cells: Callable[[int], PolicyBatch],
    largest_made: Callable[[], Any],
    monkeypatch: pytest.MonkeyPatch,
    windows: int,
) -> None:
    """While a token of 60 sequences is decoded, nothing is made that could hold the keys of a cell's prompt, let alone
    of a window's, for each of them."""
    cells, g = make_cells(windows), 12
    made: list[tuple[int, int]] = []
    decode = talkative.decode

    def spy(ids: Tensor, positions: Tensor, tree: DecodeMemory) -> Tensor:
        with largest_made() as mode:
            hidden = decode(ids, positions, tree)
        made.append((len(ids), mode.elements))
        return hidden

    monkeypatch.setattr(talkative, "decode", spy)
    complete(talkative, cells, "sample", g, max_tokens=3)
    own = 2 * 32  # keys of one token in one layer
    fewest_tokens = min(cells.prompts.shape[1], cells.shared.shape[1])
    assert [sequences for sequences, _ in made] == [windows * 5 * g] * 2
    assert all(0 < elements < sequences * own * fewest_tokens / 2 for sequences, elements in made)


@pytest.mark.parametrize("g", [1, 8])
def test_a_cells_keys_are_held_once_however_many_candidates_it_has(
    talkative: PolicyModel, make_cells: Callable[[int], PolicyBatch], g: int
) -> None:
    cells = make_cells(2)
    t = cells.prompts.shape[1]
    with torch.no_grad():
        batch = DecodeBatch(
            talkative, talkative.prefix(cells.shared, cells.grids), cells.prompts, g, max_tokens=MAX_TOKENS
        )
        batch.admit()
        batch.feed(torch.full((10 * g,), talkative.first_numeral_id))
    held = {
        x.untyped_storage().data_ptr(): x.untyped_storage().nbytes()
        for x in tensors_of(vars(batch.memory))
        if x.ndim == 4
    }
    # Places of as many cells again, for those that are let in while a last candidate still runs.
    own_tokens, cell_tokens = 10 * g * MAX_TOKENS, 2 * 10 * t
    assert talkative.cache_bytes_per_token == 2 * 4 * 2 * 32 * 4
    assert sum(held.values()) == (own_tokens + cell_tokens) * talkative.cache_bytes_per_token


def tensors_of(value: Any) -> list[Tensor]:
    """Of the memory's own attributes; the windows belong to the caller."""
    if isinstance(value, dict):
        return [x for key, item in value.items() if key not in ("prefix", "policy") for x in tensors_of(item)]
    if isinstance(value, (list, tuple)):
        return [x for item in value for x in tensors_of(item)]
    return [value] if torch.is_tensor(value) else []


def test_the_batch_is_as_large_as_its_cache_may_be(
    talkative: PolicyModel, make_cells: Callable[[int], PolicyBatch], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An even share of all cells; all candidates of a cell at least."""
    cells = make_cells(2)
    prefix = talkative.prefix(cells.shared, cells.grids)

    def slots(sequences: int, g: int) -> int:
        monkeypatch.setattr(decode_batch, "CACHE_BYTES", sequences * MAX_TOKENS * talkative.cache_bytes_per_token)
        return DecodeBatch(talkative, prefix, cells.prompts, g, MAX_TOKENS).slots

    assert [slots(n, 2) for n in (100, 20, 19, 10, 7, 6, 2, 1)] == [20, 20, 10, 10, 6, 6, 2, 2]
    assert [slots(n, 4) for n in (19, 11, 1)] == [16, 8, 4]


def test_a_cache_of_a_large_model_stays_within_a_gibibyte(
    talkative: PolicyModel, make_cells: Callable[[int], PolicyBatch], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it ships: where a token's keys and values take a mebibyte, 170 candidates of six tokens fit, not 171."""
    cells = make_cells(1)
    prefix = talkative.prefix(cells.shared, cells.grids)
    monkeypatch.setattr(type(talkative), "cache_bytes_per_token", 2**20)
    prompts = cells.prompts[:1, :1].expand(170 * 3, 1)
    assert DecodeBatch(talkative, prefix, prompts, 1, max_tokens=6).slots == 170 == 2**30 // (6 * 2**20)


def test_families_by_hand() -> None:
    """Five sequences of three parents, one of which has none; the table is filled up with sequence 0."""
    family = Family.of(torch.tensor([2, 0, 2, 2, 0]), parents=3)
    assert family.rank.tolist() == [0, 0, 1, 2, 1]
    assert family.table.tolist() == [[1, 4, 0], [0, 0, 0], [0, 2, 3]]
    assert torch.equal(family.table[family.parent, family.rank], torch.arange(5))


# --- places ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_cells_are_let_in_when_a_quarter_is_free_and_take_the_first_free_places(
    talkative: PolicyModel, make_cells: Callable[[int], PolicyBatch], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fifteen cells in two rounds of eight, by hand: the last sequence fills a hole, the lowest place goes first."""
    monkeypatch.setattr(decode_batch, "MOST_SEQUENCES", 8)
    cells = make_cells(3)
    batch = DecodeBatch(talkative, talkative.prefix(cells.shared, cells.grids), cells.prompts, 1, MAX_TOKENS)
    assert (batch.slots, len(batch.admit()), batch.waiting) == (8, 8, 7)
    assert batch.keep(torch.arange(8) != 0).tolist() == [7, 1, 2, 3, 4, 5, 6]
    assert (len(batch.admit()), batch.waiting) == (0, 7), "one of eight is less than a quarter"
    assert batch.keep(torch.arange(7) != 0).tolist() == [6, 1, 2, 3, 4, 5]
    assert (len(batch.admit()), batch.waiting) == (2, 5)
    assert batch.number.tolist() == [6, 1, 2, 3, 4, 5, 8, 9]
    assert batch._cell.tolist() == [6, 1, 2, 3, 4, 5, 0, 7]
    assert batch._window.tolist() == [1, 0, 0, 0, 0, 1, 1, 1]
    batch.keep(torch.zeros(8, dtype=torch.bool))
    assert (len(batch.admit()), batch.waiting) == (5, 0) and batch._cell.tolist() == [0, 1, 2, 3, 4]


@torch.no_grad()
def test_a_cells_place_is_free_when_its_last_candidate_has_ended(
    talkative: PolicyModel, make_cells: Callable[[int], PolicyBatch], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two cells of four candidates at a time, places for four: with one candidate of each left, nobody is let in."""
    monkeypatch.setattr(decode_batch, "MOST_SEQUENCES", 8)
    cells = make_cells(2)
    batch = DecodeBatch(talkative, talkative.prefix(cells.shared, cells.grids), cells.prompts, 4, MAX_TOKENS)
    assert len(batch.admit()) == 8 and batch._cell.tolist() == [0] * 4 + [1] * 4
    batch.keep(torch.tensor([0, 0, 0, 1, 0, 0, 0, 1]) == 1)
    for place in (2, 3):
        assert len(batch.admit()) == 4 and batch._cell.tolist()[-4:] == [place] * 4
        batch.keep(torch.arange(len(batch)) < len(batch) - 3)
    assert sorted(batch._cell.tolist()) == [0, 1, 2, 3] and len(batch.admit()) == 0 and batch.waiting == 6
    batch.keep(batch._cell != 2)
    assert len(batch.admit()) == 4 and batch._cell.tolist()[-4:] == [2] * 4
