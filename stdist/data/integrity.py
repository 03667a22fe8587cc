"""Digests of files, and the one place where what is read of a store is compared with them.

Whatever is read of a store through :class:`VerifiedStore` belongs to a file whose digest has been compared with the
recorded one, once since the store was opened (benchmarks/integrity.py measures the cost).
"""

import asyncio
import hashlib
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

from zarr.abc.store import ByteRequest
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import LocalStore

from stdist.errors import DamageError, InputError

ROOT_METADATA = "zarr.json"
TRIES = 10
"""Times that a file is read anew whose place another took meanwhile."""

Identity = tuple[int, ...]
"""Tells the file under a name from another that takes its place; () where there is none."""


def identity(path: Path) -> Identity:
    """Cheap: one look at the name."""
    try:
        stat = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return ()
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


@dataclass(frozen=True)
class SourceRecord:
    """A raw file, or a folder that is one data set, as it was when a preparation began."""

    path: Path
    bytes: int
    sha256: str
    stamps: tuple[tuple[str, int, int], ...]

    @classmethod
    def of(cls, path: Path) -> "SourceRecord":
        """Reads everything: 20 GB take ten seconds of a core that has instructions for it, if the disk keeps up."""
        stamps = _stamps(path)
        if path.is_dir():
            listed = "".join(f"{name} {sha256_of(path / name)}\n" for name, *_ in stamps)
            digest = hashlib.sha256(listed.encode()).hexdigest()
        else:
            digest = sha256_of(path)
        return cls(path, sum(size for _, size, _ in stamps), digest, stamps)

    def as_attribute(self) -> dict[str, Any]:
        return {"name": self.path.name, "bytes": self.bytes, "sha256": self.sha256}


def _stamps(path: Path) -> tuple[tuple[str, int, int], ...]:
    """Name, size and time of change (ns) of every file of a source."""
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    return tuple((p.relative_to(path).as_posix(), p.stat().st_size, p.stat().st_mtime_ns) for p in files)


def require_unchanged(sources: Sequence[SourceRecord]) -> None:
    """Raise InputError naming a source that changed since its record was made."""
    for source in sources:
        if not source.path.exists() or _stamps(source.path) != source.stamps:
            raise InputError(f"{source.path} changed while it was read; prepare again once it is complete")


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def record_of(path: Path) -> dict[str, Any]:
    """The bytes and sha256 that are recorded of a file."""
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path)}


def is_as_recorded(path: Path, recorded: Mapping[str, Any]) -> bool:
    """Reads the file, unless it is missing or its size tells enough."""
    try:
        return path.stat().st_size == recorded["bytes"] and sha256_of(path) == recorded["sha256"]
    except (FileNotFoundError, NotADirectoryError):
        return False


def combined_digest(files: Mapping[str, Any], attributes: Mapping[str, Any]) -> str:
    """One sha256 over every file's digest and every attribute but the digest itself."""
    rest = {name: value for name, value in attributes.items() if name not in ("digest", "files")}
    text = json.dumps([files, rest], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def require_all_files(root: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise DamageError naming the first file that is missing or has not its recorded size."""
    for name, recorded in files.items():
        try:
            size = (root / name).stat().st_size
        except FileNotFoundError:
            raise damage(root, f"{name} is missing") from None
        if size != recorded["bytes"]:
            raise damage(root, f"{name} has {size} of {recorded['bytes']} bytes")


def changed(root: Path) -> InputError:
    return InputError(f"{root} was changed while it was read: days were appended or it was made anew; run it again")


def damage(root: Path, what: str) -> DamageError:
    return DamageError(f"{root} is damaged: {what}; make it again, or copy it again")


class VerifiedStore(LocalStore):
    """The Zarr store in the folder ``root``, to read: each of ``files`` (bytes and sha256 by name) is compared with its
    record before anything of it is handed out, once. A pickled copy begins anew.

    What is read of a file is of the very one that was compared: one that took its place since is compared again. Raises
    DamageError, naming the file, where it is not as recorded or not among ``files``, and InputError where the store has
    another ``digest`` by now (``append``). The root's metadata is compared by whoever has read ``files`` from it.
    """

    def __init__(self, root: Path, files: Mapping[str, Mapping[str, Any]], digest: str | None = None) -> None:
        super().__init__(root, read_only=True)
        self._files, self._digest = files, digest
        self._sound: dict[str, Identity] = {}
        self._checks: dict[str, Future[None]] = {}
        self._lock = Lock()

    def __reduce__(self) -> tuple[type["VerifiedStore"], tuple[Path, Mapping[str, Mapping[str, Any]], str | None]]:
        return VerifiedStore, (self.root, self._files, self._digest)

    async def get(
        self, key: str, prototype: BufferPrototype | None = None, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        if key == ROOT_METADATA:
            return await super().get(key, prototype, byte_range)
        for _ in range(TRIES):
            if key not in self._sound:
                await asyncio.to_thread(self._require_sound, key)
            content = await super().get(key, prototype, byte_range)
            if self._sound.get(key, ()) == identity(self.root / key):
                return content
            with self._lock:  # another file has its place: none of what was read of it is handed out
                self._sound.pop(key, None)
                self._checks.pop(key, None)
        raise changed(self.root)

    def _require_sound(self, key: str) -> None:
        """Threads that ask for one file at once share one reading of it."""
        mine: Future[None] = Future()
        with self._lock:
            check = self._checks.setdefault(key, mine)
        if check is mine:
            try:
                before = identity(self.root / key)
                self._compare(key)
                self._sound[key] = before
                mine.set_result(None)
            except BaseException as error:
                mine.set_exception(error)
        check.result()

    def _compare(self, key: str) -> None:
        path, recorded = self.root / key, self._files.get(key)
        what = ""
        if recorded is None:
            what = f"{key} is not of this store" if path.exists() else ""
        elif not is_as_recorded(path, recorded):
            what = f"{key} is not as it was written"
        if what:
            raise changed(self.root) if self._is_another() else damage(self.root, what)

    def _is_another(self) -> bool:
        """True where the store has another digest than when it was opened."""
        try:
            digest = json.loads((self.root / ROOT_METADATA).read_text())["attributes"]["digest"]
            return self._digest is not None and digest != self._digest
        except (OSError, ValueError, LookupError, TypeError):
            return False
