"""Writes a grid store in three phases: init, parts of whole days in any order, finalise.

Everything is written to ``OUT.partial`` and renamed at the end, so that a killed or failing preparation
leaves nothing under the final name. One process coordinates and holds a lock; parts may be written by any
process, each shard by one of them. What was finished before an interruption is not done again: the store of
a resumed preparation is, byte for byte, that of an undisturbed one.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from types import TracebackType
from typing import Any
from uuid import uuid4

import numpy as np
import zarr
from zarr.codecs import BloscCodec, ZstdCodec

from stdist.data.coordinates import coordinates, create_array, digest_of_arrays
from stdist.data.finalise import finalise
from stdist.data.integrity import ROOT_METADATA, SourceRecord, is_as_recorded, record_of, require_unchanged
from stdist.data.journal import FOLDER, Journal
from stdist.data.parts import Day, Executor, Part, PartResult, RunPart
from stdist.data.schema import GridSpec, NodeSpec, chunk_and_shard, observed_name
from stdist.data.shards import PartWriter
from stdist.data.spans import Split
from stdist.errors import DamageError, InputError
from stdist.files import require_outside, require_working_folder


def serially(run_part: RunPart, parts: list[Part]) -> Iterator[PartResult]:
    """An ``Executor``: one part after the other, in this process."""
    return map(run_part, parts)


class GridWriter:
    """One store in the making, of a grid or of nodes.

    As a context manager it removes its partial output when left by an ``InputError``; after anything else
    (a kill, Ctrl-C, a full disk) it stays, and the same preparation goes on where it stopped.

    out: final path. recipe: what makes the store, JSON. sources: the raw files, whose names, sizes and
    digests are recorded. parts: all of the work, where it is known.
    Raises InputError where ``out`` exists or lies in a store, another process writes it, or its partial output is of
    other work; DamageError where what init made is not as it was written; ValueError where two parts touch one shard.
    """

    def __init__(
        self,
        out: Path,
        spec: GridSpec | NodeSpec,
        recipe: Mapping[str, Any],
        sources: Sequence[Path] = (),
        parts: Sequence[Part] = (),
    ) -> None:
        self.out, self.spec, self.parts = Path(out), spec, list(parts)
        require_disjoint(spec, self.parts)
        # A kill between renaming and tidying up leaves a finished store that still holds its journal.
        self._sealed = not self.out.is_symlink() and Journal(self.out).identity() is not None
        if os.path.lexists(self.out) and not self._sealed:
            raise InputError(f"{self.out} exists already; remove it or choose another name")
        require_outside(self.out)
        self.partial = self.out.with_name(self.out.name + ".partial")
        require_working_folder(self.partial, is_ours=Journal(self.partial).folder.is_dir())
        self.journal = Journal(self.out if self._sealed else self.partial)
        self._session = uuid4().hex
        self._lock = self.journal.lock(self.out, self._session)
        try:
            self._begin(recipe, [Path(source) for source in sources])
        except BaseException:
            self._lock.close()
            raise

    def __enter__(self) -> "GridWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, InputError) and not isinstance(error, DamageError):  # what is damaged may be mended
            shutil.rmtree(self.partial, ignore_errors=True)
        self._lock.close()

    @property
    def done(self) -> set[str]:
        """Names of the parts that are finished, by this process or by one before it."""
        return {part.name for part in self.parts} if self._sealed else set(self.journal.finished())

    def part_writer(self, read: Callable[[Part], Iterator[Day]], written: Callable[[], None] | None = None) -> RunPart:
        """Reads and writes a part that is not done, in any process. written: called after each day."""
        return PartWriter(self.partial, self._session, read, written)

    def write_day(self, day_index: int, values: Mapping[str, np.ndarray], present: np.ndarray | None = None) -> None:
        """Write one local day, counted from 0, as a part of its own; see ``parts.Day``."""
        part = Part(f"day-{day_index}", (day_index,))
        self.part_writer(lambda _: iter([Day(day_index, dict(values), present)]))(part)

    def finalise(self, split: Split | None = None, executor: Executor = serially) -> Path:
        """Impute, fit the training statistics, digest, consolidate and rename; returns the final path.

        split: the store's default split; where None, ``spans.default_split`` of the days that hold data.
        executor: runs the imputation, a part for each tile and channel. Raises InputError where the sources
        hold no frame, or one of them changed while it was read; ValueError where a part is missing.
        """
        if not self._sealed:
            done = self.done
            left = [part.name for part in self.parts if part.name not in done]
            if left:
                raise ValueError(f"{self.out}: {len(left)} parts are missing, the first of them {left[0]}")
            require_unchanged(self._sources)
            finalise(self.partial, self.out, self._session, split, executor)
        Journal(self.out).remove()
        return self.out

    def _begin(self, recipe: Mapping[str, Any], sources: list[Path]) -> None:
        """Make the partial store, or make sure that the one that is there is of the same work."""
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            self._sources = list(pool.map(SourceRecord.of, sources))
        attributes = {
            **self.spec.attributes(),
            "recipe": dict(recipe),
            "sources": [source.as_attribute() for source in self._sources],
        }
        arrays = list(coordinates(self.spec))
        identity = {**attributes, "coordinates": digest_of_arrays(arrays), "parts": _digest_of_parts(self.parts)}
        if (noted := self.journal.identity()) is not None:
            # JSON makes lists of tuples.
            expected = json.loads(json.dumps(identity))
            if other := [name for name in expected if noted.get(name) != expected[name]]:
                raise InputError(
                    f"{self.journal.root} is of another preparation: its {other[0]} differs; "
                    "remove it or choose another name"
                )
            if not self._sealed:
                self._look_at_what_is_there(attributes, noted["files"])
            return
        for path in self.partial.iterdir():
            if path != self.journal.folder:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        group = zarr.create_group(self.partial, zarr_format=3, attributes=attributes)
        for array in arrays:
            create_array(group, array)
        self._create_channels(group, [array.name for array in arrays if array.located])
        written = sorted(path for path in self.partial.rglob("*") if path.is_file())
        files = {path.relative_to(self.partial).as_posix(): record_of(path) for path in written}
        made = {name: record for name, record in files.items() if not name.startswith(FOLDER) and name != ROOT_METADATA}
        self.journal.begin(identity | {"files": made})

    def _look_at_what_is_there(self, attributes: Mapping[str, Any], made: Mapping[str, Any]) -> None:
        """Every byte that an interrupted preparation has left is compared with its digest before it is built on."""
        for name, record in made.items():
            if not is_as_recorded(self.partial / name, record):
                raise DamageError(
                    f"{self.partial} is damaged: {name} is not as it was written; remove it and begin anew"
                )
        # Finalise may have added to the root's attributes: it does so again.
        (self.partial / ROOT_METADATA).unlink(missing_ok=True)
        zarr.create_group(self.partial, zarr_format=3, attributes=dict(attributes))
        self.journal.discard_damaged(self.spec.channels)

    def _create_channels(self, group: zarr.Group, located: Sequence[str]) -> None:
        spec = self.spec
        chunks, shards = chunk_and_shard(spec.slots_per_day, spec.shape)
        for channel in spec.channels:
            for name, dtype, fill, codec in (
                (channel, "float32", float("nan"), BloscCodec(cname="zstd", clevel=1, shuffle="shuffle")),
                (observed_name(channel), "bool", False, ZstdCodec(level=1)),
            ):
                group.create_array(
                    name,
                    shape=(spec.steps, *spec.shape),
                    dtype=dtype,
                    chunks=chunks,
                    shards=shards,
                    fill_value=fill,
                    compressors=codec,
                    dimension_names=("time", *spec.dims),
                    # xarray finds the coordinates that are not dimensions by this attribute alone.
                    attributes={
                        **({"coordinates": " ".join(located)} if located else {}),
                        **({"units": spec.units} if name == channel else {}),
                    },
                )


def require_disjoint(spec: GridSpec | NodeSpec, parts: Sequence[Part]) -> None:
    """Raise ValueError where two parts have one name or one shard, or a part has a day or tile that is none."""
    tiles, owners = spec.tiles(), dict[tuple[int, int], str]()
    names = [part.name for part in parts]
    if len(set(names)) < len(names):
        raise ValueError(f"two parts are called {max(names, key=names.count)}")
    for part in parts:
        part_tiles = tiles if part.tiles is None else part.tiles
        if not set(part.days) <= set(range(len(spec.days))) or not all(tile in tiles for tile in part_tiles):
            raise ValueError(f"part {part.name} has days or tiles that are none of the store's")
        for shard in product(part.days, [tiles.index(tile) for tile in part_tiles]):
            other = owners.setdefault(shard, part.name)
            if other != part.name:
                raise ValueError(f"parts {other} and {part.name} both touch day {shard[0]}, tile {shard[1]}")


def _digest_of_parts(parts: Sequence[Part]) -> str:
    """sha256 over names, days and tiles, in any order of parts."""
    listed = sorted((part.name, part.days, repr(part.tiles)) for part in parts)
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()
