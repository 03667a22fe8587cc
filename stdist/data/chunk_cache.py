"""Decoded chunks of a store's arrays: bounded in memory, shared by windows and by the threads that read them."""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from threading import Lock

import numpy as np

CACHE_BYTES = 2**30
"""Decoded values that a store keeps by default: 8,928 steps of a 100 x 100 grid take half of it."""


class ChunkCache:
    """Arrays by key, the longest unused ones dropped beyond ``limit`` bytes. Threads may share it.

    A pickled copy is empty: whoever gets one reads the store itself.
    """

    def __init__(self, limit: int = CACHE_BYTES) -> None:
        self.limit = limit
        self._lock = Lock()
        self._arrays: OrderedDict[Hashable, Future[np.ndarray]] = OrderedDict()
        self.nbytes = 0
        """Bytes held; arrays that are being read come on top."""

    def __reduce__(self) -> tuple[type["ChunkCache"], tuple[int]]:
        return ChunkCache, (self.limit,)

    def get(self, key: Hashable, read: Callable[[], np.ndarray]) -> np.ndarray:
        """The array under ``key``, made by ``read`` where it is not held.

        Threads that ask for the same key at once share one call of ``read``, its exception included; a failed
        key is read again when it is asked for again. Nobody may write into the array.
        """
        mine: Future[np.ndarray] = Future()
        with self._lock:
            future = self._arrays.setdefault(key, mine)
            self._arrays.move_to_end(key)
        if future is not mine:
            return future.result()
        try:
            array = read()
        except BaseException as error:
            with self._lock:
                del self._arrays[key]
            mine.set_exception(error)
            raise
        array.flags.writeable = False
        with self._lock:
            mine.set_result(array)
            self.nbytes += array.nbytes
            if self.nbytes > self.limit:
                self._make_room()
        return array

    def _make_room(self) -> None:
        # What another thread is still reading has no size yet, and stays.
        for key in [key for key, future in self._arrays.items() if future.done()]:
            self.nbytes -= self._arrays.pop(key).result().nbytes
            if self.nbytes <= self.limit:
                return
