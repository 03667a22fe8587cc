"""How much memory this process may have, asked before anything is made of a size that somebody wrote down."""

import os
import resource
from functools import cache
from pathlib import Path

CGROUPS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


@cache
def available() -> int:
    """Bytes: the machine's own, or less where a container or ``ulimit -v`` says so."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    address_space, _ = resource.getrlimit(resource.RLIMIT_AS)
    if address_space != resource.RLIM_INFINITY:
        limits.append(address_space)
    for path in map(Path, CGROUPS):
        try:
            limits.append(int(path.read_text()))
        except (OSError, ValueError):  # there is no such file, or it says "max"
            continue
    return min(limits)


def fits(size: int) -> bool:
    """Whether ``size`` bytes can be had at all."""
    return size <= available()
