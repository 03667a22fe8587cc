"""The shards of a finished store, or of a working copy of one, each compared with its record before it is read.

What is computed of a store's values is sealed with new digests: a damaged shard must not be made good by them.
"""

from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np

from stdist.data.integrity import damage, is_as_recorded
from stdist.data.parts import Tile
from stdist.data.shards import Shards

KEPT = 4
"""Decoded shards in memory: of two days, values and what of them was observed."""


class RecordedShards(Shards):
    """``records``: bytes and sha256 of every file by name; those of shards that are written are kept true. ``named``:
    the store that a DamageError names, where this is a working copy of it."""

    def __init__(self, path: Path, attributes: dict[str, Any], named: Path | None = None) -> None:
        super().__init__(path, attributes)
        self.records: dict[str, Any] = dict(attributes["files"])
        self._named = named or path
        self._sound: set[str] = set()
        self._decoded = OrderedDict[str, np.ndarray]()

    def require_sound(self, *arrays: str) -> None:
        """Compares every file of these arrays with its record. Raises DamageError, naming the file."""
        for file in self.records:
            if file.split("/")[0] in arrays:
                self.require_file(file)

    def read(self, name: str, day: int, tile: Tile) -> np.ndarray:
        """Raises DamageError where the shard is not as it was written. The last ones read are kept: nobody may write
        into them."""
        file = self.file_of(name, day, tile)
        self.require_file(file)
        values = self._decoded.pop(file, None)
        if values is None:
            values = super().read(name, day, tile)
            values.flags.writeable = False
        self._decoded[file] = values
        if len(self._decoded) > KEPT:
            self._decoded.popitem(last=False)
        return values

    def write(self, name: str, day: int, tile: Tile, values: np.ndarray) -> dict[str, dict[str, Any]]:
        file = self.file_of(name, day, tile)
        written = super().write(name, day, tile, values)
        self.records.pop(file, None)
        self._decoded.pop(file, None)
        self.records |= written
        self._sound.add(file)
        return written

    def take_over(self, other: "RecordedShards") -> None:
        """Takes over the records of the same store, opened before, and what it compared."""
        self.records, self._sound = other.records, other._sound

    def require_file(self, file: str) -> None:
        """Raises DamageError where a file is not as it was written."""
        if file in self._sound:
            return
        recorded = self.records.get(file)
        if recorded is None:
            if (self.path / file).exists():
                raise damage(self._named, f"{file} is not of this store")
        elif not is_as_recorded(self.path / file, recorded):
            raise damage(self._named, f"{file} is not as it was written")
        self._sound.add(file)
