"""The sampler: every rank count sees the same samples, at any point and after any resumption."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stdist.data import Region
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


def _epoch(sampler: WindowSampler, epoch: int = 0, consumed: int = 0) -> list[np.ndarray]:
    return [indices for indices, _ in sampler.batches(epoch, consumed)]


def test_order_is_the_recorded_one():
    """A resumed epoch must go on with this very order, whatever version of numpy resumes it."""
    assert _sampler(8, 1, seed=3).order(2).tolist() == [4, 0, 5, 3, 7, 6, 1, 2]
    by_day = _sampler(16, 1, seed=3, days_at_once=1).order(2)
    assert by_day.tolist() == [4, 5, 7, 6, 15, 12, 13, 14, 0, 3, 1, 2, 10, 8, 9, 11]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_the_union_of_ranks_is_the_epochs_order(world):
    ranks = [_sampler(26, 6 // world, seed=5, rank=rank, world=world) for rank in range(world)]
    taken = _taken([_epoch(sampler) for sampler in ranks])
    order = _sampler(26, 6, seed=5).order(0)
    assert sorted(order) == list(range(26))
    # 26 windows make four global batches of six; a training epoch leaves the incomplete fifth.
    assert taken == order[:24].tolist()
    assert [len(sampler) for sampler in ranks] == [4] * world


def test_every_rank_takes_every_wth_sample():
    order = _sampler(12, 1).order(0).tolist()
    first = [_epoch(_sampler(12, 2, rank=rank, world=3))[0].tolist() for rank in range(3)]
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

    first, second, consumed = ranks(*before), ranks(*after), made * before[0] * before[1]
    taken = _taken([_epoch(sampler)[:made] for sampler in first])
    assert made == 0 or {[*sampler.batches(0)][made - 1][1] for sampler in first} == {consumed}
    order, step = second[0].order(0).tolist(), after[0] * after[1]
    rest = _taken([_epoch(sampler, 0, consumed) for sampler in second])
    # A remainder too short for a global batch is left.
    full = (count - consumed) // step
    assert taken + rest == order[: consumed + full * step]
    for sampler in second:
        sampler.consumed = consumed
        assert sampler.begin() == ((1, 0) if made and full == 0 else (0, consumed))


@pytest.mark.parametrize(
    ("settings", "consumed", "goes_on_at"),
    [
        # Seven windows, two a batch: the seventh is no batch of training, and one of evaluation.
        ({}, 5, (3, 5)),
        ({}, 6, (4, 0)),
        ({"world": 2}, 3, (3, 3)),
        ({"world": 2}, 4, (4, 0)),
        ({"shuffle": False}, 6, (3, 6)),
        ({"shuffle": False}, 7, (4, 0)),
        ({}, 0, (3, 0)),
    ],
)
def test_an_epoch_with_no_batch_left_is_over(settings, consumed, goes_on_at):
    sampler = _sampler(7, 2, **settings)
    sampler.epoch, sampler.consumed = 3, consumed
    assert sampler.begin() == goes_on_at == (sampler.epoch, sampler.consumed)


@given(st.integers(1, 30), st.integers(1, 5), st.integers(1, 5))
def test_evaluation_sees_every_window_exactly_once_at_any_world_size(count, batch_size, world):
    ranks = [_sampler(count, batch_size, shuffle=False, rank=rank, world=world) for rank in range(world)]
    batches = [_epoch(sampler) for sampler in ranks]
    assert _taken(batches) == list(range(count))
    assert [len(sampler) for sampler in ranks] == [len(rank) for rank in batches]
    assert all(len(batch) for rank in batches for batch in rank)


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


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"batch_size": 0}, "batch_size 0"),
        ({"batch_size": 1, "days_at_once": 0}, "days_at_once 0"),
        ({"batch_size": 1, "rank": 2, "world": 2}, "rank 2 of 2 ranks does not exist"),
        ({"batch_size": 1, "seed": -1}, "seed -1 is negative"),
        ({"batch_size": 4, "world": 3}, "10 windows make no global batch of 3 ranks x 4"),
    ],
)
def test_bad_settings_are_one_clear_line(settings, line):
    with pytest.raises(InputError, match=line):
        WindowSampler(ListedWindows(10), **settings)


def test_distributed_evaluation_is_single_process_evaluation(make_store):
    """Sums over three ranks, two of which end with a smaller batch, are those of one process."""
    rng = np.random.default_rng(0)
    values = rng.lognormal(3, 1, (144, 4, 5)).astype(np.float32)
    values[rng.random(values.shape) < 0.05] = np.nan
    windows = make_store(values).windows("train", 6, 3, channel="internet")

    def score(rank: int, world: int) -> ErrorState:
        state = ErrorState.empty(3)
        for indices in _epoch(WindowSampler(windows, 4, shuffle=False, rank=rank, world=world)):
            batch = windows.read(indices)
            made = np.repeat(batch.history[:, -1:], 3, axis=1)
            state += ErrorState.of(made, batch.target, batch.target_observed)
        return state

    alone, merged = score(0, 1), sum((score(rank, 3) for rank in range(3)), ErrorState.empty(3))
    assert alone.count.tolist() == merged.count.tolist() and (alone.count < len(windows) * 20).all()
    for name in ("sum_absolute_error", "sum_squared_error", "sum_truth"):
        np.testing.assert_allclose(getattr(merged, name), getattr(alone, name), rtol=1e-12)
