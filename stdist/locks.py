"""Locks of what one process at a time may write: a run folder, a store in the making, forecasts.

The kernel holds the lock (``flock``) and frees it when its process ends, however it ends; a note in the locked file
says whose it is, for people and for machines that do not see each other's locks.
"""

import fcntl
import json
import os
import platform
import time
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import psutil

from stdist.errors import InputError

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
"""One for all containers of a machine, another after it was started again."""
TRIES = 50
"""Times that a lock is asked for whose holder removed the file just then."""


class WriterLock:
    """The lock ``path``, held until ``close`` or until the process ends; ``close`` removes the file.

    ``path`` lies in a folder that exists. ``what`` is written, for people; ``note``: more to note beside the owner.
    Raises InputError, naming the owner, where another process holds it. The note of an owner that is gone is written
    over; that of one on another machine never is, since that machine's locks may not be seen from here.
    """

    def __init__(self, path: Path, what: Path, **note: Any) -> None:
        self.path = path
        for _ in range(TRIES):
            self._file = path.open("a+", encoding="utf-8")
            try:
                self._take(what)
            except BaseException:
                self._file.close()
                raise
            if self._is_current():
                break
            self._file.close()
        else:
            raise InputError(f"{what} is being written by other processes; wait for them or choose another name")
        self._file.truncate(0)
        self._file.write(json.dumps(_myself() | note))
        self._file.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        if self._is_current():  # its folder may be gone, with all that was written in it
            self.path.unlink()
        self._file.close()

    def _take(self, what: Path) -> None:
        seen = locked(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        owner = _noted(self._file, wait=seen is not True)
        if seen is False or (owner and seen is None and _is_alive(owner)):
            who = _named(owner) if owner else "another process"
            raise InputError(f"{what} is being written by {who}; wait for it or choose another name")
        if owner and _is_elsewhere(owner):
            raise InputError(
                f"{what} was last written by {_named(owner)}, which cannot be seen from here; "
                f"if it has ended, delete {self.path} and try again"
            )

    def _is_current(self) -> bool:
        """False where the file was removed, or another has its name."""
        try:
            return os.path.samestat(os.fstat(self._file.fileno()), self.path.stat())
        except (FileNotFoundError, NotADirectoryError):
            return False


def locked(file: IO[str], how: int) -> bool | None:
    """True where ``fcntl.flock`` had the lock, False where another has it, None on a file system without locks."""
    try:
        fcntl.flock(file, how)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _myself() -> dict[str, Any]:
    return {
        "host": platform.node(),
        "pid": os.getpid(),
        "started": psutil.Process().create_time(),
        "boot": _boot(),
        "since": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _boot() -> str:
    try:
        return BOOT_ID.read_text().strip()
    except OSError:
        return ""


def _noted(file: IO[str], wait: bool) -> dict[str, Any] | None:
    """The owner in a lock's file; None in a new one, and in one that was cut short: nobody went on from there. wait: it
    is not ours, so that another may be writing it."""
    for _ in range(2 if wait else 1):
        file.seek(0)
        try:
            owner = json.loads(file.read())
            return owner if {"host", "pid", "started", "boot", "since"} <= owner.keys() else None
        except (ValueError, AttributeError):
            if wait:
                time.sleep(0.05)
    return None


def _is_elsewhere(owner: dict[str, Any]) -> bool:
    """True for an owner on another machine; neither a container of this one nor this one before it was started again
    is."""
    return owner["boot"] != _boot() and owner["host"] != platform.node()


def _is_alive(owner: dict[str, Any]) -> bool:
    """True for a process of this machine that runs, and is not another one with its number."""
    if owner["boot"] != _boot():
        return False
    try:
        return abs(psutil.Process(owner["pid"]).create_time() - owner["started"]) < 1
    except psutil.Error:
        return False


def _named(owner: dict[str, Any]) -> str:
    return f"process {owner['pid']} on {owner['host']} (since {owner['since']})"
