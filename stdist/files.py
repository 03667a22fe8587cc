"""Small files, written whole or not at all, and the places where nothing may be written."""

import os
from pathlib import Path

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
