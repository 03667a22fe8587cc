"""Small files, written whole or not at all, and the places where nothing may be written."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from stdist.errors import InputError


def write_atomically(path: Path, text: str) -> Path:
    """Replaces a small file so that a reader sees the old text or the new, never a part; makes its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".partial")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return path


def write_sealed(path: Path, content: Any) -> None:
    """Writes JSON with its own digest, for ``read_sealed``."""
    write_atomically(path, json.dumps({"content": content, "sha256": _digest(content)}))


def read_sealed(path: Path) -> Any:
    """What ``write_sealed`` wrote; None where it is not as it was written."""
    try:
        sealed = json.loads(path.read_text(encoding="utf-8"))
        return sealed["content"] if sealed["sha256"] == _digest(sealed["content"]) else None
    except (ValueError, KeyError, TypeError):
        return None


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def require_outside(path: Path) -> None:
    """Raises InputError where ``path`` lies in a Zarr store or in a run folder."""
    folder = path.parent.resolve()
    for above in (folder, *folder.parents):
        if (above / "zarr.json").is_file() or (above / ".zgroup").is_file():
            raise InputError(f"{path} lies inside the store {above}; choose a name outside it")
        if (above / "config.yaml").is_file() and (above / "checkpoints").is_dir():
            raise InputError(f"{path} lies inside the run folder {above}; choose a name outside it")


def require_working_folder(folder: Path, is_ours: bool) -> None:
    """Raises InputError where ``folder``, which work in progress is kept in, holds what is not ours."""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise InputError(f"{folder} is no folder, and work in progress needs that name; remove it or choose another")
    if folder.is_dir() and not is_ours and any(folder.iterdir()):
        raise InputError(f"{folder} holds other files, and work in progress needs that name; choose another")
