"""A SHA-256 inside a Parquet file, over all of it: the format has sums of pages, which few programs write or compare.

The file is written with a blank of the digest's length in its footer's metadata, which lies there as plain text; then
the blank is overwritten with the digest of the file as it is.
"""

import hashlib
from pathlib import Path
from typing import BinaryIO

from stdist.errors import DamageError

SEAL_KEY = "stdist_sha256"
BLANK = "0" * 64
"""Placeholder of the digest, until the file is sealed."""
_BLOCK = 2**20
_TAIL = 8
"""Bytes behind the footer: its length and the format's mark."""


def seal(path: Path) -> None:
    """Writes the digest into a file that has the blank."""
    with path.open("r+b") as file:
        place = _place(file)
        digest = _digest(file, place)
        file.seek(place)
        file.write(digest.encode())


def require_sealed(path: Path) -> None:
    """Raises DamageError where any byte of a sealed file is not as it was written, or nothing is sealed in it."""
    with path.open("rb") as file:
        try:
            place = _place(file)
            file.seek(place)
            sound = file.read(len(BLANK)).decode(errors="replace") == _digest(file, place)
        except ValueError:
            sound = False
    if not sound:
        raise DamageError(
            f"{path} is not as stdist wrote it: damaged, or written again by another program; forecast again, or take "
            "the file as it was"
        )


def _place(file: BinaryIO) -> int:
    """Returns the offset of the digest's text. Raises ValueError where there is none."""
    end = file.seek(0, 2)
    file.seek(max(0, end - _TAIL))
    length = int.from_bytes(file.read(4), "little")
    begin = end - _TAIL - length
    if begin < 0:
        raise ValueError("no footer")
    file.seek(begin)
    # A text follows its length and type, a byte each.
    return begin + file.read(length).rindex(SEAL_KEY.encode()) + len(SEAL_KEY) + 2


def _digest(file: BinaryIO, place: int) -> str:
    """Returns the SHA-256 of the whole file, with the blank at ``place``."""
    digest = hashlib.sha256()
    file.seek(0)
    at = 0
    while at < place:
        block = file.read(min(_BLOCK, place - at))
        digest.update(block)
        at += len(block)
    digest.update(BLANK.encode())
    file.seek(place + len(BLANK))
    while block := file.read(_BLOCK):
        digest.update(block)
    return digest.hexdigest()
