"""The journal of a preparation beside its shards while it is under way: its identity, its finished parts, its locks.

All of it lies in the folder ``FOLDER`` of the partial store, which is removed once the store has its name. Every entry
carries its own digest.
"""

import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from stdist.data.integrity import is_as_recorded
from stdist.data.parts import PartResult
from stdist.data.schema import observed_name
from stdist.errors import DamageError, InputError
from stdist.files import read_sealed, write_sealed
from stdist.locks import WriterLock, locked

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
        """The preparation's identity as ``begin`` noted it; None where init was not finished.

        Raises DamageError where it is not as it was noted.
        """
        path = self.folder / "identity.json"
        if not path.exists():
            return None
        if (identity := read_sealed(path)) is None:
            raise DamageError(f"{path} is not as it was written; remove {self.root} and prepare it again")
        return identity

    def begin(self, identity: Mapping[str, Any]) -> None:
        """Notes the identity, once everything that init makes is on the disk."""
        write_sealed(self.folder / "identity.json", identity)

    def add(self, result: PartResult) -> None:
        write_sealed(self._entry("parts", result.name), vars(result))

    def finished(self) -> dict[str, PartResult]:
        """Every finished part's result by its name."""
        entries = (read_sealed(path) for path in sorted((self.folder / "parts").glob("*.json")))
        return {entry["name"]: PartResult(**entry) for entry in entries if entry}

    def add_imputed(self, part: str, files: Mapping[str, Any]) -> None:
        """Notes shards that were written again by ``part`` with their missing values filled in."""
        path = self._entry("imputed", part)
        path.parent.mkdir(exist_ok=True)
        with path.open("a", encoding="utf-8") as notes:
            notes.write(json.dumps(files) + "\n")
            notes.flush()
            os.fsync(notes.fileno())

    def discard_damaged(self, channels: Iterable[str]) -> None:
        """Forgets finished parts whose shards are not as they were written, or whose entry is not: they are redone.
        Shards of no finished part are removed.

        Every shard is read. Good are a part's own bytes, and those that imputation has noted of it. A kill between
        these two leaves a shard that is neither, and costs its part.
        """
        imputed = self._imputed()
        for path in (self.folder / "parts").glob("*.json"):
            entry = read_sealed(path)
            if entry is None or not all(
                is_as_recorded(self.root / name, record) or is_as_recorded(self.root / name, imputed.get(name, record))
                for name, record in entry["files"].items()
            ):
                path.unlink()
        known = {name for part in self.finished().values() for name in part.files}
        for channel in channels:
            for array in (channel, observed_name(channel)):
                for shard in (self.root / array / "c").rglob("*"):
                    if shard.is_file() and shard.relative_to(self.root).as_posix() not in known:
                        shard.unlink()

    def _imputed(self) -> dict[str, Any]:
        """Bytes and sha256 of shards, by name; a note that a kill cut short is none."""
        files: dict[str, Any] = {}
        for path in (self.folder / "imputed").glob("*.json"):
            for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
                with suppress(ValueError, TypeError):
                    files |= json.loads(line)
        return files

    def _entry(self, kind: str, name: str) -> Path:
        return self.folder / kind / f"{quote(name, safe='')}.json"

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def lock(self, store: Path, session: str) -> WriterLock:
        """Holds ``store`` for this process, see ``WriterLock``; from now on ``session`` alone may write shards.

        Raises InputError where another process holds the store, or where workers of a killed one still write after
        ``PATIENCE``.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = WriterLock(self.folder / "lock", store, session=session)
        with (self.folder / "workers").open("w") as workers:
            end = time.monotonic() + PATIENCE
            while locked(workers, fcntl.LOCK_EX | fcntl.LOCK_NB) is False:
                if time.monotonic() > end:
                    lock.close()
                    raise InputError(f"workers of a killed preparation still write {store}; end them and try again")
                time.sleep(0.05)
        return lock

    @contextmanager
    def working(self, session: str) -> Iterator[None]:
        """Held while shards are written, in any process: a restart waits until nobody does.

        Raises RuntimeError where a restart came before: who holds a session that is over must not write on.
        """
        with (self.folder / "workers").open("a") as file:
            locked(file, fcntl.LOCK_SH)
            if self._session() != session:
                raise RuntimeError(f"the preparation in {self.root} was restarted; this worker is of the one before")
            yield

    def _session(self) -> str | None:
        try:
            return json.loads((self.folder / "lock").read_text())["session"]
        except (OSError, ValueError, KeyError):
            return None
