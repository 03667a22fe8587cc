"""Small files, written whole or not at all."""

import os
from pathlib import Path


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
