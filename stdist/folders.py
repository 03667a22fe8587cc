"""Folders as wholes: a copy that shares its files, and an exchange in one step."""

import ctypes
import errno
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

AT_FDCWD, RENAME_EXCHANGE = -100, 2
NO_LINKS = (errno.EPERM, errno.EXDEV, errno.EMLINK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EACCES)


def copy_linked(source: Path, target: Path, names: Iterable[str], links: Callable[[str], bool]) -> None:
    """Makes the folder ``target`` with the files ``names`` of ``source``: hard links of those for which ``links`` is
    true, and copies of the others; copies of all where the file system has no links."""
    target.mkdir(parents=True)
    made = set[Path]()
    for name in names:
        file = target / name
        if file.parent not in made:
            file.parent.mkdir(parents=True, exist_ok=True)
            made.add(file.parent)
        if not links(name) or not _link(source / name, file):
            shutil.copy2(source / name, file)
    shutil.copymode(source, target)


def _link(source: Path, target: Path) -> bool:
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        return False
    return True


def exchange(first: Path, second: Path) -> bool:
    """Exchanges the names of two folders of one file system in one step; False where the system cannot (Linux can, on
    most file systems)."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    if renameat2(AT_FDCWD, os.fsencode(first), AT_FDCWD, os.fsencode(second), RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(number, os.strerror(number), str(first))
