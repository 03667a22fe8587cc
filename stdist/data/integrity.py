"""Digests of a store's files, and the checks that tell a whole store from a damaged one."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stdist.errors import InputError

ROOT_METADATA = "zarr.json"


def file_digests(root: Path) -> dict[str, dict[str, Any]]:
    """Size and sha256 of every file below ``root`` but its root metadata, which holds the digests."""
    files = sorted(path for path in root.rglob("*") if path.is_file() and path != root / ROOT_METADATA)
    return {
        path.relative_to(root).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256_of(path)} for path in files
    }


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def combined_digest(files: Mapping[str, Any], attributes: Mapping[str, Any]) -> str:
    """One sha256 over every file's digest and every attribute but the digest itself."""
    rest = {name: value for name, value in attributes.items() if name not in ("digest", "files")}
    text = json.dumps([files, rest], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def require_whole(root: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise InputError naming the first file that is missing or has not its recorded size."""
    for name, recorded in files.items():
        try:
            size = (root / name).stat().st_size
        except FileNotFoundError:
            raise InputError(f"{root} is damaged: {name} is missing; prepare or copy the store again") from None
        if size != recorded["bytes"]:
            raise InputError(
                f"{root} is damaged: {name} has {size} of {recorded['bytes']} bytes; prepare or copy the store again"
            )


def damaged_files(root: Path, files: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Names of files that are missing or whose bytes are not the recorded ones; reads everything."""
    return [
        name
        for name, recorded in files.items()
        if not (root / name).is_file() or sha256_of(root / name) != recorded["sha256"]
    ]
