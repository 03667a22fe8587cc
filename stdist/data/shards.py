"""The shards of a store in the making: whole days of whole tiles, written by one process each.

Concurrent writes to parts of a shard lose data silently, so that nothing less than a shard is ever written.
"""

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import zarr

from stdist.data.integrity import ROOT_METADATA, record_of
from stdist.data.journal import Journal
from stdist.data.parts import Day, Part, PartResult, Tile
from stdist.data.schema import observed_name, tiles_of
from stdist.data.stored_arrays import StoredArrays


class Shards(StoredArrays):
    """A store in the making, by day and tile. Cheap to make: reads metadata only."""

    @classmethod
    def of(cls, root: Path) -> "Shards":
        """Opens the partial store ``root``."""
        return cls(root, json.loads((root / ROOT_METADATA).read_text())["attributes"])

    @cached_property
    def group(self) -> zarr.Group:
        return zarr.open_group(self.path, mode="r+", use_consolidated=False)

    @cached_property
    def _arrays(self) -> dict[str, zarr.Array[Any]]:
        # Listed here and not by zarr, which warns of the journal's folder.
        names = [metadata.parent.name for metadata in self.path.glob(f"*/{ROOT_METADATA}")]
        return {name: cast("zarr.Array[Any]", self.group[name]) for name in names}

    @cached_property
    def tiles(self) -> list[Tile]:
        return tiles_of(self.slots_per_day, self.shape)

    def exists(self, day: int, tile: Tile) -> np.ndarray:
        """Nodes that exist on that day, bool of the tile's shape, or one that broadcasts to it."""
        date = self.axis_days.first_day + np.timedelta64(day, "D")
        return np.ones(1, bool) if self.since is None else self.since[tile] <= date

    def slots(self, day: int) -> slice:
        return slice(day * self.slots_per_day, (day + 1) * self.slots_per_day)

    def read(self, name: str, day: int, tile: Tile) -> np.ndarray:
        return np.asarray(self._arrays[name][(self.slots(day), *tile)])

    def file_of(self, name: str, day: int, tile: Tile) -> str:
        """Name of a shard's file within the store."""
        sides = self._arrays[name].shards
        assert sides is not None
        place = [part.start // side for part, side in zip(tile, sides[1:], strict=True)]
        return f"{name}/c/{'/'.join(map(str, (day, *place)))}"

    def write(self, name: str, day: int, tile: Tile, values: np.ndarray) -> dict[str, dict[str, Any]]:
        """Writes one shard; returns its bytes and sha256 by its name, or nothing where it holds fill values alone.

        The bytes are on the disk when this returns.
        """
        self._arrays[name][(self.slots(day), *tile)] = values
        file = self.file_of(name, day, tile)
        path = self.path / file
        if not path.exists():
            return {}
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
        return {file: record_of(path)}


@dataclass(frozen=True)
class PartWriter:
    """Reads a part and writes its shards, then leaves an entry of it in the journal. Picklable where ``read`` is.

    session: whose work it is (``Journal.lock``). written: called after each day (or tile of it).
    """

    root: Path
    session: str
    read: Callable[[Part], Iterator[Day]]
    written: Callable[[], None] | None = None

    def __call__(self, part: Part) -> PartResult:
        """Raises ValueError where a day is not one of the part's own whole shards."""
        journal, shards = Journal(self.root), Shards.of(self.root)
        files: dict[str, dict[str, Any]] = {}
        present: dict[int, np.ndarray] = {}
        seen: set[tuple[int, int]] = set()
        with journal.working(self.session):
            for day in self.read(part):
                present_slots = _present(shards, day)
                for index, tile in _tiles(shards, part, day):
                    if (day.index, index) in seen:
                        raise ValueError(f"part {part.name} yields day {day.index}, tile {index} twice")
                    seen.add((day.index, index))
                    inner = tile if day.tile is None else tuple(slice(None) for _ in tile)
                    files |= _write(shards, day, tile, inner, present_slots)
                present[day.index] = present.get(day.index, np.zeros_like(present_slots)) | present_slots
                if self.written:
                    self.written()
            bits = {str(day): np.packbits(slots).tobytes().hex() for day, slots in sorted(present.items())}
            result = PartResult(part.name, files, {"present": bits})
            journal.add(result)
        return result


def present_of(result: PartResult, slots_per_day: int) -> dict[int, np.ndarray]:
    """Time steps that the sources of a part have, bool [slots_per_day] by day."""
    bits = {int(day): np.frombuffer(bytes.fromhex(text), np.uint8) for day, text in result.result["present"].items()}
    return {day: np.unpackbits(row, count=slots_per_day).astype(bool) for day, row in bits.items()}


def _present(shards: Shards, day: Day) -> np.ndarray:
    slots = shards.slots_per_day
    present = np.ones(slots, bool) if day.present is None else np.asarray(day.present, bool)
    if present.shape != (slots,):
        raise ValueError(f"day {day.index}: present has shape {present.shape}, a day has {slots} slots")
    return present


def _tiles(shards: Shards, part: Part, day: Day) -> list[tuple[int, Tile]]:
    """Number and slices of the tiles that a day holds; ValueError where they are not the part's own shards."""
    of_part = shards.tiles if part.tiles is None else part.tiles
    of_day = of_part if day.tile is None else (day.tile,)
    if day.index not in part.days or not all(tile in of_part and tile in shards.tiles for tile in of_day):
        raise ValueError(f"part {part.name} yields day {day.index}, tile {day.tile}: not one of its whole shards")
    if day.tile is None and len(of_part) < len(shards.tiles):
        raise ValueError(f"part {part.name} owns tiles, but yields day {day.index} of the whole space")
    return [(shards.tiles.index(tile), tile) for tile in of_day]


def _write(shards: Shards, day: Day, tile: Tile, inner: Tile, present: np.ndarray) -> dict[str, dict[str, Any]]:
    """inner: the tile's place in the day's values."""
    shape = shards.shape if day.tile is None else tuple(side.stop - side.start for side in tile)
    keep = present.reshape(-1, *(1 for _ in tile)) & shards.exists(day.index, tile)
    files: dict[str, dict[str, Any]] = {}
    for channel in shards.channels:
        numbers = day.values[channel]
        if numbers.shape != (expected := (shards.slots_per_day, *shape)):
            raise ValueError(f"day {day.index} of {channel} has shape {numbers.shape}, the store {expected}")
        values = np.where(keep, numbers[(slice(None), *inner)], np.float32(np.nan)).astype(np.float32)
        files |= shards.write(channel, day.index, tile, values)
        files |= shards.write(observed_name(channel), day.index, tile, ~np.isnan(values))
    return files
