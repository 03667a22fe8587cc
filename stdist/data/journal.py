"""The journal of a preparation beside its shards while it is under way: its identity, its finished parts, its locks.

All of it lies in the folder ``FOLDER`` of the partial store, which is removed once the store has its name.
"""

import errno
import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from urllib.parse import quote

from stdist.data.parts import PartResult
from stdist.errors import InputError
from stdist.files import own_file, write_atomically

FOLDER = "preparation"
PATIENCE = 30.0
"""Seconds that a restarted preparation waits for workers of a killed one to end."""


@dataclass(frozen=True)
class Journal:
    """The journal of the partial store ``root``. An entry is written after its shards are on the disk, all at once."""

    root: Path

    @property
    def folder(self) -> Path:
        return self.root / FOLDER

    @property
    def scratch(self) -> Path:
        return self.folder / "scratch"

    def identity(self) -> dict[str, Any] | None:
        """The preparation's identity as ``begin`` noted it; None where init was not finished."""
        path = self.folder / "identity.json"
        if not path.exists():
            return None
        with own_file(path, f"remove {self.root} to prepare from the beginning"):
            return dict(json.loads(path.read_text()))

    def begin(self, identity: Mapping[str, Any]) -> None:
        """Notes the identity, once everything that init makes is on the disk."""
        write_atomically(self.folder / "identity.json", json.dumps(identity))

    def add(self, result: PartResult) -> None:
        write_atomically(self.folder / "parts" / f"{quote(result.name, safe='')}.json", json.dumps(vars(result)))

    def finished(self) -> dict[str, PartResult]:
        """Every finished part's result by its name."""
        finished = {}
        for path in sorted((self.folder / "parts").glob("*.json")):
            with own_file(path, "delete it, and its part is read again"):
                result = PartResult(**json.loads(path.read_text()))
            finished[result.name] = result
        return finished

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def lock(self, store: Path, session: str) -> IO[str]:
        """Holds ``store`` for this process until closed, or until the process ends, however it ends.

        From now on ``session`` alone may write shards. Raises InputError where another process holds the
        store, or where workers of a killed one still write after ``PATIENCE``.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        file = (self.folder / "lock").open("a")
        busy = f"{store} is being written by another process; wait for it or choose another name"
        if not _locked(file, fcntl.LOCK_EX | fcntl.LOCK_NB) or not _is(file, self.folder / "lock"):
            file.close()
            raise InputError(busy)
        file.truncate(0)
        file.write(session)
        file.flush()
        with (self.folder / "workers").open("w") as workers:
            end = time.monotonic() + PATIENCE
            while not _locked(workers, fcntl.LOCK_EX | fcntl.LOCK_NB):
                if time.monotonic() > end:
                    file.close()
                    raise InputError(busy)
                time.sleep(0.05)
        return file

    @contextmanager
    def working(self, session: str) -> Iterator[None]:
        """Held while shards are written, in any process: a restart waits until nobody does.

        Raises RuntimeError where a restart came before: who holds a session that is over must not write on.
        """
        with (self.folder / "workers").open("a") as file:
            _locked(file, fcntl.LOCK_SH)
            if (self.folder / "lock").read_text() != session:
                raise RuntimeError(f"the preparation in {self.root} was restarted; this worker is of the one before")
            yield


def _locked(file: IO[str], how: int) -> bool:
    """True where the lock was had, and on file systems without locks, where it is the user's to keep order."""
    try:
        fcntl.flock(file, how)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL):
            raise
    return True


def _is(file: IO[str], path: Path) -> bool:
    """False where ``path`` was removed or renamed by whoever held the lock before."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
