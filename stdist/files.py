"""Small files, written whole or not at all; JSON; and the places where something can, or must not, be written."""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stdist.errors import DamageError, InputError, is_damage


@contextmanager
def own_file(path: Path, remedy: str, *kinds: type[Exception]) -> Iterator[None]:
    """Around the reading of a file that this program wrote: what a missing, empty, cut or foreign one raises, an error
    of Python's own or of ``kinds``, becomes a DamageError that names it and ends with ``remedy``; a refusal of the
    system is raised as it is."""
    unreadable: tuple[type[Exception], ...] = (OSError, ValueError, LookupError, TypeError, AttributeError, *kinds)
    try:
        yield
    except InputError:
        raise
    except unreadable as error:
        if not is_damage(error):
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DamageError(f"{path} is damaged ({reason}); {remedy}") from error


def to_json(content: Any, indent: int | None = None) -> str:
    """JSON that every reader takes: ValueError for a number that is not finite, which is nobody's figure."""
    return json.dumps(content, indent=indent, allow_nan=False)


def write_atomically(path: Path, content: str | bytes) -> Path:
    """Replaces a small file so that a reader sees the old content or the new, never a part; makes its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".partial")
    try:
        with open(temporary, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
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
    """Returns the content that ``write_sealed`` wrote; None where it is not as it was written."""
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


def require_writable(folder: Path) -> None:
    """Tries whether files can be made in ``folder``, or in the folder that it would be made in; leaves nothing there.

    To be asked before work whose result goes there. Raises InputError where a file is in its place, and OSError as
    writing would.
    """
    folder = Path(os.path.abspath(folder))
    while not _exists(folder):
        folder = folder.parent
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; nothing can be written below it, choose another place")
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(folder)) from None


def _exists(path: Path) -> bool:
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True
