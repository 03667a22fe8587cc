"""A call that is the last one of its process: killed for real, in a forked process that ends itself with signal 9."""

import os
import signal
from collections.abc import Callable


def kill_at(owner: object, name: str, count: int, before: bool) -> None:
    """Replaces the function ``name`` of ``owner`` in this process, which its ``count``-th call ends: before it, or
    right after."""
    call: Callable[..., object] = getattr(owner, name)
    calls = 0

    def counted(*args: object, **kwargs: object) -> object:
        nonlocal calls
        calls += 1
        if before and calls == count:
            os.kill(os.getpid(), signal.SIGKILL)
        result = call(*args, **kwargs)
        if calls == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, counted)
