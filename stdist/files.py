"""Small files, written whole or not at all; JSON; folders that can be written into."""

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stdist.errors import DamageError, InputError, is_damage


@contextmanager
def own_file(path: Path, remedy: str) -> Iterator[None]:
    """Around the reading of a file that this program wrote: what a missing, empty, cut or foreign one raises becomes a
    DamageError that names it and ends with ``remedy``; a refusal of the system is raised as it is."""
    try:
        yield
    except InputError:
        raise
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
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
