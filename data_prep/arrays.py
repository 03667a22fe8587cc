"""Arrays in .npy and .npz files, described by their headers.

Pickled files are never loaded: an array of Python objects is refused by its header.
"""

import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from data_prep.common import existing
from data_prep.kinds import kind_of, refuse_kind
from stdist.errors import InputError, is_damage


@dataclass(frozen=True)
class ArrayFile:
    """One array of numbers in a file, before it is read; ``key`` is None in a .npy file."""

    path: Path
    key: str | None
    shape: tuple[int, ...]

    def load(self) -> np.ndarray:
        """The array, mapped and not read where the file is .npy; InputError where the file is damaged."""
        return load_array(self.path, self.key)


def load_array(path: Path, key: str | None) -> np.ndarray:
    try:
        if key is None:
            return np.load(path, mmap_mode="r", allow_pickle=False)
        with np.load(path, allow_pickle=False) as archive:
            return archive[key]
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        if not is_damage(error):
            raise
        raise InputError(f"{path} is damaged ({error}); download or write it again") from error


def array_file(path: Path, key: str | None, *dims: str) -> ArrayFile:
    """The array ``key`` of a file, or its only one where None; reads headers alone.

    dims: the axes it may have, as ``"T, N, C"``, named in errors. Raises InputError for a file that is no
    .npy or .npz file or was cut short, for another key, for pickled objects, and for another number of axes.
    """
    headers = array_headers(existing(path))
    axes = " or ".join(f"({axis_names})" for axis_names in dims)
    if key is None and len(headers) != 1:
        raise InputError(f"{path} holds {len(headers)} arrays ({', '.join(headers)}); choose with --array")
    name = next(iter(headers)) if key is None or list(headers) == [""] else key
    if name not in headers:
        raise InputError(f"{path} has no array {key!r} {axes}; it has {', '.join(headers) or 'none'}")
    shape, dtype = headers[name]
    where = f"{path}, array {name!r}" if name else f"{path}"
    if dtype.hasobject:
        raise InputError(f"{where} holds pickled Python objects, which are never loaded; save it as plain numbers")
    if dtype.kind not in "fiu" or len(shape) not in [axis_names.count(",") + 1 for axis_names in dims] or 0 in shape:
        raise InputError(f"{where} is {dtype} {shape}; it must hold numbers {axes}")
    return ArrayFile(Path(path), name or None, shape)


def array_headers(path: Path) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Shape and type of every array by its key; a .npy file has the one key ``""``. InputError for other files."""
    try:
        if path.suffix != ".npz":
            with path.open("rb") as file:
                shape, dtype = _header(file)
                missing = int(np.prod(shape)) * dtype.itemsize - (path.stat().st_size - file.tell())
        else:
            with zipfile.ZipFile(path) as archive:
                return {name.removesuffix(".npy"): _header(archive.open(name)) for name in archive.namelist()}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        if not is_damage(error):
            raise
        if kind_of(path) not in ("npy", "npz"):
            refuse_kind(path)
        raise InputError(f"{path} is no .npy or .npz file, or was cut short; download or write it again") from error
    if missing > 0 and not dtype.hasobject:
        raise InputError(f"{path} was cut short, {missing} bytes are missing; download or write it again")
    return {"": (shape, dtype)}


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype]:
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(file)
    return shape, dtype


def parse_channels(channels: str | None, count: int, usual: Mapping[int, Sequence[str]], what: str) -> tuple[str, ...]:
    """Channel names from ``a,b,c``; where None, the ``usual`` ones of this many. InputError for a wrong number."""
    if channels is None:
        if count not in usual:
            raise InputError(f"{what} has {count} channels; name them in order: --channels a,b,…")
        return tuple(usual[count])
    names = tuple(name.strip() for name in channels.split(","))
    if len(names) != count or len(set(names)) != count or not all(name.isidentifier() for name in names):
        raise InputError(f"--channels {channels!r} does not name the {count} channels of {what}; write a,b,…")
    return names
