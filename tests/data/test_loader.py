"""The loader: the sampler's batches in its order, bounded, and over when they are over."""

import gc
import random
import threading
import time

import numpy as np
import pytest
import torch

from stdist.data.loader import StepLoader, WindowLoader
from stdist.data.sampler import WindowSampler
from stdist.errors import InputError


@pytest.fixture
def windows(make_store):
    values = np.random.default_rng(0).random((144, 6, 5), np.float32)
    values[np.random.default_rng(1).random(values.shape) < 0.05] = np.nan
    return make_store(values).windows("train", 6, 3, channel="internet")


OTHERS: list[threading.Thread] = []


@pytest.fixture(autouse=True)
def others():
    """Threads of loaders that earlier tests have not let go of."""
    OTHERS[:] = threading.enumerate()


def _threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("window-loader") and t not in OTHERS]


def _before_reading(windows, monkeypatch, call) -> None:
    """Calls ``call(indices)`` in the thread before each batch is read."""
    read = windows.read
    monkeypatch.setattr(windows, "read", lambda indices, empty: (call(indices), read(indices, empty))[1])


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_batches_are_those_of_the_sampler_in_its_order(windows, monkeypatch, threads):
    sampler = WindowSampler(windows, 8, seed=2)
    expected = [(indices, windows.read(indices)) for indices, _ in sampler.batches(0)]
    late = random.Random(0)
    _before_reading(windows, monkeypatch, lambda _: time.sleep(late.random() / 100))
    loader = WindowLoader(WindowSampler(windows, 8, seed=2), threads=threads)
    batches = list(loader)
    assert len(batches) == len(expected) == 17
    for batch, (indices, read) in zip(batches, expected, strict=True):
        np.testing.assert_array_equal(batch.indices, indices)
        for name in ("history", "target", "target_observed", "origin_index"):
            np.testing.assert_array_equal(getattr(batch, name), getattr(read, name))
    assert batches[0].history.dtype == torch.float32 and batches[0].target_observed.dtype == torch.bool


def test_a_threads_failure_is_raised_at_its_batch_with_its_message(windows, monkeypatch):
    order = WindowSampler(windows, 8).order(0)

    def fail(indices) -> None:
        if indices[0] == order[24]:
            raise InputError("shard 3 is cut short")

    _before_reading(windows, monkeypatch, fail)
    loader, handed = WindowLoader(WindowSampler(windows, 8), threads=3), []
    with pytest.raises(InputError, match="shard 3 is cut short"):
        handed.extend(batch.indices for batch in loader)
    assert np.concatenate(handed).tolist() == order[:24].tolist()
    assert loader.sampler.consumed == 24 and not _threads()


@pytest.mark.parametrize("how", ["break", "exception", "dropped"])
def test_no_thread_outlives_an_iteration_that_is_left(windows, how):
    loader = WindowLoader(WindowSampler(windows, 8), threads=3)
    if how == "break":
        for _ in loader:
            break
    elif how == "exception":
        with pytest.raises(ZeroDivisionError):
            for _ in loader:
                1 / 0  # noqa: B018
    else:
        batches = iter(loader)
        next(batches)
        assert _threads()
        del batches
    gc.collect()
    assert not _threads()
    # What was read ahead was not handed out: the epoch goes on with the second batch.
    assert loader.sampler.consumed == 8
    assert next(iter(loader)).indices.tolist() == loader.sampler.order(0)[8:16].tolist()


def test_reading_ahead_is_bounded_and_goes_on_while_the_consumer_works(windows, monkeypatch):
    started = []
    _before_reading(windows, monkeypatch, started.append)
    for handed, _ in enumerate(WindowLoader(WindowSampler(windows, 8), threads=2, prefetch=3), 1):
        ahead, deadline = min(handed + 3, 17), time.monotonic() + 30
        while len(started) < ahead and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.005)
        assert len(started) == ahead


def test_the_sampler_counts_what_was_handed_out_and_goes_on_there(windows):
    whole = WindowLoader(WindowSampler(windows, 8, seed=1))
    expected = [batch.indices.tolist() for _ in range(2) for batch in whole]
    first, taken = WindowLoader(WindowSampler(windows, 8, seed=1)), []
    for batch in first:
        taken.append(batch.indices.tolist())
        if len(taken) == 5:
            break
    second = WindowLoader(WindowSampler(windows, 8, seed=1), threads=1, prefetch=1)
    second.sampler.epoch, second.sampler.consumed = first.sampler.epoch, first.sampler.consumed
    taken += [batch.indices.tolist() for _ in range(2) for batch in second]
    assert taken == expected and second.sampler.epoch == 2


def test_a_resumed_loader_at_another_world_size_takes_the_rest(windows):
    first = WindowLoader(WindowSampler(windows, 8, seed=1))
    for number, _ in enumerate(first, 1):
        if number == 6:
            break
    rest = []
    for rank in range(3):
        loader = WindowLoader(WindowSampler(windows, 5, seed=1, rank=rank, world=3))
        loader.sampler.consumed = first.sampler.consumed
        rest.append(np.concatenate([batch.indices for batch in loader]))
    order = first.sampler.order(0)
    assert np.stack(rest, axis=1).ravel().tolist() == order[48 : 48 + (len(order) - 48) // 15 * 15].tolist()


def test_settings_below_one_are_refused(windows):
    for settings in ({"threads": 0}, {"prefetch": 0}):
        with pytest.raises(InputError, match="at least 1"):
            WindowLoader(WindowSampler(windows, 8), **settings)


def test_a_batch_moves_to_a_device(windows):
    batch = next(iter(WindowLoader(WindowSampler(windows, 8))))
    moved = batch.to("meta")
    assert moved.history.device.type == "meta" and moved.history.shape == (8, 6, 6, 5)


@pytest.mark.gpu
def test_batches_are_pinned_where_cuda_is(windows):
    batch = next(iter(WindowLoader(WindowSampler(windows, 8))))
    assert batch.history.is_pinned() and batch.target.is_pinned() and batch.target_observed.is_pinned()
    torch.testing.assert_close(batch.to("cuda").history.cpu(), batch.history)


def test_a_step_has_its_windows_whatever_came_before(windows, monkeypatch):
    """In order and read ahead, out of order, and over the end of an epoch; on one rank or shared by two."""
    loader = StepLoader(windows, 8, seed=2, rank=0, world=1)
    steps = loader.steps_per_epoch
    order = [WindowSampler(windows, 8, seed=2).order(epoch) for epoch in range(2)]
    assert steps == len(windows) // 8
    for step in (0, 1, 2, steps - 1, steps, steps + 1, 1, steps + 1):
        epoch, number = divmod(step, steps)
        expected = order[epoch][8 * number : 8 * number + 8]
        batch = loader.batch(step)
        assert batch.indices.tolist() == loader.indices(step).tolist() == expected.tolist()
        assert np.array_equal(batch.target.numpy(), windows.read(expected).target)
    halves = [StepLoader(windows, 4, seed=2, rank=rank, world=2).batch(1).indices.tolist() for rank in range(2)]
    assert halves == [order[0][8:16:2].tolist(), order[0][9:16:2].tolist()]


def test_days_come_one_by_one_where_the_cache_holds_few(make_store):
    """Half of the cache is for days that are mixed; a span that fits is mixed as a whole."""
    windows = make_store(np.zeros((144 * 8, 2, 2), np.float32)).windows("train", 6, 3, channel="internet")
    assert len(windows.span) > 3
    for days, expected in ((3, 3), (len(windows.span), None)):
        windows.store.chunk_cache.limit = 2 * days * 144 * 4 * 5  # a float32 and a bool of each cell
        order = WindowSampler(windows, 8, seed=2, days_at_once=expected).order(0)
        assert StepLoader(windows, 8, seed=2, rank=0, world=1).indices(0).tolist() == order[:8].tolist()
    windows.store.chunk_cache.limit = 0
    order = WindowSampler(windows, 8, seed=2, days_at_once=2).order(0)
    assert StepLoader(windows, 8, seed=2, rank=0, world=1).indices(0).tolist() == order[:8].tolist()
