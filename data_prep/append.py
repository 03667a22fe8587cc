"""New files for a store that is there: read as its own were, placed by ids, and handed to ``StoreAppender``.

A store remembers its reader and the options that its preparation was given (recipe: ``reader``, ``options``), so that
an append names files alone; options given again win. Its city and cadence are taken over where neither says. What tells
where files begin is never remembered: files without stamps of their own need ``--start`` each time.
"""

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np

from data_prep.preparation import Plan
from data_prep.reader import READERS, SPANS
from stdist.data import Day, GridSpec, GridStore, NodeSpec, open_store
from stdist.data.append import Growth, StoreAppender
from stdist.errors import InputError
from stdist.progress import Progress

OF_THE_FILES = ("start", "span", *SPANS)
"""Options that are of the files they were given with, or of the store."""


@dataclass(frozen=True)
class AppendSummary:
    """The result of an append: its ``Growth``, ``frames``, the time steps that exist in the store now, and
    ``places_without_data``, places of the store that the files do not have."""

    path: Path
    city: str
    growth: Growth
    frames: int
    places_without_data: int
    digest: str
    read_as: str = ""
    said: tuple[str, ...] = ()

    @property
    def line(self) -> str:
        """For people."""
        growth, late, corrected = self.growth, sum(self.growth.late.values()), sum(self.growth.corrected.values())
        if growth.is_nothing:
            return f"{self.path}: {self.city}, nothing new; the store is as it was"
        days = f" ({growth.new_days[0]} to {growth.new_days[-1]})" if growth.new_days else ""
        line = f"{self.path}: {self.city}, {len(growth.new_days)} new days{days}, {len(growth.changed_days)} changed"
        line += f", {growth.new_frames} new of {self.frames} frames"
        line += f", {late} late values taken, {corrected} values corrected"
        if self.places_without_data:
            line += f"; {self.places_without_data} places of the store are not in the files, and missing there"
        return line

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        rest = {"path": str(self.path), "said": [*self.said], "changed": not self.growth.is_nothing}
        both = {**vars(self), **vars(self.growth), **rest}
        return {name: value for name, value in both.items() if name not in ("growth", "first_conflict")}


def append(
    path: Path,
    sources: list[Path],
    corrections: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> AppendSummary:
    """Appends the days of files to the store ``path``, or corrects it by them; see ``stdist.data.append``.

    corrections: values other than the store's take their place. options: of the store's reader, where they are others
    than it was prepared with. progress: called with (days, in all). Raises InputError where the store does not tell its
    reader, and where files do not fit it: places that it does not have, another cadence, clock, unit or channel, days
    before its first, other values than it has.
    """
    if not sources:
        raise InputError(f"append takes the files with the new days of {path}; none was given")
    if spans := [name for name in SPANS if options.get(name) is not None]:
        raise InputError(
            f"--{spans[0]}: the split of {path} stays what it is; prepare a store of all files for another"
        )
    tell = progress or (lambda _done, _total: None)
    with StoreAppender(path, corrections) as appender:
        store = appender.old
        plan = plan_as_before(store, sources, options)
        require_same(store, plan.spec, sources)
        places = Places.of(store, plan.spec)
        shift = int((plan.spec.first_day - store.axis_days.first_day).astype(int))
        appender.begin(plan.spec.last_day, plan.sources)
        done, total = 0, sum(len(part.days) for part in plan.parts)
        for part in plan.parts:
            for day in plan.read(part):
                appender.add(replace(places.moved(day), index=day.index + shift))
            done += len(part.days)
            tell(done, total)
        growth = appender.finish()
    store = open_store(path)
    frames = int(store.present.sum())
    return AppendSummary(
        path, store.city, growth, frames, places.without_data, store.digest, plan.read_as, plan.said
    )  # fmt: skip


def reader_of(attributes: Mapping[str, Any], path: Path) -> str:
    """Name of the reader that made a store of these attributes; InputError where it is none that is known."""
    name = attributes.get("recipe", {}).get("reader")
    if name not in READERS:
        raise InputError(f"{path} was made by {name or 'no reader'}, which is not here; prepare a store of all files")
    return name


def plan_as_before(store: GridStore, sources: list[Path], options: Mapping[str, Any]) -> Plan:
    """The plan of new files by the store's own reader and options; ``options`` win."""
    recipe, plan = store.attributes["recipe"], READERS[reader_of(store.attributes, store.path)].plan
    known = inspect.signature(plan).parameters
    remembered = {
        option: Path(value) if Path in (kind := known[option].annotation, *get_args(kind)) else value
        for option, value in recipe.get("options", {}).items()
        if option in known and option not in OF_THE_FILES
    }
    own = {"city": store.city, "cadence": store.attributes["cadence_minutes"]}
    return plan(sources, **{option: own[option] for option in own if option in known} | remembered | dict(options))


def require_same(store: GridStore, spec: GridSpec | NodeSpec, sources: Iterable[Path]) -> None:
    """Raises InputError where files are of other channels, units, cadence or clock, or of days before the store's."""
    files = ", ".join(path.name for path in sources)
    if set(spec.channels) != set(store.channels):
        theirs, ours = (", ".join(sorted(names)) for names in (spec.channels, store.channels))
        raise InputError(f"{files}: channels are {theirs}, {store.path} has {ours}; give files of all of these")
    free = ("city", "channels", "first_day", "last_day")
    for name, value in spec.attributes().items():
        stored = store.attributes.get(name)
        if name not in free and value != stored:
            raise InputError(
                f"{files}: {name} is {value}, that of {store.path} is {stored}; give files of its kind, or the option "
                "that reads them so"
            )
    if spec.first_day < store.axis_days.first_day:
        raise InputError(
            f"{files}: the first day is {spec.first_day}, before {store.axis_days.first_day}, the first of "
            f"{store.path}; prepare a store of all files"
        )


@dataclass(frozen=True, eq=False)
class Places:
    """A map from the places of new files to those of a store. ``positions``: of each in the store's places, row by row,
    -1 for one outside the city, int64 [n]; None where they are the store's in its order."""

    shape: tuple[int, ...]
    positions: np.ndarray | None = None
    without_data: int = field(default=0)

    @classmethod
    def of(cls, store: GridStore, spec: GridSpec | NodeSpec) -> "Places":
        """Raises InputError where a place is none of the store's, or lies elsewhere there."""
        if isinstance(spec, GridSpec):
            theirs, counted = spec.cell_ids, np.ones(spec.shape, bool) if spec.inside is None else spec.inside
        else:
            theirs, counted = spec.node_ids, np.ones(spec.shape, bool)
        position = {place: number for number, place in enumerate(store.cell_ids.reshape(-1).tolist())}
        listed = [
            (position.get(place, -2) if there else -1)
            for place, there in zip(theirs.reshape(-1).tolist(), counted.reshape(-1).tolist(), strict=True)
        ]
        positions = np.array(listed)
        if len(strangers := np.flatnonzero(positions == -2)):
            raise InputError(
                f"{len(strangers)} places of the files are none of {store.path}, the first: "
                f"{theirs.reshape(-1)[strangers[0]]}; leave them out, or prepare a store of all places"
            )
        _require_where_they_were(store, spec, positions)
        if np.array_equal(theirs, store.cell_ids):
            return cls(store.shape)
        known = np.zeros(store.inside.size, bool)
        known[positions[positions >= 0]] = True
        return cls(store.shape, positions, int((store.inside.reshape(-1) & ~known).sum()))

    def moved(self, day: Day) -> Day:
        """A day of the files with the store's places; those that the files do not have are missing."""
        if self.positions is None:
            return day
        if day.tile is not None:
            raise InputError("rasters this large are appended with all of the store's cells only; give whole rasters")
        known = self.positions >= 0
        values = {}
        for channel, numbers in day.values.items():
            spread = np.full((len(numbers), int(np.prod(self.shape))), np.nan, np.float32)
            spread[:, self.positions[known]] = numbers.reshape(len(numbers), -1)[:, known]
            values[channel] = spread.reshape(len(numbers), *self.shape)
        return replace(day, values=values)


def _require_where_they_were(store: GridStore, spec: GridSpec | NodeSpec, positions: np.ndarray) -> None:
    """Raises InputError where cells of one id have other rows, columns or coordinates: rasters are numbered each from
    its own corner."""
    known = positions >= 0
    theirs: dict[str, np.ndarray | None] = {"latitude": spec.latitude, "longitude": spec.longitude}
    if isinstance(spec, GridSpec):
        height, width = spec.shape
        rows = np.arange(height) if spec.rows is None else spec.rows
        cols = np.arange(width) if spec.cols is None else spec.cols
        theirs |= {"row": np.repeat(rows, width), "col": np.tile(cols, height)}
    for name, of_files in theirs.items():
        if of_files is None or name not in store.dataset.variables:
            continue
        stored = store.dataset[name].values
        if name in ("row", "col"):
            stored = np.broadcast_to(stored[:, None] if name == "row" else stored, store.shape)
        here, there = np.ravel(of_files)[known], stored.reshape(-1)[positions[known]]
        if (wrong := ~np.isclose(here, there, equal_nan=True)).any():
            place = store.cell_ids.reshape(-1)[positions[known]][wrong][0]
            raise InputError(
                f"{int(wrong.sum())} places of the files lie elsewhere in {store.path}, the first: {place}, whose "
                f"{name} is {here[wrong][0]} and was {there[wrong][0]}; give files of the same places"
            )
