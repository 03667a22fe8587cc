"""Digests of a store's files, and the checks that tell a whole store from a damaged one."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stdist.errors import DamageError, InputError

ROOT_METADATA = "zarr.json"


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
            raise DamageError(f"{root} is damaged: {name} is missing; prepare or copy the store again") from None
        if size != recorded["bytes"]:
            raise DamageError(
                f"{root} is damaged: {name} has {size} of {recorded['bytes']} bytes; prepare or copy the store again"
            )
