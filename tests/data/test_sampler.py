"""The sampler: every rank count sees the same samples, at any point and after any resumption."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stdist.data import DaySpan, Region
from stdist.data.sampler import WindowSampler
from stdist.errors import InputError
from stdist.evaluation.metrics import ErrorState


class ListedWindows:
    """What a sampler needs of ``count`` windows, four of each day, in a region of 2 x 3 cells, one of them outside."""

    def __init__(self, count: int) -> None:
        self.origins = np.arange(count) * 36
        self.region = Region(0, 2, 0, 3)
        inside = np.array([[True, True, True], [True, True, False]])
        self.store = SimpleNamespace(slots_per_day=144, digest="d", inside=inside)
        self.contract = f"{count} windows"

    def __len__(self) -> int:
        return len(self.origins)


def _sampler(count: int, batch_size: int, **settings) -> WindowSampler:
    return WindowSampler(ListedWindows(count), batch_size, **settings)


def _taken(batches: list[list[np.ndarray]]) -> list[int]:
    """The samples of all ranks in the order of the epoch: rank r's b-th is the (b * w + r)-th."""
    world, flat = len(batches), [np.concatenate([*rank, np.zeros(0, int)]) for rank in batches]
    merged = np.full((max(map(len, flat)), world), -1)
    for rank, own in enumerate(flat):
        merged[: len(own), rank] = own
    return merged[merged >= 0].tolist()


def _walk(samplers: list[WindowSampler], batches: int) -> list[int]:
    """What ranks that go in step take in so many batches, over the ends of epochs."""
    taken = []
    while batches:
        epochs = [iter(sampler) for sampler in samplers]
        for step in zip(*epochs, strict=True):
            taken += _taken([[samples.indices] for samples in step])
            batches -= 1
            if not batches:
                return taken
    return taken


def test_order_is_the_recorded_one():
    """A resumed epoch must go on with this very order, whatever version of numpy resumes it."""
    assert _sampler(8, 1, seed=3).order(2).tolist() == [4, 0, 5, 3, 7, 6, 1, 2]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_the_union_of_ranks_is_the_epochs_order(world):
    ranks = [_sampler(26, 6 // world, seed=5, rank=rank, world=world) for rank in range(world)]
    taken = _taken([[samples.indices for samples in sampler] for sampler in ranks])
    order = _sampler(26, 6, seed=5).order(0)
    assert sorted(order) == list(range(26))
    # 26 windows make four global batches of six; a training epoch leaves the incomplete fifth.
    assert taken == order[:24].tolist()
    assert [len(sampler) for sampler in ranks] == [4] * world


def test_every_rank_takes_every_wth_sample():
    order = _sampler(12, 1).order(0).tolist()
    first = [next(iter(_sampler(12, 2, rank=rank, world=3))).indices.tolist() for rank in range(3)]
    assert first == [[order[0], order[3]], [order[1], order[4]], [order[2], order[5]]]


def test_epochs_and_seeds_differ_and_repeat_themselves():
    orders = [tuple(_sampler(50, 1, seed=seed).order(epoch)) for seed in (0, 1) for epoch in (0, 1, 0)]
    assert len(set(orders)) == 4 and orders[0] == orders[2]


@given(st.data())
def test_resumed_anywhere_at_any_world_size_goes_on_with_the_remaining_samples(data):
    count, seed = data.draw(st.integers(12, 60)), data.draw(st.integers(0, 9))
    before, after = (data.draw(st.tuples(st.integers(1, 3), st.integers(1, 4))) for _ in range(2))
    made = data.draw(st.integers(0, count // (before[0] * before[1])))

    def ranks(world: int, batch_size: int) -> list[WindowSampler]:
        return [_sampler(count, batch_size, seed=seed, rank=r, world=world) for r in range(world)]

    first = ranks(*before)
    taken = _walk(first, made)
    states = [json.loads(json.dumps(sampler.state_dict())) for sampler in first]
    assert all(state == states[0] for state in states)
    second = ranks(*after)
    for sampler in second:
        sampler.load_state_dict(states[0])
    order, step = second[0].order(0).tolist(), after[0] * after[1]
    whole = (count - len(taken)) // step
    rest = _walk(second, whole + 1)
    # A remainder too short for a global batch is left, and the next epoch begins.
    remaining = order[len(taken) : len(taken) + whole * step]
    assert taken == order[: len(taken)]
    assert rest == remaining + second[0].order(1 if made or whole else 0).tolist()[:step]


@given(st.integers(1, 30), st.integers(1, 5), st.integers(1, 5))
def test_evaluation_sees_every_window_exactly_once_at_any_world_size(count, batch_size, world):
    ranks = [_sampler(count, batch_size, shuffle=False, rank=rank, world=world) for rank in range(world)]
    batches = [[samples.indices for samples in sampler] for sampler in ranks]
    assert _taken(batches) == list(range(count))
    assert [len(sampler) for sampler in ranks] == [len(rank) for rank in batches]
    assert all(len(batch) for rank in batches for batch in rank)


def test_an_interrupted_run_takes_the_same_samples_over_several_epochs():
    whole = _walk([_sampler(11, 2)], 13)
    for made in range(14):
        first, second = _sampler(11, 2), _sampler(11, 2)
        taken = _walk([first], made)
        second.load_state_dict(first.state_dict())
        assert taken + _walk([second], 13 - made) == whole


def test_days_at_once_keeps_windows_of_few_days_together():
    """Forty days of four windows: between a day's first window and its last no more than 2 * 3 others are met."""
    sampler = _sampler(160, 1, days_at_once=3)
    order = sampler.order(0)
    assert sorted(order) == list(range(160)) and order.tolist() != sampler.order(1).tolist()
    days = order // 4
    met = []
    for day in range(40):
        (at,) = np.nonzero(days == day)
        met.append(len(set(days[at[0] : at[-1] + 1])) - 1)
    assert max(met) <= 2 * 3 and np.mean(met) > 2
    # Days are in no order, and neither are windows of a day.
    first = days[np.sort(np.unique(days, return_index=True)[1])]
    assert first.tolist() != sorted(first)
    assert any(np.diff(order[days == day]).min() < 0 for day in range(40))


def test_cells_are_those_of_seed_epoch_and_window_alone():
    samplers = [_sampler(12, 12 // world, cells_per_window=2, world=world) for world in (1, 2, 3)]
    alone = samplers[0].cells(0, np.arange(12))
    for sampler in samplers:
        for samples in sampler:
            np.testing.assert_array_equal(samples.cells, alone[samples.indices])
    assert alone.shape == (12, 2) and (alone[:, 0] < alone[:, 1]).all()
    assert (samplers[0].cells(1, np.arange(12)) != alone).any()


def test_cells_outside_the_city_or_without_weight_are_never_drawn():
    cells = np.arange(200)
    assert set(_sampler(200, 1, cells_per_window=5).cells(0, cells).ravel()) == {0, 1, 2, 3, 4}
    weights = np.array([[1, 0, 1], [0, 3, 9]])
    assert set(_sampler(200, 1, cells_per_window=2, cell_weights=weights).cells(0, cells).ravel()) == {0, 2, 4}


def test_cells_are_drawn_in_proportion_to_their_weights():
    """Weights 1, 2, 5. First draw: 1/8, 1/4, 5/8. In either of two draws without replacement, by hand:
    P(1) = 1/8 + 1/4 * 1/6 + 5/8 * 1/3 = 3/8, P(2) = 1/4 + 1/8 * 2/7 + 5/8 * 2/3 = 59/84."""
    weights, n = np.array([[1, 2, 5], [0, 0, 0]]), 20_000
    for count, expected in ((1, [1 / 8, 1 / 4, 5 / 8]), (2, [3 / 8, 59 / 84, 2 - 3 / 8 - 59 / 84])):
        drawn = _sampler(n, 1, cells_per_window=count, cell_weights=weights).cells(0, np.arange(n))
        shares = np.bincount(drawn.ravel(), minlength=3) / n
        np.testing.assert_allclose(shares, expected, atol=5 * 0.5 / n**0.5)


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"batch_size": 0}, "batch_size 0"),
        ({"batch_size": 1, "days_at_once": 0}, "days_at_once 0"),
        ({"batch_size": 1, "rank": 2, "world": 2}, "rank 2 of 2 ranks does not exist"),
        ({"batch_size": 1, "seed": -1}, "seed -1 is negative"),
        ({"batch_size": 4, "world": 3}, "10 windows make no global batch of 3 ranks x 4"),
        ({"batch_size": 1, "cells_per_window": 6}, "cannot draw 6 cells a window of 5"),
        ({"batch_size": 1, "cells_per_window": 1, "cell_weights": np.ones(6)}, r"shape \(6,\), region 0:2,0:3"),
        ({"batch_size": 1, "cells_per_window": 1, "cell_weights": -np.ones((2, 3))}, "finite and not negative"),
    ],
)
def test_bad_settings_are_one_clear_line(settings, line):
    with pytest.raises(InputError, match=line):
        WindowSampler(ListedWindows(10), **settings)


@pytest.mark.parametrize(
    ("other", "line"),
    [
        (_sampler(11, 1), "windows '11 windows', this run '10 windows'"),
        (_sampler(10, 1, seed=1), "seed 1, this run 0"),
        (_sampler(10, 1, days_at_once=2), "days_at_once 2, this run None"),
    ],
)
def test_a_state_of_another_order_is_refused(other, line):
    with pytest.raises(InputError, match=line):
        _sampler(10, 1).load_state_dict(other.state_dict())


def test_distributed_evaluation_is_single_process_evaluation(make_store):
    """Sums over three ranks, two of which end with a smaller batch, are those of one process."""
    rng = np.random.default_rng(0)
    values = rng.lognormal(3, 1, (144, 4, 5)).astype(np.float32)
    values[rng.random(values.shape) < 0.05] = np.nan
    windows = make_store(values).windows("train", 6, 3, channel="internet")

    def score(rank: int, world: int) -> ErrorState:
        state = ErrorState.empty(3)
        for samples in WindowSampler(windows, 4, shuffle=False, rank=rank, world=world):
            batch = windows.read(samples.indices)
            state = state.update(np.repeat(batch.history[:, -1:], 3, axis=1), batch.target, batch.target_observed)
        return state

    alone, merged = score(0, 1), sum((score(rank, 3) for rank in range(3)), ErrorState.empty(3))
    assert alone.count.tolist() == merged.count.tolist() and (alone.count < len(windows) * 20).all()
    for name in ("sum_absolute_error", "sum_squared_error", "sum_truth"):
        np.testing.assert_allclose(getattr(merged, name), getattr(alone, name), rtol=1e-12)


def test_few_shot_windows_are_those_of_the_first_days(make_store):
    """Half of five days is two of them, and their windows do not reach into the third."""
    store = make_store(np.ones((720, 2, 2), np.float32))
    span = DaySpan.parse("2013-11-01:2013-11-05")
    few = store.windows(span, 12, 6, channel="internet", name="train").fraction(0.5)
    assert few.origins.tolist() == list(range(11, 2 * 144 - 6))
    assert few.contract == store.windows(few.span, 12, 6, channel="internet", name="train").contract
