"""The memory that this process may have, asked before anything is made of a size that somebody wrote down."""

import os
import resource
from functools import cache
from pathlib import Path

from stdist.errors import InputError

LARGEST = 2**32
"""No option and no key counts anything of which there are more."""
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
    """True where ``size`` bytes can be had at all."""
    return size <= available()


def require_room(size: int, what: str, remedy: str) -> None:
    """Raises InputError where ``size`` bytes, which ``what`` takes at the least, are more than there are."""
    if not fits(size):
        needed, has = (count / 2**30 for count in (size, available()))
        raise InputError(f"{what} takes {needed:,.0f} GiB at the least and this machine has {has:,.0f}; {remedy}")
