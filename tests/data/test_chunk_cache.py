"""The cache of decoded frames: bounded, shared by threads, and honest about failures."""

import pickle
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, Event

import numpy as np
import pytest

from stdist.data.chunk_cache import ChunkCache


def _of(value: int, size: int = 10):
    return lambda: np.full(size, value, np.int64)


def _unread():
    raise AssertionError("read again")


def test_the_longest_unused_go_first_and_bytes_stay_within_the_limit():
    cache = ChunkCache(limit=240)
    for key in range(3):
        cache.get(key, _of(key))
    assert cache.nbytes == 240
    cache.get(0, _unread)
    cache.get(3, _of(3))
    assert cache.nbytes == 240
    for key in (0, 2, 3):
        assert cache.get(key, _unread)[0] == key
    assert cache.get(1, _of(7))[0] == 7


def test_what_is_larger_than_the_limit_is_handed_out_and_not_held():
    cache = ChunkCache(limit=79)
    assert cache.get("a", _of(1))[0] == 1 and cache.nbytes == 0
    assert cache.get("a", _of(2))[0] == 2


def test_threads_that_ask_at_once_read_once():
    cache, together, reads = ChunkCache(), Barrier(4), []

    def ask(_):
        together.wait()
        return cache.get("a", lambda: (reads.append(1), Event().wait(0.05), np.ones(3))[-1])

    with ThreadPoolExecutor(4) as pool:
        arrays = list(pool.map(ask, range(4)))
    assert len(reads) == 1 and all(array is arrays[0] for array in arrays)


def test_a_failure_is_raised_and_read_again_when_asked_again():
    cache = ChunkCache()
    with pytest.raises(ZeroDivisionError):
        cache.get("a", lambda: 1 / 0)
    assert cache.get("a", _of(5))[0] == 5 and cache.nbytes == 80


def test_nobody_writes_into_what_others_read():
    with pytest.raises(ValueError, match="read-only"):
        ChunkCache().get("a", _of(5))[0] = 1


def test_a_pickled_copy_is_empty_and_keeps_the_limit():
    cache = ChunkCache(limit=1000)
    cache.get("a", _of(5))
    copy = pickle.loads(pickle.dumps(cache))
    assert copy.limit == 1000 and copy.nbytes == 0 and copy.get("a", _of(6))[0] == 6
