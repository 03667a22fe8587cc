"""Decoded stretches of a store's arrays: bounded in memory, shared by windows and by the threads that read them."""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from threading import Lock

import numpy as np

CACHE_BYTES = 2**30
"""What a store holds in memory unless it is told another limit: 8,928 frames of a 100 x 100 grid take half of it."""


class ChunkCache:
    """Arrays by key, the longest unused ones dropped beyond ``limit`` bytes. Threads may share it.

    A pickled copy is empty: whoever gets one reads the store itself.
    """

    def __init__(self, limit: int = CACHE_BYTES) -> None:
        self.limit = limit
        self._lock = Lock()
        self._held: OrderedDict[Hashable, Future[np.ndarray]] = OrderedDict()
        self._bytes = 0

    def __reduce__(self) -> tuple[type["ChunkCache"], tuple[int]]:
        return ChunkCache, (self.limit,)

    @property
    def nbytes(self) -> int:
        """Bytes held; what is being read comes on top."""
        return self._bytes

    def get(self, key: Hashable, read: Callable[[], np.ndarray]) -> np.ndarray:
        """The array under ``key``, made by ``read`` where it is not held.

        Threads that ask for the same key at once share one call of ``read``, its exception included; a failed
        key is read again when it is asked for again. Nobody may write into the array.
        """
        mine: Future[np.ndarray] = Future()
        with self._lock:
            future = self._held.setdefault(key, mine)
            self._held.move_to_end(key)
        if future is not mine:
            return future.result()
        try:
            array = read()
        except BaseException as error:
            with self._lock:
                del self._held[key]
            mine.set_exception(error)
            raise
        array.flags.writeable = False
        with self._lock:
            mine.set_result(array)
            self._bytes += array.nbytes
            if self._bytes > self.limit:
                self._make_room()
        return array

    def _make_room(self) -> None:
        # What another thread is still reading has no size yet, and stays.
        for key in [key for key, future in self._held.items() if future.done()]:
            self._bytes -= self._held.pop(key).result().nbytes
            if self._bytes <= self.limit:
                return
